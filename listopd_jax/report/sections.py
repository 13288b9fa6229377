"""The report's sections: each a function from what the workdir holds to text, figures and tables.

A new section is one more function in SECTIONS that returns None while it has nothing
to say; the template needs no change. A forecast is one more `plots.Series` in `_parse_plot`.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from listopd_jax.records import Example, Result
from listopd_jax.report import findings, page, plots
from listopd_jax.report.beside import beside_section
from listopd_jax.report.constrained_section import constrained_section
from listopd_jax.report.curves import opd_section, sft_section
from listopd_jax.report.errors_section import errors_section
from listopd_jax.report.findings import FAILURES, Findings, Policy
from listopd_jax.report.guarded_section import guarded_section
from listopd_jax.report.inputs import METRICS, Inputs
from listopd_jax.report.page import Cell, Listing, Plot, Section, Table
from listopd_jax.report.passage import passage_section
from listopd_jax.report.prediction_section import prediction_section, prediction_series
from listopd_jax.report.strip import strip_section
from listopd_jax.report.threshold_section import predicted, threshold_section
from listopd_jax.report.wording import (
    at,
    capital,
    cut,
    decimal,
    fact,
    interval,
    label,
    number,
    percent,
    words,
)

MAX_OUTPUT, MAX_PROMPT = 1500, 4000  # characters of an example shown
FEW_BUDGETS = 2  # drawn in the figure of parse against λ
FORGETTING = ("perplexity", "kl_to_base")
FORGETTING_HEAD = ("policy", "seed", "perplexity", "KL to the base")
GOOD_EXAMPLES, BAD_EXAMPLES = 1, 2  # shown per policy
_ORIGIN = ("fingerprint", "inputs", "files")  # of the data report: for machines, folded away


def key_figures(found: Findings) -> list[tuple[str, str, str]]:
    """(value, what it is, remark) of the few numbers to remember."""
    shown = [policy for policy in (found.teacher, found.student, found.best) if policy is not None]
    figures = [
        (percent(p.mean("parse")), f"{p.name} parses", interval(p.interval("parse"), percent, " to "))
        for p in shown
    ]
    if found.best is not None and found.best.mean("useful") is not None:
        ends = interval(found.best.interval("useful"), to=" to ")
        figures.append((decimal(found.best.mean("useful")), f"peak useful, at {found.best.where}", ends))
    if found.cliff.last_held is not None and len(found.opd) > 1:
        rule = f"parses {percent(findings.CONTRACT_HOLDS)} or more"
        figures.append((at(found.cliff.last_held.lam), "largest λ that keeps the contract", rule))
    return figures


def contract_section(inputs: Inputs) -> Section:
    """Parse, ranking quality and useful against λ."""
    title, found = "Where the contract breaks", inputs.found
    if not found.opd:
        return Section("contract", title, "No distilled policy has been evaluated yet.")
    lead = (
        "A dot is one seed, its bar the 95 % interval over answers; the line joins the means. "
        "Horizontal lines are the policies before distillation; the forecast is greedy decoding from the target "
        "λ log π_T + (1−λ) log π_B without any training, upright lines the thresholds of the calibration."
    )
    return Section("contract", title, lead, plots=[_parse_plot(inputs), _quality_plot(found)])


def policies_section(inputs: Inputs) -> Section:
    """Every evaluated policy with its intervals; means over seeds first where there are several."""
    if not inputs.results:
        return Section("policies", "Policies compared", "No policy has been evaluated yet.")
    many = any(len(policy.records) > 1 for policy in inputs.policies)
    ends = replace(inputs, results=[record for policy in inputs.policies for record in policy.records])
    tables = [_seeds_table(inputs) if many else _runs_table(ends, collapsed=False)]
    if many or len(ends.results) < len(inputs.results):
        tables.append(_runs_table(inputs, collapsed=True))
    return Section("policies", "Policies compared", _how_to_read(inputs), tables=tables)


def failures_section(inputs: Inputs) -> Section | None:
    """Failure classes of every policy, as a picture and as counts; None where no record has them."""
    shown = [policy for policy in inputs.policies if policy.failure_shares()]
    if not shown:
        return None
    names = _failure_names(shown)
    known = dict.fromkeys(failure for p in shown for record in p.records for failure in record.failures)
    absent = [FAILURES.get(failure, failure) for failure in known if failure not in names]
    lead = "An answer with several faults counts once."
    lead += f" No answer shows: {', '.join(absent)}." if absent else ""
    plot, table = _failure_plot(shown, names), _failure_table(shown, names)
    return Section("failures", "How answers fail", lead, plots=[plot], tables=[table], layout="beside")


def forgetting_section(inputs: Inputs) -> Section | None:
    """How policies read unrelated English, before distillation and after; None where that was not asked for."""
    rows = [
        (
            Cell(findings.policy_name(*r.policy)),
            Cell(fact(r.seed)),
            *(Cell(fact(measured.get(n))) for n in FORGETTING),
        )
        for r in inputs.results
        if isinstance(measured := r.extra.get("forgetting"), Mapping)
    ]
    if not rows:
        return None
    lead = (
        "Twelve English sentences that have nothing to do with the task: perplexity per token, and the mean KL "
        "divergence to the base in nats. The SFT student is the base: what distilled policies start from."
    )
    return Section("forgetting", "What is forgotten", lead, tables=[Table("", FORGETTING_HEAD, rows)])


def examples_section(inputs: Inputs) -> Section | None:
    """Outputs good and bad of every policy; None before there are any."""
    if not inputs.examples:
        return None
    chosen = _choose(inputs.examples)
    lead = (
        f"{len(chosen)} of {len(inputs.examples)} saved outputs, greedy decoding, as the model wrote them; "
        "control characters are spelt out and very long texts cut."
    )
    return Section("examples", "Outputs, good and bad", lead, examples=[_example(e) for e in chosen])


def data_section(inputs: Inputs) -> Section | None:
    """What was read and dropped, how the lists were split, any baseline, and the builder's remarks."""
    if not inputs.data:
        return None
    shown = {name: value for name, value in inputs.data.items() if name not in (*_ORIGIN, "notes")}
    nested = {name: value for name, value in shown.items() if isinstance(value, Mapping) and value}
    plain = {name: value for name, value in shown.items() if name not in nested}
    tables = [_facts("overview", plain)] if plain else []
    tables += [_facts(name, value) for name, value in nested.items()]
    origin = _lines({name: inputs.data[name] for name in _ORIGIN if name in inputs.data}, " = ")
    listings = [Listing("Fingerprint and files", origin)] if origin else []
    points = [str(note) for note in inputs.data.get("notes", ())]
    return Section("data", "Data", points=points, tables=tables, listings=listings)


def choices_section(inputs: Inputs) -> Section | None:
    """Why the experiment is set up as it is, in its author's words; None without such words."""
    notes = [str(note) for note in inputs.config.get("notes", ())]
    return Section("choices", "What was chosen, and why", points=notes) if notes else None


def reproduce_section(inputs: Inputs) -> Section | None:
    """The command, the revision, the versions and every field of the config."""
    if not inputs.config:
        return None
    facts = {name: inputs.config.get(name, "unknown") for name in ("preset", "device", "revision")}
    listings = [
        Listing("Command", str(inputs.config.get("command", "unknown")), is_open=True),
        Listing("Versions", _lines(inputs.config.get("versions", {}), " ")),
        Listing("Config, every field", _lines(inputs.config.get("config", {}), " = ")),
    ]
    shown = [listing for listing in listings if listing.text]
    return Section("reproduce", "To reproduce", tables=[_facts("run", facts)], listings=shown)


SECTIONS: tuple[Callable[[Inputs], Section | None], ...] = (
    contract_section,
    guarded_section,
    policies_section,
    failures_section,
    constrained_section,
    errors_section,
    beside_section,
    prediction_section,
    threshold_section,
    strip_section,
    passage_section,
    opd_section,
    sft_section,
    forgetting_section,
    examples_section,
    data_section,
    choices_section,
    reproduce_section,
)


def _parse_plot(inputs: Inputs) -> Plot:
    found = inputs.found
    last, first = found.cliff.last_held, found.cliff.first_broken
    if len(found.opd) == 1:
        title = f"Parse at the one λ tested, {number(found.opd[0].lam)}"
    elif first is not None:
        title = f"Parse falls between {at(last.lam)} and {number(first.lam)}"
    else:
        title = "Parse never reaches the contract" if last is None else f"Parse holds up to {at(last.lam)}"
    series = [
        plots.Series("OPD", _points(found.opd, "parse"), plots.BLUE),
        plots.Series("OPD, guarded", _points(found.guarded, "parse"), plots.PURPLE, "s"),
        plots.Series("forecast, untrained", _points(found.forecast, "parse"), plots.GREEN, "D"),
        plots.Series("forecast, guarded", _points(found.guarded_forecast, "parse"), plots.AMBER, "d"),
        *prediction_series(inputs),
    ]
    shorter = findings.shorter_budgets(
        inputs.results
    )  # more than a few have figures of their own (passage.py)
    for steps, policies in shorter.items() if len(shorter) <= FEW_BUDGETS else ():
        series.append(plots.Series(f"OPD, {steps} steps", _points(policies, "parse"), plots.CALM))
    series += predicted(inputs.calibration, max(p.lam for p in (*found.opd, *found.forecast)))
    svg = plots.versus_lambda(
        [one for one in series if one.points],
        _levels(found, "parse", percent),
        ylabel="answers that parse",
        in_percent=True,
        description=f"Strict parse rate against λ. {_spoken(found, 'parse')}",
        broken=(last.lam, first.lam) if first is not None else None,
    )
    return Plot(title, Markup(svg))


def _quality_plot(found: Findings) -> Plot:
    ranking, useful = _points(found.opd, "ndcg@1"), _points(found.opd, "useful")
    series = [
        plots.Series("NDCG@1, parsed answers", ranking, plots.PURPLE, "s"),
        plots.Series("useful, all answers", useful, plots.GREEN),
        plots.Series("useful, guarded", _points(found.guarded, "useful"), plots.ORANGE, "s"),
    ]
    shown = {"ndcg@1": "NDCG@1", "useful": "useful"} if ranking else {"useful": "useful"}
    spoken = " ".join(_spoken(found, metric) for metric in shown)
    svg = plots.versus_lambda(
        [one for one in series if one.points],
        _levels(replace(found, teacher=None), "useful", decimal),
        ylabel=" or ".join(shown.values()),
        description=capital(f"{' and '.join(shown.values())} against λ. {spoken}"),
    )
    flat = findings.only_format_breaks(found)
    title = "Useful falls with parse; ranking does not" if flat else "Useful, and ranking where answers parse"
    return Plot(title if ranking else "Useful against λ", Markup(svg))


def _points(policies: Iterable[Policy], metric: str) -> list[plots.Point]:
    """One point per seed that defines `metric`."""
    runs = [(policy.lam, run) for policy in policies for run in policy.records]
    return [
        plots.Point(lam, value, run.intervals.get(metric))
        for lam, run in runs
        if (value := run.metric(metric)) is not None
    ]


def _levels(found: Findings, metric: str, form: Callable[[float], str]) -> list[plots.Level]:
    """The policies before distillation, where they define `metric`."""
    styles = ((found.teacher, plots.ORANGE, "-."), (found.student, plots.MUTED, "--"))
    return [
        plots.Level(f"{p.name}, {form(p.mean(metric))}", p.mean(metric), colour, dash, p.interval(metric))
        for p, colour, dash in styles
        if p is not None and p.mean(metric) is not None
    ]


def _spoken(found: Findings, metric: str) -> str:
    """The numbers of a figure, for those who cannot see it."""
    shown = [p for p in (found.teacher, found.student, *found.opd, *found.guarded) if p is not None]
    return "; ".join(f"{p.name}: {METRICS[metric]} {decimal(p.mean(metric))}" for p in shown) + "."


def _how_to_read(inputs: Inputs) -> str:
    gains = sorted({record.gain for record in inputs.results if record.gain})
    text = (
        f"Strict parse, greedy decoding. Parse and useful ({inputs.useful}) count every answer; the other "
        "metrics only answers that parse, “–” where none does. Ends: the share of answers, parsed or not, that close "
        "with EOS before the token budget does. Small print: 95 % bootstrap intervals over "
        "answers; one of zero width only means that all answers agree."
    )
    return text + (f" NDCG gain: {', '.join(gains)}." if gains else "")


def _runs_table(inputs: Inputs, collapsed: bool) -> Table:
    """One row per record: metrics with intervals, answers, steps, seed."""
    places = {policy.key: i for i, policy in enumerate(inputs.policies)}
    runs = sorted(inputs.results, key=lambda r: (places[r.policy], r.seed or 0, r.steps or 0))
    rows = [_run_row(run, inputs.metrics_shown) for run in runs]
    marked = inputs.found.best is not None and not collapsed
    best = runs.index(inputs.found.best.records[0]) if marked else None
    head = ("policy", *inputs.metrics_shown.values(), "answers", "steps", "seed")
    return Table("Every run" if collapsed else "", head, rows, best=best, collapsed=collapsed)


def _run_row(run: Result, shown: Iterable[str]) -> tuple[Cell, ...]:
    name = findings.policy_name(*run.policy)
    metrics = [Cell(decimal(run.metric(m)), interval(run.intervals.get(m))) for m in shown]
    return (Cell(name), *metrics, *(Cell(fact(value)) for value in (run.n, run.steps, run.seed)))


def _seeds_table(inputs: Inputs) -> Table:
    """One row per policy: means over its seeds."""
    rows = [
        (
            Cell(policy.name),
            *(_spread(policy, m) for m in inputs.metrics_shown),
            Cell(fact(len(policy.records))),
        )
        for policy in inputs.policies
    ]
    best = inputs.policies.index(inputs.found.best) if inputs.found.best is not None else None
    head = ("policy", *inputs.metrics_shown.values(), "seeds")
    return Table("Mean over seeds ± their standard deviation", head, rows, best=best)


def _spread(policy: Policy, metric: str) -> Cell:
    values = [value for record in policy.records if (value := record.metric(metric)) is not None]
    return Cell(
        decimal(policy.mean(metric)), f"± {decimal(statistics.stdev(values))}" if len(values) > 1 else ""
    )


def _failure_names(shown: Iterable[Policy]) -> dict[str, str]:
    """The classes that occur and their names, those of the contract first."""
    occur = {failure for policy in shown for failure, share in policy.failure_shares().items() if share}
    known = {failure: name for failure, name in FAILURES.items() if failure in occur}
    return known | {failure: label(failure) for failure in sorted(occur - set(FAILURES))}


def _failure_plot(shown: Sequence[Policy], names: Mapping[str, str]) -> Plot:
    distilled = [policy for policy in shown if policy.stage == "opd"]
    main = findings.main_failure(distilled[-1]) if distilled else None
    title = f"{capital(main[0])} is the main failure at the largest λ" if main else "Failure classes"
    rows = [(label(policy.name.removeprefix("OPD, ")), policy.failure_shares()) for policy in shown]
    said = [
        f"{name}: {', '.join(f'{names[f]} {percent(s)}' for f, s in row.items() if s)}" for name, row in rows
    ]
    description = f"Share of answers by failure class. {'; '.join(said)}."
    return Plot(title, Markup(plots.failure_bars(rows, names, description=description)))


def _failure_table(shown: Sequence[Policy], names: Mapping[str, str]) -> Table:
    rows = []
    for policy in shown:
        counts = [sum(record.failures.get(f, 0) for record in policy.records) for f in names]
        rows.append((Cell(policy.name), *(Cell(fact(count)) for count in counts)))
    return Table("Answers, all seeds together", ("policy", *names.values()), rows)


def _choose(examples: Sequence[Example]) -> list[Example]:
    """A few good and bad outputs per policy, in the order of the policies."""
    groups = defaultdict(list)
    for example in examples:
        groups[example.policy].append(example)
    chosen = []
    for policy in findings.policies(
        Result(run=e.run, stage=e.stage, lam=e.lam, guard=e.guard, sweep=e.sweep) for e, *_ in groups.values()
    ):
        group = groups[policy.key]
        good = [e for e in group if e.failure == "ok"]
        bad = _varied([e for e in group if e.failure != "ok"])
        chosen += good[:GOOD_EXAMPLES] + bad[:BAD_EXAMPLES]
    return chosen


def _varied(failed: Sequence[Example]) -> list[Example]:
    """`failed` with one of each class before a second of any."""
    classes = [e.failure for e in failed]
    order = sorted(range(len(failed)), key=lambda i: classes[:i].count(classes[i]))
    return [failed[i] for i in order]


def _example(example: Example) -> page.Example:
    return page.Example(
        policy=findings.policy_name(*example.policy),
        failure=FAILURES.get(example.failure, example.failure),
        ok=example.failure == "ok",
        key=example.key,
        output=cut(example.output, MAX_OUTPUT),
        prompt=cut(example.prompt, MAX_PROMPT),
        scores=_score_table(example.true_scores or [], example.scores or []) or _right_table(example),
    )


def _score_table(labels: Sequence[Any], scores: Sequence[Any]) -> Table | None:
    """Labels and, where the answer parses, scores by review; None without labels."""
    rows = [
        (Cell(name), *(Cell(fact(value)) for value in values))
        for name, values in (("label", labels), ("model", scores))
        if values
    ]
    head = ("review", *(str(i + 1) for i in range(len(labels))))
    return Table("", head, rows) if labels else None


def _right_table(example: Example) -> Table | None:
    """The right answer, where a record has one."""
    right = example.extra.get("right")
    return Table("", ("right answer",), [(Cell(cut(right, MAX_OUTPUT)),)]) if isinstance(right, str) else None


def _facts(name: str, values: Mapping[str, Any]) -> Table:
    """Names and values; lists of one length (histograms) become numbered columns."""
    caption = capital(words(name))
    lengths = {len(value) if isinstance(value, list) else 0 for value in values.values()}
    if len(lengths) == 1 and 0 not in lengths:
        rows = [(Cell(words(row)), *(Cell(fact(x)) for x in value)) for row, value in values.items()]
        return Table(caption, ("", *map(str, range(lengths.pop()))), rows)
    rows = [(Cell(words(path)), Cell(fact(value))) for path, value in _leaves(values, " › ")]
    return Table(caption, (), rows)


def _lines(tree: Mapping[str, Any], between: str) -> str:
    """One line per leaf: its dotted path and its JSON."""
    return "\n".join(
        f"{path}{between}{json.dumps(value, ensure_ascii=False)}" for path, value in _leaves(tree, ".")
    )


def _leaves(tree: Mapping[str, Any], separator: str) -> list[tuple[str, Any]]:
    """(path, value) of every leaf, in the order of the mapping; an empty mapping is a leaf."""
    leaves = []
    for name, inner in tree.items():
        if isinstance(inner, Mapping) and inner:
            leaves += [(f"{name}{separator}{path}", value) for path, value in _leaves(inner, separator)]
        else:
            leaves.append((name, inner))
    return leaves
