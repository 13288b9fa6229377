"""What fewer bits of frozen models change: log-probabilities, λ_flip and the forecast, against float32.

    python -m benchmarks.quantized --job=WORKDIR [--lambdas=1,1.05,1.1,1.2] [--lists=N] [--dtypes=bfloat16,int8,int4]
    python -m benchmarks.quantized --weights=CHECKPOINT --reviews=FILE [--dtypes=bfloat16,int8,int4]

The first reads the exports of a job's SFT teacher and student, calibrates and forecasts them as its own pipeline does,
without a guard, and compares log π of the tokens of one batch of right answers. The second reads any checkpoint with
its tokenizer, and reviews of womens_clothing_reviews.csv (or its zip) as running text: 4 rows of 256 tokens, of each
row all but the first are scored. Prints one JSON object.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import quiet_libraries, say

EXACT, ROUNDED = "float32", ("bfloat16", "int8", "int4")
ROWS, ROW = 4, 256


def lambdas(text: str) -> tuple[float, ...]:
    """The λ of "1,1.05". Raises ValueError, which argparse reports."""
    return tuple(map(float, text.split(",")))


def dtypes(text: str) -> tuple[str, ...]:
    """The dtypes of "int8,int4", each of ROUNDED."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(ROUNDED):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is not of {', '.join(ROUNDED)}")
    return names


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; UserError for a mistake."""
    parser = Parser(
        prog="python -m benchmarks.quantized", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--job", type=pathlib.Path, help="the workdir of a finished job")
    what.add_argument("--weights", help="a checkpoint with its tokenizer")
    parser.add_argument("--reviews", help="what a checkpoint reads")
    parser.add_argument("--lambdas", default=(1.0, 1.05, 1.1, 1.2), type=lambdas)
    parser.add_argument("--lists", type=positive, default=600, help="of the job's validation split, at most")
    parser.add_argument("--dtypes", default=ROUNDED, type=dtypes)
    args = parser.parse_args(argv)
    if args.weights and not args.reviews:
        raise UserError("--weights: needs --reviews=FILE, a CSV file of clothing reviews")
    return args


def configuration(args: argparse.Namespace, dtype: str) -> ml_collections.FrozenConfigDict:
    """The job's config, starting from the models of its SFT and without a guard."""
    from listopd_jax.config import defaults, read_saved, validate
    from listopd_jax.config.saved import from_json

    saved = from_json(read_saved(args.job / "config.json")["config"])
    config = ml_collections.ConfigDict(saved.to_dict())
    for role in ("teacher", "student"):
        config[role].weights = str(args.job / "export" / f"sft_{role}")
        config.sft[role].update(steps=0, epochs=0.0)
    config.tokenizer.path = config.teacher.weights
    config.sft.continued = config.train.export = False
    config.dtype.frozen = dtype
    config.opd.guard.update(defaults().opd.guard)
    config.opd.update(lambdas=args.lambdas, plain_lambdas=())
    config.forecast.update(lambdas=(), plain_lambdas=())
    config.evaluation.max_lists = args.lists
    return validate(config)


def pair_in(args: argparse.Namespace, dtype: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Calibration and forecast in `dtype`, and log π of right answers by role."""
    from listopd_jax.models.build import initial_params
    from listopd_jax.ops.opd_loss import Frozen
    from listopd_jax.records import CALIBRATION, RESULTS, read_calibration, read_results
    from listopd_jax.stages.before import before_training
    from listopd_jax.stages.job import ROLES
    from listopd_jax.stages.opd import first_batch
    from listopd_jax.stages.prepare import job_on_mesh
    from listopd_jax.train.preflight import answer_logprobs

    config = configuration(args, dtype)
    with tempfile.TemporaryDirectory() as folder, job_on_mesh(config, pathlib.Path(folder)) as job:
        params = {r: initial_params(job.models[r], job.shapes[r], seed=0, dtype=dtype) for r in ROLES}
        batch, vocab, chunk = first_batch(job), job.codec.vocab, config.opd.head_chunk
        seen = {role: answer_logprobs(job.graphs[role], params[role], batch, vocab, chunk) for role in ROLES}
        before_training(job, Frozen(params["teacher"], params["student"]))
        found = read_calibration(job.workdir / CALIBRATION)
        records = read_results(job.workdir / RESULTS)
    flips = ("positions", "min", "percentile_5", "percentile_50")
    return {
        "p_typ": found.p_typ,
        "b_measured": found.b_measured,
        "flips": [{name: getattr(row, name) for name in flips} for row in found.flips],
        "forecast": {str(r.lam): {"parse": r.parse, "mae": r.mae} for r in records if r.stage == "forecast"},
    }, seen


def compare_pair(args: argparse.Namespace) -> dict[str, Any]:
    """Rows by dtype of a job's pair."""
    row, exact = pair_in(args, EXACT)
    rows = {EXACT: row}
    for dtype in args.dtypes:
        row, seen = pair_in(args, dtype)
        rows[dtype] = row | {"logprob_error": {role: error(x, exact[role]) for role, x in seen.items()}}
    return rows


def compare_texts(args: argparse.Namespace) -> dict[str, Any]:
    """Rows by dtype of a checkpoint on running text."""
    from listopd_jax.config import defaults
    from listopd_jax.models.build import graph_of, initial_params, model_config
    from listopd_jax.train.preflight import answer_logprobs

    section = defaults().teacher
    section.weights = args.weights
    config, batch = model_config(section, 0), text(args)
    graph = graph_of(config, EXACT, "none", "xla")

    def seen(dtype: str) -> np.ndarray:
        return answer_logprobs(
            graph, initial_params(section, config, 0, dtype), batch, config.vocab_size, ROW
        )

    exact = seen(EXACT)
    return {EXACT: {"nll": -float(exact.mean())}} | {d: error(seen(d), exact) for d in args.dtypes}


def text(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """ROWS of ROW tokens of reviews, the first token of each as prompt."""
    from listopd_jax.data.readers import read_reviews
    from listopd_jax.data.tokenizer import load_tokenizer
    from listopd_jax.models.build import tokenizer_source

    tokenizer, ids = load_tokenizer(tokenizer_source(args.weights)), []
    for review in read_reviews("clothing", args.reviews, 0.05, Counter()):
        ids += tokenizer.encode(review.text + "\n", add_special_tokens=False)
        if len(ids) >= ROWS * ROW:
            break
    else:
        raise UserError(
            f"{args.reviews}: has {len(ids)} tokens of text, fewer than {ROWS * ROW}; give a longer file"
        )
    tokens = np.array(ids[: ROWS * ROW], np.int32).reshape(ROWS, ROW)
    batch = {"prompt": tokens[:, :1], "answer": tokens[:, 1:]}
    return batch | {f"{name}_length": np.full(ROWS, x.shape[1], np.int32) for name, x in batch.items()}


def error(logprobs: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """How far log π of tokens is from the exact one, and what that does to its mean, in nats."""
    gap = np.abs(logprobs - exact)
    return {
        "mean": float(gap.mean()),
        "p99": float(np.quantile(gap, 0.99)),
        "max": float(gap.max()),
        "nll_change": float((exact - logprobs).mean()),
    }


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    args = parse(argv)
    quiet_libraries()
    rows = compare_pair(args) if args.job else compare_texts(args)
    say(json.dumps(rows, indent=1, allow_nan=False))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
