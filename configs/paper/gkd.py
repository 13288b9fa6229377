"""Other divergences and other data than the reverse KL on the student's own lists: GKD (arXiv:2306.13649).

    python -m listopd_jax.main --config=configs/paper/gkd.py:tiny,forward_kl --workdir=runs/paper/gkd/forward_kl

Ablations: reverse_kl, forward_kl, jsd (β = .5), each on policy; mixed, jsd with half of the steps on right answers;
off_policy, the forward KL on right answers alone. Exact gradients. At `tiny`: 30 runs; not run yet.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="a control, without a figure in its table: is it the data or the divergence that lifts parse?",
    lambdas=(1.0, 1.5),
    shared={"opd.estimator": "full_vocab", "opd.ratio": "none"},
    ablations={
        "reverse_kl": {},
        "forward_kl": {"opd.jsd": 0.0},
        "jsd": {"opd.jsd": 0.5},
        "mixed": {"opd.jsd": 0.5, "opd.on_policy": 0.5},
        "off_policy": {"opd.jsd": 0.0, "opd.on_policy": 0.0},
    },
    agrees=lambda seen: all(mean(curve, 1.0) >= 0.8 for curve in seen.values()),
)
get_config = EXPERIMENT.get_config
