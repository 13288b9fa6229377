"""The command that compares a checkpoint with transformers: it agrees, it notices, and it explains."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from listopd_jax.errors import exit_code
from listopd_jax.models import check, hf
from listopd_jax.models.config import ModelConfig, RopeScaling
from listopd_jax.models.decoder import Decoder

pytest.importorskip("torch")

CONFIGS = {
    "qwen3_gqa_untied": ModelConfig(97, 32, 48, 3, 8, 2, 12, rope_theta=5e6, tied=False),
    "llama_scaled_tied": ModelConfig(
        97, 32, 48, 2, 4, 1, 16, rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 32), qk_norm=False
    ),
}


@pytest.fixture(params=CONFIGS)
def export(request, tmp_path):
    from flax import nnx

    config = CONFIGS[request.param]
    params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)))
    sharper = nnx.from_flat_state([(path, p.replace(p[...] * 2)) for path, p in nnx.to_flat_state(params)])
    hf.save_hf(tmp_path / "out", config, sharper)
    return tmp_path / "out"


def test_float32_agrees_and_continues_token_for_token(export, capsys):
    assert exit_code(check.main, [f"--weights={export}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["tokens"] == 64
    assert 0 < result["max_rel_logit_diff"] < 1e-4
    assert result["greedy_agreement"] == 1.0


def test_a_wrong_model_is_noticed(export, capsys, monkeypatch):
    """Only one constant is off, as in systems that ignore a checkpoint's own RoPE θ."""

    load_hf = hf.load_hf

    def wrong_theta(folder, dtype):
        config, params = load_hf(folder, dtype)
        return dataclasses.replace(config, rope_theta=config.rope_theta * 2), params

    monkeypatch.setattr(hf, "load_hf", wrong_theta)
    assert check.main([f"--weights={export}", "--tokens=16"]) == 1
    assert "ok: False" in capsys.readouterr().out


def test_user_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    assert exit_code(check.main, [f"--weights={tmp_path / 'a' / 'b'}"]) == 2
    assert exit_code(check.main, [f"--weights={tmp_path}", "--tokens=0"]) == 2
    assert exit_code(check.main, [f"--weights={tmp_path}"]) == 2
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert exit_code(check.main, [f"--weights={tmp_path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, part in zip(
        lines, ["no such folder", "--tokens", "config.json", "pip install torch"], strict=True
    ):
        assert part in line


def test_a_missing_torch_is_said_without_library_chatter(tmp_path):
    """transformers warns of it at its import; a process of its own, for here it is imported already."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from listopd_jax.errors import exit_code\n"
        "from listopd_jax.models import check\n"
        f"sys.exit(exit_code(check.main, ['--weights={tmp_path}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "pip install torch" in line


def test_bfloat16_is_close(tmp_path):
    from flax import nnx

    config = CONFIGS["qwen3_gqa_untied"]
    hf.save_hf(tmp_path / "out", config, nnx.state(Decoder(config, rngs=nnx.Rngs(0))), dtype=jnp.bfloat16)
    result = check.compare(tmp_path / "out", tokens=8, dtype="bfloat16")
    assert 0 < result["max_rel_logit_diff"] < 0.05 and result["ok"]
