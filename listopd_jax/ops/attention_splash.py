"""Causal attention on TPUs by jax's splash kernel: blocks of scores stay in the chip's fast memory.

One call per prompt serves all n completions: their queries form one row of length n·T, the keys are the prompt's,
once, and then all the completions' own. A static block-sparse mask keeps completions apart, so blocks that no query
sees cost nothing; the prompt's length, which is dynamic, comes in by segment ids.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from listopd_jax.ops.attention import Prompt
from listopd_jax.rounding import round_up

LANES = 128  # blocks are multiples of it
BLOCKS = (512, 256, LANES)  # larger ones reload keys less often


@dataclasses.dataclass(frozen=True)
class CompletionsMask(splash.Mask):
    """`queries` rows, runs of `tokens` for each completion; a column for each of `prompt` slots and each row.

    Rows see the prompt and, of their own completion, what is not after them.
    """

    prompt: int
    tokens: int
    queries: int

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.queries, self.prompt + self.queries

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        row = np.arange(self.shape[0])[index[0], None]
        column = np.arange(self.shape[1])[None, index[1]] - self.prompt
        return (column < 0) | ((column <= row) & (column // self.tokens == row // self.tokens))


def causal(
    q: Float[Array, "B n T N H"],
    k: Float[Array, "B n T KV H"],
    v: Float[Array, "B n T KV H"],
    prompt: Prompt | None = None,
    starts: Int[Array, "B T"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B n T N H"]:
    """`listopd_jax.ops.attention.causal` by splash attention, with its derivatives.

    interpret: run the kernel in Pallas' interpreter, on any device, to test it. Rows and keys are padded to whole
    blocks; a row of padding sees itself, so its softmax is finite.
    """
    B, n, T, N, H = q.shape
    queries = round_up_to_blocks(n * T)
    # The kernel does not scale scores, so the queries are scaled here, in float32.
    rows = _one_row((q.astype(jnp.float32) * H**-0.5).astype(q.dtype), queries)
    keys, values = _one_row(k, queries), _one_row(v, queries)
    slots, segments = 0, None
    if prompt is not None:
        slots = round_up_to_blocks(prompt.v.shape[2])
        keys = jnp.concatenate([_pad_to(prompt.k.swapaxes(2, 3), slots), keys], 2)
        values = jnp.concatenate([_pad_to(prompt.v, slots), values], 2)
        segments = _segments(prompt.lengths, slots, queries)
    if starts is not None:  # no two sequences of a row begin at one place
        ids = jnp.pad(starts, ((0, 0), (0, queries - T)))
        segments = splash.SegmentIds(ids, ids)
    kernel = _kernel(CompletionsMask(slots, T, queries), N, interpret)
    # One call per prompt: the mask is static and the same for all of them.
    out = jax.vmap(kernel)(rows, keys, values, segments)
    return out[:, :, : n * T].reshape(B, N, n, T, H).transpose(0, 2, 3, 1, 4)


def round_up_to_blocks(length: int) -> int:
    """`length` or the next length that blocks divide: a multiple of 128, and of 256 where that is short of it."""
    block = LANES if length <= LANES else 2 * LANES
    return round_up(length, block)


def _kernel(mask: CompletionsMask, heads: int, interpret: bool):
    """Splash attention with one mask for all heads, for [heads, queries, H] and [KV, keys, H]."""
    rows, columns = (next(b for b in BLOCKS if size % b == 0) for size in mask.shape)
    blocks = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns
    )  # fmt: skip
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret,
    )  # fmt: skip


def _segments(lengths: Int[Array, " B"], slots: int, queries: int) -> splash.SegmentIds:
    """0 for queries and all that they may see, 1 for the padding of the prompt."""
    own = jnp.zeros((len(lengths), queries), jnp.int32)
    padding = (jnp.arange(slots) >= lengths[:, None]).astype(jnp.int32)
    return splash.SegmentIds(own, jnp.concatenate([padding, own], 1))


def _one_row(x: Float[Array, "B n T X H"], length: int) -> Float[Array, "B X L H"]:
    """The tokens of all completions in one row for each head, with zeros up to `length`."""
    x = x.transpose(0, 3, 1, 2, 4)
    return _pad_to(x.reshape(*x.shape[:2], -1, x.shape[-1]), length)


def _pad_to(x: Float[Array, "B X S H"], length: int) -> Float[Array, "B X L H"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
