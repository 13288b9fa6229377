"""What the files of this folder share: ablations of one experiment, at two scales."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from configs import fashion
from listopd_jax.errors import UserError, unknown_name

STEPS = {"tiny": 50, "paper": 42}  # of one budget
SEEDS = {"tiny": (0, 1, 2), "paper": (42,)}
FIVE = (7, 13, 21, 42, 95)  # EC's

# λ (None of a policy that is not distilled) -> parse of each seed
Curve = Mapping[float | None, Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What EC did and saw, and when our runs agree with it.

    ablations: name -> config fields by their dotted names, on top of `shared`. at: scale -> ablation -> fields of that
    scale alone. policy: the stage whose models are judged, opd or sft_student. agrees: of ablation -> curve. The matrix
    trains teacher and base once for all; an ablation trains those of `own` itself (from the matrix's weights where it
    is in `trained_on` too), and its teacher is the SFT model of `teacher`. reference: ablation -> the role whose SFT
    model is `reference.weights`. on_clothing: of real reviews, whose file the matrix has to be given.
    """

    ec: str
    lambdas: tuple[float, ...]
    agrees: Callable[[Mapping[str, Curve]], bool]
    ablations: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"plain": {}})
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    budget: float = 1.0  # of EC's 42 steps
    seeds: tuple[int, ...] = ()  # (): those of the scale
    own: tuple[str, ...] = ()
    trained_on: tuple[str, ...] = ()
    reference: Mapping[str, str] = dataclasses.field(default_factory=dict)
    on_clothing: bool = False
    teacher: str = "teacher"
    policy: str = "opd"

    def get_config(self, choice: str = "tiny") -> ml_collections.ConfigDict:
        """The config of SCALE or SCALE,ABLATION; the first ablation where none is named."""
        scale, _, ablation = choice.partition(",")
        ablation = ablation or next(iter(self.ablations))
        for what, name, known in (("scale", scale, STEPS), ("ablation", ablation, self.ablations)):
            if name not in known:
                raise unknown_name(what, name, known)
        config = {"tiny": fashion.tiny, "paper": fashion.paper}[scale]()
        config.preset = choice
        config.train.export = False
        config.forecast.lambdas = ()
        steps = round(self.budget * STEPS[scale])
        if steps > STEPS[scale]:
            config.opd.eval_steps = (STEPS[scale],)
        config.opd.update(lambdas=self.lambdas, steps=steps, seeds=self.seeds or SEEDS[scale])
        own = self.at.get(scale, {}).get(ablation, {})
        config.update_from_flattened_dict({**self.shared, **self.ablations[ablation], **own})
        return config


def mean(curve: Curve, lam: float | None) -> float:
    """The mean parse at λ over the seeds; UserError if it was not run."""
    if lam not in curve:
        raise UserError(f"no run{'' if lam is None else f' at λ = {lam:g}'}; resume the matrix")
    return float(np.mean(curve[lam]))


def falls(curve: Curve, holds: float, breaks: float) -> bool:
    """Whether the contract holds (parse ≥ .8) at λ = `holds` and is broken (< .5) at `breaks`."""
    return mean(curve, holds) >= 0.8 and mean(curve, breaks) < 0.5
