"""Where the estimator of an OPD run ends at a position: its exact limit, not the target (docs/theory.md §2).

With the ratio `teacher_student`, ρ = min(c, π_T/π_S), the mean flow rests where ρ_v A_v = κ for every token v. With
r_v = (p_v/b_v)^(λ−1) and t_v = p_v r_v, the unnormalised target:

    q_v = t_v · exp(−max(W(κ r_v), κ/c)),   κ from Σ_v q_v = 1                                          (ours)

W is Lambert's function. κ ≥ 0 for λ ≥ 1, where Σ_v t_v ≥ 1. For λ < 1, κ < 0 and min becomes max; the equation has no
solution for a token with κ r_v < −1/e: there the least W, −1, stands for it. Other ratios end at the target itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_BISECTIONS = 22  # of log |κ|, which leaves 1e-5
LIKELIEST = 24  # tokens that are looked at one by one
_NEVER = -1e9  # log-probability
_SPAN = 30.0  # of log |κ|, on either side of 0
_LARGEST_CLIP = 1e6  # stands for no clip, where the bracket of κ must be finite


def teacher_student_limit(
    teacher: Float[Array, "*s V"],
    base: Float[Array, "*s V"],
    lam: Float[Array, "*#s"],
    clip: Float[Array, ""],
) -> Float[Array, "*s V"]:
    """log q of the limit from log-distributions, float32; traceable. `clip` > 0, inf: none.

    κ is found from the LIKELIEST tokens of the target and the sum of all others, as one token with their mean r.
    """
    log_r = (jnp.asarray(lam)[..., None] - 1) * (teacher - base)
    clip = jnp.minimum(clip, _LARGEST_CLIP)
    few_t, few_r = _with_rest(teacher, log_r)
    log_z = jax.nn.logsumexp(few_t, -1, keepdims=True)
    rises = log_z >= 0  # κ ≥ 0, and the tokens' sum falls as it grows; else κ < 0, and the sum grows with −κ

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        total = jax.nn.logsumexp(few_t - _given_up(middle, few_r, rises, clip), -1, keepdims=True)
        further = (total > 0) == rises
        return jnp.where(further, middle, low), jnp.where(further, high, middle)

    # At κ = c·log Z all tokens are clipped and sum to 1, so a token that is not makes the root smaller.
    high = jnp.where(rises, jnp.log(clip * jnp.maximum(log_z, 0) + jnp.exp(-_SPAN)), _SPAN)
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.full_like(log_z, -_SPAN), high))
    return jax.nn.log_softmax(teacher + log_r - _given_up((low + high) / 2, log_r, rises, clip))


def _with_rest(
    teacher: Float[Array, "*s V"], log_r: Float[Array, "*s V"]
) -> tuple[Float[Array, "*s _"], Float[Array, "*s _"]]:
    """log t and log r of the likeliest tokens of the target and of the rest."""
    if teacher.shape[-1] <= LIKELIEST:
        return teacher + log_r, log_r
    log_t, at = jax.lax.top_k(teacher + log_r, LIKELIEST)
    log_p = jnp.take_along_axis(teacher, at, -1)
    is_rest = (teacher + log_r) < log_t[..., -1:]
    rest_t, rest_p = (
        jax.nn.logsumexp(jnp.where(is_rest, x, _NEVER), -1, keepdims=True) for x in (teacher + log_r, teacher)
    )
    return jnp.concatenate([log_t, rest_t], -1), jnp.concatenate([log_t - log_p, rest_t - rest_p], -1)


def _given_up(log_kappa, log_r, rises, clip) -> Float[Array, "*s V"]:
    """log t − log q of a token: what the limit leaves of the target there."""
    at, clipped = log_kappa + log_r, jnp.exp(log_kappa) / clip
    above, below = jnp.maximum(_lambert_of_log(at), clipped), jnp.minimum(_lambert_below_zero(at), -clipped)
    return jnp.where(rises, above, below)


def _lambert_of_log(z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """W(e^z), where w + ln w = z."""
    w = jnp.where(z > 1, z - jnp.log(jnp.maximum(z, 1.0)), jnp.log1p(jnp.exp(jnp.minimum(z, 1.0))))
    for _ in range(3):
        w = jnp.maximum(w * (1 + z - jnp.log(w)) / (1 + w), jnp.finfo(jnp.float32).tiny)
    return w


def _lambert_below_zero(z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """W(−e^z) ∈ [−1, 0), Winitzki-like start from the branch point, then Halley's method."""
    x = -jnp.exp(jnp.minimum(z, -1.0))
    s = jnp.sqrt(jnp.maximum(2 * (1 + jnp.e * x), 0.0))
    w = -1 + s - s**2 / 3 + 11 * s**3 / 72
    for _ in range(3):
        e = jnp.exp(w)
        f = w * e - x
        w = w - f / (e * (w + 1) - (w + 2) * f / (2 * w + 2 + 1e-6) + 1e-12)
    return jnp.clip(w, -1.0, 0.0)
