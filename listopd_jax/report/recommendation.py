"""What to do next, first on the page: which policy to use, and what to try; no more than the records carry."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from listopd_jax import recommend
from listopd_jax.report.findings import CONTRACT_HOLDS, Findings, Policy
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.wording import at, capital, decimal, number, percent


class Advice(NamedTuple):
    """A sentence, and the flags that do what it says."""

    text: str
    flags: str = ""


def recommendation(inputs: Inputs) -> list[Advice]:
    """First which policy to use, then what else to do; before distillation was evaluated, what the forecasts say."""
    found = inputs.found
    if not found.opd:
        return (
            [Advice(capital(line)) for line in inputs.recommendation.lines] if inputs.recommendation else []
        )
    chosen = choose(found)
    if chosen is None:
        rate = percent(CONTRACT_HOLDS)
        none = f"Use none of these policies: no λ parses {rate} of answers. Train SFT or distillation for longer."
        return [Advice(none)]
    return [Advice(_use(chosen, found)), *_next(inputs, chosen)]


def choose(found: Findings) -> Policy | None:
    """The policy of the smallest λ that keeps the contract and is about as useful as the most useful one, if any."""
    held = [*found.cliff.held, *(p for p in found.guarded if p.mean("parse") >= CONTRACT_HOLDS)]
    lows = [(policy.interval("useful") or (None,))[0] for policy in held]
    options = [recommend.Option(p.lam, p.mean("useful"), low) for p, low in zip(held, lows, strict=True)]
    chosen = recommend.choose(options)
    return None if chosen is None else held[options.index(chosen)]


def _use(chosen: Policy, found: Findings) -> str:
    record = max(chosen.records, key=lambda r: r.useful or 0.0)
    text = (
        f"Use {chosen.where}, policy {record.run}: it parses {percent(chosen.mean('parse'))} of answers, useful "
        f"{decimal(chosen.mean('useful'))}."
    )
    larger = [policy for policy in found.cliff.held if policy.lam > chosen.lam]
    return text + (f" No larger λ is clearly more useful ({_lambdas(larger)} tried)." if larger else "")


def _next(inputs: Inputs, chosen: Policy) -> list[Advice]:
    """Next steps that the grid leaves open."""
    cliff, said = inputs.found.cliff, []
    if cliff.first_broken is not None and not _guarded(inputs):
        past, reviews = at(cliff.last_held.lam), _config(inputs, "task", "name") == "reviews"
        said.append(
            Advice(f"To go past {past}, keep the contract by a guard:", recommend.guard_flags(reviews))
        )
    if cliff.first_broken is None and len(inputs.found.opd) > 1:
        said.append(Advice(f"No cliff up to {at(inputs.found.opd[-1].lam)}: a larger λ may be worth a run."))
    if len({r.seed for p in inputs.found.opd for r in p.records}) == 1:
        said.append(Advice("One seed says little about another; run more:", "--config.opd.seeds=0,1,2"))
    earlier = best_earlier(inputs, chosen)
    if earlier is not None:
        steps, useful = earlier
        text = (
            f"It was more useful at step {steps} ({decimal(useful)}) than at its last; export that step with"
        )
        said.append(Advice(text, "--steps=best"))
    return said


def best_earlier(inputs: Inputs, policy: Policy) -> tuple[int, float] | None:
    """Step and useful of the best evaluation of a run of `policy` before its last, if it beats the last."""
    last = max(policy.records, key=lambda r: r.useful or 0.0)
    earlier = [r for r in inputs.results if r.run == last.run and r.stage == "opd" and r.steps != last.steps]
    best = max(earlier, key=lambda r: r.useful or 0.0, default=None)
    return None if best is None or (best.useful or 0.0) <= (last.useful or 0.0) else (best.steps, best.useful)


def _guarded(inputs: Inputs) -> bool:
    return bool(guard_margin(inputs)) or any(r.guard for r in inputs.results if r.stage == "opd")


def guard_margin(inputs: Inputs) -> float:
    """opd.guard.margin of the run, 0 where it is off or not recorded."""
    value = _config(inputs, "opd", "guard", "margin")
    return float(value) if isinstance(value, int | float) else 0.0


def _config(inputs: Inputs, *names: str) -> Any:
    """A field of the run's configuration, {} where it is not recorded."""
    value = inputs.config.get("config", {})
    for name in names:
        value = value.get(name, {}) if isinstance(value, dict) else {}
    return value


def _lambdas(policies: Sequence[Policy]) -> str:
    return ", ".join(number(policy.lam) for policy in policies)
