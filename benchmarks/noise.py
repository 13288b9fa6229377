"""How much noise the options against it remove, on the embedded task: in a gradient, and between seeds.

    python -m benchmarks.noise gradient --workdir=runs/noise [--lam=1.2] [--batches=24]
    python -m benchmarks.noise seeds --small --workdir=runs/noise_small [--lam=1.2] [--seeds=4] [--ema=0.9]

The pair is that of configs/fashion.py:tiny with 200 held-out lists, trained in the workdir the first time; with --small
it is of one layer, 32 wide, and ranks two reviews. `gradient`:
total variance of a batch's gradient over fresh batches of prompts and completions, of each objective with each control
variate, as a share of the one without; all see the same batches. `seeds`: mean and standard deviation over seeds of
what greedy answers are worth, with and without the average of the weights and the decay of the learning rate. The
average is evaluated next to the weights that it averages, so that these two share their runs.
"""

import argparse
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from configs.fashion import tiny
from listopd_jax.config import validate
from listopd_jax.errors import Parser, exit_code, positive
from listopd_jax.lifecycle import say
from listopd_jax.main import set_up
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.stages.job import Job
from listopd_jax.stages.opd import (
    Distillation,
    hyper_at,
    initial_state,
    make_step,
    opd_runs,
    opd_saving,
    sample,
    train_opd,
)
from listopd_jax.stages.pipeline import frozen_models, student_source
from listopd_jax.stages.prepare import job_on_mesh
from listopd_jax.stages.results import greedy, metrics_of
from listopd_jax.train.checkpoints import abstract
from listopd_jax.train.loop import open_checkpoints
from listopd_jax.train.opd_step import OpdBatch
from listopd_jax.train.optimizer import adamw, init_state

RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: (grads, grads),
)
"""An optimizer whose state is the last gradient."""

RATIOS = ("teacher_student", "none")
CONTROLS = ("none", "kl", "optimal")
METRICS = ("parse", "useful", "mae")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; UserError for a mistake."""
    parser = Parser(
        prog="python -m benchmarks.noise", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=("gradient", "seeds"))
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--lam", type=float, default=1.2)
    parser.add_argument("--batches", type=positive, default=24)
    parser.add_argument("--seeds", type=positive, default=4)
    parser.add_argument("--ema", type=float, default=0.9)
    return parser.parse_args(argv)


def config_of(small: bool, models: pathlib.Path | None = None, **opd: Any) -> Any:
    """The task with 200 held-out lists; with the SFT models of a workdir, if one is given."""
    config = tiny()
    if small:
        shrink(config)
    config.data.synthetic.products, config.data.validation_share = 120 if small else 600, 0.3
    config.evaluation.update(max_lists=200, batch_size=100)
    config.opd.update(lambdas=(), **opd)
    config.rollout.draft_tokens = 0  # as for models that are made here
    config.train.export = models is None
    if models is not None:
        config.tokenizer.path = str(models / "export" / "sft_teacher")
        for role in ("teacher", "student"):
            config[role].weights = str(models / "export" / f"sft_{role}")
            config.sft[role].update(steps=0, epochs=0.0)
    return validate(config)


def shrink(config: ml_collections.ConfigDict) -> None:
    """A task that takes seconds: two reviews per list, a teacher that truncates 30 % of them, a base without noise."""
    config.task.update(k=2, max_prompt=96, max_review_words=8)
    config.tokenizer.vocab_size = 400
    for role, steps, truncated in (("teacher", 90, "truncate:0.3"), ("student", 60, "")):
        config[role].update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1)
        config.sft[role].update(steps=steps, batch_size=16, lr=1e-2, warmup_steps=5)
        config.sft[role].noise = truncated
    config.opd.update(steps=30, batch_size=8, rollouts=2, lr=3e-3)


def shared_of(job: Job, frozen: Frozen) -> Distillation:
    """The parts that the runs of a job share."""
    opd, optimizer = job.config.opd, job.config.optimizer
    tx = adamw(optimizer, opd.b2, opd.moments)
    step = make_step(opd, tx, job.graphs, vocab=job.codec.vocab, attention=job.attention)
    return Distillation(student_source(job, frozen.base), frozen, tx, {"": step})


# --- the gradient ---


def gradients(job: Job, frozen: Frozen, params: Any, opd: Any, lam: float, batches: int) -> np.ndarray:
    """The gradient of each of `batches` batches, [batches, parameters] float64."""
    step = make_step(opd, RECORD, job.graphs, vocab=job.codec.vocab, attention=job.attention)
    source, found = job.opd_batches(seed=0), []
    for number in range(batches):
        batch = next(source)
        prompts, lengths = jnp.asarray(batch["prompt"]), jnp.asarray(batch["prompt_length"])
        rollout = sample(job, params, prompts, lengths, jax.random.key(number))._replace(steps=None)
        state = init_state(jax.tree.map(jnp.copy, params), RECORD)
        state, *_ = step(
            state, frozen, OpdBatch(prompts, lengths, rollout), hyper_at(opd, lam, 0), jnp.float32(0)
        )
        leaves = jax.tree.leaves(state.opt_state)
        found.append(np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves]))
    return np.stack(found)


def noise_of_gradient(workdir: pathlib.Path, small: bool, lam: float, batches: int) -> None:
    """Print total variances of the gradient, at the SFT student and at one trained at λ with the defaults."""
    config = config_of(small, workdir / "pair")
    with job_on_mesh(config, workdir / "gradient") as job:
        frozen = frozen_models(job)
        (run,) = opd_runs(job, lam, seed=0)
        for at, params in (("sft", frozen.base), ("trained", train_opd(job, shared_of(job, frozen), run))):
            for ratio, control in [*itertools.product(RATIOS, CONTROLS), ("full_vocab", "none")]:
                found = gradients(job, frozen, params, objective(config.opd, ratio, control), lam, batches)
                variance = found.var(0, ddof=1).sum()
                plain = variance if control == "none" else plain
                row = {"at": at, "objective": ratio, "control_variate": control, "variance": variance}
                say(json.dumps(row | {"ratio": variance / plain, "norm": np.linalg.norm(found.mean(0))}))


def objective(opd: Any, ratio: str, control: str) -> ml_collections.ConfigDict:
    """Config section `opd` with a ratio and a control variate, or with the exact loss."""
    section = ml_collections.ConfigDict(opd.to_dict())
    exact = {"ratio": "none", "estimator": "full_vocab"}
    section.update(exact if ratio == "full_vocab" else {"ratio": ratio, "control_variate": control})
    return section


# --- the seeds ---


def noise_of_seeds(workdir: pathlib.Path, small: bool, lam: float, seeds: int, ema: float) -> None:
    """Train each seed with a constant and a decaying learning rate; print scores of weights and their average."""
    for decay in ("none", "linear"):
        config = config_of(small, workdir / "pair", ema=ema, lr_decay=decay)
        worth: dict[str, list[dict[str, float]]] = {"params": [], "average": []}
        with job_on_mesh(config, workdir / f"seeds_{decay}") as job:
            shared = shared_of(job, frozen_models(job))
            for seed in range(seeds):
                (run,) = opd_runs(job, lam, seed)
                train_opd(job, shared, run)
                with open_checkpoints(job.workdir, run, opd_saving(config, job.workdir)) as checkpoints:
                    state = checkpoints.restore(abstract(initial_state(job, shared, seed))).state
                for name, of in worth.items():
                    answers = greedy(job, "student", getattr(state, name), f"{run.name} {name}")
                    judged = metrics_of(job, answers)
                    of.append({metric: judged[metric] for metric in METRICS})
        for name, of in worth.items():
            spread = {m: _mean_and_sd([x[m] for x in of]) for m in METRICS}
            say(
                json.dumps(
                    {"lr_decay": decay, "weights": name, "lambda": lam, "seeds": seeds, **spread, "each": of}
                )
            )


def _mean_and_sd(values: Sequence[float | None]) -> list[float]:
    """Over the seeds that have a value; NaN where these are too few."""
    there = [value for value in values if value is not None]
    return [float(np.mean(there)), float(np.std(there, ddof=1))] if len(there) > 1 else [np.nan, np.nan]


def main(argv: Sequence[str]) -> None:
    """Train the pair, measure, print JSON lines."""
    args = parse(argv)
    config = config_of(args.small)
    set_up(config, args.workdir)
    with job_on_mesh(config, args.workdir / "pair") as job:
        frozen_models(job)
    if args.what == "gradient":
        noise_of_gradient(args.workdir, args.small, args.lam, args.batches)
    else:
        noise_of_seeds(args.workdir, args.small, args.lam, args.seeds, args.ema)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
