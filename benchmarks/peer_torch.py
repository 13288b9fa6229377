"""torch + transformers as a competent user writes it: generate with a cache, logits of completion positions only."""

import math
import pathlib
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.shape import Shape

ROWS = 8
"""Sequences a gradient pass: of 8, 16, 32 and all 64 none was faster on two (busy) cores, and 8 is the smallest."""


class Peer:
    """One step in the stages rollout and update, the update in the parts score and gradient."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        torch.manual_seed(0)
        self.shape = shape
        self.student, self.base, self.teacher = (
            AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32)
            for role in ("student", "student", "teacher")
        )
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=shape.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.prompts = torch.tensor(shape.prompt_ids(), dtype=torch.long)

    def rollout(self) -> torch.Tensor:
        """Sequences [prompts · n, prompt + new] of forced length."""
        n, new = self.shape.completions, self.shape.new_tokens
        with torch.inference_mode():
            sequences = self.student.generate(
                self.prompts, attention_mask=torch.ones_like(self.prompts), do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, max_new_tokens=new, eos_token_id=None, num_return_sequences=n, pad_token_id=0,
            )  # fmt: skip
        return sequences.clone()  # an inference tensor cannot be read by a differentiated pass

    def update(self, sequences: torch.Tensor) -> tuple[float, dict[str, float]]:
        """EC's sampled objective, clipped gradient, AdamW; the loss and the seconds of scoring and gradient."""
        began = time.perf_counter()
        with torch.inference_mode():
            teacher, base = (
                torch.cat([self._logprobs(model, rows) for rows in sequences.split(ROWS)])
                for model in (self.teacher, self.base)
            )
        scored = time.perf_counter()
        parts = zip(sequences.split(ROWS), teacher.split(ROWS), base.split(ROWS), strict=True)
        loss = sum(self._accumulate(*part, len(sequences)) for part in parts)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, {"score": scored - began, "gradient": time.perf_counter() - scored}

    def _logprobs(self, model, sequences: torch.Tensor) -> torch.Tensor:
        """log π of the completions' tokens [rows, new]: no distribution is ever normalised as a whole."""
        new = self.shape.new_tokens
        logits = model(sequences, logits_to_keep=new + 1, use_cache=False).logits[:, :-1]
        chosen = logits.gather(-1, sequences[:, -new:, None])[..., 0]
        return chosen - logits.logsumexp(-1)

    def _accumulate(self, sequences, teacher, base, total: int) -> float:
        """Add the gradient of these rows' share of the batch's mean loss; that share."""
        student = self._logprobs(self.student, sequences)
        now = student.detach()
        advantage = self.shape.lam * (teacher - base) - (now - base)
        ratio = torch.exp(torch.clamp(teacher - now, max=math.log(self.shape.clip)))
        loss = -(ratio * advantage * student).sum() / (total * self.shape.new_tokens)
        loss.backward()
        return float(loss.detach())

    def tokens(self, sequences: torch.Tensor) -> np.ndarray:
        """Sampled tokens [prompts, n, new]."""
        new = self.shape.new_tokens
        return sequences[:, -new:].reshape(self.shape.prompts, self.shape.completions, new).numpy()

    def of_tokens(self, tokens: np.ndarray) -> torch.Tensor:
        """Sequences with these completions."""
        prompts = self.prompts.repeat_interleave(self.shape.completions, 0)
        return torch.cat([prompts, torch.tensor(tokens, dtype=torch.long).flatten(0, 1)], 1)
