"""Did extrapolation pay? The ablations of configs/gain.py as one JSON file and as a Markdown table.

    python -m listopd_jax.report.gain runs/gain --out=docs/results/gain.json

`mae` is the error of the expected scores over all held-out lists, parsed or not. A difference is taken seed by seed to
λ = 1 of the same pair of teacher and base after N steps (negative: better), and has a 95 % t interval over the seeds
that both have, null for fewer than two. λ = 1 trained for 2N steps is one of the controls.
"""

import json
import math
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from listopd_jax import files
from listopd_jax.errors import Parser, UserError, exit_code
from listopd_jax.records import RESULTS, Result, read_results
from listopd_jax.report.findings import policy_name
from listopd_jax.report.wording import markdown

Json = dict[str, Any]
Seeds = Mapping[int, Result]  # one policy, trained once for each seed

HEAD = ("policy", "seeds", "λ", "parse", "MAE", "MAE − that of λ = 1", "MAE − that of λ = 1, 2N steps")


def difference(policy: Seeds, reference: Seeds, metric: str = "expected_mae") -> Json:
    """Mean of policy minus reference over the seeds that both have, with its 95 % t interval."""
    seeds = sorted(policy.keys() & reference.keys())
    if not seeds:
        raise UserError("no seed is done in both of two ablations that are compared; let the runs finish")
    return mean_interval([policy[s].metric(metric) - reference[s].metric(metric) for s in seeds])


def mean_interval(values: Sequence[float]) -> Json:
    """Mean of paired differences with its 95 % t interval, which one value alone does not have."""
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None}
    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def figures(policy: Seeds) -> Json:
    """Means over the seeds."""
    records = policy.values()
    return {
        "parse": statistics.fmean(r.parse for r in records),
        "mae": statistics.fmean(r.expected_mae for r in records),
    }


def compared(policy: Seeds, reference: Seeds) -> Json:
    """λ, means and difference of a policy."""
    # Unpacked as a check: all seeds of a policy have one λ.
    (lam,) = {record.lam for record in policy.values()}
    return {"lambda": lam, **figures(policy), "mae_difference": difference(policy, reference)}


def policies(folder: pathlib.Path) -> dict[str, Seeds]:
    """The policies of the ablations in `folder` by name; UserError where one is missing."""
    ablations = ("same", "plain", "guarded", "independent", "independent_guarded")
    found = {ablation: _trained(folder / ablation / RESULTS) for ablation in ablations}
    budgets = sorted({steps for steps, _ in found["same"]})
    if len(budgets) != 2:
        raise UserError(f"{folder / 'same' / RESULTS}: needs λ = 1 after N and after 2N steps, has {budgets}")
    names = {ablation: (ablation, budgets[0]) for ablation in ablations} | {"longer": ("same", budgets[1])}
    seeds = {
        name: {seed: record for (steps, seed), record in found[ablation].items() if steps == budget}
        for name, (ablation, budget) in names.items()
    }
    for name, records in seeds.items():
        if not records:
            raise UserError(
                f"{folder / names[name][0] / RESULTS}: no policy after {names[name][1]} steps yet"
            )
    return seeds


def distilled(path: pathlib.Path) -> list[Result]:
    """The distilled policies of an ablation; UserError if a seed has several, which would be taken for one another."""
    records = [r for r in read_results(path) if r.stage == "opd"]
    kinds = list(dict.fromkeys(policy_name(*r.policy) for r in records))
    if len(kinds) > 1:
        raise UserError(
            f"{path}: an ablation has one policy per seed, this one has more ({'; '.join(kinds[:2])}): run it with one "
            "of opd.lambdas, and without opd.plain_lambdas and opd.sweep"
        )
    return records


def _trained(path: pathlib.Path) -> dict[tuple[int, int], Result]:
    """The distilled policies of an ablation by steps and seed."""
    records = distilled(path)
    if any(r.expected_mae is None for r in records):
        raise UserError(f"{path}: has no expected_mae; run the ablation with evaluation.expected=True")
    return {(r.steps, r.seed): r for r in records}


def summary(folder: pathlib.Path) -> Json:
    """The content of gain.json for the ablations in `folder`."""
    ablations = policies(folder)
    teachers = [r for r in read_results(folder / "same" / RESULTS) if r.stage == "sft_teacher"]
    if not teachers:
        raise UserError(f"{folder / 'same' / RESULTS}: has no record of the teacher")
    return {
        "lambda_1": figures(ablations["same"]),
        "guarded": compared(ablations["guarded"], ablations["same"]),
        "teacher": figures({0: teachers[0]}),
        "controls": {
            "independent_teacher": compared(ablations["independent_guarded"], ablations["independent"]),
            "longer_lambda_1": compared(ablations["longer"], ablations["same"]),
        },
    }


def table(folder: pathlib.Path) -> str:
    """Every policy in Markdown, means ± standard deviations over seeds."""
    ablations, rows = policies(folder), []
    for name, seeds in ablations.items():
        reference = ablations["independent" if name.startswith("independent") else "same"]
        to_longer = in_words(difference(seeds, ablations["longer"])) if name in ("plain", "guarded") else ""
        to_one = "" if seeds is reference else in_words(difference(seeds, reference))
        records = list(seeds.values())
        cells = (_spread([r.parse for r in records]), _spread([r.expected_mae for r in records]))
        rows.append((name, str(len(records)), f"{records[0].lam:g}", *cells, to_one, to_longer))
    return markdown(HEAD, rows)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def in_words(found: Json) -> str:
    """A difference with its interval: "-0.100 [-0.132, -0.068]"."""
    ends = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['mean']:+.3f}{ends}"


def parser_of(module: str, doc: str, workdirs: str) -> Parser:
    """The arguments of a command that summarises a folder of `workdirs`, and may write that to a file."""
    parser = Parser(prog=f"python -m listopd_jax.report.{module}", description=doc.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help=f"the folder of the {workdirs}")
    parser.add_argument("--out", help="the JSON file to write")
    return parser


def write_or_print(found: Json, out: str | None) -> None:
    """Write a summary to the file `out`, or print it where there is none."""
    if out:
        files.write_json(out, found)
    else:
        print(json.dumps(found, indent=2))


def main(argv: Sequence[str]) -> None:
    """Print the table and write the file; UserError where an ablation is missing."""
    args = parser_of("gain", __doc__, "ablations' workdirs").parse_args(argv)
    print(table(args.folder))
    write_or_print(summary(args.folder), args.out)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
