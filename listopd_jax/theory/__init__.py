"""Thresholds of λ in float64 NumPy. Nothing here imports JAX; the simulator, listopd_jax.simulate, does."""

from listopd_jax.theory.checks import Undefined
from listopd_jax.theory.thresholds import (
    clip_boundary,
    clip_boundary_log_odds,
    clip_safe_lambda,
    clip_safe_lambda_base_neutral,
    clip_safe_lambda_log_odds,
    fixed_point,
    fixed_point_log_odds,
    flip_lambda,
    log_odds,
    log_odds_gap,
    probability,
)

__all__ = [
    "Undefined",
    "clip_boundary",
    "clip_boundary_log_odds",
    "clip_safe_lambda",
    "clip_safe_lambda_base_neutral",
    "clip_safe_lambda_log_odds",
    "fixed_point",
    "fixed_point_log_odds",
    "flip_lambda",
    "log_odds",
    "log_odds_gap",
    "probability",
]
