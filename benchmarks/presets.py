"""The configurations that benchmarks measure, and the tokens that each step is forced to."""

import ml_collections

from benchmarks.shape import Shape
from configs import fashion
from listopd_jax.config import defaults

FASHION = (700, 225)  # mean tokens of prompt and response on Amazon Fashion


def cpu(shape: Shape = Shape()) -> ml_collections.ConfigDict:  # noqa: B008 (frozen)
    """The shape that peers are compared in, as a configuration: float32."""
    config = defaults()
    config.remat, config.rollout.draft_tokens = shape.remat, shape.drafts
    config.task.update(max_prompt=shape.prompt_tokens, max_response=shape.new_tokens)
    config.tokenizer.vocab_size = shape.vocab
    for role in ("student", "teacher"):
        config[role].update(shape.dimensions(role), rope_theta=float(shape.rope_theta))
    config.opd.update(
        batch_size=shape.prompts, rollouts=shape.completions, lambdas=(shape.lam,), clip=shape.clip, lr=shape.lr,
        temperature=shape.temperature, microbatch=shape.microbatch,
    )  # fmt: skip
    return config


def paper() -> ml_collections.ConfigDict:
    """EC's step of configs/fashion.py:paper, with random weights of the published shapes."""
    config = fashion.paper()
    config.student.update(weights="", architecture="qwen3_1_7b")
    config.teacher.update(weights="", architecture="qwen3_4b")
    return config


def paper_small() -> ml_collections.ConfigDict:
    """`paper` with everything it asks for (bfloat16, remat, microbatches, budgets) at a size for a CPU."""
    config, small = paper(), Shape(vocab=512, student=(2, 64), teacher=(2, 128), head_dim=32)
    for role in ("student", "teacher"):
        config[role].update(small.dimensions(role), architecture="custom")
    config.tokenizer.update(path="", vocab_size=small.vocab)
    config.task.update(max_prompt=128, max_response=32)
    config.opd.update(batch_size=8, microbatch=4, head_chunk=32)
    return config


PRESETS = {"cpu": (cpu, (256, 64)), "paper": (paper, FASHION), "paper_small": (paper_small, (44, 14))}
"""Configuration and mean tokens (prompt, response) of each preset that runs."""
