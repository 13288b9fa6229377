"""trl's DistillationTrainer: on-policy, the student's reverse KL to the teacher over the whole vocabulary.

Its own methods in the order of its training step: n completions are n copies of the prompt; the batch is split as its
gradient accumulation splits it. It has no base and no λ. Prompts are given to it as ids: their text is not tokenized.
"""

import pathlib
import tempfile

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import split_tensor_dict

from benchmarks.peer_torch import ROWS
from benchmarks.shape import Prompts, Shape


class Peer:
    """One step in the stages rollout and update."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        self.shape, self.rows = shape, shape.prompts * shape.completions
        asked = [row.tolist() for row in Prompts.read(folder).rows() for _ in range(shape.completions)]
        self.inputs = [{"prompt": f"prompt {i}"} for i in range(self.rows)]
        self.output = tempfile.TemporaryDirectory()
        config = DistillationConfig(
            output_dir=self.output.name, per_device_train_batch_size=self.rows, max_completion_length=shape.new_tokens,
            temperature=shape.temperature, beta=1.0, learning_rate=shape.lr, max_steps=10_000, use_cpu=True, bf16=False,
            generation_kwargs={} if shape.eos else {"min_new_tokens": shape.new_tokens}, report_to=[],
            gradient_checkpointing=False, gradient_accumulation_steps=1,
        )  # fmt: skip
        self.trainer = DistillationTrainer(
            model=str(folder / "student"), teacher_model=str(folder / "teacher"), args=config,
            train_dataset=Dataset.from_list(self.inputs),
            processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        )  # fmt: skip
        self.trainer._tokenize_prompts = lambda prompts: (asked, None, {})
        self.trainer.create_optimizer()
        self.trainer.model.train()

    def rollout(self) -> dict:
        """The trainer's generation."""
        return self.trainer._generate_and_score_completions(self.inputs)

    def update(self, batch: dict) -> tuple[float, dict[str, float]]:
        """The trainer's loss in parts of the batch, its clipped gradient, the optimizer; the loss."""
        total = 0.0
        for part in split_tensor_dict(batch, max(1, self.rows // ROWS)):
            loss = self.trainer.compute_loss(self.trainer.model, part)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return total, {}

    def tokens(self, batch: dict) -> np.ndarray:
        """Sampled tokens [prompts, n, T], padded."""
        return batch["completion_ids"].reshape(self.shape.prompts, self.shape.completions, -1).numpy()
