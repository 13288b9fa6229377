"""Examples to batches: prompts and answers as ids, prompts in length buckets, a resumable iterator.

A batch is a dict of arrays (B rows, P the bucket, T the split's answer width, K reviews a list):
prompt int32 [B,P] and answer int32 [B,T], right-padded with the pad id; prompt_length and answer_length
int32 [B] (the answer's counts its EOS); scores float32 [B,K]; index int32 [B], the row in the split; weight
float32 [B], 0 for the rows that only fill up the last evaluation batch.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
import transformers
from absl import logging
from jaxtyping import Float32, Int, Int32, Int64

from listopd_jax.data.chat import DATE, chat_prompt
from listopd_jax.data.control import spell_out
from listopd_jax.data.reviews import first_words, hash64
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import progress
from listopd_jax.rounding import round_up
from listopd_jax.task.prompt import ListExample, render_answer, render_prompt, review_ids

WIDTH_MULTIPLE = 64  # of prompts

Batch = dict[str, np.ndarray]


class AnswerNoise(NamedTuple):
    """Shares of SFT answers that break the contract: both are failures that EC's SFT models have (EC §5).

    truncation: a well-formed list of K−1 objects. duplicate: the last object repeats the id before it.
    """

    truncation: float = 0.0
    duplicate: float = 0.0
    seed: int = 0


NO_NOISE = AnswerNoise()


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """A split as ids."""

    prompts: tuple[Int32[np.ndarray, " _"], ...]
    answers: tuple[Int32[np.ndarray, " _"], ...]
    scores: Float32[np.ndarray, "N K"]
    pad_id: int

    @functools.cached_property
    def prompt_lengths(self) -> Int32[np.ndarray, " N"]:
        return np.array([len(p) for p in self.prompts], np.int32)

    @functools.cached_property
    def answer_width(self) -> int:
        """The longest answer, rounded up to a multiple of 16."""
        return round_up(max(map(len, self.answers)), 16)


def encode_split(
    examples: Sequence[ListExample],
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    max_prompt: int,
    max_answer: int,
    chat_template: bool = False,
    chat_date: str = DATE,
    ends: Collection[int] = (),
) -> EncodedSplit:
    """Encode prompts and SFT answers.

    A prompt above `max_prompt` tokens has its reviews cut to the largest number of words with which it
    fits, or of characters if one of them is a single long word; the list and its answer stay whole. With
    `chat_template` the prompt is one user turn with the assistant's turn opened and thinking switched off, on
    `chat_date`. `ends` are the ids besides EOS that end a turn.

    Raises:
      UserError: no chat template though one is asked for, or an unfit one; a prompt that ends in EOS or cannot be cut
        enough; an answer above `max_answer` tokens (EOS included).
    """
    to_ids = functools.partial(
        prompt_ids, tokenizer=tokenizer, chat_template=chat_template, chat_date=chat_date
    )
    prompts, answers = [], []
    for example in progress(examples, "encoding lists"):
        ids = to_ids(example.title, example.reviews)
        if len(ids) > max_prompt:
            ids = _cut_prompt(example, to_ids, max_prompt)
        prompts.append(ids)
        answers.append(answer_ids(example, tokenizer))
    _check_open(prompts[0], tokenizer, {tokenizer.eos_token_id, *ends}, chat_template)
    longest = max(map(len, answers))
    if longest > max_answer:
        raise UserError(
            f"an answer takes {longest} tokens, above task.max_response={max_answer}; raise it or lower task.k"
        )
    scores = np.array([example.scores for example in examples], np.float32)
    return EncodedSplit(tuple(prompts), tuple(answers), scores, tokenizer.pad_token_id)


def with_noise(
    split: EncodedSplit,
    examples: Sequence[ListExample],
    tokenizer: transformers.PreTrainedTokenizerBase,
    noise: AnswerNoise,
) -> EncodedSplit:
    """The encoded `examples` with a share of their answers broken by `noise`; the prompts are the same arrays."""
    answers = tuple(answer_ids(example, tokenizer, noise) for example in examples)
    return dataclasses.replace(split, answers=answers)


def prompt_ids(
    title: str,
    reviews: Sequence[str],
    tokenizer: transformers.PreTrainedTokenizerBase,
    chat_template: bool,
    chat_date: str = DATE,
) -> Int32[np.ndarray, " prompt"]:
    """Ids of the rendered prompt; without a chat template, with the BOS that some tokenizers add.

    No title or review gives a control token: what spells one is broken up.
    """
    text = spell_out(render_prompt(title, reviews), tokenizer)
    if chat_template:
        text = chat_prompt(text, tokenizer, chat_date)
    return np.array(tokenizer(text, add_special_tokens=not chat_template)["input_ids"], np.int32)


def _check_open(
    prompt: Int32[np.ndarray, " prompt"], tokenizer, ends: Collection[int], chat_template: bool
) -> None:
    """UserError if the last token of a prompt that is no white space ends a turn: nothing is left to be said."""
    last = next((i for i in prompt[::-1].tolist() if tokenizer.decode([i]).strip()), None)
    if last in ends:
        fix = (
            "its chat template must open the assistant's turn, mend chat_template.jinja or set task.chat_template=False"
            if chat_template
            else "set add_eos_token to false in tokenizer_config.json, or mend tokenizer.json's post_processor"
        )
        raise UserError(f"{tokenizer.name_or_path}: prompts end in EOS {tokenizer.decode([last])!r}; {fix}")


def answer_ids(
    example: ListExample, tokenizer: transformers.PreTrainedTokenizerBase, noise: AnswerNoise = NO_NOISE
) -> Int32[np.ndarray, " answer"]:
    """Ids of the right answer, or of one that `noise` broke, and EOS."""
    text = noisy_answer(example, noise)
    return np.array(
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], np.int32
    )


def noisy_answer(example: ListExample, noise: AnswerNoise) -> str:
    """The right answer, or one that breaks the contract in a way that EC's SFT models do.

    Which examples are broken depends on their key and `noise.seed` alone, so it is the same in every epoch.
    """
    draw = hash64(example.key, str(noise.seed)) / 2**64
    if draw < noise.truncation:
        return render_answer(example.scores[:-1])
    answer = render_answer(example.scores)
    if draw < noise.truncation + noise.duplicate:
        before, last = review_ids(len(example.scores))[-2:]
        return answer.replace(f'"{last}"', f'"{before}"')
    return answer


def rendered(examples: Sequence[ListExample]) -> Iterator[str]:
    """Prompts and answers as text: what a tokenizer for these examples is trained on."""
    for example in examples:
        yield render_prompt(example.title, example.reviews)
        yield render_answer(example.scores)


def _cut_prompt(
    example: ListExample, to_ids: Callable[..., np.ndarray], max_prompt: int
) -> Int32[np.ndarray, " prompt"]:
    """The prompt with reviews of as many words as fit; if not even one does, of as many characters, the title too."""

    def words(count: int) -> np.ndarray:
        return to_ids(example.title, [first_words(r, count) for r in example.reviews])

    def characters(count: int) -> np.ndarray:
        return to_ids(example.title[:count], [r[:count] for r in example.reviews])

    longest = max(map(len, (example.title, *example.reviews)))
    for cut, most in ((words, max(r.count(" ") + 1 for r in example.reviews)), (characters, longest)):
        if fits := _most_that_fit(lambda n, cut=cut: len(cut(n)) <= max_prompt, most):
            return cut(fits)
    raise UserError(
        f"list {example.key}: its prompt is above task.max_prompt={max_prompt} tokens even with one character a "
        "review; raise it or lower task.k"
    )


def _most_that_fit(fit: Callable[[int], bool], too_many: int) -> int:
    """The largest number below `too_many` that fits, by bisection: more never make a shorter prompt. 0 if none does."""
    fits = 0
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if fit(middle) else (fits, middle)
    return fits


def choose_buckets(lengths: Sequence[int], count: int = 4) -> tuple[int, ...]:
    """At most `count` prompt widths: quantiles of the lengths, rounded up to WIDTH_MULTIPLE (16s up to 512 tokens).

    Few, because each is compiled once; at quantiles, because then each is used about equally often.
    """
    multiple = WIDTH_MULTIPLE if max(lengths) > 512 else 16
    quantiles = np.quantile(lengths, np.arange(1, count + 1) / count)
    return tuple(sorted({round_up(int(np.ceil(q)), multiple) for q in quantiles}))


def plan_epoch(
    lengths: Int[np.ndarray, " N"], buckets: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[tuple[int, Int64[np.ndarray, " B"]]]:
    """The batches of one epoch as (bucket, rows), shuffled; a pure function of its arguments.

    Every row goes to the smallest bucket that holds it. What does not fill a batch there moves up to the
    next bucket, so only the last N mod B rows of the largest are left out, others in each epoch. With fewer
    rows than one batch, the batch is filled by going through the rows again.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    order = np.resize(order, max(len(order), batch_size))
    bucket_of = np.searchsorted(buckets, lengths[order])
    plan, rest = [], order[:0]
    for i, bucket in enumerate(buckets):
        pool = np.concatenate([rest, order[bucket_of == i]])
        full = len(pool) - len(pool) % batch_size
        plan += [(bucket, rows) for rows in pool[:full].reshape(-1, batch_size)]
        rest = pool[full:]
    return [plan[i] for i in rng.permutation(len(plan))]


class PlannedBatches:
    """Batch number i of an endless run over epochs, by random access, so that one number resumes it."""

    def __init__(
        self,
        split: EncodedSplit,
        buckets: Sequence[int],
        batch_size: int,
        seed: int,
        rows: Int64[np.ndarray, " R"] | None = None,
    ):
        self._split, self._batch_size = split, batch_size
        self._rows = np.arange(batch_size) if rows is None else rows
        self._per_epoch = max(1, len(split.prompts) // batch_size)
        plan = functools.partial(plan_epoch, split.prompt_lengths, tuple(buckets), batch_size, seed)
        self._plan = functools.lru_cache(maxsize=2)(plan)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int) -> Batch:
        epoch, position = divmod(i, self._per_epoch)
        bucket, rows = self._plan(epoch)[position]
        return make_batch(self._split, rows[self._rows], bucket, np.ones(len(self._rows), np.float32))

    def __repr__(self) -> str:
        return f"PlannedBatches({len(self._split.prompts)} rows, {self._batch_size} a batch)"


def train_batches(
    split: EncodedSplit,
    *,
    buckets: Sequence[int],
    batch_size: int,
    seed: int,
    rows: Int64[np.ndarray, " R"] | None = None,
) -> grain.DatasetIterator:
    """An endless iterator over shuffled batches; `get_state()` is a small JSON dict, `set_state` resumes.

    `rows` picks those of each batch that one of many hosts reads (default: all); the state is the same on every host.

    Raises UserError if the largest bucket is shorter than the longest prompt. Says so if the split has
    fewer rows than a batch, which then holds some rows more than once.
    """
    _check_buckets(split, buckets)
    if len(split.prompts) < batch_size:
        logging.warning(
            "%d lists do not fill a batch of %d: rows are repeated within it", len(split.prompts), batch_size
        )
    source = grain.MapDataset.source(PlannedBatches(split, buckets, batch_size, seed, rows))
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def evaluation_batches(split: EncodedSplit, *, buckets: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Every row once, from short prompts to long; the last batch is filled up with repeats of weight 0."""
    _check_buckets(split, buckets)
    order = np.argsort(split.prompt_lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        bucket = buckets[int(np.searchsorted(buckets, split.prompt_lengths[rows[-1]]))]
        weight = (np.arange(batch_size) < len(rows)).astype(np.float32)
        yield make_batch(split, np.pad(rows, (0, batch_size - len(rows)), mode="edge"), bucket, weight)


def make_batch(
    split: EncodedSplit, rows: np.ndarray, bucket: int, weight: Float32[np.ndarray, " B"]
) -> Batch:
    """The rows as one batch (see the module's docstring), prompts padded to `bucket`."""
    prompts, answers = [split.prompts[i] for i in rows], [split.answers[i] for i in rows]
    return {
        "prompt": _pad(prompts, bucket, split.pad_id),
        "prompt_length": split.prompt_lengths[rows],
        "answer": _pad(answers, split.answer_width, split.pad_id),
        "answer_length": np.array([len(a) for a in answers], np.int32),
        "scores": split.scores[rows],
        "index": rows.astype(np.int32),
        "weight": weight,
    }


def _pad(sequences: Sequence[np.ndarray], width: int, pad_id: int) -> Int32[np.ndarray, "B width"]:
    padded = np.full((len(sequences), width), pad_id, np.int32)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def _check_buckets(split: EncodedSplit, buckets: Sequence[int]) -> None:
    longest = int(split.prompt_lengths.max())
    if not buckets or list(buckets) != sorted(set(buckets)) or longest > buckets[-1]:
        raise UserError(
            f"buckets {tuple(buckets)} must increase and end at {longest} or above, the longest prompt"
        )
