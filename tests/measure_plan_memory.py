"""Measure what the planner predicts: run by test_plan_compile.py in a process of its own, prints JSON.

The peak of resident memory is reset before each phase (writing 5 to /proc/self/clear_refs), all programs having been
compiled and run once, so that it holds arrays and no compiler. Values are [measured, predicted] bytes.
"""

import ctypes
import gc
import json
import os
import pathlib
import re
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
# On one core: with more, threads keep scratch memory and heaps of their own, up to 14 % of the update's peak.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp

from listopd_jax.config import defaults, validate
from listopd_jax.models.build import graph_of, initial_params
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel.mesh import make_mesh, use_mesh
from listopd_jax.plan import search
from listopd_jax.plan.arithmetic import Load
from listopd_jax.plan.chips import GIB, parse_topology
from listopd_jax.plan.search import shapes_of, vocabulary
from listopd_jax.rollout.decode import generate
from listopd_jax.stages.opd import hyper_at, make_step
from listopd_jax.train.opd_step import OpdBatch
from listopd_jax.train.optimizer import adamw, init_state

ROWS, ROLLOUTS, PROMPT, RESPONSE = 8, 2, 192, 48
MEASURED = ("rollout", "update")  # the phases; the others are not compiled


def small_config():
    """Models whose arrays, a few hundred MB, stand out from the interpreter's noise."""
    config = defaults()
    config.task.update(max_prompt=PROMPT, max_response=RESPONSE)
    for model in (config.teacher, config.student):
        model.update(
            hidden_size=512, intermediate_size=1536, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64
        )
    config.tokenizer.vocab_size = 4096
    config.opd.update(batch_size=ROWS, rollouts=ROLLOUTS, microbatch=4, head_chunk=256)
    return validate(config)


def status(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


def settle() -> None:
    """Give freed memory back and forget the peak so far."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Predict, run twice, and print what the second run took."""
    config = small_config()
    shapes, vocab = shapes_of(config), vocabulary(config)
    builds = search._builds(config)
    with mock.patch.object(search, "_builds", lambda config: {phase: builds[phase] for phase in MEASURED}):
        load = Load(ROWS, ROLLOUTS, PROMPT, RESPONSE)
        plan = search.make_plan(config, parse_topology("cpu:1"), load, compile_it=True)
    graphs = {role: graph_of(shape, "float32", config.remat, "xla") for role, shape in shapes.items()}
    tx = adamw(config.optimizer, config.opd.b2)
    step = make_step(config.opd, tx, graphs, vocab=vocab, attention="xla")
    prompts, lengths = jnp.zeros((ROWS, PROMPT), jnp.int32), jnp.full(ROWS, PROMPT)

    def build():
        student, teacher = (
            initial_params(config[r], shapes[r], 0, "float32") for r in ("student", "teacher")
        )
        state = init_state(jax.tree.map(jnp.copy, student), tx)
        return state, Frozen(teacher, student)

    def rollout(params):
        return generate(
            (graphs["student"],), (jax.tree.map(jnp.copy, params),), jnp.ones((1, ROLLOUTS)), prompts, lengths,
            jax.random.key(0), max_tokens=RESPONSE, vocab=vocab, eos=(), pad=0, temperature=1.0,
        )  # fmt: skip

    def update(state, frozen, sampled):
        hyper = hyper_at(config.opd, lam=1.5, step=0)
        return step(state, frozen, OpdBatch(prompts, lengths, sampled), hyper, jnp.float32(1e-4))

    with use_mesh(make_mesh(plan["mesh"])):
        state, frozen = build()
        jax.block_until_ready(update(state, frozen, rollout(state.params)))
        del state, frozen
        settle()
        state, frozen = jax.block_until_ready(build())
        settle()
        # Freed memory that stayed with the process is used again, so the pages of these arrays need not be new ones.
        others = status("VmRSS") - sum(x.nbytes for x in jax.live_arrays())
        sampled = jax.block_until_ready(rollout(state.params))
        measured = {"rollout": status("VmHWM") - others}
        settle()
        done = jax.block_until_ready(update(state, frozen, sampled))
        measured["update"] = status("VmHWM") - others
        del done
    print(json.dumps({phase: [size, plan["peaks_gib"][phase] * GIB] for phase, size in measured.items()}))


if __name__ == "__main__":
    main()
