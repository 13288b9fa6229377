"""The two random models that every peer is given, on disk."""

import pathlib

from benchmarks.presets import cpu
from benchmarks.shape import Shape
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
    """Random float32 weights of both roles as Hugging Face folders: folder/student, folder/teacher."""
    config = cpu(shape)
    for seed, (role, dimensions) in enumerate(shapes_of(config).items()):
        params = initial_params(config[role], dimensions, seed, "float32")
        save_hf(folder / role, dimensions, params, words_tokenizer(shape.vocab))
