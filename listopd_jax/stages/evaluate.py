"""Strict evaluation of one policy: greedy answers to every validation prompt, judged by the contract."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from listopd_jax.lifecycle import reached
from listopd_jax.metrics_log import progress
from listopd_jax.ops.guard import Guard
from listopd_jax.parallel.hosts import gather
from listopd_jax.records import Decoding, Result
from listopd_jax.rollout.decode import Rollout, generate
from listopd_jax.task.codec import Codec
from listopd_jax.task.contract import Parsed
from listopd_jax.task.metrics import summarize
from listopd_jax.task.protocol import Task


class Answer(NamedTuple):
    """One judged answer; `index` is the row of the evaluated split, `ended` whether it closed before its budget did.

    `tokens` are its ids, with the end.
    """

    index: int
    text: str
    parsed: Parsed
    ended: bool = True
    tokens: tuple[int, ...] = ()


def greedy_answers(
    graphdefs: tuple[nnx.GraphDef, ...],
    params: tuple[Any, ...],
    weights: Float[Array, "m n"],
    batches: Iterable[dict[str, np.ndarray]],
    codec: Codec,
    decoding: Mapping[str, Any],
    judge: Callable[[str, int], Parsed],
    description: str = "greedy answers",
    guard: Guard | None = None,
    constrain: Callable[[Sequence[int]], Mapping[str, Any]] = lambda rows: {},
) -> list[list[Answer]]:
    """For each of the n mixtures Σ_i weights[i, j] log π_i, its greedy answer to each prompt of `batches`, judged.

    One model with weight 1 is a policy; filler rows of weight 0 in a batch are left out. `decoding`: Job.decoding;
    `judge`: Job.judge, of a text and a row. A guard lowers the λ of teacher and base at each position. `constrain`: the
    options of Job.constraint for the rows of a batch.
    """
    answers: list[list[Answer]] = [[] for _ in range(weights.shape[1])]
    for number, batch in enumerate(progress(list(batches), description), 1):
        options = {"guard": guard, **decoding, **constrain(batch["index"].tolist())}
        rollout = greedy_rollout(graphdefs, params, weights, batch, options)
        tokens, lengths = gather(rollout.tokens), gather(rollout.lengths)
        for row in np.flatnonzero(batch["weight"]):
            index = int(batch["index"][row])
            texts, ended = codec.texts(tokens[row], lengths[row]), codec.ended(tokens[row], lengths[row])
            ids = [tuple(own[:n].tolist()) for own, n in zip(tokens[row], lengths[row], strict=True)]
            for column, text, end, own in zip(answers, texts, ended.tolist(), ids, strict=True):
                column.append(Answer(index, text, judge(text, index), end, own))
        reached(f"{description} {number}")
    return answers


def greedy_rollout(
    graphdefs: tuple[nnx.GraphDef, ...],
    params: tuple[Any, ...],
    weights: Float[Array, "m n"],
    batch: Mapping[str, np.ndarray],
    options: Mapping[str, Any],
) -> Rollout:
    """The greedy answers to the prompts of a batch; `options` are those of `generate`."""
    # Greedy decoding draws nothing: any key will do.
    return generate(
        graphdefs, params, weights, batch["prompt"], batch["prompt_length"], jax.random.key(0), greedy=True, **options
    )  # fmt: skip


def result_record(
    task: Task, records: Sequence[Any], answers: Sequence[Answer], head: dict[str, Any], bootstrap: int
) -> Result:
    """One entry of results.json: `head` (run, stage, lam, seed, steps), the metrics with intervals, and `ended`.

    `records` are those that `index` counts. An answer may parse and still run to its budget: the contract
    judges what it says, `ended` that it stops.
    """
    return Result.of(head | _metrics(task, records, answers, bootstrap))


def decoding_record(
    task: Task, records: Sequence[Any], answers: Sequence[Answer], head: dict[str, Any], bootstrap: int
) -> Decoding:
    """The same of one way of decoding; `head`: its name, and what it takes."""
    return Decoding.of(head | _metrics(task, records, answers, bootstrap))


def _metrics(task: Task, records: Sequence[Any], answers: Sequence[Answer], bootstrap: int) -> dict[str, Any]:
    found = summarize(task, [(a.parsed, records[a.index]) for a in answers], bootstrap=bootstrap)
    ended = sum(a.ended for a in answers) / len(answers) if answers else None
    return found | {"ended": ended}


def select_examples(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Up to `count` good and `count` bad answers, in order; one of each failure class before a second of any."""
    good = [a for a in answers if a.parsed.ok][:count]
    by_class: dict[str, list[Answer]] = {}
    for a in answers:
        if not a.parsed.ok:
            by_class.setdefault(a.parsed.failure, []).append(a)
    # By the rank within a class first, so the classes take turns.
    ranked = sorted(
        ((i, name, a) for name, group in by_class.items() for i, a in enumerate(group)), key=lambda x: x[:2]
    )
    return good + [a for _, _, a in ranked[:count]]
