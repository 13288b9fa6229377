"""Checkpoints in and out against Hugging Face transformers: numbers, bits, memory, and hostile files."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from listopd_jax.errors import UserError
from listopd_jax.models import check, hf
from listopd_jax.models.config import ModelConfig, RopeScaling
from listopd_jax.models.decoder import Decoder, abstract
from listopd_jax.models.hf import save
from listopd_jax.models.hf.tensors import INDEX

CONFIGS = {
    "qwen3_gqa_untied": ModelConfig(97, 32, 48, 3, 8, 2, 12, rope_theta=5e6, tied=False),
    "qwen3_mqa_tied": ModelConfig(97, 32, 48, 2, 4, 1, 10, rope_theta=1e6, tied=True),
    "llama_scaled_tied": ModelConfig(
        97, 32, 48, 2, 4, 2, 16, rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 32), qk_norm=False
    ),
    "llama_untied": ModelConfig(97, 32, 48, 2, 4, 4, 8, rope_theta=1e4, qk_norm=False, tied=False),
    "qwen2_tied": ModelConfig(97, 32, 48, 2, 4, 2, 8, qk_norm=False, qkv_bias=True),
    "qwen2_untied": ModelConfig(97, 32, 48, 3, 4, 1, 10, qk_norm=False, qkv_bias=True, tied=False),
    "smollm3": ModelConfig(97, 32, 48, 4, 4, 2, 8, rope_theta=5e6, qk_norm=False, nope_layers=(1, 3)),
    "mistral": ModelConfig(97, 32, 48, 2, 4, 2, 12, rope_theta=1e4, norm_eps=1e-5, qk_norm=False, tied=False),
}
TINY = CONFIGS["qwen3_gqa_untied"]


def random_params(config: ModelConfig, dtype=jnp.float32, seed=0) -> nnx.State:
    """Weights larger than at initialisation, and norms away from one, so that every mistake shows."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan = leaf.shape[-1] ** 0.5
        return jnp.asarray(rng.normal(size=leaf.shape) * 3 / fan + 0.2, dtype)

    return jax.tree.map(draw, abstract(config, param_dtype=dtype)[1])


def assert_same_bits(ours: nnx.State, theirs: nnx.State):
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), jax.tree_util.keystr(path)


# --- against transformers


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def transformers_config(name: str, config: ModelConfig):
    """In transformers' own terms: what we read from config.json, and write there, is compared to it."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= dataclasses.asdict(config.rope_scaling) | {"rope_type": "llama3"}
    kind = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "smollm3": "SmolLM3"}
    turns = [int(i not in config.nope_layers) for i in range(config.num_layers)]
    own = {"mistral": {"sliding_window": None}, "smollm3": {"no_rope_layers": turns}}
    return getattr(transformers, f"{kind[name.split('_')[0]]}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_parameters=rope,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **own.get(name, {}),
    )


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, torch, tmp_path_factory):
    """A random transformers model, saved by transformers, and what we read of it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIGS[request.param]
    model = AutoModelForCausalLM.from_config(
        transformers_config(request.param, config), attn_implementation="eager"
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 3 / weight.shape[-1] ** 0.5 + 0.2)
    folder = tmp_path_factory.mktemp("hf") / request.param
    model.save_pretrained(folder)
    return model.eval(), folder, config, hf.load_hf(folder)


def test_config_is_read_as_it_was_written(pair):
    _, _, config, (read, _) = pair
    assert read == dataclasses.replace(config, max_positions=read.max_positions)


def test_logits_and_gradients_equal_transformers(pair, torch):
    """Cross-entropy on a random mask of ragged right-padded rows: logits to 1e-4, every gradient to 1e-3."""
    model, _, config, (_, params) = pair
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 97, (4, 40)), np.array([40, 23, 7, 2])
    valid = np.arange(40) < lengths[:, None]
    mask = (valid[:, 1:] * (rng.random((4, 39)) < 0.5)).astype(np.float32)
    mask[0, 0] = 1

    @jax.jit
    @jax.value_and_grad
    def ours(p):
        hidden = nnx.merge(graphdef, p)(tokens, lengths)
        log_probs = jax.nn.log_softmax(hidden @ nnx.merge(graphdef, p).head_weight().T)
        return (
            -(jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], -1)[..., 0] * mask).sum()
            / mask.sum()
        )

    graphdef, _ = abstract(config)
    logits = jax.jit(
        lambda p: nnx.merge(graphdef, p)(tokens, lengths) @ nnx.merge(graphdef, p).head_weight().T
    )
    loss, grads = ours(params)

    model.zero_grad()
    out = model(torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64))).logits
    losses = torch.nn.functional.cross_entropy(
        out[:, :-1].reshape(-1, 97), torch.tensor(tokens[:, 1:]).reshape(-1), reduction="none"
    )
    their_loss = (losses * torch.tensor(mask).reshape(-1)).sum() / mask.sum()
    their_loss.backward()

    theirs = out.detach().numpy()
    assert np.abs(logits(params) - theirs)[valid].max() < 1e-4 * np.abs(theirs[valid]).max()
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)
    their_grads = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    our_grads = dict(hf.hf_tensors(grads))
    assert our_grads.keys() == their_grads.keys()
    for name, grad in our_grads.items():
        assert np.abs(grad - their_grads[name]).max() < 1e-3 * np.abs(their_grads[name]).max(), name


def test_greedy_continuations_equal_transformers(pair):
    _, folder, _, _ = pair
    result = check.compare(folder, tokens=64)
    assert result["ok"] and result["greedy_agreement"] == 1.0, result


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_our_export_bit_for_bit(pair, torch, tmp_path, max_shard_bytes):
    from transformers import AutoModelForCausalLM

    model, _, config, (read, params) = pair
    hf.save_hf(tmp_path / "out", read, params, max_shard_bytes=max_shard_bytes)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    same_class = type(model).__name__.replace("Mistral", "Llama")  # without a window it is one
    assert type(again).__name__ == same_class
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, again.eval()(tokens).logits)
    rope = again.config.rope_parameters
    assert {key: rope[key] for key in model.config.rope_parameters} == model.config.rope_parameters


def test_tokenizer_travels_with_the_export(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocab = {"a": 0, "<eos>": 1, "<pad>": 2}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    hf.save_hf(tmp_path / "out", TINY, random_params(TINY), tokenizer)
    raw_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw_config["eos_token_id"], raw_config["pad_token_id"]) == (1, 2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == vocab


# --- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_round_trip_is_exact(tmp_path, dtype, max_shard_bytes):
    params = random_params(TINY, dtype)
    hf.save_hf(tmp_path / "out", TINY, params, max_shard_bytes=max_shard_bytes)
    config, again = hf.load_hf(tmp_path / "out", dtype)
    assert config == TINY
    assert_same_bits(params, again)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) == 1 or max(sizes) < max_shard_bytes + 4096  # and a header


def test_export_in_bfloat16_rounds_to_nearest(tmp_path):
    params = random_params(TINY)
    hf.save_hf(tmp_path / "out", TINY, params, dtype="bfloat16")
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_same_bits(hf.load_hf(tmp_path / "out", "bfloat16")[1], expected)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), expected)
    assert_same_bits(hf.load_hf(tmp_path / "out", "float32")[1], widened)


def test_loaded_parameters_merge_into_a_decoder(tmp_path):
    decoder = Decoder(TINY, rngs=nnx.Rngs(3))
    graphdef, params = nnx.split(decoder)
    hf.save_hf(tmp_path / "out", TINY, params)
    _, again = hf.load_hf(tmp_path / "out")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert np.array_equal(nnx.merge(graphdef, again).layers.o[...], decoder.layers.o[...])


def test_replacing_an_export_but_nothing_else(tmp_path):
    out = tmp_path / "out"
    hf.save_hf(out, TINY, random_params(TINY, seed=0), max_shard_bytes=20_000)
    hf.save_hf(out, TINY, random_params(TINY, seed=1))
    assert_same_bits(hf.load_hf(out)[1], random_params(TINY, seed=1))
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="not an earlier export"):
        hf.save_hf(tmp_path / "notes", TINY, random_params(TINY))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "out"]


def test_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    hf.save_hf(tmp_path / "out", TINY, random_params(TINY))

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(save, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        hf.save_hf(tmp_path / "out", TINY, random_params(TINY, seed=1))
    assert_same_bits(hf.load_hf(tmp_path / "out")[1], random_params(TINY))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


MEASURE = """
import pathlib, sys
import jax, jax.numpy as jnp
from listopd_jax.models import hf
def status(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024
hf.load_hf(sys.argv[1], sys.argv[3])  # start JAX, so that what it takes for itself is not counted
before = status("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
_, params = hf.load_hf(sys.argv[2], sys.argv[3])
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((status("VmHWM") - before) / size)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_never_holds_two_copies(tmp_path, dtype):
    """The peak of resident memory over a load is below 1.3 times the model (140 MB in bfloat16)."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc to reset the peak of resident memory")
    config = ModelConfig(8000, 640, 1728, 14, 8, 4, 80, tied=False)
    hf.save_hf(tmp_path / "tiny", TINY, random_params(TINY))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, dtype), abstract(config)[1])
    hf.save_hf(tmp_path / "large", config, params, dtype="bfloat16", max_shard_bytes=40_000_000)
    del params
    command = [sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path / "large", dtype]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3


# --- hostile files


@pytest.fixture
def export(tmp_path):
    hf.save_hf(tmp_path / "out", TINY, random_params(TINY))
    return tmp_path / "out"


@pytest.fixture
def sharded(tmp_path):
    hf.save_hf(tmp_path / "out", TINY, random_params(TINY), max_shard_bytes=30_000)
    return tmp_path / "out"


def edit_tensors(path: pathlib.Path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: pathlib.Path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(folder: pathlib.Path, *parts: str, dtype="float32"):
    """The load fails with one line that has all the parts."""
    with pytest.raises(UserError) as caught:
        hf.load_hf(folder, dtype)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


Q = "model.layers.1.self_attn.q_proj.weight"


def poke(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


TENSOR_EDITS = {
    "missing": (lambda t: t.pop(Q), ("missing",)),
    "unexpected": (
        lambda t: t.update({"model.layers.1.extra.weight": t[Q]}),
        ("extra.weight is unexpected",),
    ),
    "bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[Q][0]}),
        ("q_proj.bias is unexpected",),
    ),
    "extra layer": (lambda t: t.update({Q.replace("1", "3"): t[Q]}), ("layers.3", "unexpected")),
    "transposed": (lambda t: t.update({Q: np.ascontiguousarray(t[Q].T)}), (Q, "(32, 96)", "(96, 32)")),
    "integer": (lambda t: t.update({Q: np.ones((96, 32), np.int8)}), (Q, "I8")),
    "nan": (poke(Q, (5, 5), np.nan), (Q, "NaN")),
    "infinite": (poke("model.norm.weight", 3, np.inf), ("model.norm.weight", "NaN or infinities")),
    "blank layer": (poke(Q, ..., 0), (Q, "blank")),
    "blank head": (poke("lm_head.weight", ..., 0), ("lm_head.weight", "blank")),
}


@pytest.mark.parametrize("edit", TENSOR_EDITS)
def test_bad_tensors_are_refused_by_name(export, edit):
    change, parts = TENSOR_EDITS[edit]
    edit_tensors(export / "model.safetensors", change)
    refused(export, "model.safetensors" if edit != "missing" else Q, *parts)


def test_overflow_in_the_narrower_type_is_reported(export):
    edit_tensors(export / "model.safetensors", poke(Q, (0, 0), 1e6))
    refused(export, Q, "as float16", dtype="float16")
    assert hf.load_hf(export, "float32")[0] == TINY


def test_tied_head_must_equal_the_embedding(tmp_path):
    config = CONFIGS["qwen3_mqa_tied"]
    hf.save_hf(tmp_path / "out", config, random_params(config))
    path = tmp_path / "out" / "model.safetensors"
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert hf.load_hf(tmp_path / "out")[0] == config
    edit_tensors(path, poke("lm_head.weight", (0, 0), 7))
    refused(tmp_path / "out", "lm_head.weight differs", "tie_word_embeddings")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_file(export, keep):
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(export, "model.safetensors", "download it again")


def test_random_bytes_never_give_a_traceback(export):
    """Any damage to the header is either refused in one line or harmless."""
    rng = np.random.default_rng(0)
    path = export / "model.safetensors"
    good = path.read_bytes()
    for _ in range(60):
        bad = bytearray(good)
        for place in rng.integers(0, 3000, rng.integers(1, 4)):
            bad[place] = rng.integers(256)
        path.write_bytes(bad)
        try:
            hf.load_hf(export)
        except UserError as e:
            assert "\n" not in str(e)


def test_doubled_tensor_across_shards(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    edit_tensors(second, lambda t: t.update({name: load_file(first)[name]}))
    refused(sharded, second.name, name, "is also in", first.name)


def test_shards_and_index_must_agree(sharded):
    shards, index = sorted(sharded.glob("*.safetensors")), sharded / INDEX
    name = next(iter(load_file(shards[0])))
    good = index.read_text()
    edit_json(index, lambda j: j["weight_map"].pop(name))
    refused(sharded, shards[0].name, name, "not listed")
    index.write_text(good)
    edit_json(index, lambda j: j["weight_map"].update({"ghost": shards[0].name}))
    refused(sharded, shards[0].name, "ghost is missing")
    index.write_text(good)
    shards[1].unlink()
    refused(sharded, shards[1].name, "no such file")


@pytest.mark.parametrize("bad", ["../model.safetensors", "/etc/passwd", "a.bin", 5, None])
def test_index_cannot_lead_elsewhere(sharded, bad):
    edit_json(sharded / INDEX, lambda j: j["weight_map"].update({Q: bad}))
    refused(sharded, INDEX, "not the name of a safetensors file")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "\x00"])
def test_broken_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


CONFIG_EDITS = {
    "model_type": ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    "moe": ({"model_type": "qwen3_moe", "num_experts": 8}, "model_type 'qwen3_moe'"),
    "head": ({"architectures": ["Qwen3ForSequenceClassification"]}, "ForSequenceClassification"),
    "attention_bias": ({"attention_bias": True}, "attention_bias"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias"),
    "sliding": ({"use_sliding_window": True, "max_window_layers": 1}, "sliding-window"),
    "layer_types": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "sliding-window",
    ),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope type 'linear'"),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor' is missing"),
    "scaling": ({"rope_scaling": [4]}, "rope_scaling must be an object"),
    "activation": ({"hidden_act": "gelu"}, "'gelu'"),
    "fp8": (
        {"quantization_config": {"quant_method": "fp8"}},
        "quantized weights (fp8) are not supported; give",
    ),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized weights (unnamed)"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
    "mistral v0.1": (
        {"model_type": "mistral", "sliding_window": 4096},
        "up to sliding_window tokens: if yours are, set it to null",
    ),
    "mistral default": ({"model_type": "mistral"}, "sliding-window"),
    "smollm3 window": ({"model_type": "smollm3", "use_sliding_window": True}, "sliding-window"),
    "smollm3 layers": ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "3 zeros and ones"),
    "smollm3 interval": ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval 0"),
    "smollm3 deep": ({"model_type": "smollm3", "num_hidden_layers": 10**20}, "num_hidden_layers 1000"),
    "smollm3 list": ({"model_type": "smollm3", "no_rope_layers": [[1], [0], [1]]}, "wrong type"),
    "string": ({"hidden_size": "32"}, "hidden_size"),
    "huge": ({"hidden_size": 10**15}, "hidden_size"),
    "layers": ({"num_hidden_layers": 10**9}, "1000000000 layers"),
    "more layers": ({"num_hidden_layers": 4}, "model.layers.3"),
    "theta": ({"rope_theta": None}, "rope_theta"),
    "tied": ({"tie_word_embeddings": "yes"}, "tied"),
    "heads": ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    "null": ({"vocab_size": None}, "vocab_size"),
    "types": ({"layer_types": 5}, "wrong type"),
    "windows": ({"use_sliding_window": True, "max_window_layers": "all"}, "wrong type"),
}


@pytest.mark.parametrize("edit", CONFIG_EDITS)
def test_unsupported_or_broken_config(export, edit):
    change, part = CONFIG_EDITS[edit]
    edit_json(export / "config.json", lambda j: j.update(change))
    refused(export, part)


@pytest.mark.parametrize("name", ["qweight", "weight_packed", "weight_scale_inv", "weight.absmax"])
def test_quantized_tensors_are_named_as_such(export, name):
    """Some say so in a file of their own, not in config.json."""
    edit_tensors(export / "model.safetensors", lambda t: t.update({Q.replace("weight", name): t.pop(Q)}))
    refused(export, "quantized weights", name, "without -FP8, -AWQ, -GPTQ")


def test_smollm3_without_a_list_has_no_positions_in_every_fourth_layer(export):
    def change(raw):
        raw.update(model_type="smollm3", architectures=["SmolLM3ForCausalLM"], num_hidden_layers=9)
        for field in ("rope_theta", "tie_word_embeddings"):
            raw.pop(field)

    edit_json(export / "config.json", change)
    config = hf.read_config(export)
    assert (config.nope_layers, config.rope_theta, config.tied) == ((3, 7), 2e6, True)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_config_field(export, field):
    edit_json(export / "config.json", lambda j: j.pop(field))
    refused(export, "config.json", field, "missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff", "[" * 100_000])
def test_broken_config_file(export, text):
    (export / "config.json").write_text(text)
    refused(export, "config.json")


def test_unused_sliding_window_is_accepted(export):
    unused = {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 4096}
    edit_json(export / "config.json", lambda j: j.update(unused))
    assert hf.load_hf(export)[0] == TINY


def test_pickled_weights_are_refused_with_advice(export):
    (export / "model.safetensors").rename(export / "pytorch_model.bin")
    refused(export, "pickled", "save_pretrained")


def test_absent_files_and_folders(export, tmp_path):
    (export / "model.safetensors").unlink()
    refused(export, "neither model.safetensors nor")
    (export / "config.json").unlink()
    refused(export, "config.json", "no such file")
    refused(tmp_path / "nowhere" / "at" / "all", "no such folder")


def test_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("no-such-owner/no-such-model", "no-such-owner/no-such-model", "hub")


def test_hub_id_is_read_from_its_snapshot(export, monkeypatch):
    asked = {}

    def snapshot(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(export)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hf.load_hf(hf.resolve("owner/name", "abc"))[0] == TINY
    assert asked["name"] == "owner/name" and asked["revision"] == "abc"
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["patterns"])
