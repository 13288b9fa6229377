"""More steps (EC, 42 against 196): the cliff moves to smaller λ.

    python -m listopd_jax.main --config=configs/paper/budget.py:tiny --workdir=runs/paper/budget

Each run is evaluated after EC's 42 steps' worth and at its end. Cost: 9 runs of 233 steps at tiny, about 15 minutes.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="after 196 steps parse .934 at λ = 1, .703 at 1.05, .500 at 1.10 (after 42: .887, .939, .943)",
    lambdas=(1.0, 1.05, 1.1),
    budget=196 / 42,
    agrees=lambda seen: mean(seen["plain"], 1.0) - mean(seen["plain"], 1.1) > 0.2,
)
get_config = EXPERIMENT.get_config
