"""What several fields mean together: questions that the rest of the code asks a configuration."""

from typing import Any

import ml_collections

from listopd_jax.config.fields import defaults
from listopd_jax.errors import require
from listopd_jax.task.corruptions import parse_noise

SMALL_WIDTH = 128


def noise_shares(sft: Any, field: str = "sft") -> tuple[tuple[str, float], ...]:
    """The corruptions of an SFT section and their shares; UserError, which names `field`, for a malformed entry."""
    shares = parse_noise(sft.noise)
    require(
        shares is not None,
        f"{field}.noise={sft.noise!r}: write NAME:SHARE, e.g. 'truncate:0.2,wrong_digit:0.1'",
    )
    require(
        sum(share for _, share in shares) <= 1 and len(dict(shares)) == len(shares),
        f"{field}.noise={sft.noise!r}: shares must not sum to more than 1, and no name may appear twice",
    )
    return shares


def teacher_routes(teachers: Any) -> dict[str, str]:
    """Value of `teachers.field` → weights of its teacher, or TEACHER; UserError for a malformed entry."""
    pairs = [entry.partition("=") for entry in teachers.route.split(",")] if teachers.route else []
    routes = {value.strip(): weights.strip() for value, _, weights in pairs}
    require(
        all(routes) and all(routes.values()) and len(routes) == len(pairs),
        f"teachers.route={teachers.route!r}: write VALUE=WEIGHTS, no value twice, e.g. 'hats=runs/hats,shoes=teacher'",
    )
    return routes


def constraints(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> dict[str, tuple]:
    """The names of constraints that a config asks for, by field."""
    rollouts = config.opd.constrained_rollouts
    return {
        "evaluation.constrained": tuple(filter(None, config.evaluation.constrained.split(","))),
        "opd.constrained_rollouts": (rollouts,) if rollouts else (),
    }


def task_name(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> str:
    """The task's name in messages: its file, if it has one."""
    return config.task.file or config.task.name


def ranks_reviews(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> bool:
    """Whether the task is reviews, the only one with `data.source`."""
    return task_name(config) == "reviews"


def is_embedded(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> bool:
    """Whether the records are the embedded synthetic reviews."""
    return ranks_reviews(config) and config.data.source == "synthetic"


def eval_budgets(opd: Any, steps: int) -> list[int]:
    """The steps at which section `opd` evaluates a run of `steps` steps, ascending; the last is its end."""
    every = range(opd.eval_every, steps, opd.eval_every) if opd.eval_every else ()
    return [*sorted({*every, *(n for n in opd.eval_steps if n < steps)}), steps]


def is_small(config: ml_collections.FrozenConfigDict) -> bool:
    """Whether all models are of a size at which compiling takes longer than running: made here, at most 128 wide."""
    models = (config.student, config.teacher)
    others = config.reference.weights or config.teachers.route
    made_here = all(not m.weights and m.architecture == "custom" for m in models) and not others
    return made_here and all(m.hidden_size <= SMALL_WIDTH for m in models)


def guard_text(guard: ml_collections.FrozenConfigDict) -> str:
    """The options of config section `opd.guard` that differ from the defaults, "" where it is off."""
    if not (guard.margin or guard.mask or guard.floor or guard.structure >= 0):
        return ""
    off = defaults().opd.guard
    return " ".join(f"{name}={guard[name]}" for name in off if guard[name] != off[name])


def predicts(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> bool:
    """Whether the parse of the sweep is predicted before it is run."""
    return bool(config.predict.anchors) or config.predict.fixed_text_lists > 0


def unguarded(opd: ml_collections.FrozenConfigDict) -> ml_collections.FrozenConfigDict:
    """Config section `opd` with its guard off, as the runs at `plain_lambdas` have it."""
    return ml_collections.FrozenConfigDict(opd.to_dict() | {"guard": defaults().opd.guard.to_dict()})


def guard_knows_contract(guard: ml_collections.FrozenConfigDict) -> bool:
    """Whether config section `opd.guard` needs the grammar of the answers."""
    return bool(guard_text(guard)) and (guard.scope == "structure" or guard.mask or guard.structure >= 0)
