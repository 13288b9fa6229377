"""peer_torch with transformers' prompt-lookup decoding, which takes one sequence at a time."""

import torch

from benchmarks import peer_torch

DRAFTED = 10
"""Tokens drafted per pass, the number that transformers' documentation gives."""


class Peer(peer_torch.Peer):
    """peer_torch, except for the rollout."""

    def rollout(self) -> peer_torch.Sequences:
        """Completions row by row, each drafted from its prompt and what it has written itself."""
        prompts = [row[real > 0] for row, real in zip(self.prompts, self.real, strict=True)]
        rows = [self._row(prompt) for prompt in prompts for _ in range(self.shape.completions)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.shape.pad)
        return self._with_completions(padded)

    def _row(self, prompt: torch.Tensor) -> torch.Tensor:
        """One completion [T] of a prompt [P]."""
        asked = prompt[None]
        return self.generate(asked, torch.ones_like(asked), prompt_lookup_num_tokens=DRAFTED)[0]
