"""Constrained decoding of the SFT student, with and without the permutation repair, next to distillation at λ = 1.

    python -m listopd_jax.main --config=configs/paper/constrained.py:tiny --workdir=runs/paper/constrained

Needs the extra `constrained`. The report's section has the decodings side by side. Cost: 3 runs at tiny, 4 minutes.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="parse of the SFT student .335, constrained .783, repaired all; useful .823 repaired against .874 distilled",
    lambdas=(1.0,),
    shared={"evaluation.constrained": "schema"},
    agrees=lambda seen: mean(seen["plain"], 1.0) >= 0.8,
)
get_config = EXPERIMENT.get_config
