"""Students of three sizes under one teacher (EC's size axis).

    python -m listopd_jax.main --config=configs/paper/size.py:tiny,small --workdir=runs/paper/size/small

At `tiny` each arm trains its own student: one layer, two (that of the other experiments), four. At `paper` these are
Qwen3-0.6B, 1.7B and 4B. Cost: 9 runs at tiny and two SFT stages, some 7 minutes.
"""

import ml_collections

from configs.paper.experiment import Experiment, mean

LAYERS = {"small": 1, "middle": 2, "large": 4}
QWEN3 = {"small": "0.6B", "middle": "1.7B", "large": "4B"}
EXPERIMENT = Experiment(
    ec="parse of SFT and after OPD: .547 → .953 (0.6B), .264 → .921 (1.7B), .516 → .953 (4B), .877 → .943 (8B)",
    lambdas=(1.0,),
    arms={size: {} for size in LAYERS},
    own=("student",),
    agrees=lambda seen: all(mean(curve, 1.0) >= 0.8 for curve in seen.values()),
)


def get_config(choice: str = "tiny,middle") -> ml_collections.ConfigDict:
    """The config of SCALE,SIZE."""
    config = EXPERIMENT.get_config(choice)
    scale, _, size = choice.partition(",")
    if scale == "paper":
        config.student.weights = f"Qwen/Qwen3-{QWEN3[size or 'small']}"
    else:
        config.student.num_layers = LAYERS[size or "small"]
    return config
