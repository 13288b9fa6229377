"""The same number of steps spent on more SFT instead of OPD: what do students gain by that?

    python -m listopd_jax.main --config=configs/paper/continued_sft.py:tiny,seed2 --workdir=runs/paper/continued_sft/2

The student's SFT continues for the steps that OPD would have. Nothing is distilled: the SFT student is judged.
Ablations: three seeds of its SFT. At `paper`, EC's five epochs and 42 steps more. At `tiny`: three SFT stages, about
5 minutes; not run yet.
"""

from configs.paper.experiment import STEPS, Experiment, mean

EC_SFT = 70  # steps: EC's five epochs
EXPERIMENT = Experiment(
    ec="a control, without a figure in its table: SFT alone stays at .264 ± .105 (5 seeds)",
    lambdas=(),
    policy="sft_student",
    ablations={f"seed{seed}": {"sft.student.seed": seed} for seed in (2, 3, 5)},
    at={
        scale: {f"seed{seed}": {"sft.student.steps": before + STEPS[scale]} for seed in (2, 3, 5)}
        for scale, before in (("tiny", 120), ("paper", EC_SFT))
    },
    own=("student",),
    agrees=lambda seen: all(mean(curve, None) < 0.6 for curve in seen.values()),
)
get_config = EXPERIMENT.get_config
