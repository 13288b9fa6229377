"""What each field alone may be: one of some names, a range, a seed."""

import datetime
import math
import re
import urllib.parse
from typing import Any

from listopd_jax.config.fields import (
    ADVANTAGES,
    AGGREGATES,
    ATTENTIONS,
    CONTROL_VARIATES,
    DTYPES,
    ESTIMATORS,
    FALLBACKS,
    LR_DECAYS,
    ON_COLLAPSE,
    RATIOS,
    REMATS,
    SCOPES,
    SOURCES,
    TASKS,
    defaults,
    flatten,
)
from listopd_jax.errors import require, unknown_name

_NAMES = {
    "opd.ratio": RATIOS,
    "opd.advantage": ADVANTAGES,
    "opd.estimator": ESTIMATORS,
    "opd.aggregate": AGGREGATES,
    "opd.control_variate": CONTROL_VARIATES,
    "opd.lr_decay": LR_DECAYS,
    "opd.on_collapse": ON_COLLAPSE,
    "opd.guard.fallback": FALLBACKS,
    "task.name": TASKS,
    "opd.guard.scope": SCOPES,
    "data.source": SOURCES,
    "task.ndcg_gain": ("linear", "exponential"),
    "remat": REMATS,
    "attention": ATTENTIONS,
    "dtype.compute": DTYPES,
    "dtype.frozen": (*DTYPES, "int8", "int4"),
    "sft.teacher.moments": DTYPES,
    "sft.student.moments": DTYPES,
    "opd.moments": DTYPES,
}

_POSITIVE = """
task.max_prompt task.prompt_buckets data.vote_cap
data.synthetic.reviews_per_product sft.teacher.batch_size sft.teacher.lr sft.student.batch_size sft.student.lr
opd.batch_size opd.rollouts opd.updates_per_batch opd.lr opd.temperature opd.head_chunk
opd.collapse.window opd.collapse.parse_drop opd.collapse.length_change predict.largest_gap
forecast.batch_size evaluation.batch_size evaluation.bootstrap train.checkpoint_every train.keep_checkpoints
parallel.timeout_s track.completions
""".split()

_NOT_NEGATIVE = """
task.max_review_words data.max_broken data.max_reviews_per_product data.max_lists data.synthetic.noise
data.synthetic_queries
sft.teacher.steps sft.teacher.epochs sft.teacher.warmup_steps sft.teacher.microbatch sft.teacher.packing
sft.student.steps sft.student.epochs sft.student.warmup_steps sft.student.microbatch sft.student.packing
opd.steps opd.epochs opd.warmup_steps opd.microbatch opd.kl_to_base opd.entropy_bonus opd.lambda_warmup_steps
opd.guard.margin opd.contract_reward opd.collapse.flips opd.eval_every opd.guard.floor predict.fixed_text_lists
teachers.max_prompt
evaluation.max_lists evaluation.examples optimizer.weight_decay optimizer.max_grad_norm
track.log_completions_every
""".split()

_SEEDS = "seed data.seed sft.teacher.seed sft.student.seed".split()

_SHARES = """
data.validation_share
optimizer.b1 sft.teacher.b2 sft.student.b2 opd.b2 opd.ema opd.ppo_clip
opd.collapse.lower
""".split()


def validate_fields(values: dict[str, Any]) -> None:
    """UserError for the first of the dotted fields whose value is wrong whatever the others are."""
    default = dict(flatten(defaults().to_dict()))
    for field, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        for x in numbers:
            is_switch = isinstance(default[field], bool)
            require(is_switch or not isinstance(x, bool), f"{field}={value}: must not be True or False")
            require(not isinstance(x, float) or not math.isnan(x), f"{field}={value}: must not be NaN")
            require(
                field == "opd.clip" or not isinstance(x, float) or math.isfinite(x),
                f"{field}={value}: must be finite",
            )
    for field, known in _NAMES.items():
        if values[field] not in known:
            raise unknown_name(field, values[field], known)
    for field in _POSITIVE:
        require(values[field] > 0, f"{field}={values[field]}: must be > 0")
    for field in _NOT_NEGATIVE:
        require(values[field] >= 0, f"{field}={values[field]}: must be >= 0")
    for field in _SEEDS:
        require(is_seed(values[field]), f"{field}={values[field]}: must be in [0, 2^32)")
    for field in _SHARES:
        require(0 <= values[field] < 1, f"{field}={values[field]}: must be in [0, 1)")
    for field in ("opd.jsd", "opd.on_policy"):
        require(0 <= values[field] <= 1, f"{field}={values[field]}: must be in [0, 1]")


def is_lambda(x: Any) -> bool:
    """Whether `x` is a number ≥ 0."""
    return isinstance(x, int | float) and not isinstance(x, bool) and x >= 0


def is_seed(x: Any) -> bool:
    """Whether `x` is a whole number of 32 bits."""
    return isinstance(x, int) and 0 <= x < 2**32


def is_date(text: str) -> bool:
    """Whether `text` is a date as YYYY-MM-DD."""
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def is_address(text: str) -> bool:
    """Whether `text` is the address of a server, without user, password or query."""
    form = r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[\w./-]*)?"
    try:
        return re.fullmatch(form, text) is not None and urllib.parse.urlsplit(text).port != 0
    except ValueError:  # no such port or IPv6 address
        return False
