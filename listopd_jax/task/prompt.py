"""How a list of reviews is put to the model, and how its answer is written (EC, arXiv:2605.08737)."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Control characters break the line structure; lone surrogates have no UTF-8 form, so tokenizers refuse them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class ListExample:
    """K reviews of one product with their true helpfulness, or any other texts to rank.

    Attributes:
      key: unique name of the list.
      product_id: the product; splits never put one product on both sides.
      title: product title, as the source has it.
      reviews: K review texts, as the source has them.
      scores: K integers in 0..10, the label of each review.
    """

    key: str
    product_id: str
    title: str
    reviews: tuple[str, ...]
    scores: tuple[int, ...]


def review_ids(k: int) -> tuple[str, ...]:
    """The ids by which a prompt of `k` reviews names them: ('r1', …, 'rk')."""
    return tuple(f"r{i}" for i in range(1, k + 1))


def render_prompt(title: str, reviews: Sequence[str]) -> str:
    """The user's message: title, one line per review, and the form of the answer. Ends in a newline."""
    head = f"Product: {one_line(title)}. Below are {len(reviews)} reviews. Score each 0-10 for helpfulness."
    return render_list(head, "review", reviews)


def render_list(head: str, noun: str, texts: Sequence[str], example: int = 7) -> str:
    """A request for scores: `head`, one line per text (a `noun`), the form of the answer with score `example`.

    Each text is put on one line, so that only real ones start a line with `[Review n]`. Special tokens spelt out in a
    text (`<|im_end|>`) are the tokenizer's business, not handled here.
    """
    k = len(texts)
    named = zip(review_ids(k), texts, strict=True)
    lines = [
        f"[{noun.capitalize()} {n}] id={name} {one_line(text)}" for n, (name, text) in enumerate(named, 1)
    ]
    tail = f'Return JSON list of {k} objects: [{{"{noun}_id":"r1","score":{example}}},...]'
    return "\n".join([head, *lines, tail, ""])


def render_answer(scores: Sequence[int], field: str = "review_id") -> str:
    """The right answer for `scores`, in the order of the ids, as compact JSON: what SFT trains on."""
    items = [{field: name, "score": s} for name, s in zip(review_ids(len(scores)), scores, strict=True)]
    return json.dumps(items, separators=(",", ":"))


def one_line(text: str) -> str:
    """`text` with control characters and line ends as spaces, and runs of white space as one space."""
    return " ".join(_UNPRINTABLE.sub(" ", text).split())
