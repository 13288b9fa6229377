"""runs.json, results.json, examples.json and errors.json: what is to be evaluated, and each policy as soon as it is."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from listopd_jax.metrics_log import read_metrics
from listopd_jax.models.build import cast
from listopd_jax.ops.guard import Guard
from listopd_jax.parallel.hosts import from_main
from listopd_jax.parallel.rules import decoding_copy
from listopd_jax.records import (
    ERRORS,
    EXAMPLES,
    RESULTS,
    RUNS,
    Errors,
    Example,
    Identity,
    Planned,
    Record,
    Result,
    read_errors,
    read_examples,
    read_results,
    write_records,
)
from listopd_jax.stages.constrained import decodings
from listopd_jax.stages.evaluate import Answer, greedy_answers, result_record, select_examples
from listopd_jax.stages.expected import expected_scores
from listopd_jax.stages.job import Job
from listopd_jax.stages.margins import structural_margin
from listopd_jax.task.metrics import summarize
from listopd_jax.train.loop import Run


def write_plan(workdir: pathlib.Path, runs: Sequence[Run]) -> None:
    """Write runs.json: the runs to come, in their order."""
    write_records(workdir / RUNS, [Planned(**_head(run)) for run in runs])


def evaluated(workdir: pathlib.Path, run: Run) -> Result | None:
    """The record of `run` in results.json, None if it is not there."""

    def find() -> dict[str, Any] | None:
        records = (r for r in read_results(workdir / RESULTS) if r.identity == _identity(run))
        return next((r.to_json() for r in records), None)

    found = from_main(find)
    return None if found is None else Result.from_json(found, RESULTS)


def evaluate(job: Job, role: str, params: Any, run: Run, **extra: Any) -> Result:
    """Evaluate the policy that `run` ended in, constrained too where the job asks; keep record and examples."""
    params, description = _sampling_copy(job, params), f"{run.name} evaluated"
    answers = greedy(job, role, params, description)
    (means,) = expected(job, (job.graphs[role],), (params,), jnp.ones((1, 1)))
    under = decodings(job, role, params, answers, description)
    if job.config.evaluation.margins:
        extra["structural_margin"] = structural_margin(job, role, params, answers)
    return keep(job, run, answers, expected=means, decodings=under, **extra)


def guarded_share(workdir: pathlib.Path, run: Run) -> dict[str, float]:
    """The mean share of sampled tokens that the guard of a run held back, as `guarded`; {} of a run without one."""
    if not run.guard:
        return {}
    rows = from_main(lambda: [r for r in read_metrics(workdir) if r.get("run") == run.name])
    # The log may continue to a larger budget of the same run.
    shares = [r["guarded_fraction"] for r in rows if r["step"] <= run.steps and "guarded_fraction" in r]
    return {"guarded": float(np.mean(shares))} if shares else {}


def greedy(job: Job, role: str, params: Any, description: str) -> list[Answer]:
    """The judged answers of a policy to all validation prompts, in the dtype that samples."""
    (answers,) = greedy_answers(
        (job.graphs[role],), (_sampling_copy(job, params),), jnp.ones((1, 1)), job.evaluation_batches(), job.codec,
        job.decoding, job.judge("validation"), description,
    )  # fmt: skip
    return answers


def _sampling_copy(job: Job, params: Any) -> Any:
    """`params` in the dtype that samples, gathered where the config says so."""
    params = cast(params, job.config.dtype.compute)
    return decoding_copy(params) if job.config.parallel.gather_rollout else params


def metrics_of(job: Job, answers: Sequence[Answer]) -> dict[str, Any]:
    """The metrics of `answers` to validation prompts, without intervals."""
    records = job.records["validation"]
    return summarize(job.task, [(a.parsed, records[a.index]) for a in answers], bootstrap=0)


def expected(
    job: Job,
    graphdefs: tuple,
    params: tuple,
    weights: Float[Array, "m n"],
    batch_size: int = 0,
    guard: Guard | None = None,
) -> Sequence[Float[np.ndarray, "N K"] | None]:
    """For each mixture its expected scores, if the job asks for them."""
    if job.forced is None:
        return [None] * weights.shape[1]
    batches = job.evaluation_batches(batch_size)
    return list(expected_scores(graphdefs, params, weights, batches, job.forced, job.codec.vocab, guard))


def keep(
    job: Job,
    run: Run,
    answers: Sequence[Answer],
    of_policy: bool = True,
    expected: Float[np.ndarray, "N K"] | None = None,
    **extra: Any,
) -> Result:
    """Put the record of `answers` into results.json; returns the record.

    `expected` are the mean scores of the lists. Some answers of a policy (a forecast is not one) go into examples.json,
    and the errors of its mean scores into errors.json. `extra` are more fields of the record.
    """
    evaluation, head = job.config.evaluation, _head(run) | extra
    errors = None if expected is None else np.abs(expected - job.true_scores)
    if errors is not None:
        head["expected_mae"] = float(errors.mean())
    record = result_record(job.task, job.records["validation"], answers, head, evaluation.bootstrap)
    if of_policy:
        shown = select_examples(answers, evaluation.examples)
        path = job.workdir / EXAMPLES
        _replace(path, read_examples(path), run, [_example(job, run, a) for a in shown])
    if of_policy and errors is not None:
        path = job.workdir / ERRORS
        _replace(
            path, read_errors(path), run, [Errors(**_head(run), errors=errors.mean(-1).round(4).tolist())]
        )
    # results.json last, because `evaluated` goes by it: a run killed before this is evaluated again.
    path = job.workdir / RESULTS
    _replace(path, read_results(path), run, [record])
    return record


def summary(record: Result) -> str:
    """The main metrics of a record on one line, those that it has."""
    values = {name: record.metric(name) for name in ("parse", "ended", "useful", "ndcg@1", "expected_mae")}
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)


def _head(run: Run) -> dict[str, Any]:
    """The first fields of the records of the policy that `run` ended in."""
    return {
        "run": run.name,
        "stage": run.stage,
        "lam": run.lam,
        "seed": run.seed,
        "steps": run.steps,
        "guard": run.guard,
        "sweep": run.sweep,
    }


def _identity(run: Run) -> Identity:
    return Result(**_head(run)).identity


def _replace(path: pathlib.Path, kept: Sequence[Record], run: Run, records: Sequence[Record]) -> None:
    """Rewrite a list file with `records` in place of those of `kept` that `run` had."""
    write_records(path, [*(r for r in kept if r.identity != _identity(run)), *records])


def _example(job: Job, run: Run, answer: Answer) -> Example:
    record, prompt = job.records["validation"][answer.index], job.validation.prompts[answer.index]
    return Example(
        **_head(run),
        key=record.key,
        prompt=job.codec.text(prompt),
        output=answer.text,
        failure=answer.parsed.failure,
        **job.task.shown(answer.parsed, record),
    )
