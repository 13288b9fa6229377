"""The work that every peer is given: prompts, three models of one vocabulary, and how long an answer may be.

Only numpy is imported with this module: the processes of other libraries load it too.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np

PROMPTS = "prompts.npz"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One on-policy distillation step. With random weights lengths are forced, and the base is a copy of the student.

    For a trained run (benchmarks/trained.py) the sizes of the models are those of their folders, and the last fields
    are the run's.
    """

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
    eos: tuple[int, ...] = ()  # ids that end a completion; none: each has `new_tokens`
    pad: int = 0
    temperature: float = 1.0
    drafts: int = 0  # most that we draft per row and decode step
    remat: str = "attention"  # on a CPU as fast as storing the products ("dots"), and smaller
    microbatch: int = 0

    def dimensions(self, role: str) -> dict[str, int]:
        """Dimensions of the student or the teacher, named as in listopd_jax's config."""
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

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens up to and with the first of `eos`, int32 [...], of completions [..., T]; T where there is none."""
        ends = np.isin(tokens, self.eos)
        return np.where(ends.any(-1), ends.argmax(-1) + 1, tokens.shape[-1]).astype(np.int32)


class Prompts(NamedTuple):
    """Prompts of a shape, and an answer's tokens that drafts may be copied from; all int32."""

    ids: np.ndarray  # [prompts, P], right-padded
    lengths: np.ndarray  # [prompts]
    hint: np.ndarray  # [1, H]

    def write(self, folder: pathlib.Path) -> None:
        """Keep them in `folder`."""
        np.savez(folder / PROMPTS, **self._asdict())

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Prompts":
        """The prompts that `write` kept."""
        with np.load(folder / PROMPTS) as kept:
            return cls(**kept)

    def rows(self) -> list[np.ndarray]:
        """The prompts without padding."""
        return [row[:n] for row, n in zip(self.ids, self.lengths, strict=True)]
