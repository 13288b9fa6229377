"""Does λ > 1 pay where base and teacher share their errors? The experiment behind docs/results/gain.json.

    for ablation in same plain guarded independent independent_guarded; do
        python -m listopd_jax.main --config=configs/gain.py:$ablation --workdir=runs/gain/$ablation
    done
    python -m listopd_jax.report.gain runs/gain --out=docs/results/gain.json

The teacher continues the base's own SFT run, and only from there on a share of its answers is truncated: its errors are
the base's, smaller, and extrapolation runs into a cliff. `same` trains the pair and distils it at λ = 1, for N steps
and for 2N: is λ > 1 only a larger step? `plain` and `guarded` extrapolate it, without a guard and
with one of structure alone. `independent` and `independent_guarded` do the same with a teacher of its own
initialisation, order and depth, for which there should be nothing to gain. Run `same` and `independent` first: the
others load their models. Endpoint: the error of the expected scores over all 1,000 held-out lists, by seed.
"""

import ml_collections

from configs.fashion import tiny
from listopd_jax.errors import unknown_name

RUNS = "runs/gain"
ABLATIONS = ("same", "plain", "guarded", "independent", "independent_guarded")
SEEDS = (7, 13, 21, 42, 95, 101, 123, 202)
LAMBDA = 2.0
STEPS = 100


def get_config(name: str = "same") -> ml_collections.ConfigDict:
    """The configuration of `name`, one of ABLATIONS."""
    if name not in ABLATIONS:
        raise unknown_name("ablation", name, ABLATIONS)
    config = tiny()
    config.preset = name
    config.remat = "full"  # was faster than storing activations on a CPU
    config.task.max_response = 64
    config.data.update(validation_share=0.25)
    config.data.synthetic.products = 1500
    config.evaluation.update(max_lists=1000, expected=True, bootstrap=200)
    config.forecast.lambdas = (
        (1.0, 1.25, 1.5, 3.0) if name in ("same", "guarded", "independent_guarded") else ()
    )
    config.train.update(checkpoint_every=100, keep_checkpoints=1, export=name in ("same", "independent"))
    config.opd.update(
        estimator="full_vocab", ratio="none", batch_size=16, rollouts=2, lr=1e-3, seeds=SEEDS, steps=STEPS,
        lambdas=(LAMBDA,),
    )  # fmt: skip
    if name == "same":
        config.opd.update(lambdas=(1.0,), steps=2 * STEPS, eval_steps=(STEPS,))
    if name == "independent":
        config.opd.lambdas = (1.0,)
    if name.endswith("guarded"):
        config.opd.guard.update(margin=1.25, fallback="base", scope="structure")
    _models(config, name)
    return config


def _models(config: ml_collections.ConfigDict, name: str) -> None:
    """How the ablation's models are trained, or where it finds those of another ablation."""
    config.sft.student.update(steps=100, noise="duplicate_id:0.53", seed=2)
    config.sft.teacher.update(steps=60, noise="truncate:0.25", seed=3)
    if name.startswith("independent"):
        config.sft.teacher.update(steps=160, seed=5)
    else:
        config.teacher.num_layers = config.student.num_layers
    config.sft.continued = name == "same"
    pair = "independent" if name.startswith("independent") else "same"
    for role, source in (("teacher", pair), ("student", "same")):
        if name != source:
            config[role].weights = f"{RUNS}/{source}/export/sft_{role}"
            config.sft[role].update(steps=0, epochs=0.0)
    if name != "same":
        config.tokenizer.path = f"{RUNS}/same/export/sft_teacher"
