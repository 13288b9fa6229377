"""The work that every peer is given: forced lengths, prompts and two models of one vocabulary.

Only numpy is imported with this module: the processes of other libraries load it too.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """One on-policy distillation step with forced lengths. The base is a copy of the student."""

    completions: int = 1  # of each prompt
    prompts: int = 8
    prompt_tokens: int = 256
    new_tokens: int = 64
    vocab: int = 4096
    student: tuple[int, int] = (4, 256)  # layers, width
    teacher: tuple[int, int] = (6, 384)
    head_dim: int = 64
    lam: float = 1.1
    clip: float = 5.0
    lr: float = 1e-5
    rope_theta: int = 10_000

    def dimensions(self, role: str) -> dict[str, int]:
        """Of the student or the teacher, in the names of listopd_jax's config."""
        layers, width = getattr(self, role)
        heads = width // self.head_dim
        return {
            "num_layers": layers,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_heads": heads,
            "num_kv_heads": max(1, heads // 2),
            "head_dim": self.head_dim,
        }

    def prompt_ids(self, seed: int = 0) -> np.ndarray:
        """Random prompts int32 [prompts, prompt_tokens]; ids 0 and 1 are PAD and EOS."""
        ids = np.random.default_rng(seed).integers(2, self.vocab, (self.prompts, self.prompt_tokens))
        return ids.astype(np.int32)
