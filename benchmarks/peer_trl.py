"""trl's DistillationTrainer: on-policy, reverse KL over the whole vocabulary.

No base, no λ; no completions per prompt: n completions are n copies of the prompt.
"""

import pathlib
import tempfile

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

from benchmarks.shape import Shape


class Peer:
    """One step in the stages rollout and update, by the trainer's own methods."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        rows = shape.prompts * shape.completions
        texts = [" ".join(f"w{i}" for i in prompt) for prompt in shape.prompt_ids()]
        self.inputs = [{"prompt": text} for text in texts for _ in range(shape.completions)]
        config = DistillationConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, gradient_accumulation_steps=1,
            max_completion_length=shape.new_tokens, temperature=1.0, beta=1.0, learning_rate=1e-5, max_steps=10_000,
            generation_kwargs={"min_new_tokens": shape.new_tokens}, use_cpu=True, report_to=[], bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        self.trainer = DistillationTrainer(
            model=str(folder / "student"), teacher_model=str(folder / "teacher"), args=config,
            train_dataset=Dataset.from_list(self.inputs),
            processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        )  # fmt: skip
        self.trainer.create_optimizer()
        self.trainer.model.train()

    def rollout(self):
        """The trainer's generation."""
        self.trainer.model.train()
        return self.trainer._generate_and_score_completions(self.inputs)

    def update(self, batch) -> float:
        """The trainer's loss, its gradient and the optimizer."""
        loss = self.trainer.compute_loss(self.trainer.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return float(loss)
