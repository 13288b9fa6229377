"""Teacher-forced scoring: a prompt is computed once, its n completions extend it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.head import token_logprobs
from listopd_jax.rounding import round_up

ROW_MULTIPLE = 32


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RowWidth:
    """Tokens of the rows that hold a prompt and its completion: a part of a program, not of its data."""

    tokens: int

    @classmethod
    def holding(cls, tokens: int) -> "RowWidth":
        """`tokens` rounded up, by at most 31 or 1/16: few widths, so few compilations of the update.

        In steps of 32 tokens up to 1,024, of 64 up to 2,048 and so on.
        """
        return cls(round_up(tokens, max(ROW_MULTIPLE, 2 ** (tokens - 1).bit_length() // 32)))


def row_width(
    attention: str, prompt_lengths: Int[Array, " B"], lengths: Int[Array, "B n"]
) -> RowWidth | None:
    """The width that holds the longest prompt with its completion; None where they are not read in one row."""
    if not in_one_row(attention, lengths.shape[1]):
        return None
    return RowWidth.holding(int((prompt_lengths[:, None] + lengths).max()))


def in_one_row(attention: str, completions: int) -> bool:
    """Whether prompt and completion are read as one causal row, which fused kernels prefer for one completion."""
    return completions == 1 and attention != "xla"


def completion_hidden(
    decoder: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    completions: Int[Array, "B n T"],
    width: RowWidth | None = None,
) -> Float[Array, "B n T D"]:
    """The hidden state that predicts each completion token.

    The first is predicted by the prompt's last token, which is therefore read with each completion; of the prompt
    before it only keys and values are needed. `in_one_row` nothing is concatenated, and no mask is needed; where
    `width` is known, the rows have it.
    """
    if in_one_row(decoder.attention, completions.shape[1]):
        return one_row_hidden(decoder, prompts, prompt_lengths, completions, width)
    # `keys_values` also caches the last token of each prompt. The length is one less, so it is not attended to twice.
    prompt = decoder.keys_values(prompts)
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, None]
    last = jnp.broadcast_to(last, (*completions.shape[:2], 1))
    # The last token of a completion predicts nothing and is not read.
    return decoder.extend(prompt, prompt_lengths - 1, jnp.concatenate([last, completions[..., :-1]], axis=2))


def one_row_hidden(
    decoder: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    completions: Int[Array, "B 1 T"],
    width: RowWidth | None = None,
) -> Float[Array, "B 1 T D"]:
    """`completion_hidden` of one completion per prompt, each read right after its prompt, as one sequence."""
    P, T = prompts.shape[1], completions.shape[-1]
    W = min(width.tokens, P + T) if width else P + T
    place = jnp.arange(W) - prompt_lengths[:, None]  # in the completion; below 0: in the prompt
    own = jnp.take_along_axis(completions[:, 0], jnp.clip(place, 0, T - 1), axis=1)
    row = jnp.where(place < 0, jnp.pad(prompts, ((0, 0), (0, T)))[:, :W], own)
    predicts = prompt_lengths[:, None] - 1 + jnp.arange(T)
    # Places beyond the row are after the end of a completion, where weights are 0.
    return decoder.states_at(row, jnp.minimum(predicts, W - 1))[:, None]


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
