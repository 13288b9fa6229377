"""Does extrapolation pay where the teacher continues the base's own SFT? docs/results/gain.json."""

import ml_collections

from configs.fashion import tiny


def get_config(name: str = "pair") -> ml_collections.ConfigDict:
    config = tiny()
    config.preset = name
    config.teacher.num_layers = 2
    config.data.synthetic.products = 1500
    config.data.validation_share = 0.25
    config.evaluation.max_lists = 1000
    config.sft.continued = True
    config.sft.student.update(steps=100, duplicate_rate=0.0, seed=2)
    config.sft.teacher.update(steps=100, truncation_rate=0.0, seed=3)
    config.evaluation.expected = True
    config.opd.update(lambdas=())
    config.opd.guard.update(margin=1.25, fallback="base", scope="structure")
    config.forecast.lambdas = (1.0, 1.25, 1.5, 2.0)
    config.train.export = False
    return config
