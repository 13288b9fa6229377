"""Plain and guarded policies of one run side by side, and whether going past λ = 1 paid.

The endpoint is the error of the expected scores, for which every list counts, parsed or not. One seed is compared with
λ = 1 list by list, several seed by seed: an interval over lists says nothing about other seeds.
"""

from collections.abc import Sequence

from listopd_jax.report.findings import Policy, main_failure
from listopd_jax.report.gain import mean_interval
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.page import Cell, Section, Table
from listopd_jax.report.wording import at, decimal, interval, percent

Interval = dict[str, float | None]  # mean, low, high
CONTROLS = (
    "Controls with eight seeds, λ = 1 trained twice as long and an independent teacher: docs/results.md."
)


def guarded_section(inputs: Inputs) -> Section | None:
    """Every distilled policy with its difference to plain λ = 1; None unless there are both guarded and plain ones."""
    found = inputs.found
    if not found.guarded:
        return None
    head = ("policy", "parse", "useful", "expected MAE", "the same − that of λ = 1", "main failure")
    shown = sorted((*found.opd, *found.guarded), key=lambda p: (p.lam, p.guard))
    lead = (
        "Plain: extrapolated at every token. Guarded: extrapolated only where the guard allows "
        f"({found.guarded[0].guard}). Expected MAE: the error of the mean scores, over all answers, parsed or not."
    )
    tables = [Table("", head, [_row(inputs, policy) for policy in shown])]
    return Section("guarded", "Guarded vs. plain", lead, points=gain(inputs), tables=tables)


def gain(inputs: Inputs) -> list[str]:
    """The gain of the largest guarded λ over plain λ = 1, in a sentence, and what that leaves open; [] without such."""
    first, guarded = _first(inputs), inputs.found.guarded
    if first is None or not guarded or guarded[-1].lam <= 1:
        return []
    policy = guarded[-1]
    found = difference(inputs, policy, first)
    if found is None:
        return []
    plain = next((p for p in inputs.found.opd if p.lam == policy.lam), None)
    lost = "" if plain is None else f" and {percent(plain.mean('parse'))} without it"
    maes = (
        f"expected MAE {decimal(policy.mean('expected_mae'))} against {decimal(first.mean('expected_mae'))}"
    )
    text = (
        f"At {at(policy.lam)} the student parses {percent(policy.mean('parse'))} under the guard{lost}, and its scores "
        f"are {_verdict(found)} the labels than those of plain λ = 1: {maes}, a difference of {_said(found)} "
        f"({_over(policy)})."
    )
    return [text, CONTROLS]


def difference(inputs: Inputs, policy: Policy, reference: Policy) -> Interval | None:
    """Policy minus reference in expected MAE with a 95 % t interval: over the seeds of both, or the lists of one.

    None where a record lacks what it takes.
    """
    maes, others = ({r.seed: r.expected_mae for r in p.records} for p in (policy, reference))
    seeds = [s for s in maes if None not in (maes[s], others.get(s))]
    if len(seeds) != 1:
        return mean_interval([maes[s] - others[s] for s in seeds]) if seeds else None
    errors = {(*e.policy, e.seed, e.steps): e.errors for e in inputs.errors}
    mine, theirs = (
        next((errors.get((*p.key, r.seed, r.steps)) for r in p.records if r.seed == seeds[0]), None)
        for p in (policy, reference)
    )
    if not mine or not theirs:
        return {"mean": maes[seeds[0]] - others[seeds[0]], "low": None, "high": None}
    return mean_interval([a - b for a, b in zip(mine, theirs, strict=True)])


def _first(inputs: Inputs) -> Policy | None:
    """Plain λ = 1."""
    return next((p for p in inputs.found.opd if p.lam == 1), None)


def _row(inputs: Inputs, policy: Policy) -> tuple[Cell, ...]:
    first = _first(inputs)
    found = None if first in (None, policy) else difference(inputs, policy, first)
    numbers = (decimal(policy.mean(name)) for name in ("parse", "useful", "expected_mae"))
    failure, _ = main_failure(policy) or ("", 0.0)
    apart = Cell("–") if found is None else Cell(decimal(found["mean"]), _ends(found))
    return (Cell(policy.name), *map(Cell, numbers), apart, Cell(failure))


def _verdict(found: Interval) -> str:
    if found["low"] is None or found["low"] <= 0 <= found["high"]:
        return "not clearly nearer to"
    return "nearer to" if found["high"] < 0 else "farther from"


def _said(found: Interval) -> str:
    return decimal(found["mean"]) + (f" [{_ends(found)}]" if _ends(found) else "")


def _ends(found: Interval) -> str:
    ends: Sequence[float] | None = None if found["low"] is None else (found["low"], found["high"])
    return interval(ends, to=", ")


def _over(policy: Policy) -> str:
    seeds = len(policy.records)
    return "one seed; 95 % t interval over lists, paired" if seeds == 1 else f"95 % t interval, {seeds} seeds"
