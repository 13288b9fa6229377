"""The sweep over λ (EC, 42 steps, seed 42).

    python -m listopd_jax.main --config=configs/paper/lambda_sweep.py:tiny --workdir=runs/paper/lambda_sweep

Cost: 27 runs at tiny, about 10 minutes on two cores; 9 runs of 42 steps at paper.
"""

from configs.paper.experiment import Experiment, falls

EXPERIMENT = Experiment(
    ec="parse .887 at λ = 1, .948 at 1.15, .868 at 1.20, .651 at 1.25, .160 at 1.40, .085 at 1.50: a cliff",
    lambdas=(0.5, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.4, 1.5),
    agrees=lambda seen: falls(seen["plain"], 1.0, 1.5),
)
get_config = EXPERIMENT.get_config
