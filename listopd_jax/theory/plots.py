"""Figures of the closed forms. Matplotlib is imported on use, so that `listopd_jax.theory` stays NumPy only."""

import pathlib

import numpy as np

from listopd_jax.theory.explain import Explanation
from listopd_jax.theory.thresholds import fixed_point_log_odds, probability

PNG = {"dpi": 150, "metadata": {"Software": None}}  # no version stamp: the same data give the same file


def save_tail_plot(e: Explanation, path: str | pathlib.Path) -> None:
    """Draw the target's tail mass 1 − q* against λ with the clip boundary (1−p)/c, as EC Fig. 1a; write a PNG."""
    from matplotlib.figure import Figure

    thresholds = [
        ("λ_clip", e.lambda_clip, "tab:red"),
        ("λ_clip, b = ½", e.lambda_clip_base_neutral, "tab:orange"),
    ]
    thresholds += [("λ_flip", e.lambda_flip, "tab:purple")]
    drawn = [(name, lam, color) for name, lam, color in thresholds if lam is not None]
    lams = np.linspace(0, max([1.6, e.lam, *(1 + 1.5 * (lam - 1) for _, lam, _ in drawn)]), 400)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(
        lams, probability(-np.asarray(fixed_point_log_odds(e.p, e.b, lams))), label="target tail mass 1 − q*"
    )
    if e.q_c is not None and e.q_c < 1:
        axes.axhline((1 - e.p) / e.c, color="gray", ls="--", label=f"clip boundary (1 − p)/c, c = {e.c:g}")
    if e.lambda_flip is not None:
        axes.axhline(0.5, color="gray", ls=":", label="mode boundary ½")
    for name, lam, color in drawn:
        axes.axvline(lam, color=color, lw=1, label=f"{name} = {lam:.4f}")
    axes.set(xlabel="extrapolation weight λ", ylabel="tail mass", title=f"p = {e.p:g}, b = {e.b:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", **PNG)
