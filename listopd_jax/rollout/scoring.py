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
    before it only keys and values are needed.
    """
    prompt = decoder.keys_values(prompts)
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, None]
    last = jnp.broadcast_to(last, (*completions.shape[:2], 1))
    return decoder.extend(prompt, prompt_lengths - 1, jnp.concatenate([last, completions[..., :-1]], axis=2))


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
