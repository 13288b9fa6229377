"""A finished run as work for benchmarks: its models on disk, its held-out prompts, its task's verdicts on answers."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from benchmarks.shape import Prompts, Shape
from listopd_jax.config import CONFIG, at_point, from_json, read_saved
from listopd_jax.data.batches import make_batch
from listopd_jax.models.hf import save_hf
from listopd_jax.records import RESULTS, Result, read_results
from listopd_jax.stages.export import find_policy, policy_model
from listopd_jax.stages.job import Job, draft_tokens
from listopd_jax.stages.prepare import open_job


def open_run(workdir: pathlib.Path) -> Job:
    """The job of the run in `workdir`, as its config.json has it; UserError if there is none."""
    return open_job(from_json(read_saved(workdir / CONFIG)["config"]), workdir)


def chosen_policy(results: Sequence[Result], name: str = "") -> Result:
    """The trained policy `name`: by default the most useful distilled one, or the SFT student if none is distilled."""
    distilled = [record for record in results if record.stage == "opd"]
    if name or not distilled:
        return find_policy(results, name or "sft_student")
    return max(distilled, key=lambda record: record.useful or 0.0)


def write_run(job: Job, policy: str, number: int, folder: pathlib.Path) -> tuple[Shape, str]:
    """The shape of a step on the run's first `number` held-out prompts, and the name of the policy that is the student.

    `folder` gets prompts and models, in float32. The student is `chosen_policy`, the base the SFT student.
    """
    results = read_results(job.workdir / RESULTS)
    student = chosen_policy(results, policy)
    roles = {
        "student": student,
        "base": find_policy(results, "sft_student"),
        "teacher": find_policy(results, "sft_teacher"),
    }
    for role, record in roles.items():
        model = policy_model(at_point(job.config, record.sweep), job.workdir, record)
        save_hf(folder / role, model.shape, model.params, model.tokenizer, ends=model.ends)
    asked = held_out(job, number)
    asked.write(folder)
    return _shape(job, asked), student.run


def held_out(job: Job, number: int) -> Prompts:
    """The first `number` validation prompts, or all there are, in a width that the run compiles for."""
    lengths = job.validation.prompt_lengths[:number]
    width, rows = next(size for size in job.buckets if size >= lengths.max()), np.arange(len(lengths))
    batch = make_batch(job.validation, rows, width, np.ones(len(rows), np.float32))
    return Prompts(batch["prompt"], batch["prompt_length"], job.decoding["hint"])


def _shape(job: Job, asked: Prompts) -> Shape:
    opd, codec = job.config.opd, job.codec
    prompts, width = asked.ids.shape
    return Shape(
        prompts=prompts, prompt_tokens=width, new_tokens=job.max_response, vocab=codec.vocab, eos=codec.ends,
        pad=codec.pad, temperature=opd.temperature, drafts=draft_tokens(job.config), remat=job.config.remat,
        microbatch=opd.microbatch if prompts % (opd.microbatch or 1) == 0 else 0,
    )  # fmt: skip


def answered(job: Job, shape: Shape, tokens: Int[np.ndarray, "B n T"]) -> dict[str, float]:
    """For completions of the first B held-out prompts: `tokens`, the mean length, and `parsed`, the parse rate."""
    lengths, judge = shape.lengths(tokens), job.judge("validation")
    rows = np.repeat(np.arange(len(tokens)), tokens.shape[1]).tolist()
    held = [judge(text, row).ok for text, row in zip(job.codec.texts(tokens, lengths), rows, strict=True)]
    return {"tokens": float(lengths.mean()), "parsed": float(np.mean(held))}
