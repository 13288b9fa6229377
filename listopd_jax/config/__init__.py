"""The one configuration object: every field with its default, checked once at the start.

Experiments live in `configs/*.py`; each starts from `defaults()` and sets what differs. A field that is not in
`config/fields.py` does not exist: ml_collections refuses misspelt names and wrong types, `validate` refuses impossible
combinations.
"""

from listopd_jax.config.check import for_its_task, validate
from listopd_jax.config.command_line import auto_preset, find_config_file, flag_mistakes, unknown_field
from listopd_jax.config.derived import (
    constraints,
    eval_budgets,
    guard_knows_contract,
    guard_text,
    is_embedded,
    is_small,
    noise_shares,
    predicts,
    ranks_reviews,
    task_name,
    teacher_routes,
    unguarded,
)
from listopd_jax.config.fields import DTYPES, REMATS, RENAMED, TASKS, TEACHER, defaults, flatten
from listopd_jax.config.saved import (
    CONFIG,
    EVALUATION,
    as_first_saved,
    changed_field,
    code_revision,
    digest,
    fixed_fields,
    from_json,
    read_saved,
    to_json,
)
from listopd_jax.config.sweep import at_point, sweep_labels

__all__ = [
    "CONFIG",
    "DTYPES",
    "EVALUATION",
    "REMATS",
    "RENAMED",
    "TASKS",
    "TEACHER",
    "as_first_saved",
    "at_point",
    "auto_preset",
    "changed_field",
    "code_revision",
    "constraints",
    "defaults",
    "digest",
    "eval_budgets",
    "find_config_file",
    "fixed_fields",
    "flag_mistakes",
    "flatten",
    "for_its_task",
    "from_json",
    "guard_knows_contract",
    "guard_text",
    "is_embedded",
    "is_small",
    "noise_shares",
    "predicts",
    "ranks_reviews",
    "read_saved",
    "sweep_labels",
    "task_name",
    "teacher_routes",
    "to_json",
    "unguarded",
    "unknown_field",
    "validate",
]
