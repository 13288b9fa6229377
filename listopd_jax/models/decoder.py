"""One decoder (Qwen3 and, by switches, Llama, Mistral, Qwen2, SmolLM3): one layer body for scoring and decoding."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from listopd_jax.errors import UserError
from listopd_jax.models.config import Lora, ModelConfig
from listopd_jax.ops.attention import SAVED, Prompt, stored
from listopd_jax.ops.attention_backends import BACKENDS, causal_attention, decode_attention
from listopd_jax.parallel.rules import (
    CACHE,
    PARAMS,
    constrain,
    gathered,
    kv_copies,
    laid_out,
    row_multiple,
)


def _of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether it is cuDNN's attention, whose residuals cannot be named from outside."""
    return primitive.name.startswith("dot_product_attention_fwd")


_ATTENTION = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(SAVED), _of_cudnn
)
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    "none": None,
}

BLOCK = 2**17  # tokens of prompts that go through a layer at one time

ROWS = ("batch", "completions", "length")  # logical axes in front of an activation's own


class KVCache(NamedTuple):
    """Rotated keys and values of all layers, in the order in which attention reads them.

    k, v: of prompts [L,B,KV,H,P] and [L,B,KV,P,H]; of completions [L,B,n,KV,H,C] and [L,B,n,KV,C,H]. KV counts
    the copies that a mesh may ask for (listopd_jax.parallel.rules.kv_copies).
    """

    k: Array
    v: Array

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.k.shape[-1]


def rms_norm(x: Float[Array, "*r D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*r D"]:
    """x / rms(x) · weight over the last axis, in float32; the result has x's dtype."""
    # float32: a mean of squares over the width keeps two or three digits in bfloat16.
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Rotary angles per position, float32 [H/2]: θ^(-2i/H), stretched by `rope_scaling` if there is one."""
    frequencies = 1 / config.rope_theta ** (
        np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    )
    s = config.rope_scaling
    if s is None:
        return frequencies
    # Planes that turn often within the original context keep their frequency. Those that hardly turn are slowed by
    # `factor`, and those in between by a mixture of the two.
    turns = s.original_max_position_embeddings * frequencies / (2 * np.pi)
    keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return (frequencies * (keep + (1 - keep) / s.factor)).astype(np.float32)


def rotate(
    x: Float[Array, "*r N H"], cos: Float[Array, "*#r 1 H/2"], sin: Float[Array, "*#r 1 H/2"]
) -> Float[Array, "*r N H"]:
    """Rotary positions: the first and second half of a head are the two coordinates of its planes."""
    # Hugging Face's pairing, coordinate i with i + H/2; the RoFormer paper pairs 2i with 2i + 1.
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Layer(nnx.Module):
    """Pre-norm attention and SwiGLU, with weights of `param_dtype` cast to the activations' dtype at use."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32, lora: Lora | None = None
    ):
        c, D, F = config, config.hidden_size, config.intermediate_size

        def weight(*shape, fan_in, residual=False):
            # A layer adds to the residual stream twice. Smaller by sqrt(2L), these weights keep its variance from
            # growing with depth (GPT-2).
            return _normal(rngs, shape, fan_in * (2 * c.num_layers if residual else 1), param_dtype)

        def ones(size):
            return nnx.Param(jnp.ones(size, param_dtype))

        self.config = config
        self.attn_norm = ones(D)
        self.q = weight(D, c.num_heads, c.head_dim, fan_in=D)
        self.k = weight(D, c.num_kv_heads, c.head_dim, fan_in=D)
        self.v = weight(D, c.num_kv_heads, c.head_dim, fan_in=D)
        self.o = weight(c.num_heads, c.head_dim, D, fan_in=c.num_heads * c.head_dim, residual=True)
        self.q_norm = ones(c.head_dim) if c.qk_norm else None
        self.k_norm = ones(c.head_dim) if c.qk_norm else None
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            bias = nnx.Param(jnp.zeros((heads, c.head_dim), param_dtype)) if c.qkv_bias else None
            setattr(self, f"{name}_bias", bias)
        self.mlp_norm = ones(D)
        self.gate = weight(D, F, fan_in=D)
        self.up = weight(D, F, fan_in=D)
        self.down = weight(F, D, fan_in=F, residual=True)
        self.lora = lora
        for name in lora.targets if lora else ():
            # `o` reads two axes, heads and head_dim; every other projection reads one.
            shape, inputs = getattr(self, name).shape, 2 if name == "o" else 1
            a = _normal(rngs, (*shape[:inputs], lora.rank), math.prod(shape[:inputs]), param_dtype)
            setattr(self, f"{name}_lora_a", nnx.LoRAParam(a[...]))
            setattr(
                self, f"{name}_lora_b", nnx.LoRAParam(jnp.zeros((lora.rank, *shape[inputs:]), param_dtype))
            )

    def __call__(
        self,
        x: Float[Array, "B n T D"],
        rope: tuple[Array, Array],
        attend: Callable[[Array, Array, Array], Array],
    ) -> tuple[Float[Array, "B n T D"], tuple[Array, Array]]:
        """The new x, and rotated keys and values [B,n,T,KV,H]. `attend(q, k, v)` has q's shape."""
        rows = self.rows(x)
        q, k, v = self.queries_keys_values(rows, x.shape, rope)
        return self.after_attention(rows, attend(q, k, v)), (k, v)

    def queries_keys_values(
        self, x: Float[Array, "M D"], shape: tuple[int, ...], rope: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Attention's inputs for rows of `shape` [B, n, T]: queries [B,n,T,N,H], keys and values [B,n,T,KV,H]."""
        y = self._norm(x, "attn_norm")
        q = self._heads(y, "q", shape, rope)
        return q, self._heads(y, "k", shape, rope), self._heads(y, "v", shape)

    def after_attention(
        self, x: Float[Array, "M D"], mixed: Float[Array, "B n T *NH"]
    ) -> Float[Array, "B n T D"]:
        """The new x from the rows and attention's result for them."""
        x = x + self._dense(mixed.reshape(len(x), -1), "o")
        y = self._norm(x, "mlp_norm")
        # Over `tensor`, gate and up are split by columns and down by rows: one all-reduce, after down (Megatron-LM).
        units = jax.nn.silu(self._dense(y, "gate")) * self._dense(y, "up")
        x = x + self._dense(constrain(units, "batch", "mlp"), "down")
        return constrain(x.reshape(*mixed.shape[:3], -1), *ROWS, "hidden")

    def rows(self, x: Float[Array, "B n T D"]) -> Float[Array, "M D"]:
        """x as M = B·n·T rows: XLA's CPU backward pass through products of more axes is half as fast."""
        return constrain(x, *ROWS, "hidden").reshape(-1, self.config.hidden_size)

    def _norm(self, x: Float[Array, "M D"], name: str) -> Float[Array, "M D"]:
        return rms_norm(x, getattr(self, name)[...], self.config.norm_eps)

    def _dense(self, x: Float[Array, "M inputs"], name: str) -> Float[Array, "M outputs"]:
        """x @ weight in x's dtype, the weight seen as [inputs, outputs], and its adapter's part."""
        y = x @ self._weight(name, x.dtype).reshape(x.shape[1], -1)
        if self.lora is None or name not in self.lora.targets:
            return y
        a, b = (self._weight(f"{name}_lora_{factor}", x.dtype) for factor in "ab")
        rank = self.lora.rank
        return y + self.lora.scale * (x @ a.reshape(-1, rank) @ b.reshape(rank, -1))

    def _heads(self, x: Float[Array, "M D"], name: str, shape: tuple[int, ...], rope=None) -> Array:
        """Queries, keys (both rotated, and normalised if the model does that) or values [B,n,T,N,H] of rows of `shape`.

        Keys and values have as many heads as `kv_copies` gives.
        """
        heads = self._dense(x, name).reshape(*shape[:3], -1, self.config.head_dim)
        if self.config.qkv_bias:
            heads = heads + self._weight(f"{name}_bias", x.dtype)
        heads = constrain(heads, *ROWS, "heads" if name == "q" else "kv_heads", "head_dim")
        if name == "v":
            return heads
        norm = self.q_norm if name == "q" else self.k_norm
        # Normalised first: a weight per coordinate does not commute with the rotation.
        return rotate(heads if norm is None else rms_norm(heads, norm[...], self.config.norm_eps), *rope)

    def _weight(self, name: str, dtype) -> Array:
        """Parameter `name` cast and, over devices, gathered; KV heads in `kv_copies` copies."""
        # Cast first: over devices half the bytes are sent in bfloat16.
        weight = gathered(name, getattr(self, name)[...].astype(dtype))
        copies = kv_copies(self.config.num_kv_heads) if "kv_heads" in PARAMS[name] else 1
        if copies == 1:
            return weight
        return gathered(name, jnp.repeat(weight, copies, axis=PARAMS[name].index("kv_heads")))


class Decoder(nnx.Module):
    """A stack of `config.num_layers` layers, stored with a leading layer axis and run by `jax.lax.scan`.

    Prompts are right-padded; positions are true positions: token t of a completion is at prompt_length + t.
    Hidden states have the final norm applied: logits = hidden @ head_weight().T. Parameters are functional
    state: `graphdef, params = nnx.split(decoder)` and `nnx.merge(graphdef, params)`.

    dtype: of the activations (norms, rotary positions and softmax are float32 inside).
    param_dtype: of the weights, which are cast to `dtype` at use.
    remat: what each layer stores for the backward pass: 'full' (only its input), 'attention' (also attention's result),
        'dots' (also the results of matrix products with weights) or 'none' (no remat: all but attention's scores).
        Splash attention leaves nothing that can be stored.
    lora: the adapter added to the weights, with parameters of type nnx.LoRAParam; B starts at zero.
    attention: the backend, of listopd_jax.ops.attention_backends.BACKENDS; only "splash" has a decode step of its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "none",
        attention: str = "xla",
        lora: Lora | None = None,
    ):
        if remat not in REMAT:
            raise UserError(f"remat: '{remat}' is not a policy (known: {', '.join(REMAT)})")
        if attention not in BACKENDS:
            raise UserError(f"attention: '{attention}' is not a backend (known: {', '.join(BACKENDS)})")
        self.config, self.dtype, self.remat, self.attention = config, jnp.dtype(dtype), remat, attention
        table = (config.vocab_size, config.hidden_size)

        self.embed = _normal(rngs, table, config.hidden_size, param_dtype)
        self.layers = _stacked(config, rngs, param_dtype, lora)
        self.final_norm = nnx.Param(jnp.ones(config.hidden_size, param_dtype))
        self.head = None if config.tied else _normal(rngs, table, config.hidden_size, param_dtype)

    def __call__(self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Float[Array, "B T D"]:
        """Hidden states of whole sequences; zero at the padding."""
        hidden, _ = self._causal(tokens, keep_kv=False)
        valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return jnp.where(valid[..., None], self._final(hidden), 0)

    def prefill(
        self, tokens: Int[Array, "B P"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """Read prompts (lengths ≥ 1): the state after each last token, and the KV that completions share."""
        hidden, kv = self._causal(tokens, keep_kv=True)
        # One state per prompt meets the final norm, not P of them.
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._final(last), kv

    def keys_values(self, tokens: Int[Array, "B P"]) -> KVCache:
        """Only the KV of prompts: the last layer stops at its own, so a prompt costs one layer less."""
        x, rope, kv, last = self._to_last_layer(tokens, _of_prompt)
        # Nobody reads its queries, so the compiler drops them.
        kv_of_last = _of_prompt(last.queries_keys_values(last.rows(x), x.shape, rope)[1:])
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), kv, kv_of_last)

    def states_at(
        self, tokens: Int[Array, "B T"], places: Int[Array, "B S"], starts: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B S D"]:
        """States of whole sequences at `places`: after its attention, the last layer computes no others.

        Rows may hold several sequences: `starts` is where each token's sequence begins, which is its position 0; a
        sequence sees no other.
        """
        x, rope, _, last = self._to_last_layer(tokens, lambda kv: None, starts)
        mixed = self._attend(*last.queries_keys_values(last.rows(x), x.shape, rope), starts=starts)
        x, mixed = (
            jnp.take_along_axis(y.reshape(*x.shape[:3], -1), places[:, None, :, None], axis=2)
            for y in (x, mixed)
        )
        return self._final(last.after_attention(last.rows(x), mixed))[:, 0]

    def extend(
        self, prompt: KVCache, prompt_lengths: Int[Array, " B"], completions: Int[Array, "B n T"]
    ) -> Float[Array, "B n T D"]:
        """States after reading completions[..., t], for n completions of each prompt (lengths ≥ 0)."""

        def body(layer, x, rope, kv):
            prompt = Prompt(*kv, prompt_lengths)
            return layer(x, rope, lambda q, k, v: self._attend(q, k, v, prompt))[0], None

        # [B, 1, T]: the n completions of a prompt share their positions.
        positions = (prompt_lengths[:, None] + jnp.arange(completions.shape[-1]))[:, None]
        hidden, _ = self._run(completions, positions, body, prompt)
        return self._final(hidden)

    def init_cache(self, B: int, n: int, C: int) -> KVCache:
        """Empty KV for C tokens of n completions of B prompts: zeros in the compute dtype."""
        c = self.config
        heads = (c.num_layers, B, n, c.num_kv_heads * kv_copies(c.num_kv_heads))
        zeros = (jnp.zeros((*heads, *tail), self.dtype) for tail in ((c.head_dim, C), (C, c.head_dim)))
        return KVCache(*(constrain(x, *CACHE[x.ndim]) for x in zeros))

    def decode_step(
        self,
        prompt: KVCache,
        prompt_lengths: Int[Array, " B"],
        cache: KVCache,
        cached: Int[Array, "*at"],
        tokens: Int[Array, "B n S"],
    ) -> tuple[Float[Array, "B n S D"], KVCache]:
        """Read the next S tokens of every completion: the states after each, and the cache with them.

        `cached` is the number of tokens that the cache holds already: one number for all completions, or [B,n], one
        each. The cache must have room for S more; what it holds after `cached` is never read.
        """
        at = jnp.atleast_2d(cached)
        per_layer, attend = decode_attention(self.attention, prompt, prompt_lengths, cache, at)

        def body(layer, x, rope, of_layer):
            x, new = layer(x, rope, lambda q, k, v: attend(q, k, v, of_layer))
            return x, KVCache(*stored(*new))

        positions = (prompt_lengths[:, None] + at)[..., None] + jnp.arange(tokens.shape[-1])
        # The layers only read the cache; it is written once, in place, after them.
        hidden, new = self._run(tokens, positions, body, per_layer)
        return self._final(hidden), KVCache(
            put_tokens(cache.k, new.k, cached, -1), put_tokens(cache.v, new.v, cached, -2)
        )

    def head_weight(self) -> Float[Array, "V D"]:
        """The LM head in the parameters' dtype: the embedding if tied."""
        return gathered("head", (self.embed if self.config.tied else self.head)[...])

    def _causal(self, tokens, keep_kv: bool):
        """Unnormalised hidden states [B,T,D] of whole sequences and, if asked, their KV."""

        # Padding is on the right, so causality alone keeps it from every valid token.
        def body(layer, x, rope, _):
            if not keep_kv:
                return layer(x, rope, self._attend)[0], None

            def read(rows):
                rows, kv = layer(rows, rope, self._attend)
                return rows, _of_prompt(kv)

            # Prefill has no backward pass, so nothing needs all rows at one time.
            x, kv = in_blocks(read, x)
            # Else XLA stacks the layers' arrays as they are computed and transposes the whole cache in the end.
            return x, KVCache(*(laid_out(array, *CACHE[5][1:]) for array in kv))

        positions = jnp.arange(tokens.shape[1])[None, None]
        hidden, kv = self._run(tokens[:, None], positions, body, None)
        return hidden[:, 0], kv

    def _to_last_layer(
        self, tokens: Int[Array, "B T"], keep: Callable, starts: Int[Array, "B T"] | None = None
    ) -> tuple[Array, Any, Any, Layer]:
        """The last layer's inputs for whole sequences (x [B,1,T,D] and its rotary angles), `keep` of the keys and
        values of each layer before it, and that layer."""
        graphdef, weights = nnx.split(self.layers)
        x, positions = self._embed(tokens[:, None]), jnp.arange(tokens.shape[1])[None, None]
        rope = self._rope(positions if starts is None else positions - starts[:, None])
        attend = functools.partial(self._attend, starts=starts)
        last = self.config.num_layers - 1

        def layer(i):  # by number: scanning over a stack without its last layer would first copy the weights
            return nnx.merge(graphdef, jax.tree.map(lambda w: w[i], weights))

        def step(x, i):
            x, kv = layer(i)(x, self._rope_of(rope, i), attend)
            return x, keep(kv)

        x, kept = jax.lax.scan(self._checkpointed(step), x, jnp.arange(last))
        return x, self._rope_of(rope, last), kept, layer(last)

    def _attend(
        self, q: Array, k: Array, v: Array, prompt: Prompt | None = None, starts: Array | None = None
    ) -> Array:
        return causal_attention(self.attention, q, k, v, prompt, starts)

    def _run(self, tokens: Int[Array, "B n T"], positions: Int[Array, "b m T"], body: Callable, per_layer):
        """Embed, then scan body(layer, x, rope, per_layer[l]) → (x, extra[l]) over the layers."""
        x, rope = self._embed(tokens), self._rope(positions)
        graphdef, weights = nnx.split(self.layers)

        def step(x, scanned):
            layer_weights, number, of_layer = scanned
            return body(nnx.merge(graphdef, layer_weights), x, self._rope_of(rope, number), of_layer)

        # Only with NoPE layers does a layer need to know which one it is.
        numbers = jnp.arange(self.config.num_layers) if self.config.nope_layers else None
        return jax.lax.scan(self._checkpointed(step), x, (weights, numbers, per_layer))

    def _embed(self, tokens: Int[Array, "B n T"]) -> Float[Array, "B n T D"]:
        # Cast after the lookup: a few rows, not the table.
        return constrain(gathered("embed", self.embed[...])[tokens].astype(self.dtype), *ROWS, "hidden")

    def _rope(self, positions: Int[Array, "b m T"]) -> tuple[Array, Array]:
        """cos and sin of the rotary angles at each position, float32 [b,m,T,1,H/2]."""
        # float32: beyond 256 bfloat16 skips positions.
        angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(self.config)
        return jnp.cos(angles), jnp.sin(angles)

    def _rope_of(self, rope: tuple[Array, Array], layer: Int[Array, ""] | int | None) -> tuple[Array, Array]:
        """`rope` for the layer of this number: no rotation in `nope_layers`."""
        if not self.config.nope_layers:
            return rope
        turns = (layer != np.array(self.config.nope_layers)).all()
        return jnp.where(turns, rope[0], 1), jnp.where(turns, rope[1], 0)

    def _checkpointed(self, step: Callable) -> Callable:
        """The scanned `step`, rematerialised as `remat` says."""
        if self.remat == "none":
            return step
        # Inside a scan XLA cannot merge the recomputation with the forward pass, so no barrier is needed.
        return jax.checkpoint(step, policy=REMAT[self.remat], prevent_cse=False)

    def _final(self, x: Float[Array, "*r D"]) -> Float[Array, "*r D"]:
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)


def put_tokens(
    cache: Shaped[Array, "L B n *r"], new: Shaped[Array, "L B n *s"], at: Int[Array, "*at"], axis: int
) -> Shaped[Array, "L B n *r"]:
    """`cache` with `new` written from place `at` of `axis`: one for all completions, or [B,n], one each."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    if at.ndim == 0:
        return put(cache, new, at)
    if jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty:
        by_row = jax.vmap(jax.vmap(put, in_axes=(1, 1, 0), out_axes=1), in_axes=(1, 1, 0), out_axes=1)
        return by_row(cache, new, at)
    # That is a scatter, which XLA's CPU backend expands into a loop several times slower than this one.
    shape, cache, new, at = (
        cache.shape,
        *(x.reshape(len(x), -1, *x.shape[3:]) for x in (cache, new)),
        at.reshape(-1),
    )

    def put_row(row, cache):
        start = [0, row] + [0] * (cache.ndim - 2)
        start[axis] = at[row]
        return jax.lax.dynamic_update_slice(cache, jax.lax.dynamic_slice_in_dim(new, row, 1, 1), start)

    return jax.lax.fori_loop(0, at.size, put_row, cache).reshape(shape)


def abstract(config: ModelConfig, **options) -> tuple[nnx.GraphDef, nnx.State]:
    """`nnx.split(Decoder(config, **options))` with shapes for arrays: nothing is computed or allocated."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options)))


def cast_once(params: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """`params` (all, or an adapter) of a decoder of `dtype`, with the weights of its products cast already.

    Each layer casts them at every use. Before a loop over batches, in 16 bit, the weights that it reads and the
    gradients that it writes are half the bytes. Norms compute in float32, and the gradients of embedding and head are
    float32 sums: these stay as they are.
    """

    def of_layers(path: tuple, param: Any) -> Any:
        cast = path[0] == "layers" and not path[-1].endswith("norm")
        return param.replace(param[...].astype(dtype)) if cast else param

    return nnx.from_flat_state([(path, of_layers(path, param)) for path, param in nnx.to_flat_state(params)])


def in_blocks(f: Callable[[Array], Any], x: Float[Array, "B 1 T D"]) -> Any:
    """f(x), a pytree of rows [B, ...], for at most BLOCK tokens at a time where rows are not split over devices.

    A layer's intermediate results are a few times its input: gigabytes for 128 prompts of 2048 tokens.
    """
    # The largest divisor of the batch that fits, or single rows.
    rows = next((n for n in range(len(x), 0, -1) if len(x) % n == 0 and n * x.shape[2] <= BLOCK), 1)
    if rows == len(x) or row_multiple() > 1:
        return f(x)
    parts = jax.lax.map(f, x.reshape(-1, rows, *x.shape[1:]))
    return jax.tree.map(lambda part: part.reshape(len(x), *part.shape[2:]), parts)


def _of_prompt(kv: tuple[Float[Array, "B 1 T KV H"], Float[Array, "B 1 T KV H"]]) -> KVCache:
    """Keys and values of one layer for whole sequences, as a cache keeps them."""
    return KVCache(*(x[:, 0] for x in stored(*kv)))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype) -> nnx.Param:
    """Normal weights of standard deviation fan_in^-½: 0.022 at width 2048, more for narrower models."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(fan_in**-0.5, dtype))


def _stacked(config: ModelConfig, rngs: nnx.Rngs, param_dtype, lora: Lora | None) -> Layer:
    """All layers as one Layer whose parameters have a leading layer axis."""

    # With one key for all, vmap would draw the same weights for every layer.
    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap
    def create(rngs):
        return Layer(config, rngs=rngs, param_dtype=param_dtype, lora=lora)

    return create(rngs)
