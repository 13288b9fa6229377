"""Pre-registration: lock a prediction before the run it predicts, and judge the run by the lock alone.

    python -m listopd_jax.prereg lock --template=fine_grid --p=0.9993 --b=0.8105 --c=5 --out=prereg.json \\
        --config=configs/fashion.py:paper --config.opd.lambdas="(1.18,1.2,1.22)" --grid=1.18,1.2,1.22
    python -m listopd_jax.prereg verify  --lock=prereg.json [--config=runs/x/config.json]
    python -m listopd_jax.prereg verdict --lock=prereg.json --workdir=runs/x [--json]
    python -m listopd_jax.prereg curve   --workdir=runs/x --out=curve.json      # lock runs/x/predictions.json
    python -m listopd_jax.prereg curves  locks/*.json --runs=runs --out=forecast.json  # verdicts on runs/PAIR

A lock is a JSON file with grid, seeds, budget, window, pass rule (data, never code), the config's hash, the
code revision and its own SHA-256 over canonical JSON. It is written once. The hash shows an accidental or
careless change; against a determined one, commit the lock to git before the run. Exit codes: 0 passed or
unchanged, 1 the prediction is refuted, 2 a mistake, or a lock or config that changed, 3 inconclusive: the grid only
bounds the place that was predicted.

Templates are EC's three tests (EC, tables of its results), scaled to any pair of models: places on the λ axis are given
in units of λ* − 1, where λ* is the predicted threshold. `window` and `grid` can also be given in full.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence

from listopd_jax import config as config_module
from listopd_jax import files
from listopd_jax.errors import Parser, UserError, exit_code
from listopd_jax.prereg.curve import judge_curve, make_curve_lock
from listopd_jax.prereg.curves import figures, judged_pairs
from listopd_jax.prereg.lock import (
    CURVE,
    TEMPLATES,
    Json,
    check_config,
    make_lock,
    predicted_lambda,
    read_lock,
    write_lock,
)
from listopd_jax.prereg.verdict import judge
from listopd_jax.records import RESULTS, read_results
from listopd_jax.theory import cliff

VERDICTS = {"pass": ("PASSED", 0), "fail": ("REFUTED", 1), "inconclusive": ("INCONCLUSIVE", 3)}
"""The printed text, and the exit code."""


def _numbers(text: str) -> list[float]:
    return [float(x) for x in text.split(",")]


def _seeds(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _parser() -> Parser:
    parser = Parser(
        prog="python -m listopd_jax.prereg", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    lock = commands.add_parser("lock", allow_abbrev=False, help="write a prediction, once")
    lock.add_argument("--template", choices=tuple(TEMPLATES), required=True)
    lock.add_argument(
        "--config", required=True, help="a run's config.json, or configs/NAME.py[:PRESET] with overrides"
    )
    lock.add_argument("--out", required=True, help="the lock to write; must not exist")
    lock.add_argument("--predict", choices=("clip", "clip_base_neutral", "flip"), default="clip")
    lock.add_argument("--p", type=float, help="teacher's probability of its modal token")
    lock.add_argument("--b", type=float, help="base's probability of the same token")
    lock.add_argument("--c", type=float, help="clip; default: the config's opd.clip")
    lock.add_argument("--threshold", type=float, help="the predicted λ itself, instead of --p and --b")
    lock.add_argument("--grid", type=_numbers, help="λ1,λ2,… instead of the template's")
    lock.add_argument("--window", type=_numbers, help="LOW,HIGH instead of the template's")
    lock.add_argument("--seeds", type=_seeds, help="default: the config's opd.seeds")
    lock.add_argument("--steps", type=int, help="default: the config's opd.steps")
    lock.add_argument("--midpoint", type=float, default=cliff.MIDPOINT, help="parse level of the midpoint")
    curve = commands.add_parser("curve", allow_abbrev=False, help="write a predicted curve, once")
    curve.add_argument("--workdir", required=True, type=pathlib.Path, help="folder with predictions.json")
    curve.add_argument("--out", required=True, help="the lock to write; must not exist")
    curves = commands.add_parser("curves", allow_abbrev=False, help="judge several curves, as one JSON list")
    curves.add_argument("locks", nargs="+", type=pathlib.Path, help="PAIR.json")
    curves.add_argument("--runs", required=True, type=pathlib.Path, help="folder with PAIR/results.json")
    curves.add_argument("--out", required=True, help="the file to write")
    verify = commands.add_parser("verify", allow_abbrev=False, help="is the lock, and the config, unchanged?")
    verify.add_argument("--lock", required=True)
    verify.add_argument("--config", help="a run's config.json")
    verdict = commands.add_parser("verdict", allow_abbrev=False, help="judge a run by the lock")
    verdict.add_argument("--lock", required=True)
    verdict.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="folder with config.json and results.json"
    )
    verdict.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def load_config(source: str, overrides: Sequence[str] = ()) -> Json:
    """The resolved config of a run's config.json, or of configs/NAME.py[:PRESET] with overrides."""
    if source.endswith(".json"):
        if overrides:
            raise UserError(
                f"{overrides[0]}: a run's config.json is as it is; overrides go with configs/NAME.py"
            )
        return config_module.read_saved(pathlib.Path(source))["config"]
    from listopd_jax import main  # registers absl flags: only where they are needed

    # main asks for a workdir, which a lock has no use for.
    config, _ = main.parse(["prereg", f"--config={source}", *overrides, "--workdir=not-used"])
    return config_module.to_json(config)


def _prediction(args: argparse.Namespace, config: Json) -> Json:
    """Where the predicted λ comes from; UserError if neither --threshold nor --p and --b are given."""
    if args.threshold is not None:
        return {"threshold": "given", "lambda": args.threshold}
    if args.p is None or (args.b is None and args.predict != "clip_base_neutral"):
        raise UserError(
            "give --p and --b (p_typ and b_measured in a run's calibration.json), or the predicted --threshold itself"
        )
    # Base-neutral: a base that does not know.
    b = 0.5 if args.b is None else args.b
    c = float(config.get("opd", {}).get("clip", math.inf)) if args.c is None else args.c
    lam = predicted_lambda(args.predict, args.p, b, c)
    return {
        "threshold": args.predict,
        "p": args.p,
        "b": b,
        # JSON has no infinity.
        "c": c if math.isfinite(c) else "inf",
        "lambda": lam,
    }


def _lock(args: argparse.Namespace, overrides: Sequence[str]) -> tuple[str, int]:
    config = load_config(args.config, overrides)
    opd = config.get("opd", {})
    if opd.get("sweep"):
        raise UserError(
            f"{args.config}: opd.sweep trains several curves over λ, and a lock is about one: leave it out"
        )
    steps = opd.get("steps") if args.steps is None else args.steps
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps={args.steps}: must be at least 1")
    if not steps:
        raise UserError(
            "opd.steps=0 leaves the budget to the data: lock it with --steps=N or --config.opd.steps=N"
        )
    prediction = _prediction(args, config)
    lock = make_lock(
        args.template,
        prediction["lambda"],
        args.seeds or opd.get("seeds", []),
        steps,
        config,
        grid=args.grid,
        window=args.window,
        prediction=prediction,
        midpoint=args.midpoint,
    )
    _check_not_run_yet(pathlib.Path(args.config), lock)
    return _written(args.out, lock)


def _curve(args: argparse.Namespace) -> tuple[str, int]:
    return _written(args.out, make_curve_lock(args.workdir, load_config(str(args.workdir / "config.json"))))


def _curves(args: argparse.Namespace) -> tuple[str, int]:
    judged = judged_pairs(args.locks, args.runs)
    files.write_json(args.out, figures(judged, args.locks))
    lines = [f"{pair}\n{_in_words(verdict)}" for pair, verdict in judged.items()]
    return "\n".join([*lines, f"{args.out}: written"]), 0


def _written(path: str, lock: Json) -> tuple[str, int]:
    write_lock(path, lock)
    return f"{path}: locked, SHA-256 {lock['sha256']}; commit it before the run", 0


def _check_not_run_yet(config_path: pathlib.Path, lock: Json) -> None:
    """UserError if the workdir of a config.json already holds results that the lock is to predict."""
    if config_path.suffix != ".json":
        return
    results = config_path.with_name(RESULTS)
    done = [r for r in read_results(results) if (r.stage, r.steps) == ("opd", lock["steps"])]
    if done:
        raise UserError(
            f"{results}: holds {len(done)} results at {lock['steps']} steps; a prediction comes before them"
        )


def _verify(args: argparse.Namespace) -> tuple[str, int]:
    lock = read_lock(args.lock)
    if args.config:
        check_config(lock, load_config(args.config), args.config)
    return f"{args.lock}: unchanged since {lock['locked_at']}" + (
        ", and so is the config" if args.config else ""
    ), 0


def _verdict(args: argparse.Namespace) -> tuple[str, int]:
    lock = read_lock(args.lock)
    saved = files.read_json(args.workdir / "config.json")
    check_config(lock, load_config(str(args.workdir / "config.json")), str(args.workdir / "config.json"))
    judged = judge_curve if lock.get("kind") == CURVE else judge
    result = judged(lock, files.read_json(args.workdir / RESULTS))
    if saved.get("revision") != lock["code_revision"]:
        result["note"] = f"locked with code {lock['code_revision']}, run with {saved.get('revision')}"
    text = (
        json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) if args.json else _in_words(result)
    )
    return text, VERDICTS[result["verdict"]][1]


def _in_words(result: Json) -> str:
    lines = [f"{VERDICTS[result['verdict']][0]} (lock {result['lock_sha256'][:12]})"]
    lines += _predictors_in_words(result) if "predictors" in result else []
    for check in result.get("checks", ()):
        value = "none" if check["value"] is None else f"{check['value']:.4f}"
        interval = check.get("interval")
        value += f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
        reason = f" ({check['reason']})" if "reason" in check else ""
        word = "pass" if check["pass"] else "open" if check.get("inconclusive") else "FAIL"
        lines.append(f"  {word}  {check['check']}: {value}{reason}")
    return "\n".join(lines + ([f"  note  {result['note']}"] if "note" in result else []))


def _predictors_in_words(result: Json) -> Iterator[str]:
    yield f"  goal: RMSE ≤ {result['goal']:.3f}; the noise floor is {result['floor']:.3f}"
    for found in result["predictors"]:
        missed = "no curve" if found["rmse"] is None else f"RMSE {found['rmse']:.3f}"
        band = (
            ""
            if found["inside"] is None
            else f", {found['inside']} of {len(result['lambdas'])} means in its band"
        )
        word = "pass" if found["pass"] else "FAIL"
        yield f"  {word}  {found['predictor']}{' (chosen)' if found['chosen'] else ''}: {missed}{band}; {found['why']}"


def run(argv: Sequence[str]) -> tuple[str, int]:
    """The command's output and exit code; UserError for a user's mistake."""
    args, rest = _parser().parse_known_args(argv)
    strange = [x for x in rest if not (args.command == "lock" and x.startswith("--config."))]
    if strange:
        raise UserError(f"{strange[0]!r} is not known; see --help")
    commands = {"lock": lambda a: _lock(a, rest), "curve": _curve, "curves": _curves, "verify": _verify}
    return commands.get(args.command, _verdict)(args)


def main(argv: Sequence[str]) -> int:
    """0 passed or unchanged, 1 refuted, 2 a mistake or a change, 3 inconclusive."""
    text, code = run(argv)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
