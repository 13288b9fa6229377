"""Several teachers, each for the records that a field assigns to it, and prompts that only teachers read.

The teacher of section `teacher` comes first, as 0; the others, `experts`, are checkpoints, never trained here. All of
them read every row of a training batch, and the loss takes each row's own: batches, buckets and programs are as with
one teacher. So m teachers cost m scoring passes, which are the smaller part of a step; calibration and forecast read
each record with its own teacher alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Int32

from listopd_jax.config import TEACHER, teacher_routes
from listopd_jax.errors import UserError, did_you_mean
from listopd_jax.task.protocol import Task

EXPERT = "teacher "  # what the role of an expert begins with; its weights follow


def expert_sections(config: Any) -> dict[str, Any]:
    """The config sections of the experts by role, in the order of `teachers.route`."""
    return {
        EXPERT + weights: ml_collections.FrozenConfigDict({"weights": weights, "adapter": ""})
        for weights in _in_order(config.teachers)[1:]
    }


def _in_order(teachers: Any) -> list[str]:
    """The weights of all teachers; TEACHER stands for those of its section."""
    # Two values may go to one teacher; fromkeys keeps it once, in order.
    return list(dict.fromkeys([TEACHER, *teacher_routes(teachers).values()]))


def teacher_roles(roles: Iterable[str]) -> list[str]:
    """The teachers among `roles`."""
    return [role for role in roles if role == TEACHER or role.startswith(EXPERT)]


def experts_of(by_role: Mapping[str, Any]) -> tuple[Any, ...]:
    """The entries of the experts in `by_role`."""
    return tuple(x for role, x in by_role.items() if role.startswith(EXPERT))


def own_teachers(task: Task, records: Sequence[Any], teachers: Any) -> Int32[np.ndarray, " N"] | None:
    """The teacher of each record: 0 the teacher, i the i-th expert; None where there is one teacher.

    UserError for a record that lacks `teachers.field`, or whose value `teachers.route` does not name.
    """
    routes, order = teacher_routes(teachers), _in_order(teachers)
    if not routes:
        return None
    values = (_value(task, record, teachers.field, routes) for record in records)
    return np.array([order.index(routes[value]) for value in values], np.int32)


def _value(task: Task, record: Any, field: str, routes: Mapping[str, str]) -> str:
    """A record's value of `field`, which is one of `routes`."""
    fields = task.fields(record)
    if field not in fields:
        near = did_you_mean(field, fields)
        raise UserError(
            f"teachers.field={field!r}: {task.name} {record.key} has no such field; {near}it has "
            f"{', '.join(fields) or 'none'}"
        )
    value = str(fields[field])
    if value not in routes:
        raise UserError(
            f"teachers.route: {task.name} {record.key} has {field}={value[:60]!r}, which has no teacher; add "
            "VALUE=WEIGHTS for it"
        )
    return value
