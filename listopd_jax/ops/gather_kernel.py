"""Log-probabilities of given tokens on a TPU: a Pallas kernel in which logits never leave the chip's fast memory.

The head streams past a block of positions; of the logits only their running maximum, their running sum of exponentials
(one online softmax) and the token's own logit are kept. XLA's form of the same (`ops.head.token_logprobs`) writes the
logits of a chunk to HBM and reads them again. There is no gradient: this is for frozen models.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from listopd_jax.parallel.rules import spec
from listopd_jax.rounding import ceil_div, round_up

ROWS = 512  # positions per block: their products with a head block take longer than reading it from HBM
HEAD_BYTES = 3 * 2**20  # of the head in fast memory at one time, twice
FAST_BYTES = 48 * 2**20  # of fast memory that the kernel may fill, of the 96 to 128 MiB of a v5 or v6 core
MASKED = -1e30  # finite: a device may hold none of the tokens that exist


def gather_logprobs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, " N"],
    vocab: int,
) -> Float[Array, " N"]:
    """log softmax(hidden·headᵀ)[token] over the first `vocab` tokens, float32; head and hidden of one dtype.

    Over a mesh, rows stay on their devices and each device streams its own part of the vocabulary.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        total, own = stream(hidden, head, tokens, jnp.int32(vocab))
        return own - total
    rows, head_spec = spec(("batch", None), hidden.shape, mesh), spec(("vocab", None), head.shape, mesh)
    axes = head_spec[0] or ()

    def local(hidden, head, tokens):
        offset = jax.lax.axis_index(axes) * len(head) if axes else 0
        total, own = stream(hidden, head, tokens - offset, vocab - offset)
        highest = jax.lax.pmax(total, axes)
        total = highest + jnp.log(jax.lax.psum(jnp.exp(total - highest), axes))
        return jax.lax.psum(own, axes) - total

    columns = PartitionSpec(rows[0])
    return jax.shard_map(
        local, in_specs=(rows, head_spec, columns), out_specs=columns, check_vma=False
    )(hidden, head, tokens)  # fmt: skip


def stream(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, " N"],
    vocab: Int[Array, ""],
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """log Σ exp of the first `vocab` logits of each row, and the logit of its token, 0 if that is not in the head."""
    n, width = hidden.shape
    rows = min(ROWS, round_up(n, 16))
    columns = max(128, HEAD_BYTES // (width * head.dtype.itemsize) // 128 * 128)
    hidden, tokens = (
        jnp.pad(x, [(0, -n % rows)] + [(0, 0)] * (x.ndim - 1)) for x in (hidden, tokens[:, None])
    )
    of_rows = pl.BlockSpec((rows, 1), lambda i, j: (i, 0))
    column = jax.ShapeDtypeStruct((len(hidden), 1), jnp.float32)
    total, own = pl.pallas_call(
        functools.partial(_kernel, columns=columns),
        grid=(len(hidden) // rows, ceil_div(len(head), columns)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            of_rows,
            pl.BlockSpec((rows, width), lambda i, j: (i, 0)),
            pl.BlockSpec((columns, width), lambda i, j: (j, 0)),
        ],
        out_specs=[of_rows, of_rows],
        out_shape=[column, column],
        scratch_shapes=[pltpu.VMEM((rows, 1), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=FAST_BYTES
        ),
    )(jnp.minimum(vocab, len(head)).astype(jnp.int32).reshape(1, 1), tokens.astype(jnp.int32), hidden, head)
    return total[:n, 0], own[:n, 0]


def _kernel(vocab, token, hidden, head, out, own_out, top, total, own, *, columns: int):
    """One block of the head for one block of positions; the last writes the results."""
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        own[...] = jnp.zeros_like(own)

    logits = jax.lax.dot_general(
        hidden[...], head[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    index = j * columns + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    exists = index < vocab[0, 0]  # a block may reach past the end of the head
    logits = jnp.where(exists, logits, MASKED)
    highest = jnp.maximum(top[...], logits.max(1, keepdims=True))
    total[...] = total[...] * jnp.exp(top[...] - highest) + jnp.exp(logits - highest).sum(1, keepdims=True)
    own[...] += jnp.where(exists & (index == token[...]), logits, 0.0).sum(1, keepdims=True)
    top[...] = highest

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        out[...] = top[...] + jnp.log(total[...])
        own_out[...] = own[...]
