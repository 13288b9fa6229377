"""The clip c at λ = 1.15 (EC, 42 steps).

    python -m listopd_jax.main --config=configs/paper/clip.py:tiny,1.5 --workdir=runs/paper/clip/1.5

Ablations 1.5, 2, 5 and inf. Cost: 12 runs at tiny, about 6 minutes.
"""

import math

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="parse .948, .557, .859, .849 at c = 1.5, 2, 5, ∞: no order in c",
    lambdas=(1.15,),
    ablations={
        name: {"opd.clip": value} for name, value in (("1.5", 1.5), ("2", 2.0), ("5", 5.0), ("inf", math.inf))
    },
    agrees=lambda seen: not mean(seen["1.5"], 1.15) < mean(seen["5"], 1.15) - 0.1,
)
get_config = EXPERIMENT.get_config
