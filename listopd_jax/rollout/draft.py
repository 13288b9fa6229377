"""Drafts of the next tokens, copied from where a text like this one has continued before.

Answers under a contract are mostly skeleton: of the ten or so tokens of an object, one or two carry information. The
text to copy from is a hint (for instance an answer of the task's form) followed by what the row itself has written. A
draft decides nothing: `decode` keeps a drafted token only where the sampler wrote the same one, so a bad draft costs
time and changes no result.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

WINDOW = 8  # tokens before a place that are compared with the last ones written
LOYALTY = (
    2.5  # matches by which another place must be better than continuing where the last draft was copied from
)


def draft(
    hint: Int[Array, "B H"],
    tokens: Int[Array, "B n T"],
    lengths: Int[Array, "B n"],
    source: Int[Array, "B n"],
    size: int,
) -> tuple[Int[Array, "B n size"], Int[Array, "B n"]]:
    """`size` tokens that may come after the first `lengths` of each row, and the place they were copied from.

    `source` is the place after the last copy, or 0: places count through hint and row. A token that was drafted wrong
    is one mismatch of WINDOW, so a draft continues behind it as if the skeleton's slot had been filled.
    """
    B, n, _ = tokens.shape
    text = jnp.concatenate([jnp.broadcast_to(hint[:, None], (B, n, hint.shape[-1])), tokens], axis=-1)
    place, end = jnp.arange(text.shape[-1]), (hint.shape[-1] + lengths)[..., None]
    matches = _matches(text, lengths, end) + LOYALTY * (place == source[..., None])
    # Nothing is written yet from `end` on.
    best = jnp.argmax(jnp.where(place < end, matches, -1.0), axis=-1, keepdims=True)
    # Past the end of what is written the copy starts over: a text that repeats itself keeps doing so.
    copied = best + jnp.arange(size) % jnp.maximum(end - best, 1)
    return jnp.take_along_axis(text, copied, axis=-1), best[..., 0]


def _matches(text: Int[Array, "B n L"], lengths: Int[Array, "B n"], end: Int[Array, "B n 1"]) -> Array:
    """How many of the WINDOW tokens before each place equal those before `end`; float32 [B, n, L]."""
    found = jnp.zeros(text.shape)
    for back in range(1, WINDOW + 1):
        last = jnp.take_along_axis(text, jnp.maximum(end - back, 0), axis=-1)
        # Only tokens that the row has written are compared; before them comes the hint.
        same = (text == last) & (back <= lengths[..., None])
        found += jnp.pad(same, ((0, 0), (0, 0), (back, 0)))[..., : text.shape[-1]]
    return found
