"""The student's own SFT model as its teacher: what does on-policy training lift without a better teacher?

    python -m launch.matrix --root=runs/matrix --out=docs/matrix.md --only=self_distillation

The matrix gives this ablation its weights; `--config=configs/paper/self_distillation.py:tiny` alone trains a teacher.
Teacher and base are one model, so the advantage vanishes at the start and λ does nothing: parse must stay where SFT
left it. At `paper`, give both weights one fine-tuned folder. At `tiny`: 6 runs, 3 minutes.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="a control, without a figure in its table: no gain",
    lambdas=(1.0, 1.5),
    teacher="student",
    shared={"opd.self_distillation": True},
    agrees=lambda seen: all(mean(seen["plain"], lam) < 0.2 for lam in (1.0, 1.5)),
)
get_config = EXPERIMENT.get_config
