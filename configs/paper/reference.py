"""G-OPD's reward correction: the teacher's own model before its last stage of training as the objective's base.

    python -m launch.matrix --root=runs/matrix --out=docs/matrix.md --only=reference

The last stage is 100 steps of SFT on right answers, from the teacher of the other experiments. Ablations: base (the
student's SFT, EC's), before (the teacher before that stage, `reference.weights`). The matrix gives the ablations their
weights; `--config=configs/paper/reference.py:tiny,before` alone needs `teacher.weights` and `reference.weights`. Cost:
12 runs and two SFT stages at tiny. Not run yet.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="not in EC. G-OPD (arXiv:2602.12125): λ > 1 gains more with the teacher before its last stage as the reference",
    lambdas=(1.0, 1.5),
    shared={"sft.teacher.steps": 100, "sft.teacher.noise": ""},
    ablations={"base": {}, "before": {}},
    own=("teacher",),
    trained_on=("teacher",),
    reference={"before": "teacher"},
    agrees=lambda seen: mean(seen["before"], 1.5) >= mean(seen["base"], 1.5),
)
get_config = EXPERIMENT.get_config
