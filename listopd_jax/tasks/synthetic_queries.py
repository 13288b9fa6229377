"""Training lists whose queries are made of the texts' own words, where the real queries are too few to learn from.

The idea is that of the inverse cloze task (Lee et al. 2019, arXiv:1906.00300): a text is relevant to a query that was
taken from it. Such a list teaches to compare a query with texts; nobody has judged it.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from listopd_jax.errors import UserError
from listopd_jax.task.prompt import ListExample

COMMON = 100  # the most frequent words of the texts, which say nothing about relevance
FILLERS = 5  # of them in a query
GRADES = (1.0, 0.5)  # shares of the best label that a relevant text may have

_WORD = re.compile(r"[a-z]{3,}")


def parts(texts: Iterable[str], words: int) -> list[str]:
    """The texts in parts of `words` words, each part once; whole texts if `words` is 0.

    All parts, not the beginnings alone: a model learns a thousand short texts by heart and compares nothing.
    """
    split = (text.split(" ") for text in texts if text)
    return list(dict.fromkeys(" ".join(part) for text in split for part in _runs(text, words or len(text))))


def _runs(words: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Consecutive runs of `size`; the last may be shorter."""
    return (words[i : i + size] for i in range(0, len(words), size))


def synthetic_lists(texts: Sequence[str], count: int, k: int, best: int, seed: int) -> Iterator[ListExample]:
    """`count` lists of `k` of the `texts`, which are all different; the same for the same arguments.

    One to half of the texts of a list are relevant, with labels of GRADES of `best`; each gives the query as many of
    its words as its label says.

    UserError if fewer than `k` texts have words enough.
    """
    common, own = _vocabulary(texts)
    rich = {text: words for text, words in own.items() if len(words) >= best}
    if len(rich) < k:
        raise UserError(
            f"data.synthetic_queries={count}: {len(rich)} texts have {best} uncommon words, too few for lists "
            f"of task.k={k}; raise task.max_review_words"
        )
    rng = random.Random(f"{seed} synthetic queries")
    for number in range(1, count + 1):
        yield _one_list(f"synthetic{number}", rich, common, k, best, rng)


def _one_list(
    key: str, own: Mapping[str, Sequence[str]], common: Sequence[str], k: int, best: int, rng: random.Random
) -> ListExample:
    """Words of the relevant texts and common ones are the query, all in a random order."""
    chosen = rng.sample(list(own), k)
    # The number of relevant texts varies: with a constant one, the labels written so far would give away the rest, and
    # a model learns to count them instead of reading the texts.
    labels = {text: int(best * rng.choice(GRADES)) for text in chosen[: rng.randint(1, k // 2)]}
    query = [word for text, label in labels.items() for word in rng.sample(own[text], label)]
    query += rng.sample(common, min(FILLERS, len(common)))
    rng.shuffle(query)
    rng.shuffle(chosen)
    scores = tuple(labels.get(text, 0) for text in chosen)
    return ListExample(key, key, f"{' '.join(query)} .", tuple(chosen), scores)


def _vocabulary(texts: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The common words of the texts, and the other words of each."""
    words = {text: sorted(set(_WORD.findall(text.lower()))) for text in texts}
    texts_with = Counter(word for of in words.values() for word in of)
    common = sorted(texts_with, key=lambda word: (-texts_with[word], word))[:COMMON]
    without = set(common)
    return common, {text: [word for word in of if word not in without] for text, of in words.items()}
