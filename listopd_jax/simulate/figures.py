"""The figures and numbers of docs/theory.md, all of them from one command (about two minutes on two cores):

    python -m listopd_jax.simulate.figures [--out=docs/figures]

Each experiment is a function that returns JSON values; `numbers.json` holds them all, and the figures draw
them. The two processes are these: a *clean* teacher, surer than the base everywhere (p =
.9993, b = .81, EC's values), and a *truncating* one, which is less sure of the comma after object K−1 (p =
.684) than the base (b = .988).
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from listopd_jax import files
from listopd_jax.errors import Parser, exit_code
from listopd_jax.ops.objective import Variant
from listopd_jax.rounding import ceil_div
from listopd_jax.simulate.process import Process, Recipe, listwise, run_grid, single_position
from listopd_jax.theory.budget import budget_lambda
from listopd_jax.theory.cliff import crossings
from listopd_jax.theory.estimators import flip_lambda_of, limit_log_odds
from listopd_jax.theory.explain import explain
from listopd_jax.theory.plots import PNG, save_tail_plot
from listopd_jax.theory.thresholds import clip_boundary_log_odds, clip_safe_lambda, flip_lambda, probability

CLEAN, TRUNCATING = (0.9993, 0.81), (0.684, 0.988)
SURE = (0.99, 0.8)  # of the budget experiment: a clip boundary that few steps can reach
SURE_STRUCTURE = (0.9993, 0.97)  # of the truncating process: the base knows its brackets
SPREAD = (0.5, 0.5)  # of the log-odds at the transition over prompts, teacher and base
LAMBDAS = [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.75, 2.0]
BUDGETS = [40, 80, 100, 120, 160, 640]
CLIPS = [1.5, 2.0, 5.0, np.inf]
SEEDS = [0, 1, 2]
HALF = 0.5  # parse at the midpoint of a simulated cliff, which falls from 1 to 0

VARIANTS = {
    "full_vocab": Variant(ratio="none", estimator="full_vocab"),
    "sampled, no ratio": Variant(ratio="none"),
    "sampled, trainer_rollout": Variant(ratio="trainer_rollout"),
    "sampled, teacher_student": Variant(ratio="teacher_student"),
    "sampled, aspo": Variant(ratio="aspo"),
    "sampled, teacher_student, no_base": Variant(ratio="teacher_student", advantage="no_base"),
}


def truncating_process() -> Process:
    """Lists of 8 objects whose transition the teacher knows less well than the base."""
    return listwise(SURE_STRUCTURE, TRUNCATING, spread=SPREAD)


def clean_process() -> Process:
    """Lists of 8 objects where the teacher is surer than the base of everything."""
    return listwise(CLEAN, CLEAN, spread=SPREAD)


def estimator_limits() -> dict:
    """Where the mean flow ends against λ, per ratio: no simulation."""
    lams = np.round(np.arange(1.0, 2.01, 0.05), 3)
    cases = {"clean": CLEAN, "truncating": TRUNCATING}
    ratios = {"none": np.inf, "teacher_student": 5.0, "aspo": 5.0}
    limits = {
        case: {r: [float(limit_log_odds(*pb, lam, c, r)) for lam in lams] for r, c in ratios.items()}
        for case, pb in cases.items()
    }
    flips = {r: flip_lambda_of(*TRUNCATING, r, c) for r, c in ratios.items()}
    finite = {
        case: {r: np.clip(x, -60, 60).tolist() for r, x in rows.items()} for case, rows in limits.items()
    }
    return {"lambdas": lams.tolist(), "log_odds": finite, "lambda_flip_of": flips}


def budget_shift() -> dict:
    """λ whose single-position run just reaches the level after N steps: simulated (SGD) and by the integral."""
    cases = {
        "flip": (TRUNCATING, 0.0, 0.2, np.geomspace(1.15, 4, 40), [80, 100, 120, 150, 200, 400, 1000]),
        "clip": (
            SURE,
            clip_boundary_log_odds(SURE[0], 5),
            1.0,
            np.geomspace(1.4, 6, 40),
            [300, 500, 1000, 2000, 4000],
        ),
    }
    result, recipe = {}, VARIANTS["full_vocab"]
    for name, ((p, b), level, lr, lams, budgets) in cases.items():
        run = run_grid(single_position(p, b, 64), Recipe(recipe, 64, "sgd", lr), lams, eval_steps=budgets)
        beyond = np.sign(b - p) * (run.log_odds[:, 0, 0, :, 0].T - level)
        dense = np.geomspace(budgets[0], budgets[-1], 60)
        result[name] = {
            "budgets": budgets,
            "simulated": crossings(lams, beyond, 0.0).tolist(),
            "integral": np.asarray(budget_lambda(p, b, level, lr, np.array(budgets, float))).tolist(),
            "line": [dense.tolist(), np.asarray(budget_lambda(p, b, level, lr, dense)).tolist()],
        }
    return result


def midpoints(greedy: np.ndarray, lams: list[float]) -> list[float | None]:
    """Per budget, the λ where greedy parse [λ, budget] passes ½; None if it holds to the end of the grid."""
    at = crossings(np.array(lams), greedy.T, HALF)
    return [None if np.isnan(x) or x >= lams[-1] else float(x) for x in at]


def estimators_against_budget() -> dict:
    """Greedy parse of the truncating process per estimator, mean over seeds [λ][budget], and midpoints."""
    result = {}
    for name, variant in VARIANTS.items():
        recipe = Recipe(variant, lists=2, lr=0.05, mismatch=0.05)
        greedy = run_grid(truncating_process(), recipe, LAMBDAS, [5.0], SEEDS, BUDGETS).greedy[:, 0].mean(1)
        result[name] = {"parse": greedy.tolist(), "midpoints": midpoints(greedy, LAMBDAS)}
    return result


def clips_against_budget(process: Process, optimizer: str, lr: float) -> dict:
    """Greedy and sampled parse per clip under EC's Eq. 3, mean over seeds [λ][budget], and the midpoints."""
    recipe = Recipe(VARIANTS["sampled, teacher_student"], 2, optimizer, lr, mismatch=0.05)
    curves = run_grid(process, recipe, LAMBDAS, CLIPS, SEEDS, BUDGETS)
    greedy, sampled = curves.greedy.mean(2), curves.sampled.mean(2)
    return {
        str(c): {
            "parse": greedy[:, i].tolist(),
            "sampled_parse": sampled[:, i].tolist(),
            "midpoints": midpoints(greedy[:, i], LAMBDAS),
        }
        for i, c in enumerate(CLIPS)
    }


def shocks() -> dict:
    """Share of readings of a clean position whose mode is lost (or overflowed) under very large steps, per clip."""
    lams, budgets, lost = [1.0, 1.2, 1.5, 2.0, 3.0], list(range(20, 2001, 20)), {}
    for optimizer, lr in (("sgd", 100.0), ("adam", 2.0)):
        recipe = Recipe(VARIANTS["sampled, teacher_student"], 8, optimizer, lr)
        curves = run_grid(single_position(*CLEAN, 160), recipe, lams, CLIPS, range(8), budgets)
        wrong = ~(curves.log_odds[..., 0] > 0)  # NaN counts as lost
        lost[optimizer] = {str(c): wrong[:, i].mean((1, 2)).tolist() for i, c in enumerate(CLIPS)}
    return {"lambdas": lams, "lost": lost}


def draw_limits(numbers: dict, path: pathlib.Path) -> None:
    """Limits of the mean flow: tail mass for the clean position, probability of the comma for the truncating one."""
    figure, (left, right) = _axes(2)
    for ratio, log_odds in numbers["log_odds"]["clean"].items():
        left.semilogy(numbers["lambdas"], probability(-np.array(log_odds)), label=ratio)
    left.axhline((1 - CLEAN[0]) / 5, color="gray", ls="--", label="clip boundary, c = 5")
    left.axvline(clip_safe_lambda(*CLEAN, 5), color="gray", lw=1, label="λ* (EC Eq. 4)")
    left.set(ylim=(1e-7, 2e-3), title="clean: p = .9993, b = .81", ylabel="tail mass at the limit")
    for ratio, log_odds in numbers["log_odds"]["truncating"].items():
        (line,) = right.plot(numbers["lambdas"], probability(np.array(log_odds)), label=ratio)
        right.axvline(numbers["lambda_flip_of"][ratio], color=line.get_color(), lw=1, ls=":")
    right.axhline(0.5, color="gray", ls="--", label="mode boundary")
    right.set(title="truncating: p = .684, b = .988", ylabel="probability of the comma at the limit")
    _finish(figure, path)


def draw_budgets(numbers: dict, path: pathlib.Path) -> None:
    """Simulated and predicted λ at which N steps just reach a level."""
    figure, axes = _axes(2)
    asymptotes = {"flip": flip_lambda(*TRUNCATING), "clip": clip_safe_lambda(*SURE, 5)}
    for ax, (name, rows) in zip(axes, numbers.items(), strict=True):
        ax.plot(*rows["line"], label="integral (mean field)")
        ax.plot(rows["budgets"], rows["simulated"], "o", label="simulated (SGD, full_vocab)")
        ax.axhline(asymptotes[name], color="gray", ls="--", label="closed form, N → ∞")
        ax.set(title=f"{name} level", ylabel="λ that N steps just reach")
    _finish(figure, path, "budget N, steps")


def draw_curves(
    panels: dict[str, np.ndarray], lines: dict[str, dict[str, float]], path: pathlib.Path
) -> None:
    """Greedy parse [λ][budget] against λ, one panel each; `lines`: panel → thresholds to mark."""
    figure, axes = _axes(len(panels))
    for ax, (name, parse) in zip(axes, panels.items(), strict=True):
        for curve, budget in zip(np.array(parse).T, BUDGETS, strict=True):
            ax.plot(LAMBDAS, curve, marker=".", label=f"N = {budget}")
        for label, lam in lines.get(name, {}).items():
            ax.axvline(lam, color="gray", ls="--", label=f"{label} = {lam:.3f}")
        ax.set(title=name, ylim=(-0.03, 1.03), ylabel="greedy parse")
    _finish(figure, path)


def _axes(count: int):
    from matplotlib.figure import Figure

    rows, columns = ceil_div(count, 3), min(count, 3)
    figure = Figure(figsize=(4.4 * columns, 3.5 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _finish(figure, path: pathlib.Path, xlabel: str = "extrapolation weight λ") -> None:
    for ax in figure.axes:
        ax.set_xlabel(xlabel)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.savefig(path, format="png", **{**PNG, "dpi": 110})


def draw_estimators(numbers: dict, path: pathlib.Path) -> None:
    """The truncating process per estimator, with the λ at which each ratio's own limit flips."""
    ratios = {"sampled, teacher_student": "teacher_student", "sampled, aspo": "aspo"}
    lines = {
        name: {"its λ_flip": flip_lambda_of(*TRUNCATING, ratios.get(name, "none"), 5.0)}
        for name in numbers
        if "no_base" not in name
    }
    draw_curves({name: rows["parse"] for name, rows in numbers.items()}, lines, path)


def draw_clips(numbers: dict, path: pathlib.Path) -> None:
    """Both processes for three clips, with EC's threshold where it is defined."""
    cases = {f"{case}, c = {c}": (case, c) for case in ("clean", "truncating") for c in ("1.5", "5.0", "inf")}
    lines = {
        name: {"λ* (EC Eq. 4)": clip_safe_lambda(*CLEAN, float(c))}
        for name, (case, c) in cases.items()
        if case == "clean" and c != "inf"
    }
    draw_curves({name: numbers[case][c]["parse"] for name, (case, c) in cases.items()}, lines, path)


def draw_midpoints(numbers: dict, path: pathlib.Path) -> None:
    """Midpoint of the truncating process against the budget per clip, one panel for each optimizer."""
    figure, axes = _axes(2)
    limit = flip_lambda_of(*TRUNCATING, "teacher_student", 5.0)
    for ax, (title, case) in zip(axes, {"Adam": "truncating", "SGD": "truncating_sgd"}.items(), strict=True):
        for c, rows in numbers[case].items():
            ax.semilogx(BUDGETS, np.array(rows["midpoints"], float), marker="o", label=f"c = {c}")
        ax.axhline(limit, color="gray", ls="--", label=f"λ_flip of this ratio = {limit:.3f}")
        ax.set(title=f"teacher_student, {title}", ylabel="midpoint λ", ylim=(1.1, 2.0))
        ax.set_xticks([40, 80, 160, 640], ["40", "80", "160", "640"])
        ax.set_xticks([], minor=True)
    _finish(figure, path, "budget N, steps")


def rounded(value):
    """The same JSON values with floats of four decimals: what the figures can show."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


def make(out: pathlib.Path) -> dict:
    """Run every experiment, write numbers.json and the figures into `out`; returns the numbers."""
    numbers = {
        "limits": estimator_limits(),
        "budget": budget_shift(),
        "estimators": estimators_against_budget(),
        "clips": {
            "truncating": clips_against_budget(truncating_process(), "adam", 0.05),
            "clean": clips_against_budget(clean_process(), "adam", 0.05),
            "truncating_sgd": clips_against_budget(truncating_process(), "sgd", 20.0),
        },
        "shocks": shocks(),
    }
    files.write_json(out / "numbers.json", rounded(numbers))
    save_tail_plot(explain(*CLEAN, 5.0), out / "tail.png")
    draw_limits(numbers["limits"], out / "limits.png")
    draw_budgets(numbers["budget"], out / "budget.png")
    draw_estimators(numbers["estimators"], out / "estimators.png")
    draw_clips(numbers["clips"], out / "clips.png")
    draw_midpoints(numbers["clips"], out / "midpoints.png")
    return numbers


def main(argv: Sequence[str]) -> None:
    """Make the figures."""
    parser = Parser(prog="python -m listopd_jax.simulate.figures", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/figures"))
    out = parser.parse_args(argv).out
    make(out)
    print(f"figures and numbers.json: {out}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
