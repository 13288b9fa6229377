"""A checksum of a tree of arrays that does not depend on how it is split over devices.

Every word is mixed with its place and all are added modulo 2^32: devices sum their own shards and exchange one number.
A single changed word is always detected; other damage escapes with probability 2^-32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from listopd_jax.parallel.compiler import OTHER, BackendJit

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksum(tree: Any) -> int:
    """The checksum of a tree of arrays with elements of at most four bytes; the same on every mesh."""
    return int(_checksum(jax.tree.leaves(tree)))


@functools.partial(BackendJit, options=OTHER)
def _checksum(leaves: list[Shaped[Array, "..."]]) -> UInt32[Array, ""]:
    # The number of the leaf is mixed in, or two arrays that changed places would not show.
    return sum((_mix(_leaf(x) + jnp.uint32(i)) for i, x in enumerate(leaves)), start=jnp.uint32(0))


def _leaf(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    # bitcast_convert_type takes no bool.
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):  # not arange(x.size).reshape: that would not be split like x
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return _mix(words.astype(jnp.uint32) ^ _mix(place)).sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words in which every bit reaches every other (multiply and xorshift, twice)."""
    # The constants of lowbias32 (C. Wellons).
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
