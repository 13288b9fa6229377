"""The model card of an exported policy: what it is, what it was measured to do, and how it was made."""

import functools
from typing import Any

from listopd_jax.records import Calibration, Result
from listopd_jax.report.findings import policy_name
from listopd_jax.report.inputs import Inputs, metric_columns
from listopd_jax.report.threshold_section import flip_text, main_numbers
from listopd_jax.report.wording import decimal, fact, interval, markdown, visible

FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- listopd_jax
---"""

FIELDS = (
    "task.name task.file task.schema data.source data.path data.labels task.k task.max_review_words task.chat_template "
    "student.weights student.architecture student.lora.rank student.lora.alpha student.lora.targets "
    "teacher.weights teacher.architecture teacher.served_name reference.weights "
    "teachers.field teachers.route teachers.max_prompt"
).split()
SFT_FIELDS = "lr batch_size noise".split()
OPD_FIELDS = (
    "ratio advantage normalize estimator jsd on_policy control_variate contract_reward aggregate clip ppo_clip "
    "guard.margin "
    "guard.fallback guard.scope guard.mask guard.floor guard.structure on_collapse collapse.window collapse.parse_drop "
    "collapse.length_change collapse.flips collapse.lower lr lr_decay warmup_steps ema batch_size rollouts "
    "temperature updates_per_batch kl_to_base "
    "entropy_bonus lambda_warmup_steps constrained_rollouts"
).split()


def model_card(config: Any, inputs: Inputs, record: Result) -> str:
    """README.md of the policy that `record` is of; `config` is that of the run, whose workdir holds `inputs`.

    Texts of the run are shown as text: they cannot become markup.
    """
    parts = [
        FRONT,
        f"# {_text(record.run)}",
        f"{_text(policy_name(*record.policy))}: made by listopd_jax {_purpose(inputs)} The licence is that of the "
        "weights and data that it was made from.",
        _metrics(record, inputs),
        *([] if inputs.calibration is None else [_thresholds(inputs.calibration)]),
        _making(config, inputs, record),
    ]
    return "\n\n".join(parts) + "\n"


def _purpose(inputs: Inputs) -> str:
    if task := inputs.data.get("task"):
        return f"for the task {_text(str(task))}."
    return (
        'to score K reviews of one product as `[{"review_id":"r1","score":7},…]`. Prompts are those of '
        "`listopd_jax/task/prompt.py`."
    )


def _contract(inputs: Inputs) -> str:
    if "task" in inputs.data:
        return f"the whole answer holds the task’s contract. Useful is {_text(inputs.useful)}."
    return (
        "exactly K objects, each naming one distinct review, each with a finite score. Useful is parse · NDCG@1; NDCG, "
        "Kendall τ and MAE are over answers that parse."
    )


def _metrics(record: Result, inputs: Inputs) -> str:
    rows = [
        (_text(name), decimal(record.metric(metric)), interval(record.intervals.get(metric), to=" to "))
        for metric, name in metric_columns([record]).items()
    ]
    lead = f"Greedy decoding of {fact(record.n)} held-out records; strict parse: {_contract(inputs)}"
    table = markdown(("metric", "value", "95 % interval over answers"), rows)
    return f"## What it does\n\n{lead}\n\n{table}"


def _thresholds(found: Calibration) -> str:
    rows = [*main_numbers(found)]
    for row in found.flips:
        flips = f"λ at which half of the answers first flip, {_text(row.positions)} tokens"
        rows.append((flips, flip_text(row.percentile_50), ""))
    lead = (
        "Read off teacher and base before any update: p is the teacher's probability of its own token, b the base's, "
        "λ* where the target crosses the clip boundary (arXiv:2605.08737, Eq. 4)."
    )
    return f"## Thresholds\n\n{lead}\n\n{markdown(('', 'value', '95 % interval'), rows)}"


def _making(config: Any, inputs: Inputs, record: Result) -> str:
    """The data, the settings, and the command with the versions that ran it."""
    section, names = record.stage.replace("_", "."), OPD_FIELDS if record.stage == "opd" else SFT_FIELDS
    if record.stage == "opd" and not record.guard:  # also one of opd.plain_lambdas, in a run that has a guard
        names = [name for name in names if not name.startswith("guard.")]
    fields = [*FIELDS, *(f"{section}.{name}" for name in names)]
    values = {name: functools.reduce(getattr, name.split("."), config) for name in fields}
    if record.stage != "opd":
        # What was planted, which may be less than what the config asks for.
        planted = inputs.planted(section.removeprefix("sft."))
        values[f"{section}.noise"] = ", ".join(f"{name}:{share:g}" for name, share in planted)
    facts = {"λ": record.lam, "seed": record.seed, "steps": record.steps}
    # A run that collapsed and was stopped: these weights are of an earlier step.
    facts |= {
        name: record.extra.get(key)
        for name, key in (("step of these weights", "checkpoint"), ("collapsed at", "collapsed_at"))
    }
    facts |= values
    counts = _object(inputs.data.get("lists") or inputs.data.get("records"))
    facts |= {f"records, {split}": n for split, n in counts.items()}
    facts |= {name: inputs.data.get(key) for name, key in (("labels", "labels"), ("data", "fingerprint"))}
    facts |= {"code revision": inputs.config.get("revision"), **_object(inputs.config.get("versions"))}
    rows = [(_text(name), _text(fact(value))) for name, value in facts.items() if value not in (None, "")]
    command = _text(str(inputs.config.get("command", "unknown")), markup=False)
    return f"## How it was made\n\n    {command}\n\n{markdown(('', ''), rows)}"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(text: str, markup: bool = True) -> str:
    """`text` on one line with nothing hidden in it; where Markdown has `markup`, nothing of it is markup."""
    line = " ".join(visible(text).split())
    # & too, since an entity would become the sign that it stands for.
    return "".join(f"\\{c}" if c in r"\`*[]<>|&" else c for c in line) if markup else line
