"""A policy under constraints: decoded as it is and under each mask that the config asks for, repaired or not."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from listopd_jax.config import constraints
from listopd_jax.parallel.hosts import gather
from listopd_jax.records import FREE, REPAIRED, Decoding
from listopd_jax.stages.evaluate import Answer, decoding_record, greedy_answers, greedy_rollout
from listopd_jax.stages.job import Job

TIMINGS = 3  # the fastest counts: other load can only slow one down


def decodings(
    job: Job, role: str, params: Any, free: Sequence[Answer], description: str
) -> tuple[Decoding, ...]:
    """How the policy of `params` fares under each of `evaluation.constrained`, next to its answers `free` of masks.

    () where the config asks for none.
    """
    asked = constraints(job.config)["evaluation.constrained"]
    names = (FREE, *asked) if asked else ()
    return tuple(d for name in names for d in _under(job, role, params, name, free, description))


def _under(
    job: Job, role: str, params: Any, name: str, free: Sequence[Answer], description: str
) -> Iterator[Decoding]:
    """The records of one constraint, and after the repair, if there is one, of answers that may break the contract."""
    constrain = lambda rows: job.constraint("" if name == FREE else name, "validation", rows)  # noqa: E731
    policy = (job.graphs[role],), (params,), jnp.ones((1, 1))
    answers = free
    if name != FREE:
        batches, judge = job.evaluation_batches(), job.judge("validation")
        (answers,) = greedy_answers(
            *policy, batches, job.codec, job.decoding, judge, f"{description}, {name}", constrain=constrain
        )
    records, bootstrap = job.records["validation"], job.config.evaluation.bootstrap
    head = {"decoding": name, "ms_per_token": _ms_per_token(policy, job, constrain)}
    yield decoding_record(job.task, records, answers, head, bootstrap)
    repaired = [a._replace(parsed=job.task.repair(a.text, records[a.index])) for a in answers]
    if name != "contract" and all(a.parsed is not None for a in repaired):
        yield decoding_record(job.task, records, repaired, {"decoding": name + REPAIRED}, bootstrap)


def _ms_per_token(policy: tuple, job: Job, constrain: Callable[[Sequence[int]], Mapping[str, Any]]) -> float:
    """Milliseconds from token to token: the time of a batch, its prompts included, over its longest answer.

    Of the first batch, whose programs are compiled by then.
    """
    batch, taken = next(iter(job.evaluation_batches())), []
    for _ in range(TIMINGS):
        start = time.perf_counter()
        options = {**job.decoding, **constrain(batch["index"].tolist())}
        longest = np.max(gather(greedy_rollout(*policy, batch, options).lengths))
        taken.append(1e3 * (time.perf_counter() - start) / float(longest))
    return min(taken)
