"""The importance ratio: EC's Eq. 3, ASPO's, what verl computes, and none (EC has ASPO at two λ).

    python -m listopd_jax.main --config=configs/paper/ratio.py:tiny,aspo --workdir=runs/paper/ratio/aspo

Ablations teacher_student, trainer_rollout, aspo and none. Cost: 24 runs at tiny, about 10 minutes.
"""

from configs.paper.experiment import Experiment, falls

RATIOS = ("teacher_student", "trainer_rollout", "aspo", "none")
EXPERIMENT = Experiment(
    ec="ASPO: parse .932 ± .008 at λ = 1.0, .096 ± .020 at 1.5",
    lambdas=(1.0, 1.5),
    ablations={name: {"opd.ratio": name} for name in RATIOS},
    agrees=lambda seen: falls(seen["aspo"], 1.0, 1.5),
)
get_config = EXPERIMENT.get_config
