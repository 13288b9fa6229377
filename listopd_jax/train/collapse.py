"""The watch over a run that may collapse: what its samples show at each step, and what is done about it.

Every step samples completions anyway; how many of them hold the contract, how long they are and at how many structural
tokens the target flips is a free look at the policy. Means over a window of steps are compared with those of the window
in which most completions held the contract: a noisy step is not a collapse, and neither is a student that starts low.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from listopd_jax.files import on_process_0


class Thresholds(NamedTuple):
    """The criteria of a collapse; fields as in the config section `opd.collapse`."""

    window: int
    parse_drop: float
    length_change: float
    flips: float


class Seen(NamedTuple):
    """Statistics of the samples of a step, or a mean over steps: shares of 1, and tokens."""

    parse: float
    length: float
    flips: float  # of structural tokens


def collapse(now: Seen, best: Seen, at: Thresholds) -> str:
    """Why `now` is a collapse after `best`, in a few words; "" if it is not one."""
    if best.parse - now.parse > at.parse_drop:
        return f"parse fell from {best.parse:.2f} to {now.parse:.2f}"
    if abs(now.length - best.length) > at.length_change * best.length:
        return f"completions went from {best.length:.0f} to {now.length:.0f} tokens"
    if now.flips > at.flips:
        return f"the target flips at {now.flips:.3f} of structural tokens"
    return ""


def mean(seen: list[Seen]) -> Seen:
    """The mean of each number."""
    return Seen(*(sum(column) / len(column) for column in zip(*seen, strict=True)))


class Watch:
    """Looks at every step of one run; its state is saved with the run's.

    Args:
      run: its name, for what is printed.
      action: warn, lower_lambda or stop.
      lower: lower_lambda moves λ to 1 + lower·(λ − 1).
    """

    def __init__(self, run: str, action: str, thresholds: Thresholds, lower: float):
        self._run, self._action, self._at, self._lower = run, action, thresholds, lower
        self._recent: list[Seen] = []
        self._best: Seen | None = None
        self._scale = 1.0
        self.collapses: list[int] = []  # the steps at which a collapse was seen

    @property
    def stopped(self) -> bool:
        """Whether the run is over."""
        return self._action == "stop" and bool(self.collapses)

    def lam(self, lam: float) -> float:
        """The λ of the next step of a run at `lam`."""
        # 1 + (λ − 1) need not be λ: for .3 it is .30000000000000004. Without a collapse λ stays as it is.
        return 1 + self._scale * (lam - 1) if self._scale < 1 else lam

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Look at `step`, the number of updates so far; returns extra metrics to log."""
        log = {"lambda_scale": self._scale} if self._action == "lower_lambda" else {}
        seen = Seen(metrics["parse"], metrics["completion_length"], metrics["flip_structural"])
        self._recent = [*self._recent, seen][-self._at.window :]
        why = ""
        if len(self._recent) == self._at.window:
            now = mean(self._recent)
            if self._best is None or now.parse >= self._best.parse:
                self._best = now
            why = collapse(now, self._best, self._at)
        if why:
            self._act(step, why)
        return log | {"collapsed": float(bool(why))}

    def _act(self, step: int, why: str) -> None:
        """Act on a collapse. Later steps are compared with each other only: the window starts over."""
        self.collapses.append(step)
        self._recent, self._best = [], None
        if self._action == "lower_lambda":
            self._scale *= self._lower
        done = {
            "warn": "it continues",
            "stop": "stopped",
            "lower_lambda": f"λ − 1 is {self._scale:g} of what it was",
        }
        if on_process_0():
            print(f"warning: {self._run}, step {step}: {why}; {done[self._action]}", file=sys.stderr)

    def get_state(self) -> dict[str, Any]:
        """JSON, for `set_state`."""
        best = None if self._best is None else list(self._best)
        return {
            "recent": [list(seen) for seen in self._recent],
            "best": best,
            "scale": self._scale,
            "collapses": self.collapses,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resume from what `get_state` gave."""
        self._recent = [Seen(*seen) for seen in state["recent"]]
        self._best = None if state["best"] is None else Seen(*state["best"])
        self._scale, self.collapses = state["scale"], list(state["collapses"])
