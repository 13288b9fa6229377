"""google-tunix: its Sampler writes, its DistillationTrainer with LogitStrategy learns from what was written.

It has no on-policy distillation of its own: the two are put together here. Its loss is the forward KL over the whole
vocabulary; it has no base, no λ and no completions per prompt, and its Qwen3 computes logits of prompts too.
Run by an interpreter that has google-tunix (benchmarks.peers --tunix-python).
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation import distillation_trainer, strategies
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors

from benchmarks.shape import Shape


class Words:
    """The shape's tokenizer: "w17 w4 …"."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return " ".join(f"w{i}" for i in ids)

    def bos_id(self) -> int:
        """0: none."""
        return 0

    def eos_id(self) -> int:
        """EOS."""
        return 1

    def pad_id(self) -> int:
        """PAD."""
        return 0


class Peer:
    """One step in the stages rollout and update."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        self.shape, self.count = shape, 0
        self.student, teacher = (load(shape, folder, role) for role in ("student", "teacher"))
        sizes, length = shape.dimensions("student"), shape.prompt_tokens + shape.new_tokens
        cache = CacheConfig(length, sizes["num_layers"], sizes["num_kv_heads"], sizes["head_dim"])
        self.sampler = Sampler(self.student, Words(), cache)
        self.texts = [Words().decode(row) for row in shape.prompt_ids() for _ in range(shape.completions)]
        self.prompts = np.repeat(shape.prompt_ids(), shape.completions, 0)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(shape.lr, weight_decay=0.0))
        strategy = strategies.LogitStrategy(
            self._logits, self._logits, self._labels, temperature=1.0, alpha=1.0
        )
        config = distillation_trainer.TrainingConfig(eval_every_n_steps=10**9)
        self.trainer = distillation_trainer.DistillationTrainer(
            self.student, teacher, strategy, optimizer, config
        )
        self.trainer.is_managed_externally = True  # train() is called once per step

    def _logits(self, model, input_tokens, input_mask):
        """Logits [rows, new, V] that predict the completions."""
        rows, length = input_tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
        logits, _ = model(input_tokens, positions, None, mask)
        return logits[:, self.shape.prompt_tokens - 1 : -1]

    def _labels(self, input_tokens, input_mask):
        return nnx.one_hot(input_tokens[:, self.shape.prompt_tokens :], self.shape.vocab)

    def rollout(self) -> np.ndarray:
        """Sequences [prompts · n, prompt + new] of forced length."""
        self.count += 1
        self.sampler.transformer_state = nnx.variables(self.student)
        out = self.sampler(
            self.texts, self.shape.new_tokens, max_prompt_length=self.shape.prompt_tokens, eos_tokens=[-1],
            temperature=1.0, top_p=1.0, seed=self.count,
        )  # fmt: skip
        return np.concatenate([self.prompts, np.stack([np.asarray(row) for row in out.tokens])], 1)

    def update(self, sequences: np.ndarray) -> tuple[None, dict[str, float]]:
        """The trainer's step; no loss, since the trainer logs that of a step during the next."""
        mask = np.ones(sequences.shape, bool)
        self.trainer.train([distillation_trainer.TrainingInput(input_tokens=sequences, input_mask=mask)])
        jax.block_until_ready(nnx.state(self.student))
        return None, {}

    def tokens(self, sequences: np.ndarray) -> np.ndarray:
        """Sampled tokens [prompts, n, new]."""
        new = self.shape.new_tokens
        return sequences[:, -new:].reshape(self.shape.prompts, self.shape.completions, new)


def load(shape: Shape, folder: pathlib.Path, role: str):
    """tunix's Qwen3 with the weights of folder/role."""
    sizes = shape.dimensions(role)
    config = ModelConfig(
        num_layers=sizes["num_layers"], vocab_size=shape.vocab, embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"], num_heads=sizes["num_heads"], head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_kv_heads"], rope_theta=shape.rope_theta, norm_eps=1e-6, use_tied_embedding=True,
    )  # fmt: skip
    return create_model_from_safe_tensors(str(folder / role), config, dtype=jnp.float32)
