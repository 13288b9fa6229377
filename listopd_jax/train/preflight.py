"""Checks before the first update, each for a failure that other systems train through in silence."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from listopd_jax.errors import UserError
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.quantized import GROUPS, divides
from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.parallel.hosts import gather
from listopd_jax.rollout.decode import completion_mask
from listopd_jax.rollout.scoring import completion_logprobs

UNIFORM = 1e-3  # nats: log-probabilities this close to −log V everywhere come from blank weights
SAME = 1e-6  # nats: two models that agree this closely everywhere are one model


def answer_logprobs(
    graphdef: nnx.GraphDef, params: Any, batch: dict[str, np.ndarray], vocab: int, chunk: int
):
    """log π of each token of the right answers of `batch`, [tokens] float32."""

    logprobs, mask = _score(graphdef, params, {k: jnp.asarray(v) for k, v in batch.items()}, vocab, chunk)
    return gather(logprobs)[gather(mask)]


@functools.partial(BackendJit, options=OTHER, static_argnames=("graphdef", "vocab", "chunk"))
def _score(graphdef: nnx.GraphDef, params: Any, batch: dict[str, Any], vocab: int, chunk: int):
    """log π of the answers [B, 1, T], and which of their tokens count."""
    decoder, answers = nnx.merge(graphdef, params), batch["answer"][:, None]
    logprobs, _ = completion_logprobs(decoder, batch["prompt"], batch["prompt_length"], answers, vocab, chunk)
    return logprobs, completion_mask(batch["answer_length"][:, None], answers.shape[-1])


def check_models(
    teacher: np.ndarray,
    other: np.ndarray,
    vocab: int,
    role: str = "student",
    teacher_role: str = "teacher",
    may_be_same: bool = False,
) -> None:
    """Refuse to start from the log-probabilities that a teacher and student, or reference, give the same right answers.

    Raises UserError if either is not finite or uniform over the vocabulary (blank weights), or if the two are the same
    model (nothing to distil, or to extrapolate from) and not `may_be_same`.
    """
    for name, logprobs in ((teacher_role, teacher), (role, other)):
        if not np.isfinite(logprobs).all():
            raise UserError(
                f"{name}: log-probabilities are not finite on the first batch; its weights are broken"
            )
        if np.abs(logprobs + np.log(vocab)).max() < UNIFORM:
            raise UserError(
                f"{name}: every log-probability is -log {vocab}; its weights are blank, load real ones"
            )
    if not may_be_same and np.abs(teacher - other).max() < SAME:
        raise UserError(
            f"{role} and {teacher_role} give the same log-probabilities everywhere: they are the same model; give "
            "another, or set opd.self_distillation=True for a control"
        )


def check_mesh(config: Any, shapes: Mapping[str, ModelConfig], sizes: Mapping[str, int]) -> None:
    """UserError for the first dimension of the models or size of a batch that its mesh axes do not divide."""
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    for role, shape in shapes.items():
        _divides(
            f"parallel.tensor={tensor}", tensor, f"num_heads={shape.num_heads} of the {role}", shape.num_heads
        )
        units = shape.intermediate_size
        _divides(f"parallel.tensor={tensor}", tensor, f"intermediate_size={units} of the {role}", units)
        _divides(
            f"parallel.fsdp={fsdp}", fsdp, f"hidden_size={shape.hidden_size} of the {role}", shape.hidden_size
        )
    sections = {"opd": config.opd, "sft.teacher": config.sft.teacher, "sft.student": config.sft.student}
    rows = f"parallel.data*parallel.fsdp={sizes['data'] * fsdp}"
    for name, section in sections.items():
        for field in ("batch_size", "microbatch"):
            _divides(rows, sizes["data"] * fsdp, f"{name}.{field}={section[field]}", section[field])


def check_rounding(config: Any, shapes: Mapping[str, ModelConfig]) -> None:
    """UserError for the first number of inputs of the models' products that `dtype.frozen` does not divide."""
    dtype = config.dtype.frozen
    for role, shape in shapes.items() if dtype in GROUPS else ():
        for name in ("hidden_size", "head_dim", "intermediate_size"):
            size = getattr(shape, name)
            if not divides(size, dtype):
                raise UserError(
                    f"dtype.frozen={dtype}: {name}={size} of the {role} must be a multiple of {GROUPS[dtype]}, or an "
                    "even number below that; set dtype.frozen=int8"
                )


def _divides(what: str, divisor: int, dividend: str, size: int) -> None:
    if size % divisor:
        raise UserError(f"{what} must divide {dividend}; change one of them")
