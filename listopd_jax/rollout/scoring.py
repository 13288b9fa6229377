"""Teacher-forced scoring: a prompt is computed once, its n completions extend it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.head import token_logprobs


def completion_hidden(
    decoder: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    completions: Int[Array, "B n T"],
) -> Float[Array, "B n T D"]:
    """The hidden state that predicts each completion token: the prompt's last state predicts the first."""
    last, prompt = decoder.prefill(prompts, prompt_lengths)
    first = jnp.broadcast_to(last[:, None, None], (*completions.shape[:2], 1, last.shape[-1]))
    if completions.shape[-1] == 1:
        return first
    rest = decoder.extend(prompt, prompt_lengths, completions[..., :-1])
    return jnp.concatenate([first, rest], axis=2)


def completion_logprobs(
    decoder: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    completions: Int[Array, "B n T"],
    vocab: int,
    chunk: int,
) -> tuple[Float[Array, "B n T"], Float[Array, "B n T"]]:
    """log π(token) and entropy at every completion position, float32; positions after the end are not masked."""
    hidden = completion_hidden(decoder, prompts, prompt_lengths, completions)
    return token_logprobs(hidden, decoder.head_weight(), completions, vocab, chunk)
