"""python -m launch.matrix --root=runs/matrix --out=docs/matrix.md [--json=FILE] [--only=clip,no_base]
    [--clothing=FILE]

Run the paper's experiments (configs/paper) at tiny scale, one ablation after another, and write what EC saw next to
what we saw. Teacher and base are trained once and shared. What is done is left alone; Ctrl-C and SIGTERM let the run
save and stop, and the same command resumes. The table is rewritten after each call, with what is done by then.
Experiments on real reviews run where their file is given.

Exit code 0: all done; 1: some failed; 2: a mistake to fix; 130 or 143: stopped.
"""

import importlib
import os
import pathlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

import configs.paper
from configs.paper.experiment import Curve, Experiment
from launch import cli
from launch.local import run_all
from listopd_jax import files
from listopd_jax.errors import UserError, exit_code, unknown_name
from listopd_jax.records import RESULTS, read_results
from listopd_jax.report.wording import markdown
from listopd_jax.theory.cliff import t_half_width

MODELS = "models"  # the folder of the run that trains teacher and base
Seen = Mapping[str, Mapping[str, Curve]]  # experiment -> ablation -> what it came to
HEAD = ("experiment", "ablation", "λ", "seeds", "parse, 95 % t interval")


class Ablation(NamedTuple):
    """One job of the matrix."""

    experiment: str
    name: str

    @property
    def folder(self) -> str:
        """Below the matrix's root."""
        return f"{self.experiment}/{self.name}"


def main(argv: Sequence[str]) -> int:
    """Parse, run what is not done, write the table."""
    parser = cli.parser("launch.matrix", __doc__)
    parser.add_argument("--root", required=True, type=pathlib.Path, help="folder of the matrix")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the Markdown file to write")
    parser.add_argument("--json", type=pathlib.Path, help="a JSON file of the same numbers, seed by seed")
    parser.add_argument("--only", default="", help="experiments, as NAME,NAME; default: all")
    parser.add_argument("--clothing", default="", help="data.path of the experiments on real reviews")
    args = parser.parse_args(argv)
    chosen = select(args.only)
    _check_clothing(args.clothing, chosen if args.only else {})
    code = run(args.root, chosen, args.clothing)
    files.write_text(args.out, page(args.root, chosen))
    if args.json:
        files.write_json(args.json, figures(curves(args.root, chosen)))
    print(args.out)
    return code


def select(only: str = "") -> dict[str, Experiment]:
    """The experiments of configs/paper by name, or those of `only`."""
    names = [m.name for m in pkgutil.iter_modules(configs.paper.__path__) if m.name != "experiment"]
    selected = [name for name in only.split(",") if name] or names
    for name in selected:
        if name not in names:
            raise unknown_name("experiment", name, names)
    return {name: importlib.import_module(f"configs.paper.{name}").EXPERIMENT for name in selected}


def _check_clothing(clothing: str, asked: Mapping[str, Experiment]) -> None:
    """UserError if the file of real reviews is missing, or is not given though an experiment of `asked` needs it."""
    if clothing and not pathlib.Path(clothing).is_file():
        raise UserError(f"--clothing={clothing}: no such file")
    needing = [name for name, experiment in asked.items() if experiment.on_clothing]
    if needing and not clothing:
        raise UserError(
            f"--clothing=FILE is missing: {', '.join(needing)} is about real reviews (docs/data.md)"
        )


def run(
    root: pathlib.Path,
    chosen: Mapping[str, Experiment],
    clothing: str = "",
    program: Sequence[str] = ("-m", "listopd_jax.main"),
) -> int:
    """Train the models, then every ablation; the exit code of `launch.local`, 1 too if a job stopped before its end."""
    chosen = {name: e for name, e in chosen.items() if clothing or not e.on_clothing}
    logs = root / "logs"
    # One job runs at a time, so what one compiles serves the others.
    env = {"JAX_COMPILATION_CACHE_DIR": str(root.resolve() / "compile_cache"), **os.environ}
    if not done(root, MODELS) and not all(e.on_clothing for e in chosen.values()):
        code = run_all({MODELS: [sys.executable, *program, *_models_arguments(root)]}, 1, logs, env)
        if code or not done(root, MODELS):
            return code or 1
    waiting = [ablation for ablation in ablations(chosen) if not done(root, ablation.folder)]
    commands = {
        ablation.folder.replace("/", "_"): [
            sys.executable,
            *program,
            *_arguments(root, ablation, chosen[ablation.experiment], clothing),
        ]
        for ablation in waiting
    }
    return run_all(commands, 1, logs, env) or int(
        not all(done(root, ablation.folder) for ablation in waiting)
    )


def ablations(chosen: Mapping[str, Experiment]) -> list[Ablation]:
    """All ablations, experiment by experiment."""
    return [
        Ablation(name, ablation) for name, experiment in chosen.items() for ablation in experiment.ablations
    ]


def done(root: pathlib.Path, folder: str) -> bool:
    """Whether the job there came to its end: the report is the last that it writes."""
    return (root / folder / "report.html").exists()


def _models_arguments(root: pathlib.Path) -> list[str]:
    return [
        "--config=configs/paper/lambda_sweep.py:tiny", f"--workdir={root / MODELS}", "--config.opd.lambdas=()",
        "--config.train.export=True",
    ]  # fmt: skip


def _arguments(root: pathlib.Path, ablation: Ablation, experiment: Experiment, clothing: str) -> list[str]:
    """The arguments of an ablation: its models are the exported ones, except those that it trains itself."""
    given = {"data.path": clothing} if experiment.on_clothing else _exported(root, ablation, experiment)
    return [
        f"--config=configs/paper/{ablation.experiment}.py:tiny,{ablation.name}",
        f"--workdir={root / ablation.folder}",
        *(f"--config.{name}={value}" for name, value in given.items()),
    ]


def _exported(root: pathlib.Path, ablation: Ablation, experiment: Experiment) -> dict[str, object]:
    """The fields by which an ablation reads models of the run that trains them, and their tokenizer."""
    export = root / MODELS / "export"
    given: dict[str, object] = {"tokenizer.path": export / "sft_teacher"}
    for role, source in {"teacher": experiment.teacher, "student": "student"}.items():
        if role not in experiment.own or role in experiment.trained_on:
            given[f"{role}.weights"] = export / f"sft_{source}"
        if role not in experiment.own:
            given |= {f"sft.{role}.{name}": 0 for name in ("steps", "epochs")}
    if ablation.name in experiment.reference:
        given["reference.weights"] = export / f"sft_{experiment.reference[ablation.name]}"
    return given


# --- the table ---


def curves(root: pathlib.Path, chosen: Mapping[str, Experiment]) -> Seen:
    """The parse curves of each ablation."""
    return {
        name: {ablation: curve(root / name / ablation, e.policy) for ablation in e.ablations}
        for name, e in chosen.items()
    }


def figures(seen: Seen) -> list[dict[str, object]]:
    """The same as JSON values: the parse of every seed of an ablation at a λ."""
    return [
        {"experiment": name, "ablation": ablation, "lambda": lam, "parse": list(parse)}
        for name, ablations_of in seen.items()
        for ablation, one in ablations_of.items()
        for lam, parse in one.items()
    ]


def page(root: pathlib.Path, chosen: Mapping[str, Experiment]) -> str:
    """The matrix in Markdown: what EC saw, what we saw, whether they agree; then every number."""
    seen = curves(root, chosen)
    verdicts = [(name, e.ec, verdict(e, seen[name])) for name, e in chosen.items()]
    rows = [
        row
        for ablation in ablations(chosen)
        for row in _rows(ablation, seen[ablation.experiment][ablation.name])
    ]
    return (
        "\n\n".join(
            [
                "# The paper's experiments, at tiny scale",
                "Models of 0.2 million parameters on the embedded task (`configs/paper`), made by",
                f"    python -m launch.matrix --root={root} --out=docs/matrix.md",
                markdown(("experiment", "EC saw", "ours agrees"), verdicts),
                markdown(HEAD, rows) if rows else "Nothing has run yet.",
            ]
        )
        + "\n"
    )


def curve(workdir: pathlib.Path, policy: str = "opd") -> Curve:
    """λ -> parse of each seed at the last step of the runs of stage `policy` in `workdir`; {} if it has none yet."""
    records = [r for r in read_results(workdir / RESULTS) if r.stage == policy and r.parse is not None]
    last = max((r.steps for r in records), default=0)
    lambdas = sorted({r.lam for r in records if r.steps == last}, key=lambda lam: lam or 0.0)
    return {lam: [r.parse for r in records if (r.lam, r.steps) == (lam, last)] for lam in lambdas}


def verdict(experiment: Experiment, seen: Mapping[str, Curve]) -> str:
    """Yes or no, by the experiment's own rule; what is missing where it cannot be judged yet."""
    try:
        return "yes" if experiment.agrees(seen) else "**no**"
    except UserError as e:
        return f"open: {e}"


def _rows(ablation: Ablation, seen: Curve) -> list[tuple[str, ...]]:
    return [
        (
            ablation.experiment,
            ablation.name,
            "–" if lam is None else f"{lam:g}",
            str(len(parse)),
            _interval(parse),
        )
        for lam, parse in seen.items()
    ]


def _interval(parse: Sequence[float]) -> str:
    half = t_half_width(np.array(parse), 0.95)
    return f"{np.mean(parse):.3f}" + ("" if half is None else f" ± {half:.3f}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
