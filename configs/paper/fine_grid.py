"""The fine grid of five seeds about the cliff (EC, 42 steps).

    python -m listopd_jax.main --config=configs/paper/fine_grid.py:tiny --workdir=runs/paper/fine_grid

Cost: 20 runs, about 8 minutes on two cores at tiny.
"""

from configs.paper.experiment import FIVE, Experiment, mean

EXPERIMENT = Experiment(
    ec="parse .898, .810, .789, .658 at λ = 1.18, 1.20, 1.22, 1.24; seeds differ by up to .15",
    lambdas=(1.18, 1.2, 1.22, 1.24),
    seeds=FIVE,
    agrees=lambda seen: mean(seen["plain"], 1.18) > mean(seen["plain"], 1.24),
)
get_config = EXPERIMENT.get_config
