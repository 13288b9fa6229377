"""Is a small student as good as the SFT of a large model? The runs of configs/size_axis.py as a file and as tables.

    python -m listopd_jax.report.size_axis runs/size_axis --out=docs/results/size_axis.json

A difference is small model minus large model. `by_list`: paired by held-out list, the mean over the seeds that both
have, with a 95 % percentile bootstrap over lists, which says nothing about other seeds. `by_seed`: its 95 % t interval
over seeds, which share nothing but their number; null for one. NDCG@1 is over the lists that parse, in a difference
both.
"""

import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from listopd_jax.errors import UserError, exit_code
from listopd_jax.records import EXAMPLES, RESULTS, Example, Result, read_examples, read_results
from listopd_jax.report.gain import difference, parser_of, write_or_print
from listopd_jax.report.wording import decimal, interval, markdown
from listopd_jax.task.contract import Parsed
from listopd_jax.task.metrics import bootstrap_intervals, list_metrics

Json = dict[str, Any]
METRICS = ("parse", "useful", "ndcg@1")
NAMES = {
    ("small", "sft_student"): "student's SFT",
    ("small", "sft_teacher"): "teacher",
    ("small_sft", "sft_student"): "small SFT, the teacher's recipe",
    ("small_sft", "sft_teacher"): "small SFT, all lists",
    ("large", "sft_student"): "large, the student's recipe",
    ("large", "sft_teacher"): "large, all lists",
}
"""The models trained in the two SFT stages of each preset."""
RESAMPLES = 2000


class Policy(NamedTuple):
    """Its records by seed, and by seed METRICS of each held-out list by the list's key."""

    records: dict[int, Result]
    lists: dict[int, dict[str, Float[np.ndarray, " M"]]]


def policies(folder: pathlib.Path) -> dict[str, Policy]:
    """Every trained policy of the workdirs PRESET/SEED in `folder` by name; UserError if there is none."""
    found: dict[str, Policy] = {}
    for path in sorted(folder.glob(f"*/*/{RESULTS}")):
        preset, seed = path.parts[-3:-1]
        if not seed.isdigit():
            continue
        examples = read_examples(path.with_name(EXAMPLES))
        for record in sorted(read_results(path), key=lambda r: r.lam or 0.0):
            if name := _name(preset, record):
                policy = found.setdefault(name, Policy({}, {}))
                policy.records[int(seed)] = record
                own = (e for e in examples if e.identity == record.identity)
                policy.lists[int(seed)] = {e.key: _metrics(e) for e in own}
    if not found:
        raise UserError(
            f"{folder}: holds no workdir PRESET/SEED of configs/size_axis.py with a policy; run it first"
        )
    return found


def _name(preset: str, record: Result) -> str | None:
    if record.stage == "opd":
        kind = "guarded" if record.guard else "", record.sweep  # else they would take one another's place
        return ", ".join([f"student, λ = {record.lam:g}", *filter(None, kind)])
    return NAMES.get((preset, record.stage))


def _metrics(example: Example) -> Float[np.ndarray, " M"]:
    """METRICS of one list; NaN where undefined."""
    values = list_metrics(Parsed(example.failure, example.scores), example.true_scores)
    return np.array([values[metric] for metric in METRICS])


def figures(name: str, policy: Policy) -> Json:
    """The row of size_axis.json for a policy: means and standard deviations over the seeds, None if there is none."""
    row: Json = {"policy": name, "seeds": sorted(policy.records)}
    for metric in METRICS:
        values = [value for r in policy.records.values() if (value := r.metric(metric)) is not None]
        row[metric] = statistics.fmean(values) if values else None
        row[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def compared(student: Policy, large: Policy) -> Json:
    """Small minus large model in each of METRICS; UserError where no seed is done of both, or answers are missing."""
    seeds = sorted(student.records.keys() & large.records.keys())
    if not seeds:
        raise UserError("no seed is done of both the student and a large model; let the runs finish")
    keys = sorted(student.lists[seeds[0]])
    for policy in (student, large):
        for s in seeds:
            _check_lists(policy.records[s], policy.lists[s], keys)
    gaps = np.array([[student.lists[s][key] - large.lists[s][key] for key in keys] for s in seeds])
    found, intervals = _over_seeds(gaps), bootstrap_intervals(_over_seeds(gaps), RESAMPLES, seed=0)
    return {
        metric: {
            "mean": float(np.nanmean(found[:, i])) if intervals[i] else None,
            "by_list": intervals[i],
            "by_seed": _by_seed(student, large, metric),
        }
        for i, metric in enumerate(METRICS)
    }


def _check_lists(record: Result, lists: Mapping[str, Any], keys: Sequence[str]) -> None:
    if len(lists) != record.n:
        raise UserError(
            f"{EXAMPLES} of {record.run}, seed {record.seed}, has {len(lists)} of its {record.n} answers; keep the "
            "run's own file, or set evaluation.examples to the number of lists and evaluate again"
        )
    if sorted(lists) != list(keys):
        raise UserError(
            f"{record.run}, seed {record.seed}: was judged on other lists than the rest; use one `data`"
        )


def _over_seeds(gaps: Float[np.ndarray, "S N M"]) -> Float[np.ndarray, "N M"]:
    """Means over the seeds that define a difference; NaN where none does."""
    defined = np.isfinite(gaps)
    with np.errstate(invalid="ignore"):
        return np.where(defined, gaps, 0.0).sum(0) / defined.sum(0)


def _by_seed(student: Policy, large: Policy, metric: str) -> list[float] | None:
    """Ends of the t interval; None for one seed, and where of a policy no list parses."""
    if any(r.metric(metric) is None for policy in (student, large) for r in policy.records.values()):
        return None
    found = difference(student.records, large.records, metric)
    return None if found["low"] is None else [found["low"], found["high"]]


def summary(found: Mapping[str, Policy]) -> Json:
    """The content of size_axis.json: each policy, and each student and control less each large model.

    UserError where one of the two kinds is missing: there is nothing to compare.
    """
    small = [name for name in found if name.startswith(("student, ", "small SFT, "))]
    pairs = [(s, b) for s in small for b in found if b.startswith("large, ")]
    if not pairs:
        raise UserError(f"only {', '.join(found)}: run presets small and large of configs/size_axis.py first")
    return {
        "policies": [figures(name, policy) for name, policy in found.items()],
        "differences": [{"small": s, "less": b, **compared(found[s], found[b])} for s, b in pairs],
    }


def tables(found: Json) -> str:
    """A summary in Markdown."""
    rows = [(row["policy"], *(_spread(row, metric) for metric in METRICS)) for row in found["policies"]]
    gaps = [(gap["small"], gap["less"], *(_gap(gap[m]) for m in METRICS)) for gap in found["differences"]]
    head = ("parse", "useful", "NDCG@1")
    return markdown(("policy", *head), rows) + "\n\n" + markdown(("small", "less", *head), gaps)


def _spread(row: Json, metric: str) -> str:
    sd = row[f"{metric}_sd"]
    return decimal(row[metric]) + ("" if sd is None else f" ± {decimal(sd)}")


def _gap(found: Json) -> str:
    return f"{decimal(found['mean'])} [{interval(found['by_list'], to=', ')}]"


def main(argv: Sequence[str]) -> None:
    """Print the tables and, with --out, write the file; else the summary is printed too."""
    args = parser_of("size_axis", __doc__, "workdirs PRESET/SEED").parse_args(argv)
    found = summary(policies(args.folder))
    print(tables(found))
    write_or_print(found, args.out)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
