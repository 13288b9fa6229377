"""Teacher-forced scoring: a prompt is computed once, its n completions extend it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.head import token_logprobs


def completion_hidden(
    decoder: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    completions: Int[Array, "B n T"],
) -> Float[Array, "B n T D"]:
    """The hidden state that predicts each completion token.

    The first is predicted by the prompt's last token, which is therefore read with each completion; of the prompt
    before it only keys and values are needed. A fused kernel prefers prompt and completion in one causal row where
    there is a single completion: nothing is concatenated, and no mask is needed.
    """
    if completions.shape[1] == 1 and decoder.attention != "xla":
        return one_row_hidden(decoder, prompts, prompt_lengths, completions)
    prompt = decoder.keys_values(prompts)
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, None]
    last = jnp.broadcast_to(last, (*completions.shape[:2], 1))
    return decoder.extend(prompt, prompt_lengths - 1, jnp.concatenate([last, completions[..., :-1]], axis=2))


def one_row_hidden(
    decoder: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    completions: Int[Array, "B 1 T"],
) -> Float[Array, "B 1 T D"]:
    """`completion_hidden` of one completion per prompt, each read right after its prompt, as one sequence."""
    T = completions.shape[-1]
    place = (
        jnp.arange(prompts.shape[1] + T) - prompt_lengths[:, None]
    )  # in the completion; below 0: in the prompt
    own = jnp.take_along_axis(completions[:, 0], jnp.clip(place, 0, T - 1), axis=1)
    row = jnp.where(place < 0, jnp.pad(prompts, ((0, 0), (0, T))), own)
    hidden = decoder(row, prompt_lengths + T)
    predicts = prompt_lengths[:, None] - 1 + jnp.arange(T)
    return jnp.take_along_axis(hidden, predicts[..., None], axis=1)[:, None]


def completion_logprobs(
    decoder: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    completions: Int[Array, "B n T"],
    vocab: int,
    chunk: int,
) -> tuple[Float[Array, "B n T"], Float[Array, "B n T"]]:
    """log π(token) and entropy at every completion position, float32; positions after the end are not masked."""
    hidden = completion_hidden(decoder, prompts, prompt_lengths, completions)
    return token_logprobs(hidden, decoder.head_weight(), completions, vocab, chunk)
