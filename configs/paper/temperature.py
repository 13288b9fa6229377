"""The temperature at which completions are sampled for training (EC: parse hardly moves).

    python -m listopd_jax.main --config=configs/paper/temperature.py:tiny,0.5 --workdir=runs/paper/temperature/0.5

Ablations 0.5 and 1. (EC also has 0, which is not sampling: opd.temperature must be above 0.)
Cost: 6 runs at tiny, 3 minutes.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="T = 0, .5, 1 move parse by at most .071",
    lambdas=(1.0,),
    ablations={name: {"opd.temperature": float(name)} for name in ("0.5", "1")},
    agrees=lambda seen: abs(mean(seen["0.5"], 1.0) - mean(seen["1"], 1.0)) <= 0.071,
)
get_config = EXPERIMENT.get_config
