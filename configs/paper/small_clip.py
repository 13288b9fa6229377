"""A small clip, c = 1.5, 196 steps (EC's third locked test): Eq. 4 says the cliff is at 1.07.

    python -m listopd_jax.main --config=configs/paper/small_clip.py:tiny --workdir=runs/paper/small_clip

Cost: 12 runs of 233 steps at tiny, about 20 minutes.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="parse .943 at λ = .95, .939 at 1.05, .632 at 1.075, .297 at 1.15, .255 at 1.20",
    lambdas=(0.95, 1.05, 1.15, 1.2),
    budget=196 / 42,
    shared={"opd.clip": 1.5},
    agrees=lambda seen: mean(seen["plain"], 0.95) >= 0.85 and mean(seen["plain"], 1.2) <= 0.5,
)
get_config = EXPERIMENT.get_config
