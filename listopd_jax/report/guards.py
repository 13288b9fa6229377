"""Which guard keeps the contract? The ablations of configs/guards.py as one JSON file and as a Markdown table.

    python -m listopd_jax.report.guards runs/guards --out=docs/results/guards.json
    python -m listopd_jax.report.guards runs/guards --against=one_mask    # or teacher, or a results.json

Differences are taken seed by seed, as a rule to λ = 1 of the same pair and estimator, with a 95 % t interval over the
seeds that both have. `goal`: parse within .02 of that λ = 1, and the interval of the difference in the error of the
expected scores below 0. `guarded`: share of sampled tokens that the guard held back. `margin`: with
evaluation.margins, the 5 % quantile of the margins of structural tokens in nats (stages/margins.py).
"""

import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from listopd_jax import files
from listopd_jax.errors import UserError, exit_code
from listopd_jax.records import RESULTS, Result, read_results
from listopd_jax.report.gain import Seeds, difference, distilled, figures, in_words, parser_of
from listopd_jax.report.wording import markdown

Json = dict[str, Any]
REFERENCES = ("one", "one_sampled")
OF_SAMPLES = ("contract_reward",)  # ablations whose λ = 1 is that of the sampled estimator
PARSE_LOSS = 0.02  # against λ = 1 that the goal allows
MEASURED = ("parse", "useful", "expected_mae")
OPTIONAL = {"guarded": "guarded", "structural_margin": "margin"}  # field of a record -> its name here
HEAD = (
    "pair",
    "guard",
    "seeds",
    "parse",
    "useful",
    "MAE",
    "MAE − that of λ = 1",
    "guarded",
    "margin",
    "goal",
)


def compared(ablations: Mapping[str, Seeds]) -> list[Json]:
    """The rows of guards.json for one pair; an ablation is compared once λ = 1 has one of its seeds."""
    rows = []
    for ablation, seeds in ablations.items():
        row = {
            "ablation": ablation,
            "lambda": next(iter(seeds.values())).lam,
            "seeds": len(seeds),
            **figures(seeds),
        }
        row["useful"] = statistics.fmean(r.useful for r in seeds.values())
        row |= _optional(seeds)
        rows.append(row if ablation in REFERENCES else row | _to_one(ablations, ablation))
    return rows


def _optional(seeds: Seeds) -> Json:
    """Means of what records may have, over the seeds that have it; their number where these are not all."""
    found: Json = {}
    for field, name in OPTIONAL.items():
        values = [value for r in seeds.values() if (value := r.metric(field)) is not None]
        if values:
            found[name] = statistics.fmean(values)
        if 0 < len(values) < len(seeds):
            found[f"{name}_seeds"] = len(values)
    return found


def _to_one(ablations: Mapping[str, Seeds], ablation: str) -> Json:
    """The ablation against λ = 1 of its estimator, over the seeds that both have, and whether that meets the goal."""
    one = ablations.get("one_sampled" if ablation in OF_SAMPLES else "one", {})
    both = ablations[ablation].keys() & one.keys()
    if not both:
        return {}
    mae = difference(ablations[ablation], one)
    parse = statistics.fmean(ablations[ablation][s].parse - one[s].parse for s in both)
    goal = parse >= -PARSE_LOSS and mae["high"] is not None and mae["high"] < 0
    return {"parse_difference": parse, "mae_difference": mae, "goal": goal}


def pairs(folder: pathlib.Path) -> dict[str, dict[str, Seeds]]:
    """Pair → ablation → distilled policies by seed, of the workdirs PAIR_ABLATION in `folder`; UserError if none."""
    found: dict[str, dict[str, Seeds]] = {}
    for path in sorted(folder.glob(f"*/{RESULTS}")):
        pair, _, ablation = path.parent.name.partition("_")
        if seeds := _trained(path):
            found.setdefault(pair, {})[ablation] = seeds
    if not found:
        raise UserError(
            f"{folder}: holds no workdir PAIR_ABLATION with a trained policy; run configs/guards.py first"
        )
    return found


def _trained(path: pathlib.Path) -> dict[int, Result]:
    """The distilled policies of an ablation by seed, after its last step."""
    records = {r.seed: r for r in sorted(distilled(path), key=lambda r: r.steps or 0)}
    for record in records.values():
        if missing := [name for name in MEASURED if getattr(record, name) is None]:
            raise UserError(
                f"{path}: seed {record.seed} has no {missing[0]}; was it run by configs/guards.py?"
            )
    return records


def summary(folder: pathlib.Path) -> list[Json]:
    """The content of guards.json."""
    return [{"pair": pair, **row} for pair, ablations in pairs(folder).items() for row in compared(ablations)]


def against(folder: pathlib.Path, name: str) -> str:
    """Every ablation in Markdown against `name` instead of λ = 1: an ablation, `teacher`, or a results.json."""
    rows = []
    for pair, ablations in pairs(folder).items():
        for ablation, seeds in ablations.items():
            reference = _reference(folder, pair, ablations, name, seeds)
            both = sorted(seeds.keys() & reference.keys())
            if ablation != name and both:
                found = (difference(seeds, reference, metric) for metric in ("useful", "expected_mae"))
                rows.append((pair, ablation, str(len(both)), *map(in_words, found)))
    return markdown(("pair", "guard", "seeds", f"useful − {name}", f"MAE − {name}"), rows)


def _reference(
    folder: pathlib.Path, pair: str, ablations: Mapping[str, Seeds], name: str, seeds: Seeds
) -> Mapping[int, Result]:
    """By seed; the pair's teacher has none and stands for all."""
    if name == "teacher":
        records = read_results(folder / f"{pair}_one" / RESULTS)
        teacher = next((r for r in records if r.stage == "sft_teacher"), None)
        return {} if teacher is None else dict.fromkeys(seeds, teacher)
    if name in ablations or not name.endswith(".json"):
        return ablations.get(name, {})
    return _trained(pathlib.Path(name))


def table(rows: Sequence[Json]) -> str:
    """The rows of guards.json in Markdown."""
    return markdown(HEAD, [_cells(row) for row in rows])


def _cells(row: Json) -> tuple[str, ...]:
    numbers = (f"{row[name]:.3f}" for name in ("parse", "useful", "mae"))
    optional = (_optional_cell(row, name, digits) for name, digits in (("guarded", 3), ("margin", 2)))
    met = {True: "met", False: "not met"}.get(row.get("goal"), "")
    return (
        row["pair"],
        row["ablation"],
        str(row["seeds"]),
        *numbers,
        in_words(row["mae_difference"]) if "mae_difference" in row else "",
        *optional,
        met,
    )


def _optional_cell(row: Json, name: str, digits: int) -> str:
    """A number that a row may have, with that of its seeds where these are not all."""
    if name not in row:
        return ""
    seeds = row.get(f"{name}_seeds")
    return f"{row[name]:.{digits}f}" + (f" ({seeds} seeds)" if seeds else "")


def main(argv: Sequence[str]) -> None:
    """Print the table and, with --out, write the file."""
    parser = parser_of("guards", __doc__, "ablations' workdirs")
    parser.add_argument(
        "--against", help="print differences to this: an ablation, teacher, or a results.json"
    )
    args = parser.parse_args(argv)
    rows = summary(args.folder)
    print(against(args.folder, args.against) if args.against else table(rows))
    if args.out:
        files.write_json(args.out, rows)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
