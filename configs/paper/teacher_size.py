"""One student under teachers of three sizes.

    python -m listopd_jax.main --config=configs/paper/teacher_size.py:tiny,small --workdir=runs/paper/teacher_size/small

At `tiny` each arm trains its own teacher: one layer, three (that of the other experiments), five. At `paper` these are
Qwen3-1.7B, 4B and 8B. Cost: 9 runs at tiny and two SFT stages, some 7 minutes.
"""

import ml_collections

from configs.paper.experiment import Experiment, mean

LAYERS = {"small": 1, "middle": 3, "large": 5}
QWEN3 = {"small": "1.7B", "middle": "4B", "large": "8B"}
EXPERIMENT = Experiment(
    ec="no figure in its table for this task; Llama 1B under 3B and Qwen3-8B under 32B: no cliff up to λ = 1.5",
    lambdas=(1.0,),
    arms={size: {} for size in LAYERS},
    own=("teacher",),
    agrees=lambda seen: all(mean(curve, 1.0) >= 0.8 for curve in seen.values()),
)


def get_config(choice: str = "tiny,middle") -> ml_collections.ConfigDict:
    """The config of SCALE,SIZE."""
    config = EXPERIMENT.get_config(choice)
    scale, _, size = choice.partition(",")
    if scale == "paper":
        config.teacher.weights = f"Qwen/Qwen3-{QWEN3[size or 'small']}"
    else:
        config.teacher.num_layers = LAYERS[size or "small"]
    return config
