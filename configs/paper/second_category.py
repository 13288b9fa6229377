"""Zero-shot on a second category: train on one department of real clothing reviews, evaluate on another.

    python -m listopd_jax.main --config=configs/paper/second_category.py:tiny,other --workdir=runs/paper/other \
        --config.data.path=womens_clothing_reviews.csv.zip

Ablations: same (train on tops, hold out tops), other (train on tops, hold out dresses). Lists of 4 reviews at tiny, of
8 at paper. Each ablation trains its own teacher and base. Cost: 3 runs and two SFT stages for each ablation at tiny.
The matrix runs it with `--clothing=FILE` only. Not run yet.
"""

from configs.paper.experiment import Experiment, mean

EXPERIMENT = Experiment(
    ec="zero-shot Baby and Software lists: a check of scope, no cliff where SFT already parses",
    lambdas=(1.0,),
    shared={"data.source": "clothing", "data.category": "Tops", "data.max_lists": 2000},
    ablations={"same": {}, "other": {"data.validation_category": "Dresses"}},
    at={"tiny": {ablation: {"task.k": 4} for ablation in ("same", "other")}},
    own=("teacher", "student"),
    on_clothing=True,
    agrees=lambda seen: abs(mean(seen["other"], 1.0) - mean(seen["same"], 1.0)) <= 0.1,
)
get_config = EXPERIMENT.get_config
