"""Experiments that decide between explanations of the cliff (docs/results.md, "Decisive experiments").

    for ablation in no_base_none no_base_teacher_student natural decay variance_plain variance_clean_teacher; do
        python -m listopd_jax.main --config=configs/decisive.py:$ablation --workdir=runs/decisive/$ablation
    done

`no_base_*`: λ log π_T without a base at λ = 2, with ratio `none` and with that of EC. Is it the advantage that ruins
the scores, or where this ratio ends (docs/theory.md)? `natural`: one SFT run at 100 and 200 steps and no planted noise.
Does a list break on its own? `decay`: plain distillation, λ = 1, of a teacher that breaks 45 % of its lists. Does parse
fall to the teacher's with the steps? `variance_*`: the variance of log π_T/π_B, which RIDE (2609.36484) blames for
collapse, on two pairs of configs/forecast.py, to compare with their parse curves.
"""

import ml_collections

from configs import forecast, gain
from listopd_jax.errors import unknown_name

ABLATIONS = (
    "no_base_none",
    "no_base_teacher_student",
    "natural",
    "decay",
    "variance_plain",
    "variance_clean_teacher",
)

SAMPLED = {
    "estimator": "sampled",
    "ratio": "teacher_student",
    "control_variate": "optimal",
    "batch_size": 8,
    "rollouts": 4,
}


def get_config(name: str = "natural") -> ml_collections.ConfigDict:
    """The configuration of `name`, one of ABLATIONS."""
    if name not in ABLATIONS:
        raise unknown_name("ablation", name, ABLATIONS)
    if name == "natural":
        config = _natural()
    elif name == "decay":
        config = _of_pair("wrong_teacher")
        config.opd.update(lambdas=(1.0,), steps=400, eval_steps=(25, 50, 100, 200), lr=4e-4, lr_decay="none")
    elif name.startswith("variance"):
        config = _of_pair(name.removeprefix("variance_"))
        config.opd.update(lambdas=(1.0,), seeds=(1,), steps=20, **SAMPLED)
        config.evaluation.max_lists = 64
    else:
        config = _of_pair("plain")
        ratio = name.removeprefix("no_base_")
        config.opd.update(advantage="no_base", ratio=ratio, control_variate="none", lambdas=(2.0,))
        config.evaluation.expected = True
    config.preset = name
    return config


def _of_pair(pair: str) -> ml_collections.ConfigDict:
    """A pair of configs/forecast.py without anchors and forecasts."""
    config = forecast.get_config(pair)
    config.predict.update(anchors=(), fixed_text_lists=0)
    config.forecast.lambdas = ()
    return config


def _natural() -> ml_collections.ConfigDict:
    """The pair of configs/gain.py, without noise and with a teacher of 200 steps."""
    config = gain.get_config("same")
    for role in ("teacher", "student"):
        config.sft[role].update(steps=100, noise="")
    config.forecast.lambdas = ()
    config.train.export = False
    config.opd.update(lambdas=(1.0, 2.0, 3.0, 4.0, 6.0), steps=gain.STEPS, eval_steps=())
    return config
