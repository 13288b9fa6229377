"""The experiments of docs/results.md: which threshold predicts the cliff, and whether the guard removes it.

    python -m listopd_jax.main --config=configs/cliff.py:plain --workdir=runs/cliff/plain
    python -m listopd_jax.main --config=configs/cliff.py:small_clip --workdir=runs/cliff/small_clip

One preset for each ablation, five seeds (or THREE), each run evaluated after N = 50 and 4N = 200 steps; reviews and
models are those of configs/fashion.py:tiny. `plain` goes first and trains the pair, a teacher that truncates 22 % of
its training answers and a base that does not; `clean_teacher` trains a teacher that never truncates, `truncating_base`
a base that truncates more than the teacher. The other ablations load those from runs/cliff. Hours on two cores: see
docs/results.md for times and results.
"""

import math

import ml_collections

from configs.fashion import tiny
from listopd_jax.errors import unknown_name

RUNS = "runs/cliff"
THREE = (7, 13, 21)  # seeds of the ablations with a clear answer

ABLATIONS = {
    # the pair with p < b at the comma before the last object; at λ = 1 `no_base` and `guard` are `plain`
    "plain": dict(lambdas=(1.0, 1.1, 1.15, 1.3, 1.5, 1.6, 2.0)),
    "small_clip": dict(clip=1.5, lambdas=(1.0, 1.15, 1.5)),
    "no_clip": dict(clip=math.inf, ratio="none", lambdas=(1.0, 1.3)),
    "no_base": dict(advantage="no_base", lambdas=(1.3, 2.0), seeds=THREE),
    "full_vocab": dict(estimator="full_vocab", ratio="none", lambdas=(1.0, 1.1, 1.3), seeds=THREE),
    "guard": dict(margin=1.25, lambdas=(1.15, 1.3, 1.5, 2.0)),
    "guard_full_vocab": dict(
        margin=1.25, estimator="full_vocab", ratio="none", lambdas=(1.3, 2.0), seeds=THREE
    ),
    "guard_base": dict(margin=1.25, fallback="base", lambdas=(1.0, 1.15, 1.3, 1.5, 2.0)),
    # a teacher that never truncates: no structural flip, while EC Eq. 4 predicts a cliff
    "clean_teacher": dict(lambdas=(1.0, 1.3, 1.7, 3.0)),
    "clean_teacher_small_clip": dict(clip=1.5, lambdas=(1.0, 1.7)),
    # a base that truncates more than the teacher: p > b at the comma
    "truncating_base": dict(lambdas=(1.0, 1.8)),
}


def get_config(name: str = "plain") -> ml_collections.ConfigDict:
    """The configuration of `name`, one of ABLATIONS."""
    if name not in ABLATIONS:
        raise unknown_name("ablation", name, ABLATIONS)
    config = tiny()
    config.preset = name
    config.remat = "full"  # was faster than storing activations on a CPU
    config.task.max_response = 64
    config.tokenizer.vocab_size = 512
    config.sft.teacher.update(steps=300, warmup_steps=30)
    config.sft.student.update(steps=200, warmup_steps=30, noise="duplicate_id:0.5")
    config.opd.update(
        batch_size=8, rollouts=4, lr=4e-4, seeds=(7, 13, 21, 42, 95), steps=200, eval_steps=(50,)
    )
    config.forecast.lambdas = (1.05, 1.15, 1.2, 1.25, 1.4)
    config.train.update(checkpoint_every=100, keep_checkpoints=1, export=name in MAKES)
    options = dict(ABLATIONS[name])
    config.opd.guard.update(margin=options.pop("margin", 0.0), fallback=options.pop("fallback", "teacher"))
    config.opd.update(options)
    _models(config, name)
    return config


MAKES = {"plain": "both", "clean_teacher": "teacher", "truncating_base": "student"}
"""The SFT models that an ablation trains; it loads the others."""


def _models(config: ml_collections.ConfigDict, name: str) -> None:
    """Which models the ablation trains with which noise, and where it finds those of another ablation."""
    made = MAKES.get(name, "none")
    source = {"teacher": "plain", "student": "plain"}
    if name.startswith("clean_teacher"):
        source["teacher"] = "clean_teacher"
        config.sft.teacher.noise = ""
    if name == "truncating_base":
        config.sft.student.noise = "truncate:0.45,duplicate_id:0.5"
    for role in ("teacher", "student"):
        if made not in (role, "both"):
            config[role].weights = f"{RUNS}/{source[role]}/export/sft_{role}"
            config.sft[role].update(steps=0, epochs=0.0)
    if made != "both":
        config.tokenizer.path = f"{RUNS}/plain/export/sft_teacher"
