"""Policies under constraints: what masks and repairs change of parse and useful, and what a token then takes."""

from collections.abc import Mapping

from listopd_jax.records import FREE, REPAIRED, Decoding, Result
from listopd_jax.report.findings import policy_name
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.page import Cell, Section, Table
from listopd_jax.report.wording import decimal, fact, interval

NAMES = {FREE: "unconstrained", "schema": "JSON Schema", "contract": "the contract itself"}
_LEAD = (
    "Greedy answers to the same prompts. Under a JSON Schema only tokens that it allows can be written; a schema "
    "cannot say that every id appears once; the contract’s automaton can. The repair gives a missing id to the later "
    "of two objects with the same one: it is a reading of the answer, and counts nowhere else on this page. "
    "Milliseconds are from token to token of a batch, on the device of this run."
)


def constrained_section(inputs: Inputs) -> Section | None:
    """One row per policy and decoding; None where that was not asked for."""
    rows = [_row(record, d) for record in inputs.results for d in record.decodings]
    if not rows:
        return None
    head = ("policy", "seed", "decoding", "parse", "useful", "ends", "ms per token", "failures")
    return Section("constrained", "Constrained decoding", _LEAD, tables=[Table("", head, rows)])


def _row(record: Result, decoding: Decoding) -> tuple[Cell, ...]:
    metrics = [
        Cell(decimal(getattr(decoding, m)), interval(decoding.intervals.get(m))) for m in ("parse", "useful")
    ]
    return (
        Cell(policy_name(*record.policy)),
        Cell(fact(record.seed)),
        Cell(_name(decoding.decoding)),
        *metrics,
        Cell(decimal(decoding.ended)),
        Cell(decimal(decoding.ms_per_token)),
        Cell(_failures(decoding.failures)),
    )


def _name(decoding: str) -> str:
    plain = decoding.removesuffix(REPAIRED)
    return NAMES.get(plain, plain) + (", repaired" if plain != decoding else "")


def _failures(failures: Mapping[str, int]) -> str:
    """The classes that occur, the most frequent first."""
    counted = sorted(((n, name) for name, n in failures.items() if n and name != "ok"), reverse=True)
    return ", ".join(f"{n} {name.replace('_', ' ')}" for n, name in counted) or "none"
