"""results.json and examples.json: one record per evaluated policy, written as soon as it is known."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from listopd_jax import files
from listopd_jax.errors import UserError
from listopd_jax.parallel.hosts import from_main
from listopd_jax.parallel.rules import decoding_copy
from listopd_jax.stages.evaluate import Answer, greedy_answers, pick_examples, result_record
from listopd_jax.stages.job import Job
from listopd_jax.train.loop import Run

RESULTS, EXAMPLES = "results.json", "examples.json"
IDENTITY = ("stage", "lambda", "seed", "steps")  # what tells one record from another


def evaluated(workdir: pathlib.Path, run: Run) -> dict[str, Any] | None:
    """The record of `run` in results.json, None if it is not there."""

    def find() -> dict[str, Any] | None:
        return next((r for r in _read(workdir / RESULTS) if _identity(r) == _identity(_head(run))), None)

    return from_main(find)


def evaluate(job: Job, role: str, params: Any, run: Run) -> dict[str, Any]:
    """Evaluate the policy that `run` ended in and keep its record and examples; returns the record."""
    batches, limit = job.evaluation_batches(), job.config.task.max_response
    if job.config.parallel.gather_rollout:
        params = decoding_copy(params)
    (answers,) = greedy_answers(
        (job.graphs[role],), (params,), jnp.ones((1, 1)), batches, job.codec, limit, f"{run.name} evaluated"
    )
    return keep(job, run, answers)


def keep(job: Job, run: Run, answers: Sequence[Answer], examples: bool = True) -> dict[str, Any]:
    """Put the record of `answers` into results.json and, if asked, some into examples.json; returns the record."""
    evaluation = job.config.evaluation
    record = result_record(answers, _head(run), job.config.task.ndcg_gain, evaluation.bootstrap)
    if examples:
        shown = pick_examples(answers, evaluation.examples)
        _replace(job.workdir / EXAMPLES, run, [_example(job, run, a) for a in shown])
    _replace(job.workdir / RESULTS, run, [record])
    return record


def _head(run: Run) -> dict[str, Any]:
    return {"run": run.name, "stage": run.stage, **run.labels, "steps": run.steps}


def _identity(record: dict[str, Any]) -> tuple:
    return tuple(record[name] for name in IDENTITY)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a list file, [] if there is none; UserError if they are not records of policies."""
    records = files.read_json(path) if path.exists() else []
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and r.keys() >= set(IDENTITY) for r in records
    ):
        raise UserError(f"{path}: not a list of records; delete it to have the policies evaluated again")
    return records


def _replace(path: pathlib.Path, run: Run, records: Sequence[dict[str, Any]]) -> None:
    """Rewrite a list file with `records` in place of those that `run` had."""
    others = [r for r in _read(path) if _identity(r) != _identity(_head(run))]
    files.write_json(path, [*others, *records])


def _example(job: Job, run: Run, answer: Answer) -> dict[str, Any]:
    return _head(run) | {
        "key": job.examples["validation"][answer.index].key,
        "prompt": job.codec.text(job.validation.prompts[answer.index]),
        "output": answer.text,
        "failure": answer.parsed.failure,
        "true_scores": list(answer.true_scores),
        "scores": answer.parsed.scores,
    }
