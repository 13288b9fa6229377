"""The random models that every peer is given, and their prompts, on disk."""

import pathlib

import numpy as np

from benchmarks.presets import cpu
from benchmarks.shape import Prompts, Shape
from listopd_jax.models.build import initial_params
from listopd_jax.models.hf import save_hf
from listopd_jax.plan.search import shapes_of


def words_tokenizer(vocab: int):
    """A tokenizer whose text is the ids: "w17 w4 …"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


def write_models(shape: Shape, folder: pathlib.Path) -> None:
    """Random float32 weights as folder/student, /teacher and /base, which is the student; and the prompts."""
    config = cpu(shape)
    for seed, (role, dimensions) in enumerate(shapes_of(config).items()):
        params = initial_params(config[role], dimensions, seed, "float32")
        save_hf(folder / role, dimensions, params, words_tokenizer(shape.vocab))
    (folder / "base").symlink_to("student")
    lengths = np.full(shape.prompts, shape.prompt_tokens, np.int32)
    Prompts(shape.prompt_ids(), lengths, np.zeros((1, 0), np.int32)).write(folder)
