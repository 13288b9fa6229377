"""One OPD step of a configuration, on one device, with forced lengths: its two programs as the OPD stage calls them."""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from listopd_jax.data.batches import WIDTH_MULTIPLE
from listopd_jax.models.build import PARAM_DTYPE, cast, graph_of, initial_params
from listopd_jax.models.hf import load_hf
from listopd_jax.ops.attention_backends import resolve
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.plan.search import shapes_of, vocabulary
from listopd_jax.rollout.decode import Rollout, generate, pass_tokens
from listopd_jax.rollout.scoring import row_width
from listopd_jax.rollout.state import trim
from listopd_jax.rounding import round_up
from listopd_jax.stages.opd import hyper_at, make_step
from listopd_jax.train.opd_step import OpdBatch
from listopd_jax.train.optimizer import adamw, init_state


def random_prompts(config: Any, tokens: int) -> Int[np.ndarray, "B P"]:
    """Prompts of `tokens` random ids each (not 0 and 1, PAD and EOS), right-padded to a bucket's width."""
    width = min(config.task.max_prompt, round_up(tokens, WIDTH_MULTIPLE))
    rng = np.random.default_rng(0)
    ids = rng.integers(2, vocabulary(config), (config.opd.batch_size, tokens), dtype=np.int32)
    return np.pad(ids, ((0, 0), (0, width - tokens)))


class Step:
    """Weights, optimizer state and prompts [B, P] of `prompt` tokens each, and the two programs of a step.

    Completions end at one of `ends`; without any each has `response` tokens, by its budget. The weights are random, or
    those of `folder`/student, /teacher and /base. `hint`: what drafts are copied from.
    """

    def __init__(
        self,
        config: Any,
        prompts: Int[np.ndarray, "B P"],
        prompt: int | Int[np.ndarray, " B"],
        response: int,
        folder: pathlib.Path | None = None,
        ends: tuple[int, ...] = (),
        pad: int = 0,
        hint: Int[np.ndarray, "1 H"] | None = None,
    ):
        self.config, self.vocab = config, vocabulary(config)
        self.ends = {"eos": ends, "pad": pad}
        compute, frozen = config.dtype.compute, config.dtype.frozen
        if folder is None:
            shapes = shapes_of(config)
            student = base = initial_params(config.student, shapes["student"], 0, PARAM_DTYPE)
            teacher = initial_params(config.teacher, shapes["teacher"], 1, frozen)
        else:
            read = {role: load_hf(folder / role) for role in ("student", "teacher", "base")}
            shapes = {role: shape for role, (shape, _) in read.items()}
            student, teacher, base = (params for _, params in read.values())
        self.backend = backend = resolve(config.attention, jax.default_backend(), compute)
        self.graphs = {
            role: graph_of(shape, compute, config.remat, backend) for role, shape in shapes.items()
        }
        self.prompts = jnp.asarray(prompts)
        self.lengths = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), len(prompts))
        self.response = response
        self.frozen = Frozen(cast(teacher, frozen), cast(base, frozen))
        tx = adamw(config.optimizer, config.opd.b2, config.opd.moments)
        self.state = init_state(jax.tree.map(jnp.copy, student), tx)
        self.program = make_step(config.opd, tx, self.graphs, vocab=self.vocab, attention=backend)
        self.count, self.tokens_per_step = 0, 1.0
        self.drafts = max(0, config.rollout.draft_tokens)
        # As long as an answer, if there is no hint.
        self.hint = (self.prompts[:1, :response] if hint is None else hint) if self.drafts else None

    def rollout(self, response: int | None = None) -> Rollout:
        """Completions of at most `response` tokens, cut to the widths of the OPD stage (quarters of the budget)."""
        response, opd, budget = response or self.response, self.config.opd, self.config.task.max_response
        self.count += 1
        rollout = generate(
            (self.graphs["student"],), (cast(self.state.params, self.config.dtype.compute),),
            jnp.ones((1, opd.rollouts)), self.prompts, self.lengths, jax.random.key(self.count),
            max_tokens=budget, vocab=self.vocab, **self.ends, temperature=opd.temperature,
            budgets=jnp.full((len(self.prompts), opd.rollouts), response, jnp.int32), hint=self.hint,
            draft_tokens=self.drafts, pass_tokens=pass_tokens(jax.default_backend()),
        )  # fmt: skip
        self.tokens_per_step = float((rollout.lengths - 1).sum() / jnp.maximum(1, rollout.steps.sum()))
        return jax.block_until_ready(trim(rollout._replace(steps=None), budget))

    def update(self, rollout: Rollout) -> dict[str, Array]:
        """Scores of teacher and base, loss, gradient, AdamW; the step's metrics."""
        opd = self.config.opd
        hyper = hyper_at(opd, opd.lambdas[0], opd.lambda_warmup_steps)
        width = row_width(self.backend, self.lengths, rollout.lengths)
        batch = OpdBatch(self.prompts, self.lengths, rollout, width=width)
        self.state, metrics, _ = self.program(self.state, self.frozen, batch, hyper, jnp.float32(opd.lr))
        jax.block_until_ready((self.state, metrics))
        return metrics


def timed(step: Step) -> dict[str, float]:
    """Seconds of one step and of its two programs."""
    began = time.perf_counter()
    rollout = step.rollout()
    written = time.perf_counter()
    step.update(rollout)
    done = time.perf_counter()
    return {"rollout": written - began, "update": done - written, "step": done - began}


def timed_stages(step: Step) -> dict[str, float]:
    """`timed`, and the rollout's parts: `prefill`, a rollout stopped after one token, and `decode`, what it saves."""
    began = time.perf_counter()
    step.rollout(response=1)
    prefill = time.perf_counter() - began
    seconds = timed(step)
    # Apart, a prefill may take longer than a rollout with it: noise on a busy machine, and no stage takes no time.
    return {"prefill": prefill, "decode": max(1e-6, seconds["rollout"] - prefill)} | seconds
