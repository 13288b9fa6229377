"""What the evaluated policies say, in numbers and plain words: who parses, which λ is best, where it broke.

Pure functions of the records of results.json (one per policy, seed and budget). A sentence claims no more
than the 95 % intervals over answers allow, and says when there is nothing to claim.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from listopd_jax.recommend import CONTRACT_HOLDS
from listopd_jax.records import EVALUATE, Result
from listopd_jax.report.wording import NBSP, at, number, percent

LITTLE_HEADROOM = 0.95  # parse rate of the base above which distillation has little to fix

FLAT = 0.05  # range of NDCG@1 over λ below which the ranking counts as unmoved

STAGES = {
    "sft_teacher": "SFT teacher",
    "sft_student": "SFT student",
    "anchor": "anchor run",
    "forecast": "forecast",
    "opd": "OPD",
    EVALUATE: "checkpoint",
}
OK = "ok"  # the class of an answer that holds its contract
FAILURES = {
    OK: "parses",
    "no_json": "no JSON",
    "truncated_k_minus_1": "K−1 truncation",
    "wrong_length": "wrong length",
    "duplicate_id": "duplicate id",
    "unknown_id": "unknown id",
    "bad_score": "bad score",
}


@dataclass(frozen=True)
class Policy:
    """One evaluated policy: a stage and, for distillation, a λ and any guard. Its records differ in the seed.

    `checkpoint` is the name of one from elsewhere.
    """

    stage: str
    lam: float | None
    checkpoint: str | None
    guard: str
    sweep: str
    records: tuple[Result, ...]

    @property
    def key(self) -> tuple[str, float | None, str | None, str, str]:
        """`policy` of each of its records."""
        return self.stage, self.lam, self.checkpoint, self.guard, self.sweep

    @property
    def name(self) -> str:
        """Its name in the report."""
        return policy_name(*self.key)

    @property
    def where(self) -> str:
        """Its λ and whether it is under a guard."""
        return place(self.lam, self.guard)

    def mean(self, metric: str) -> float | None:
        """Mean of `metric` over the seeds that define it, None if none does."""
        return mean(record.metric(metric) for record in self.records)

    def interval(self, metric: str) -> tuple[float, float] | None:
        """95 % bootstrap interval over answers, its ends averaged over the seeds; None if there is none."""
        ends = [record.intervals[metric] for record in self.records if record.intervals.get(metric)]
        return (mean(low for low, _ in ends), mean(high for _, high in ends)) if ends else None

    def failure_shares(self) -> dict[str, float]:
        """Share of the answers of all seeds in each failure class, 'ok' among them."""
        counts = defaultdict(float)
        for record in self.records:
            for failure, count in record.failures.items():
                counts[failure] += count
        total = sum(counts.values())
        return {failure: count / total for failure, count in counts.items()} if total else {}


@dataclass(frozen=True)
class Cliff:
    """Where the contract broke on the grid of λ; `held` and `broken` are ascending."""

    held: tuple[Policy, ...]
    broken: tuple[Policy, ...]

    @property
    def last_held(self) -> Policy | None:
        return self.held[-1] if self.held else None

    @property
    def first_broken(self) -> Policy | None:
        """The smallest broken λ above the largest that held; None where nothing held or the largest λ did."""
        above = [p for p in self.broken if self.held and p.lam > self.last_held.lam]
        return above[0] if above else None


@dataclass(frozen=True)
class Findings:
    """The policies that the report compares, each None or empty where it was not evaluated.

    Where there are policies without a guard and under one, `opd`, `cliff` and `forecast` are those without, and
    `guarded` and `guarded_forecast` the others.
    """

    teacher: Policy | None
    student: Policy | None
    opd: tuple[Policy, ...]  # ascending λ
    best: Policy | None
    cliff: Cliff
    forecast: tuple[Policy, ...] = ()  # greedy from the untrained target, ascending λ
    checkpoints: tuple[Policy, ...] = ()  # from elsewhere, by name
    guarded: tuple[Policy, ...] = ()
    guarded_forecast: tuple[Policy, ...] = ()


def policy_name(
    stage: str, lam: float | None, checkpoint: str | None, guard: str = "", sweep: str = ""
) -> str:
    """A policy's name in the report: "OPD, λ = 1.2", "OPD, λ = 1.2, guarded, clip=1.5", "checkpoint NAME"."""
    name = STAGES.get(stage, stage) + (f" {checkpoint}" if checkpoint is not None else "")
    where = [] if lam is None else [place(lam, guard)]
    return ", ".join([name, *where, *filter(None, [sweep])])


def place(lam: float, guard: str) -> str:
    """A λ and whether it is under a guard, in words."""
    return at(lam) + (", guarded" if guard else "")


def policies(records: Iterable[Result]) -> list[Policy]:
    """Records grouped by policy, SFT first, λ ascending; of one seed only its longest training."""
    longest = {}
    for record in sorted(records, key=lambda r: r.steps or 0):
        # Ascending in steps, so the longest training is what stays.
        longest[record.policy, record.seed] = record
    groups = defaultdict(list)
    for (policy, _), record in longest.items():
        groups[policy].append(record)
    # `is not None` comes first: Python cannot compare None with a number.
    ordered = sorted(groups, key=lambda key: (*_stage_order(key[0]), key[1] is not None, *key[1:]))
    return [Policy(*key, tuple(sorted(groups[key], key=lambda r: r.seed or 0))) for key in ordered]


def shorter_budgets(records: Iterable[Result]) -> dict[int, list[Policy]]:
    """The distilled policies at every budget but the longest, by steps, ascending."""
    found = defaultdict(list)
    for record in records:
        if record.stage == "opd" and record.steps is not None:
            found[record.steps].append(record)
    return {steps: policies(found[steps]) for steps in sorted(found)[:-1]}


def find(records: Iterable[Result]) -> Findings:
    """Read the findings off the records of results.json."""
    everyone = policies(records)
    single = {policy.stage: policy for policy in everyone}
    known = [p for p in everyone if p.lam is not None and p.mean("parse") is not None]
    opd, guarded = _by_guard(p for p in known if p.stage == "opd")
    best = max((*opd, *guarded), key=_usefulness, default=None)
    held = tuple(p for p in opd if p.mean("parse") >= CONTRACT_HOLDS)
    broken = tuple(p for p in opd if p.mean("parse") < CONTRACT_HOLDS)
    forecast, guarded_forecast = _by_guard(p for p in everyone if p.stage == "forecast")
    checkpoints = tuple(p for p in everyone if p.stage == EVALUATE)
    teacher, student = single.get("sft_teacher"), single.get("sft_student")
    cliff = Cliff(held, broken)
    return Findings(teacher, student, opd, best, cliff, forecast, checkpoints, guarded, guarded_forecast)


def _by_guard(some: Iterable[Policy]) -> tuple[tuple[Policy, ...], tuple[Policy, ...]]:
    """Policies without a guard and those under one; if all are under one, they are the first."""
    some = tuple(some)
    plain, guarded = (tuple(p for p in some if bool(p.guard) == on) for on in (False, True))
    return (plain, guarded) if plain else (guarded, ())


def forecast_error(found: Findings) -> float | None:
    """Root mean square difference between forecast and trained parse rate over the λ that have both."""
    forecast = {p.lam: p.mean("parse") for p in found.forecast}
    squares = [(p.mean("parse") - forecast[p.lam]) ** 2 for p in found.opd if p.lam in forecast]
    return mean(squares) ** 0.5 if squares else None


def headline(found: Findings) -> str:
    """One sentence that says what happened."""
    if found.best is not None:
        return _lift(found.student, found.best) + _break(found)
    if found.teacher or found.student:
        return "SFT is done; no distilled policy has been evaluated yet"
    if found.checkpoints:
        best = max(found.checkpoints, key=_usefulness)
        among = f", the most useful of {len(found.checkpoints)}," if len(found.checkpoints) > 1 else ""
        return f"The {best.name}{among} parses {percent(best.mean('parse'))} of answers"
    return "No policy has been evaluated yet"


def sentences(found: Findings) -> list[str]:
    """The findings behind the headline, one plain sentence or two each; [] if nothing was evaluated."""
    said = [_sft, _best, _contract, _collapsed, _ranking, _forecast, _evidence]
    return [sentence for sentence in (of(found) for of in said) if sentence]


def only_format_breaks(found: Findings) -> bool:
    """Whether the contract broke while NDCG@1 of the answers that parse stayed within FLAT over λ."""
    values = _parsed_ndcg(found)
    return found.cliff.first_broken is not None and len(values) > 1 and max(values) - min(values) < FLAT


def main_failure(policy: Policy) -> tuple[str, float] | None:
    """The most frequent failure class of `policy` and its share of failures, None if none fails."""
    shares = {failure: share for failure, share in policy.failure_shares().items() if failure != "ok"}
    failed = sum(shares.values())
    if not failed:
        return None
    # Sorted, so that among equals it is always the same one.
    main = max(sorted(shares), key=shares.get)
    return FAILURES.get(main, main), shares[main] / failed


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there, None if there are none."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def _stage_order(stage: str) -> tuple[int, str]:
    return (list(STAGES).index(stage) if stage in STAGES else len(STAGES), stage)


def _usefulness(policy: Policy) -> tuple[float, float]:
    """Useful, and parse where useful is undefined or equal."""
    return (policy.mean("useful") or 0.0, policy.mean("parse") or 0.0)


def _compare(a: Policy, b: Policy) -> int:
    """1 if a parses more than b by intervals that do not overlap, −1 if less, 0 if they do not tell."""
    low_a, high_a = a.interval("parse") or (a.mean("parse"),) * 2
    low_b, high_b = b.interval("parse") or (b.mean("parse"),) * 2
    # Stricter than a test of the difference: a sentence claims no more than the intervals allow.
    return (low_a > high_b) - (high_a < low_b)


def _lift(student: Policy | None, best: Policy) -> str:
    after, where = percent(best.mean("parse")), best.where
    if best.mean("parse") == 0:
        return "No distilled policy parses a single answer"
    if student is None or student.mean("parse") is None:
        return f"Distillation parses {after} of answers at {where}"
    before = percent(student.mean("parse"))
    change = _compare(best, student)
    if change > 0:
        return f"Distillation lifts parse from {before} to {after} at {where}"
    if change < 0:
        return f"Distillation lowers parse from {before} to {after}, even at its best, {where}"
    if student.mean("parse") >= LITTLE_HEADROOM:
        return f"The SFT student already parses {before}: no headroom for distillation ({after} at {where})"
    return f"Distillation leaves parse near SFT's {before}, within the intervals ({after} at {where})"


def _break(found: Findings) -> str:
    last, first = found.cliff.last_held, found.cliff.first_broken
    if len(found.opd) == 1 or found.best.mean("parse") == 0:
        return ""
    if last is None:
        return f"; no λ tested keeps the contract in {percent(CONTRACT_HOLDS)} of answers"
    if first is None:
        return f"; no cliff up to {at(last.lam)}"
    who = "without the guard the contract" if found.guarded else "the contract"
    return f"; {who} breaks between {at(last.lam)} and {number(first.lam)}"


def _sft(found: Findings) -> str:
    trained = [("the teacher", found.teacher), ("the student", found.student)]
    known = [(who, policy.mean("parse")) for who, policy in trained if policy is not None]
    parts = [f"{who} parses {percent(parse)}" for who, parse in known if parse is not None]
    return f"After SFT, {' and '.join(parts)} of answers." if parts else ""


def _best(found: Findings) -> str:
    best, student = found.best, found.student
    if best is None or not best.mean("useful"):
        return ""
    text = (
        f"The most useful distilled policy is {best.where}: useful {best.mean('useful'):.3f} "
        f"(a failed answer counts 0), parse {percent(best.mean('parse'))}."
    )
    if student is not None and student.mean("useful") is not None:
        text += f" The SFT student’s useful is {student.mean('useful'):.3f}."
    return text + (
        " It was chosen on the records that score it, which flatters it a little."
        if len(found.opd) + len(found.guarded) > 1
        else ""
    )


def _contract(found: Findings) -> str:
    cliff, threshold = found.cliff, percent(CONTRACT_HOLDS)
    if not found.opd:
        return ""
    if len(found.opd) == 1:
        return "Only one λ was run, so nothing can be said about where the contract breaks."
    if cliff.last_held is None:
        return f"No λ reaches {threshold} parse, so there is no cliff to locate: SFT or budget is the limit."
    if cliff.first_broken is None:
        largest = number(cliff.last_held.lam)
        held = f"No cliff: parse is at least {threshold} at the largest λ tested, {largest}"
        return (
            f"{held}; {_lambdas(cliff.broken)} fell short."
            if cliff.broken
            else f"{held}, and at every other."
        )
    return _fall(cliff) + _main_failure(cliff.broken[-1])


def _fall(cliff: Cliff) -> str:
    last, first, threshold = cliff.last_held, cliff.first_broken, percent(CONTRACT_HOLDS)
    text = (
        f"{number(last.lam)} is the largest λ with parse of {threshold} or more "
        f"({percent(last.mean('parse'), 1)}); at {at(first.lam)} it is {percent(first.mean('parse'), 1)}."
    )
    low, high = first.interval("parse") or (0.0, 0.0)
    if high >= CONTRACT_HOLDS:
        reach = f"{percent(low)} to {percent(high)}"
        text += f" The interval there, {reach}, still reaches {threshold}: the place is uncertain."
    earlier = [policy for policy in cliff.broken if policy.lam < last.lam]
    if earlier:
        text += f" The curve is not monotone: {_lambdas(earlier)} fell short too."
    return text


def _lambdas(some: Sequence[Policy]) -> str:
    return f"λ{NBSP}={NBSP}" + ", ".join(number(policy.lam) for policy in some)


def _main_failure(policy: Policy) -> str:
    failure, share = main_failure(policy) or ("", 0.0)
    of_all = f"{percent(share)} of the answers that fail are of one class: {failure}"
    return f" At {at(policy.lam)}, {of_all}." if failure else ""


def _collapsed(found: Findings) -> str:
    """The effect of `opd.on_collapse` on the policies: their points are not those of the λ that they are drawn at."""
    parts = []
    for field, what in (
        ("checkpoint", "was stopped when it collapsed, and its most useful checkpoint stands for it"),
        ("lambda_end", "continued with a lower λ after it collapsed"),
    ):
        everyone = (*found.opd, *found.guarded)
        lams = [p.where for p in everyone if any(field in record.extra for record in p.records)]
        parts += [f"A run at {', '.join(lams)} {what}."] if lams else []
    return " ".join(parts)


def _ranking(found: Findings) -> str:
    values = _parsed_ndcg(found)
    if len(values) < 2:
        return ""
    spread = (
        f"NDCG@1 on the answers that parse lies between {min(values):.3f} and {max(values):.3f} over all λ"
    )
    return spread + (": what breaks is the format, not the ranking." if only_format_breaks(found) else ".")


def _parsed_ndcg(found: Findings) -> list[float]:
    values = [p.mean("ndcg@1") for p in found.opd]
    return [value for value in values if value is not None]


def _forecast(found: Findings) -> str:
    error = forecast_error(found)
    if error is None:
        return ""
    broken = [p for p in found.forecast if p.mean("parse") < CONTRACT_HOLDS]
    says = f"breaks at {at(broken[0].lam)}" if broken else f"holds up to {at(found.forecast[-1].lam)}"
    kept = min((p.mean("parse") for p in found.guarded_forecast), default=None)
    guarded = "" if kept is None else f", and that under the guard at least {percent(kept)} parse at every λ"
    return (
        f"Before training, greedy decoding from the extrapolated target said that the contract {says}{guarded}; over "
        f"the λ that were trained, its parse rate is off by {percent(error)} (root mean square)."
    )


def _evidence(found: Findings) -> str:
    everyone = (found.teacher, found.student, *found.opd, *found.guarded, *found.checkpoints)
    shown = [p for p in everyone if p is not None]
    sizes = sorted({r.n for p in shown for r in p.records if r.n is not None})
    if not sizes:
        return ""
    seeds = len({r.seed for p in found.opd for r in p.records})
    lists = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    text = f"Evidence: greedy decoding of {lists} held-out records"
    if seeds == 1:
        return text + ", one seed: how much another seed would differ is not known."
    return text + (f", {seeds} seeds." if seeds else ".")
