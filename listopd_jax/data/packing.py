"""Short lists share a row: less padding in a supervised step, and each list reads itself alone.

A packed batch is a dict of arrays (R rows of W tokens, S of them in answers): row int32 [R,W], each list's prompt with
its answer, lists one after another; starts int32 [R,W], the place at which the list of each token begins (padding
counts as a list); answer int32 [R,S], the tokens of the row's answers; places int32 [R,S], those of the tokens that
predict them; answer_length int32 [R], how many there are. The lists are those of the batch that was packed, so loss
and gradient are its own.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from listopd_jax.data.batches import Batch
from listopd_jax.data.encode import EncodedSplit
from listopd_jax.errors import UserError
from listopd_jax.rounding import round_up


class RowShape(NamedTuple):
    """What a packed row holds, and how a batch of rows is cut."""

    tokens: int
    answers: int  # of the tokens
    microbatch: int = 0  # rows per gradient pass; 0: all. A multiple of `devices`
    devices: int = 1  # that split rows

    def rows(self, needed: int) -> int:
        """`needed` rounded up to what the cuts divide, and by up to 1/8 to few numbers: few compilations."""
        in_parts = 0 < self.microbatch < needed
        # A sixteenth of the next power of two: at most 1/8 of `needed`.
        multiple, step = self.microbatch if in_parts else self.devices, 2 ** (needed - 1).bit_length() // 16
        rows = round_up(needed, max(1, step // multiple) * multiple)
        # All rows fit one gradient pass, and rounding up must not cost a second one.
        return rows if in_parts or not self.microbatch else min(rows, self.microbatch)


def row_shape(
    split: EncodedSplit, tokens: int, field: str, *, microbatch: int = 0, devices: int = 1
) -> RowShape:
    """Rows of `tokens`, as config `field` asks, for the lists of `split`; UserError if the longest list is longer.

    Nine lists in ten have no larger share of answer than a row has room for, so most rows run out of tokens first.
    """
    answers = np.array(list(map(len, split.answers)))
    lists = split.prompt_lengths + answers
    if lists.max() > tokens:
        raise UserError(
            f"{field}={tokens}: the longest list with its answer takes {lists.max()} tokens; set that or more"
        )
    share = np.quantile(answers / lists, 0.9)
    most = round_up(max(answers.max(), int(np.ceil(share * tokens))), 16)
    return RowShape(tokens, most, microbatch, devices)


def pack(batch: Batch, shape: RowShape) -> Batch:
    """The lists of a batch (listopd_jax.data.batches) in as few rows as first-fit-decreasing needs."""
    prompts, answers = batch["prompt_length"], batch["answer_length"]
    members = assign(np.stack([prompts + answers, answers], 1), shape)
    rows = shape.rows(len(members))
    row, starts = np.zeros((2, rows, shape.tokens), np.int32)
    places, answer = np.zeros((2, rows, shape.answers), np.int32)
    counts = np.zeros(rows, np.int32)
    for r, lists in enumerate(members):
        end = 0
        for i in lists:
            # The last token of the prompt predicts the first one of the answer.
            start, predicts = end, end + prompts[i] - 1
            end = start + prompts[i] + answers[i]
            row[r, start:end] = [*batch["prompt"][i, : prompts[i]], *batch["answer"][i, : answers[i]]]
            starts[r, start:end] = start
            own = slice(counts[r], counts[r] + answers[i])
            places[r, own] = predicts + np.arange(answers[i])
            answer[r, own] = batch["answer"][i, : answers[i]]
            counts[r] += answers[i]
        starts[r, end:] = end
    return {"row": row, "starts": starts, "places": places, "answer": answer, "answer_length": counts}


def assign(sizes: Int[np.ndarray, "B 2"], shape: RowShape) -> list[list[int]]:
    """The lists of each row, in the batch's order, of lists of `sizes` (tokens, of these in the answer).

    First-fit-decreasing: the longest first, each in the first row with room for it.
    """
    room, members = np.zeros((0, 2), int), []
    for i in np.argsort(-sizes[:, 0], kind="stable"):
        fits = np.flatnonzero((room >= sizes[i]).all(1))
        if not fits.size:
            room, fits = np.vstack([room, [shape[:2]]]), [len(room)]
            members.append([])
        room[fits[0]] -= sizes[i]
        members[fits[0]].append(int(i))
    return [sorted(lists) for lists in members]
