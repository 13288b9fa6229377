"""Which guard keeps the contract at λ = 2, and at what price? The experiment behind docs/results/guards.json.

    for pair in right wrong; do
        for ablation in one plain structure everywhere mask mask_structure floor per_class one_mask one_sampled \\
                contract_reward; do
            name=${pair}_$ablation
            python -m listopd_jax.main --config=configs/guards.py:$name --workdir=runs/guards/$name
        done
    done
    python -m listopd_jax.report.guards runs/guards --out=docs/results/guards.json

`right` is the pair of configs/gain.py: the teacher's greedy answers keep the contract. `wrong` is a teacher whose own
greedy answers break half of the lists (EC's: about 42 %), with a base that breaks none. `one` trains each pair and
distils it at λ = 1; run it first: the others load its models. `one_mask`, λ = 1 under the mask, was added after the
lock: how much of what a mask gives does λ = 2 give? The contract reward is about sampled tokens, so it has a
λ = 1 of its own, `one_sampled`. Seeds and held-out lists are those of configs/gain.py.
"""

from typing import Any

import ml_collections

from configs import forecast, gain
from listopd_jax.errors import unknown_name

RUNS = "runs/guards"
PAIRS = ("right", "wrong")
SAMPLED = {"estimator": "sampled", "ratio": "none", "control_variate": "optimal"}
MARGIN = {"margin": 1.25, "fallback": "base"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "one": {"lambdas": (1.0,)},
    "plain": {},
    "structure": {"guard": {**MARGIN, "scope": "structure"}},
    "everywhere": {"guard": MARGIN},
    "mask": {"guard": {"mask": True}},
    "mask_structure": {"guard": {**MARGIN, "scope": "structure", "mask": True}},
    "floor": {"guard": {"floor": 4.0, "scope": "structure"}},
    "per_class": {"guard": {"structure": 1.0}},
    "one_mask": {"lambdas": (1.0,), "guard": {"mask": True}},
    "one_sampled": {"lambdas": (1.0,), **SAMPLED},
    "contract_reward": {"contract_reward": 1.0, **SAMPLED},
}


def get_config(name: str = "right_one") -> ml_collections.ConfigDict:
    """The configuration of `name`, PAIR_ABLATION."""
    pair, _, ablation = name.partition("_")
    if pair not in PAIRS or ablation not in ABLATIONS:
        raise unknown_name(
            "ablation", name, [f"{pair}_{ablation}" for pair in PAIRS for ablation in ABLATIONS]
        )
    config = gain.get_config("same") if pair == "right" else _wrong()
    config.preset = name
    config.forecast.lambdas = (1.0, 2.0)
    config.evaluation.margins = True
    config.train.export = ablation == "one"
    config.opd.update(lambdas=(gain.LAMBDA,), steps=gain.STEPS, eval_steps=())
    config.opd.update(ABLATIONS[ablation])
    if ablation != "one":
        _load(config, pair)
    return config


def _wrong() -> ml_collections.ConfigDict:
    """The teacher of configs/forecast.py that breaks lists, in the setting of configs/gain.py."""
    config, sft = gain.get_config("independent"), forecast.get_config("wrong_teacher").sft
    for role in ("teacher", "student"):
        config[role].weights = ""
        config.sft[role].update(sft[role])
    config.tokenizer.path = ""
    return config


def _load(config: ml_collections.ConfigDict, pair: str) -> None:
    """The models that ablation `one` of the pair has trained."""
    for role in ("teacher", "student"):
        config[role].weights = f"{RUNS}/{pair}_one/export/sft_{role}"
        config.sft[role].update(steps=0, epochs=0.0)
    config.sft.continued = False
    config.tokenizer.path = f"{RUNS}/{pair}_one/export/sft_teacher"
