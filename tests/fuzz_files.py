"""Fuzz targets of what runs leave and read again, and of models: records, configs, logs, checkpoints, weights."""

import contextlib
import io
import itertools
import json
import math
import pathlib
import random
import shutil
import struct
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from fuzz_data import one_line
from ml_dtypes import bfloat16
from mutate import edited, edited_json, edited_line, edited_value, spelled
from test_checkpoints import assert_identical, make_state, restored, save_all
from test_gguf import spell
from test_gguf import write as write_gguf
from test_models_hf import CONFIGS, random_params
from test_records import MADE

from listopd_jax import config as config_module
from listopd_jax import records
from listopd_jax.config.saved import digest
from listopd_jax.data.tokenizer import load_tokenizer
from listopd_jax.metrics_log import forget_after, read_metrics
from listopd_jax.models import hf
from listopd_jax.models.config import PROJECTIONS, Lora
from listopd_jax.models.hf.gguf import convert
from listopd_jax.models.hf.stored import FLOATS
from listopd_jax.models.lora import abstract_adapter

# --- records, configs, logs


def run_files(folder: pathlib.Path):
    """What is read from a run's changed files is written again and comes back; anything else is one line."""
    kinds = [_record_case(folder / name, read, made) for name, (read, made) in _RECORDS.items()]
    kinds += [_config_case(folder), _metrics_case(folder)] * 3
    (folder / "checkpoints").mkdir()
    damaged = checkpoints(folder / "checkpoints")
    return lambda rng: damaged(rng) if rng.random() < 0.02 else rng.choice(kinds)(rng)


_OF = {"stage": "opd", "lam": 1.2, "seed": 0, "steps": 60, "run": "opd_lambda1.2_seed0"}
_RECORDS: dict[str, tuple[Callable, Any]] = {
    records.RUNS: (records.read_runs, [records.Planned(**_OF)]),
    records.RESULTS: (
        records.read_results,
        [
            records.Result(**_OF, n=3, parse=0.5, failures={"ok": 2}, intervals={"parse": [0.1, 0.9], "mae": None}),
            records.Result(stage="sft", decodings=(records.Decoding(decoding="free", n=2, extra={"x": [1, "é"]}),)),
        ],
    ),
    records.EXAMPLES: (records.read_examples, [records.Example(**_OF, key="k", output="[…]", scores=[1.0, 2.0])]),
    records.ERRORS: (
        records.read_errors,
        [records.Errors(**_OF, errors=[1.0, 0.5]), records.Errors(stage="sft", errors=[0, 1])],
    ),
    records.CALIBRATION: (records.read_calibration, MADE),
    records.RECOMMENDATION: (
        records.read_recommendation,
        records.Recommendation(lam=1.1, parse=1.0, holds_to=1.2, lines=["take it"]),
    ),
    records.PREDICTIONS: (
        records.read_predictions,
        [records.Prediction(predictor="limit", lambdas=[1.0, 1.2], parse=[1.0, 0.5], low=[0.9, 0.2], high=[1.0, 0.6])],
    ),
}  # fmt: skip


def _record_case(path: pathlib.Path, read: Callable, made: Any) -> Callable[[random.Random], None]:
    text = spelled([r.to_json() for r in made] if isinstance(made, list) else made.to_json())

    def write(value: Any) -> None:
        records.write_records(path, value if isinstance(value, list) else [value])
        if not isinstance(value, list):
            path.write_bytes(spelled(json.loads(path.read_bytes())[0]))

    def case(rng: random.Random) -> None:
        path.write_bytes(edited_json(rng, text))
        with one_line():
            found = read(path)
            write(found)
            assert read(path) == found, "does not come back"
            for record in found if isinstance(found, list) else [found]:
                assert hash(getattr(record, "identity", None)) is not None

    return case


def _config_case(folder: pathlib.Path) -> Callable[[random.Random], None]:
    config = config_module.validate(config_module.defaults())
    saved, path = config_module.to_json(config), folder / config_module.CONFIG

    def case(rng: random.Random) -> None:
        changed = edited_value(rng, saved)
        with one_line():
            again = config_module.from_json(changed)
            assert config_module.from_json(config_module.to_json(again)) == again, "does not come back"
        path.write_bytes(edited_json(rng, spelled({"config": saved, "code": "abc"})))
        with one_line():
            digest(config, folder)

    return case


def _metrics_case(folder: pathlib.Path) -> Callable[[random.Random], None]:
    rows = [
        {"run": run, "stage": "opd", "lambda": 1.2, "step": i, "loss": i / 7}
        for run in "ab"
        for i in range(1, 6)
    ]
    text, path = b"".join(spelled(row) + b"\n" for row in rows), folder / "metrics.jsonl"

    def case(rng: random.Random) -> None:
        if rng.random() < 0.5:
            i = rng.randrange(len(rows))
            lines = text.splitlines(keepends=True)
            lines[i] = edited_json(rng, lines[i]).replace(b"\n", b" ") + b"\n"
            path.write_bytes(b"".join(lines))
        else:
            i, data = edited_line(rng, text)
            path.write_bytes(data)
        others = [row for j, row in enumerate(rows) if j != i]
        with one_line():
            found = read_metrics(folder)
            assert all(found.count(row) == 1 for row in others), "another row is lost"
            assert len(found) <= len(rows) + 1
            forget_after(folder, "a", 3)
            kept = [row for row in found if row["run"] != "a" or row["step"] <= 3]
            assert read_metrics(folder) == kept, "the log that is written again reads otherwise"

    return case


# --- checkpoints


def checkpoints(folder: pathlib.Path):
    """Damage to the newest checkpoint: what is restored is one of those that were saved, bit by bit, or nothing."""
    save_all(folder / "calm", [1, 2])
    files = [p.relative_to(folder / "calm") for p in (folder / "calm").rglob("*") if p.is_file()]
    states = {step: make_state(step, 1000) for step in (1, 2)}

    def case(rng: random.Random) -> None:
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.rmtree(folder / "run.damaged", ignore_errors=True)
        shutil.copytree(folder / "calm", folder / "run")
        for victim in rng.sample(files, rng.choice((1, 1, 1, 2))):
            path = folder / "run" / victim
            data = path.read_bytes()
            is_json = data[:1] == b"{" and rng.random() < 0.6
            path.write_bytes(edited_json(rng, data) if is_json else edited(rng, data, 2))
            if rng.random() < 0.05:
                path.unlink()
        with one_line():
            with contextlib.redirect_stderr(io.StringIO()):  # warnings of what is skipped
                found = restored(folder / "run")
            if found is None:
                assert (folder / "run.damaged").is_dir(), "nothing is restored and nothing put aside"
                return
            assert_identical(found.state.params, states[found.step].params)
            assert_identical(found.state.opt_state, states[found.step].opt_state)
            assert found.progress == {"batches": {"next_index": found.step}}

    return case


# --- models


def models(folder: pathlib.Path):
    """Weights, adapters, GGUF files and tokenizers."""
    kinds = []
    for make in (weights, adapters, gguf, tokenizer):
        (folder / make.__name__).mkdir()
        kinds.append(make(folder / make.__name__))
    return lambda rng: rng.choice(kinds)(rng)


def weights(folder: pathlib.Path):
    """A changed safetensors file, index or config.json: one line, or the weights that NumPy reads from the bytes."""
    kinds = [_weights_case(folder / name, name) for name in _KINDS]
    return lambda rng: rng.choice(kinds)(rng)


_KINDS = ("qwen3_gqa_untied", "qwen2_tied", "smollm3", "llama_scaled_tied")


def _weights_case(folder: pathlib.Path, name: str) -> Callable[[random.Random], None]:
    config = CONFIGS[name]
    sharded = name == "qwen2_tied"
    hf.save_hf(folder, config, random_params(config), **({"max_shard_bytes": 20_000} if sharded else {}))
    before = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")
    }

    def case(rng: random.Random) -> None:
        victim = rng.choice(list(before))
        data = before[victim]
        if victim.endswith(".json"):
            changed = edited_json(rng, data)
        elif rng.random() < 0.7:
            changed = _edited_header(rng, data)
        else:
            changed = edited(rng, data, 2)
        for path, content in before.items():
            (folder / path).write_bytes(changed if path == victim else content)
        with one_line():
            read, params = hf.load_hf(folder)
            hf.read_eos_ids(folder)
            _check_weights(folder, read, dict(hf.hf_tensors(params)))

    return case


def _edited_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is another JSON value, of the length that is said."""
    size = struct.unpack("<Q", data[:8])[0]
    header = edited_json(rng, data[8 : 8 + size])
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(header) + 8, len(data)))
    return struct.pack("<Q", said) + header + data[8 + size :]


def _check_weights(folder: pathlib.Path, config: Any, ours: dict[str, np.ndarray]) -> None:
    """Every tensor is what its bytes in some file spell, read by NumPy alone."""
    stored: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= _numpy_tensors(path.read_bytes())
    for name, array in ours.items():
        found = stored[name if name in stored else "lm_head.weight"]
        assert found.shape == array.shape and np.array_equal(found.astype(np.float32), array), (
            f"{name} differs"
        )
    assert all(np.isfinite(array).all() for array in ours.values())


_DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": bfloat16}


def _numpy_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by its format: a length, a JSON header, and bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _DTYPES:
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(data[start:stop], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    assert set(_DTYPES) == set(FLOATS)
    return found


def adapters(folder: pathlib.Path) -> Callable[[random.Random], None]:
    """A changed LoRA adapter: one line, or finite factors of the right shapes."""
    config, lora = CONFIGS["qwen3_gqa_untied"], Lora(2, 4.0, PROJECTIONS)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jax.numpy.asarray(rng.normal(size=x.shape), "float32"), abstract_adapter(config, lora)
    )
    hf.save_adapter(folder / "adapter", lora, params, "base")
    before = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}

    def case(rng: random.Random) -> None:
        victim = rng.choice(list(before))
        is_json = victim.endswith(".json")
        changed = edited_json(rng, before[victim]) if is_json else _edited_header(rng, before[victim])
        for name, data in before.items():
            (folder / "adapter" / name).write_bytes(changed if name == victim else data)
        with one_line():
            read, state = hf.load_adapter(folder / "adapter", config)
            assert math.isfinite(read.scale)
            shapes = jax.tree.map(lambda x: x.shape, abstract_adapter(config, read))
            assert jax.tree.map(lambda x: x.shape, state) == shapes

    return case


def gguf(folder: pathlib.Path) -> Callable[[random.Random], None]:
    """A changed GGUF file: one line, or a checkpoint that loads."""
    spelling = spell(folder / "own")
    path, numbers = folder / "m.gguf", itertools.count()
    write_gguf(path, "llama", spelling)
    data = path.read_bytes()
    head = data.index(b"output_norm.weight")  # behind it: descriptions of tensors, then weights

    def case(rng: random.Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(edited(rng, data[:head], 2) + data[head:])
        else:
            path.unlink(missing_ok=True)
            name, value = rng.choice(_GGUF_CHANGES)
            try:
                write_gguf(path, rng.choice(("llama", "qwen3")), spelling, **{name: value})
            except Exception:  # the writer refuses some values
                return
        out = folder / f"out{next(numbers)}"
        with one_line():
            convert(path, out)
            hf.load_hf(out)
        shutil.rmtree(out, ignore_errors=True)

    return case


_GGUF_CHANGES = [
    (name, value)
    for name, values in {
        "block_count": (0, 1, 3, 2**31), "context_length": (0, 1), "embedding_length": (0, 63, 2**31),
        "feed_forward_length": (0, 1), "head_count": (0, 3, 2**31), "head_count_kv": (0, 3, 8),
        "key_length": (0, 15, 2**31), "layer_norm_rms_eps": (0.0, -1.0, float("nan"), float("inf")),
        "rope_freq_base": (0.0, -1.0, float("nan"), float("inf")),
        "token_list": (["a"], ["a", "a"], [""], ["a"] * 400),
        "token_merges": (["a"], ["a b c"], ["q q"], [" "], ["é é"]),
        "tokenizer_model": ("", "llama", "a\nb"), "tokenizer_pre": ("", "a\nb"), "token_types": ([1], [9] * 300),
        "eos_token_id": (2**31, None), "pad_token_id": (2**31, None), "chat_template": ("{{", "\n", "{% if %}"),
        "eot_token_id": (3, 2**31), "bos_token_id": (1, 10**6),
    }.items()
    for value in values
]  # fmt: skip


def tokenizer(folder: pathlib.Path) -> Callable[[random.Random], None]:
    """Changed files of a tokenizer: one line, or one that encodes and decodes any text."""
    spell(folder / "own")
    before = {path.name: path.read_bytes() for path in (folder / "own").iterdir()}

    def case(rng: random.Random) -> None:
        victim = rng.choice(list(before))
        changed = edited_json(rng, before[victim])
        for name, data in before.items():
            (folder / "own" / name).write_bytes(changed if name == victim else data)
        with one_line():
            found = load_tokenizer(folder / "own")
            assert isinstance(found.eos_token_id, int) and isinstance(found.pad_token_id, int)
            text = 'naïve 帽子 🧢 [{"review_id":"r1"}]'
            assert isinstance(found.decode(found(text, add_special_tokens=False)["input_ids"]), str)

    return case
