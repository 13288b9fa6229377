"""Without the base in the advantage, λ log π_T − log π_S (EC, 42 steps): no cliff.

    python -m listopd_jax.main --config=configs/paper/no_base.py:tiny --workdir=runs/paper/no_base

Cost: 12 runs at tiny, about 6 minutes.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="parse .929 to .939 from λ = 1.0 to 1.4: no cliff",
    lambdas=(1.0, 1.15, 1.25, 1.4),
    shared={"opd.advantage": "no_base"},
    agrees=lambda seen: min(mean(seen["plain"], lam) for lam in (1.0, 1.15, 1.25, 1.4)) >= 0.8,
)
get_config = EXPERIMENT.get_config
