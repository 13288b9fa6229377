"""The shape of a decoder: one frozen, hashable record, and the published shapes by name."""

import dataclasses
from typing import Any

from listopd_jax.errors import UserError, unknown_name

GGUF = ".gguf"  # the suffix of a checkpoint in one file


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies, in the field names of its published config."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        if not (self.factor >= 1 and self.high_freq_factor > self.low_freq_factor > 0):
            raise UserError(
                f"rope_scaling: needs factor >= 1 and high_freq_factor > low_freq_factor > 0, got {self}"
            )


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a layer, by the names of their parameters."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """A low-rank adapter: each weight W of `targets` (of PROJECTIONS) is used as W + alpha/rank · A B."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        if not self.targets or not set(self.targets) <= set(PROJECTIONS):
            raise UserError(f"lora: targets {self.targets!r} must be some of {', '.join(PROJECTIONS)}")

    @property
    def scale(self) -> float:
        """The multiplier of the product of the two factors."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a pre-norm decoder with grouped-query attention, SwiGLU and rotary positions.

    `head_dim` is independent of `hidden_size / num_heads`; `qk_norm` is Qwen3's RMSNorm on each query and
    key head; `qkv_bias` is Qwen2's bias on queries, keys and values; `nope_layers` are the numbers, ascending, of
    SmolLM3's layers without rotary positions; `tied` uses the embedding as the LM head; `max_positions` is only a
    record for exports.
    UserError if the values are impossible.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    nope_layers: tuple[int, ...] = ()
    tied: bool = True
    max_positions: int = 32768

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if not all(0 <= i < self.num_layers for i in self.nope_layers):
            raise UserError(
                f"model config: nope_layers={self.nope_layers} must be numbers of layers, below {self.num_layers}"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim={self.head_dim} must be even (rotary positions)")


def _check_field(field: dataclasses.Field, value: object) -> None:
    if field.type is bool and not isinstance(value, bool):
        raise UserError(f"model config: {field.name} must be true or false, got {value!r}")
    if field.type not in (int, float):
        return
    allowed = (int,) if field.type is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < 2**31:
        raise UserError(
            f"model config: {field.name} must be a positive {field.type.__name__} below 2^31, got {value!r}"
        )


def _qwen3(hidden, intermediate, layers, heads, tied) -> ModelConfig:
    return ModelConfig(
        # Rows of the embedding: the tokenizer's 151,669 tokens, padded.
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        tied=tied,
        max_positions=40960,
    )


def _llama3_2(hidden, layers, heads, head_dim) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=8192,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        rope_theta=5e5,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        qk_norm=False,
        max_positions=131072,
    )


NAMED_CONFIGS = {
    "qwen3_0_6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3_1_7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3_4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3_8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3_14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3_32b": _qwen3(5120, 25600, 64, 64, tied=False),
    "llama3_2_1b": _llama3_2(2048, 16, 32, 64),
    "llama3_2_3b": _llama3_2(3072, 28, 24, 128),
    "smollm2_135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=1e5,
        norm_eps=1e-5,
        qk_norm=False,
        max_positions=8192,
    ),
}


def named_config(name: str) -> ModelConfig:
    """The published dimensions of `name`, such as 'qwen3_1_7b'; UserError with the known names if unknown."""
    if name not in NAMED_CONFIGS:
        raise unknown_name("model", name, NAMED_CONFIGS)
    return NAMED_CONFIGS[name]


CUSTOM = (
    "hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim rope_theta qk_norm tied".split()
)


def custom_config(model: Any, vocab: int) -> ModelConfig:
    """The dimensions that config section `model` spells out, with `vocab` rows of the embedding."""
    return ModelConfig(vocab_size=vocab, **{name: model[name] for name in CUSTOM})


def num_params(config: ModelConfig) -> int:
    """Number of distinct parameters (a tied head counts once)."""
    c = config
    # q and o have num_heads heads, k and v num_kv_heads.
    heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    biases = c.head_dim * (c.num_heads + 2 * c.num_kv_heads) if c.qkv_bias else 0
    layer = c.hidden_size * (heads + 3 * c.intermediate_size) + norms + biases
    # The 1 is the final norm.
    return c.num_layers * layer + c.hidden_size * (1 + c.vocab_size * (1 if c.tied else 2))


def lora_params(config: ModelConfig, lora: Lora) -> int:
    """Number of parameters of an adapter."""
    c = config
    D, heads, kv_heads = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    widths = {name: D + c.intermediate_size for name in ("gate", "up", "down")}
    widths |= {"q": D + heads, "k": D + kv_heads, "v": D + kv_heads, "o": D + heads}
    return c.num_layers * lora.rank * sum(widths[name] for name in lora.targets)
