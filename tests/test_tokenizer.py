"""Tokenizers that cannot do the task are refused before anything is computed, in one line that names the folder."""

import json
import logging
import shutil

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from listopd_jax.data.tokenizer import (
    check_tokenizers_agree,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
    tokenizer_files,
    train_tokenizer,
)
from listopd_jax.errors import UserError
from listopd_jax.task.prompt import render_answer

ANSWER = render_answer((10, 7))
PLAIN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "TokenizersBackend"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a byte-level tokenizer of our own."""
    folder = tmp_path_factory.mktemp("base") / "t"
    train_tokenizer([ANSWER] * 3, 300, folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(base, tmp_path / "t")


def configure(folder, **fields):
    """Write tokenizer_config.json anew."""
    (folder / "tokenizer_config.json").write_text(json.dumps(PLAIN | fields))
    return folder


def refused(folder, pattern, load=load_tokenizer):
    with pytest.raises(UserError, match=pattern) as e:
        load(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_tokenizer_json_decides_where_transformers_would_not_obey_it(folder, kind, caplog):
    """transformers rebuilds these classes with a pre-tokenizer of its own: same vocabulary, other ids."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+|\s?[^\p{L}]"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    configure(folder, tokenizer_class=kind)
    stored = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rebuilt = AutoTokenizer.from_pretrained(folder)
    want = stored.encode(ANSWER, add_special_tokens=False).ids
    assert rebuilt(ANSWER, add_special_tokens=False)["input_ids"] != want, "else the test shows nothing"
    with caplog.at_level(logging.WARNING, "absl"):
        tokenizer = load_tokenizer(folder)
    assert tokenizer(ANSWER, add_special_tokens=False)["input_ids"] == want
    assert tokenizer.eos_token == "<|im_end|>" and "gives other ids" in caplog.text


def test_an_obedient_tokenizer_is_loaded_without_a_word(base, caplog):
    with caplog.at_level(logging.WARNING, "absl"):
        load_tokenizer(base)
    assert not caplog.records


def test_a_folder_of_weights_alone_holds_no_tokenizer(tmp_path):
    """transformers would make a tokenizer of one token of it."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    refused(tmp_path, "holds no tokenizer .* tokenizer.path")


def test_an_eos_that_the_vocabulary_lacks_is_refused(folder):
    """transformers would give it an id of its own, which no model has learnt."""
    refused(configure(folder, eos_token="<|nope|>"), r"eos_token '<\|nope\|>', which tokenizer.json lacks")
    refused(configure(folder, eos_token=None), "no EOS token")
    size = len(load_tokenizer(configure(folder)))
    added = {str(size): {"content": "<|nope|>", "special": True}}
    assert (
        load_tokenizer(configure(folder, eos_token="<|nope|>", added_tokens_decoder=added)).eos_token_id
        == size
    )


def test_a_base_models_tokenizer_without_eos_can_still_be_compared(folder, base):
    """Where tokenizer.path decides, a model's own tokenizer need not be fit for a run."""
    check_tokenizers_agree(load_tokenizer(base), read_tokenizer(configure(folder, eos_token=None)))


def test_tokens_that_only_one_side_has_are_no_other_vocabulary(folder, base):
    """A [PAD] that someone added; but not one token under another's id."""
    ours, theirs = load_tokenizer(base), read_tokenizer(configure(folder, pad_token="[PAD]"))
    assert len(theirs) == len(ours) + 1
    check_tokenizers_agree(ours, theirs)
    check_tokenizers_agree(theirs, ours)
    ours.add_tokens(["[OTHER]"])
    with pytest.raises(UserError, match="1 unlike"):
        check_tokenizers_agree(ours, theirs)


@pytest.mark.parametrize("dropped", ["{", '"', "1", "_"])
def test_a_vocabulary_that_cannot_spell_json_is_refused(tmp_path, dropped):
    """T5's has no brace; SFT would train on <unk>, and every answer would fail."""
    characters = sorted({*ANSWER, *"0123456789"} - {dropped})
    vocabulary = {c: i for i, c in enumerate(["<unk>", "</s>", *characters])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    special = dict(eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(tmp_path / "t")
    refused(tmp_path / "t", "cannot spell the answers")


def test_what_is_saved_is_in_the_terms_of_transformers_4_too(folder, tmp_path):
    """Version 5 writes a class and a form of extra tokens that version 4, and vLLM on it, cannot load."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{{ messages }}"
    save_tokenizer(tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (
        config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["chat_template"] == "{{ messages }}"
    )
    assert config["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in config
    assert not {"backend", "is_local", "local_files_only"} & config.keys()
    again, text = load_tokenizer(tmp_path / "out"), ANSWER + "<|im_start|><|im_end|>"
    assert (
        again(text)["input_ids"] == tokenizer(text)["input_ids"]
        and again.get_vocab() == tokenizer.get_vocab()
    )
    assert set(again.all_special_ids) == set(tokenizer.all_special_ids)
    assert again.chat_template == tokenizer.chat_template and again.eos_token == tokenizer.eos_token


def test_the_files_of_a_tokenizer(folder):
    configure(folder)
    (folder / "README.md").write_text("not a part of it")
    assert [f.name for f in tokenizer_files(folder)] == ["tokenizer.json", "tokenizer_config.json"]
