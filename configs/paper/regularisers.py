"""Three regularisers at λ = 1.15 (EC, 42 steps), next to none.

    python -m listopd_jax.main --config=configs/paper/regularisers.py:tiny,kl_to_base --workdir=runs/paper/kl

Ablations none, kl_to_base (β = .01), entropy_bonus (γ = .001), lambda_warmup (20 steps).
Cost: 12 runs at tiny, 6 minutes.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="parse .887 with β = .01, .731 with γ = .001, .929 with 20 steps of warm-up (.948 without any)",
    lambdas=(1.15,),
    ablations={
        "none": {},
        "kl_to_base": {"opd.kl_to_base": 0.01},
        "entropy_bonus": {"opd.entropy_bonus": 0.001},
        "lambda_warmup": {"opd.lambda_warmup_steps": 20},
    },
    agrees=lambda seen: mean(seen["lambda_warmup"], 1.15) >= mean(seen["none"], 1.15) - 0.05,
)
get_config = EXPERIMENT.get_config
