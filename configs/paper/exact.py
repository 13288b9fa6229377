"""Ours, not EC's: the exact gradient over the vocabulary, and the advantage with log Z taken out.

    python -m listopd_jax.main --config=configs/paper/exact.py:tiny,full_vocab --workdir=runs/paper/exact/full_vocab

Neither has EC's limit; a cliff in both says that sampling noise and clip are not its cause. Cost: 12 runs, 6 minutes.
"""

from configs.paper.experiment import Experiment, falls

EXPERIMENT = Experiment(
    ec="not in EC",
    lambdas=(1.0, 1.5),
    ablations={
        "full_vocab": {"opd.estimator": "full_vocab", "opd.ratio": "none"},
        "normalize": {"opd.normalize": True},
    },
    agrees=lambda seen: all(falls(curve, 1.0, 1.5) for curve in seen.values()),
)
get_config = EXPERIMENT.get_config
