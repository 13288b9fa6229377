"""One student under teachers of three sizes.

    python -m listopd_jax.main --config=configs/paper/teacher_size.py:tiny,small --workdir=runs/paper/teacher_size/small

At `tiny` each ablation trains its own teacher: one layer, three (that of the others), five. At `paper` these are
Qwen3-1.7B, 4B and 8B. At `tiny`: 3 runs and an SFT stage for each ablation; not run yet.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="no figure in its table for this task; Llama 1B under 3B and Qwen3-8B under 32B: no cliff up to λ = 1.5",
    lambdas=(1.0,),
    ablations={"small": {}, "middle": {}, "large": {}},
    at={
        "tiny": {
            "small": {"teacher.num_layers": 1},
            "middle": {"teacher.num_layers": 3},
            "large": {"teacher.num_layers": 5},
        },
        "paper": {
            "small": {"teacher.weights": "Qwen/Qwen3-1.7B"},
            "middle": {"teacher.weights": "Qwen/Qwen3-4B"},
            "large": {"teacher.weights": "Qwen/Qwen3-8B"},
        },
    },
    own=("teacher",),
    agrees=lambda seen: all(mean(curve, 1.0) >= 0.8 for curve in seen.values()),
)
get_config = EXPERIMENT.get_config
