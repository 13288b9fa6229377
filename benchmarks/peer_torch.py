"""torch + transformers as a competent user writes it: generate with a cache, logits of completion positions only."""

import pathlib

import torch
from transformers import AutoModelForCausalLM

from benchmarks.shape import Shape


class Peer:
    """One step in the stages rollout and update."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        torch.manual_seed(0)
        load = lambda role: AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32)  # noqa: E731
        self.shape, self.student, self.base, self.teacher = (
            shape,
            load("student"),
            load("student"),
            load("teacher"),
        )
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.prompts = torch.tensor(shape.prompt_ids(), dtype=torch.long)

    def rollout(self):
        """Sequences [prompts · n, prompt + new tokens] of forced length."""
        n, new = self.shape.completions, self.shape.new_tokens
        with torch.inference_mode():
            sequences = self.student.generate(
                self.prompts, attention_mask=torch.ones_like(self.prompts), do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, max_new_tokens=new, min_new_tokens=new, num_return_sequences=n, pad_token_id=0,
            )  # fmt: skip
        return sequences.clone()

    def _logprobs(self, model, sequences):
        new = self.shape.new_tokens
        logits = model(sequences, logits_to_keep=new + 1, use_cache=False).logits[:, :-1]
        tokens = sequences[:, -new:, None]
        return torch.log_softmax(logits.float(), -1).gather(-1, tokens)[..., 0]

    def update(self, sequences) -> float:
        """EC's sampled objective (λ = 1.1, c = 5), clipped gradient, AdamW; the loss."""
        with torch.inference_mode():
            teacher, base = (self._logprobs(m, sequences) for m in (self.teacher, self.base))
        student = self._logprobs(self.student, sequences)
        now = student.detach()
        advantage = 1.1 * (teacher - base) - (now - base)
        ratio = torch.exp(torch.clamp(teacher - now, max=torch.log(torch.tensor(5.0))))
        loss = -(ratio * advantage * student).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)
