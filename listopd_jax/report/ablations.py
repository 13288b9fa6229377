"""Several runs side by side: one table row for each run, budget and λ, and one panel for each run.

    python -m listopd_jax.report.ablations runs/cliff/plain runs/cliff/guard [--steps=200] [--figure=ablations.png]

A run is a workdir of main; its name is the folder's. Numbers are means over seeds ± their standard deviation. The
figure draws parse against λ at every budget, the untrained forecast, and where EC Eq. 4 (between the measured and the
implied b) and the flip (its median over answers) put the threshold.
"""

import pathlib
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from listopd_jax.errors import Parser, UserError, exit_code
from listopd_jax.records import Calibration, Result, is_number
from listopd_jax.report.inputs import Inputs, read_inputs
from listopd_jax.report.wording import markdown
from listopd_jax.rounding import ceil_div

COLUMNS = ("parse", "useful", "ndcg@1", "mae")
HEAD = ("run", "steps", "λ", "seeds", "parse", "useful", "NDCG@1", "MAE", "K−1 cut", "guarded", "forecast")


def groups(inputs: Inputs) -> dict[tuple[int, float], list[Result]]:
    """The distilled policies of a run by budget and λ, ascending."""
    found = defaultdict(list)
    for record in inputs.results:
        if record.stage == "opd":
            found[record.steps, record.lam].append(record)
    return dict(sorted(found.items()))


def mean_and_deviation(values: Iterable[float | None]) -> str:
    """ "mean ± standard deviation" of the values that are there, "–" for none."""
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    mean = f"{statistics.fmean(there):.3f}"
    return mean + (f" ± {statistics.stdev(there):.3f}" if len(there) > 1 else "")


def truncated(record: Result) -> float:
    """Share of the answers that end after K−1 objects."""
    return record.failures.get("truncated_k_minus_1", 0) / max(1, record.n or 0)


def guarded(inputs: Inputs, lam: float, steps: int) -> float | None:
    """Mean share of guarded tokens over the first `steps` steps of all seeds at λ; None where it was not logged."""
    rows = [
        r for r in inputs.metrics if r.get("stage") == "opd" and r.get("lambda") == lam and r["step"] <= steps
    ]
    shares = [row["guarded_fraction"] for row in rows if is_number(row.get("guarded_fraction"))]
    return statistics.fmean(shares) if shares else None


def forecasts(inputs: Inputs) -> dict[float, float]:
    """λ -> parse of the untrained target."""
    return {r.lam: r.parse for r in inputs.results if r.stage == "forecast"}


def rows(name: str, inputs: Inputs) -> list[tuple[str, ...]]:
    """The table's rows of one run."""
    untrained, found = forecasts(inputs), []
    for (steps, lam), records in groups(inputs).items():
        numbers = [mean_and_deviation(r.metric(column) for r in records) for column in COLUMNS]
        cut, share = mean_and_deviation(map(truncated, records)), guarded(inputs, lam, steps)
        forecast = f"{untrained[lam]:.3f}" if lam in untrained else "–"
        guard = "–" if share is None else f"{share:.3f}"
        found.append((name, str(steps), f"{lam:g}", str(len(records)), *numbers, cut, guard, forecast))
    return found


def save_figure(runs: Mapping[str, Inputs], path: str) -> None:
    """One panel per run: parse against λ at each budget, with its predictions; a PNG."""
    from matplotlib.figure import Figure

    columns = min(4, len(runs))
    height = ceil_div(len(runs), columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * height), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False, sharey=True).flat)
    for axes, (name, inputs) in zip(panels, runs.items(), strict=False):
        _panel(axes, name, inputs)
    for axes in panels[len(runs) :]:
        axes.remove()
    figure.legend(*_legend(figure), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    try:
        # Without matplotlib's version the same numbers give the same file.
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
    except OSError as e:
        raise UserError(f"--figure={path}: cannot be written ({e.strerror or e})") from e


def _panel(axes, name: str, inputs: Inputs) -> None:
    found = groups(inputs)
    for steps, colour in zip(sorted({steps for steps, _ in found}), ("#bccad8", "#0068ab"), strict=False):
        lams = [lam for n, lam in found if n == steps]
        parse = [[r.parse for r in found[steps, lam]] for lam in lams]
        axes.plot(
            lams, [statistics.fmean(p) for p in parse], "o-", ms=3, color=colour, label=f"{steps} steps"
        )
        axes.vlines(lams, [min(p) for p in parse], [max(p) for p in parse], color=colour, lw=1)
    untrained = sorted(forecasts(inputs).items())
    if untrained:
        axes.plot(*zip(*untrained, strict=True), ":", color="#c85200", label="forecast, no training")
    for low, high, colour, label in _thresholds(inputs.calibration):
        axes.axvspan(low, high, color=colour, alpha=0.35, lw=1, label=label)
    axes.set(title=name, xlabel="λ", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)


def _thresholds(calibration: Calibration | None) -> list[tuple[float, float, str, str]]:
    """(low, high, colour, name) of the predictions that exist."""
    if calibration is None:
        return []
    ends = [calibration.lambda_typ_measured, calibration.lambda_typ_implied]
    bands = [(min(ends), max(ends), "#b0569a", "Eq. 4")] if None not in ends else []
    medians = [flip.percentile_50 for flip in calibration.flips if flip.positions == "structural"]
    return bands + [(m, m, "#007a5e", "flip, half of the answers") for m in medians if m is not None]


def _legend(figure) -> tuple[list, list]:
    """Every label of the panels once."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def main(argv: Sequence[str]) -> None:
    """Print the table and draw the figure; UserError for a folder that holds no run."""
    parser = Parser(prog="python -m listopd_jax.report.ablations", description=__doc__.split("\n")[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--steps", type=int, help="only rows of this budget")
    parser.add_argument("--figure", help="a PNG to write")
    args = parser.parse_args(argv)
    runs = {
        " ".join(filter(None, (folder.name, point, kind))): half
        for folder in args.workdirs
        for point, inputs in read_inputs(folder).points().items()
        for kind, half in inputs.halves().items()
    }
    table = [row for name, inputs in runs.items() for row in rows(name, inputs)]
    shown = [row for row in table if args.steps is None or int(row[1]) == args.steps]
    if not shown:
        budgets = sorted({int(row[1]) for row in table})
        raise UserError(f"--steps={args.steps}: no such budget, only {budgets}")
    print(markdown(HEAD, shown))
    if args.figure:
        save_figure(runs, args.figure)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
