"""Students of three sizes under one teacher (EC's size axis).

    python -m listopd_jax.main --config=configs/paper/size.py:tiny,small --workdir=runs/paper/size/small

At `tiny` each ablation trains its own student: one layer, two (that of the others), four. At `paper` these are
Qwen3-0.6B, 1.7B and 4B. At `tiny`: 3 runs and an SFT stage for each ablation; not run yet.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="parse of SFT and after OPD: .547 → .953 (0.6B), .264 → .921 (1.7B), .516 → .953 (4B), .877 → .943 (8B)",
    lambdas=(1.0,),
    ablations={"small": {}, "middle": {}, "large": {}},
    at={
        "tiny": {
            "small": {"student.num_layers": 1},
            "middle": {"student.num_layers": 2},
            "large": {"student.num_layers": 4},
        },
        "paper": {
            "small": {"student.weights": "Qwen/Qwen3-0.6B"},
            "middle": {"student.weights": "Qwen/Qwen3-1.7B"},
            "large": {"student.weights": "Qwen/Qwen3-4B"},
        },
    },
    own=("student",),
    agrees=lambda seen: all(mean(curve, 1.0) >= 0.8 for curve in seen.values()),
)
get_config = EXPERIMENT.get_config
