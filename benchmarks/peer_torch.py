"""torch + transformers as a competent user writes it: generate with a cache, logits of completion positions only."""

import math
import pathlib
import time
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.shape import Prompts, Shape

ROWS = 8
"""Sequences per gradient pass: of 8, 16, 32 and all 64 none was faster on two (busy) cores, and 8 is the smallest."""


class Sequences(NamedTuple):
    """Left-padded prompts with their right-padded completions [prompts · n, P + T], and what of them is real (0, 1)."""

    ids: torch.Tensor
    mask: torch.Tensor
    prompt: int  # P

    def split(self, rows: int) -> list["Sequences"]:
        """Parts of `rows` sequences."""
        pairs = zip(self.ids.split(rows), self.mask.split(rows), strict=True)
        return [Sequences(*pair, self.prompt) for pair in pairs]


class Peer:
    """One step in the stages rollout and update, the update in the parts score and gradient."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        torch.manual_seed(0)
        self.shape = shape
        self.student, self.base, self.teacher = (
            AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32)
            for role in ("student", "base", "teacher")
        )
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=shape.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        asked = Prompts.read(folder)
        self.prompts = torch.full((len(asked.ids), int(asked.lengths.max())), shape.pad)
        self.real = torch.zeros_like(self.prompts)
        for i, row in enumerate(asked.rows()):
            self.prompts[i, -len(row) :] = torch.tensor(row, dtype=torch.long)
            self.real[i, -len(row) :] = 1

    def rollout(self) -> Sequences:
        """Completions of all prompts in one batch."""
        return self._with_completions(
            self.generate(self.prompts, self.real, num_return_sequences=self.shape.completions)
        )

    def generate(self, prompts: torch.Tensor, real: torch.Tensor, **options) -> torch.Tensor:
        """transformers' samples after prompts [B, P]: completions [B · num_return_sequences, T], padded."""
        shape = self.shape
        with torch.inference_mode():
            sequences = self.student.generate(
                prompts, attention_mask=real, do_sample=True, top_k=0, top_p=1.0, temperature=shape.temperature,
                max_new_tokens=shape.new_tokens, eos_token_id=list(shape.eos) or None, pad_token_id=shape.pad,
                **options,
            )  # fmt: skip
        # A copy: an inference tensor cannot be read by a differentiated pass.
        return sequences[:, prompts.shape[1] :].clone()

    def _with_completions(self, completions: torch.Tensor) -> Sequences:
        """The prompts, each `n` times, with completions [prompts · n, T]."""
        lengths = torch.from_numpy(self.shape.lengths(completions.numpy()))[:, None]
        prompts, real = (x.repeat_interleave(self.shape.completions, 0) for x in (self.prompts, self.real))
        written = (torch.arange(completions.shape[1]) < lengths).long()
        return Sequences(
            torch.cat([prompts, completions], 1), torch.cat([real, written], 1), self.prompts.shape[1]
        )

    def update(self, sequences: Sequences) -> tuple[float, dict[str, float]]:
        """EC's sampled objective, clipped gradient, AdamW; the loss and the seconds of scoring and gradient."""
        began = time.perf_counter()
        with torch.inference_mode():
            teacher, base = (
                torch.cat([self._logprobs(model, rows) for rows in sequences.split(ROWS)])
                for model in (self.teacher, self.base)
            )
        scored = time.perf_counter()
        tokens = int(sequences.mask[:, sequences.prompt :].sum())
        parts = zip(sequences.split(ROWS), teacher.split(ROWS), base.split(ROWS), strict=True)
        loss = sum(self._accumulate(*part, tokens) for part in parts)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, {"score": scored - began, "gradient": time.perf_counter() - scored}

    def _logprobs(self, model, sequences: Sequences) -> torch.Tensor:
        """log π of the completions' tokens [rows, T]: no distribution is ever normalised as a whole."""
        ids, mask, prompt = sequences
        kept = ids.shape[1] - prompt + 1
        logits = model(ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits[:, :-1]
        chosen = logits.gather(-1, ids[:, prompt:, None])[..., 0]
        return chosen - logits.logsumexp(-1)

    def _accumulate(self, sequences: Sequences, teacher, base, tokens: int) -> float:
        """Add the gradient of these rows' share of the mean loss of the batch's `tokens`; that share."""
        student = self._logprobs(self.student, sequences)
        now = student.detach()
        advantage = self.shape.lam * (teacher - base) - (now - base)
        ratio = torch.exp(torch.clamp(teacher - now, max=math.log(self.shape.clip)))
        written = sequences.mask[:, sequences.prompt :]
        loss = -(ratio * advantage * student * written).sum() / tokens
        loss.backward()
        return float(loss.detach())

    def tokens(self, sequences: Sequences) -> np.ndarray:
        """Sampled tokens [prompts, n, T], padded."""
        completions = sequences.ids[:, sequences.prompt :]
        return completions.unflatten(0, (self.shape.prompts, self.shape.completions)).numpy()

    def of_tokens(self, tokens: np.ndarray) -> Sequences:
        """Sequences with these completions [prompts, n, T], without what none of them reaches."""
        longest = int(self.shape.lengths(tokens).max())
        return self._with_completions(torch.tensor(tokens[..., :longest], dtype=torch.long).flatten(0, 1))
