"""Ids to batches: prompts in length buckets, a resumable iterator.

A batch is a dict of arrays (B rows, P the bucket, T the split's answer width): prompt int32 [B,P] and answer int32
[B,T], right-padded with the pad id; prompt_length and answer_length int32 [B] (the answer's counts its EOS); index
int32 [B], the row in the split; weight float32 [B], 0 for the rows that only fill up the last evaluation batch.
Where the split has them, FOR_TEACHERS too: own_teacher int32 [B], teacher_prompt int32 [B,Q], teacher_prompt_length
int32 [B].
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import logging
from jaxtyping import Float32, Int, Int32, Int64

from listopd_jax.data.encode import EncodedSplit
from listopd_jax.errors import UserError
from listopd_jax.rounding import round_up

WIDTH_MULTIPLE = 64  # of prompts
FOR_TEACHERS = ("own_teacher", "teacher_prompt", "teacher_prompt_length")

Batch = dict[str, np.ndarray]


def as_teachers_read(batch: Batch) -> Batch:
    """The batch with the prompts that teachers read."""
    if "teacher_prompt" not in batch:
        return batch
    return batch | {"prompt": batch["teacher_prompt"], "prompt_length": batch["teacher_prompt_length"]}


def choose_buckets(lengths: Sequence[int], count: int = 4) -> tuple[int, ...]:
    """At most `count` prompt widths: quantiles of the lengths, rounded up to WIDTH_MULTIPLE (16s up to 512 tokens).

    Few, because each is compiled once; at quantiles, because then each is used about equally often.
    """
    # 64 would be a large part of a short prompt.
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
    # Seeded by the pair, so any epoch can be planned without the epochs before it: that is how a run resumes.
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    # np.resize repeats the rows; ndarray.resize would fill up with zeros.
    order = np.resize(order, max(len(order), batch_size))
    bucket_of = np.searchsorted(buckets, lengths[order])
    plan, rest = [], order[:0]
    for i, bucket in enumerate(buckets):
        pool = np.concatenate([rest, order[bucket_of == i]])
        full = len(pool) - len(pool) % batch_size
        plan += [(bucket, rows) for rows in pool[:full].reshape(-1, batch_size)]
        # Rows left over wait for the next, wider bucket.
        rest = pool[full:]
    # Otherwise every epoch would go from short prompts to long ones.
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
        # Two epochs: prefetching reaches into the next one while this one is in use.
        self._plan = functools.lru_cache(maxsize=2)(plan)

    def __len__(self) -> int:
        # Endless, as far as grain can count. grain's own repeat() would replay one epoch's plan.
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
    change: Callable[[Batch], Batch] | None = None,
) -> grain.DatasetIterator:
    """An endless iterator over shuffled batches; `get_state()` is a small JSON dict, `set_state` resumes.

    `rows` picks those of each batch that one of many hosts reads (default: all); the state is the same on every host.
    `change` is made to each batch.

    Raises UserError if the largest bucket is shorter than the longest prompt. Says so if the split has
    fewer rows than a batch, which then holds some rows more than once.
    """
    _check_buckets(split, buckets)
    if len(split.prompts) < batch_size:
        logging.warning(
            "%d lists do not fill a batch of %d: rows are repeated within it", len(split.prompts), batch_size
        )
    source = grain.MapDataset.source(PlannedBatches(split, buckets, batch_size, seed, rows))
    source = source if change is None else source.map(change)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def evaluation_batches(split: EncodedSplit, *, buckets: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Every row once, from short prompts to long; the last batch is filled up with repeats of weight 0."""
    _check_buckets(split, buckets)
    # Prompts of one batch are about as long, so little is padded.
    order = np.argsort(split.prompt_lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # The rows ascend in length, so the last one decides.
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
        "index": rows.astype(np.int32),
        "weight": weight,
        **_for_teachers(split, rows, bucket),
    }


def _for_teachers(split: EncodedSplit, rows: np.ndarray, bucket: int) -> Batch:
    """The fields of FOR_TEACHERS that the split has."""
    found = {} if split.own_teacher is None else {"own_teacher": split.own_teacher[rows]}
    if split.teacher_prompts is not None:
        prompts = [split.teacher_prompts[i] for i in rows]
        found["teacher_prompt"] = _pad(prompts, _teacher_width(split, bucket), split.pad_id)
        found["teacher_prompt_length"] = np.array([len(p) for p in prompts], np.int32)
    return found


def _teacher_width(split: EncodedSplit, bucket: int) -> int:
    """The width of teacher prompts in a batch of `bucket`: room for every record that may come there."""
    lengths = np.array(list(map(len, split.teacher_prompts)))
    # <=, because rows left over in a narrower bucket move up. One width per bucket: one program per bucket.
    return choose_buckets(lengths[split.prompt_lengths <= bucket], 1)[0]


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
