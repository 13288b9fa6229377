"""A checkpoint with fewer layers: the ones that stay are what they were, and the result is a checkpoint."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from listopd_jax.errors import exit_code
from listopd_jax.models import cut, hf
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import Decoder

CONFIG = ModelConfig(97, 16, 24, 5, 2, 1, 8, qk_norm=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "source"
    hf.save_hf(folder, CONFIG, nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(0))), ends=(7, 9))
    return folder


def arrays(folder):
    config, params = hf.load_hf(folder)
    return config, {path: np.asarray(p[...]) for path, p in nnx.to_flat_state(params)}


@pytest.mark.parametrize(("layers", "kept"), [(1, [0]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])])
def test_the_layers_that_stay_are_bit_for_bit_those_of_the_checkpoint(source, tmp_path, layers, kept):
    out = tmp_path / "cut"
    assert exit_code(cut.main, [f"--weights={source}", f"--layers={layers}", f"--out={out}"]) in (0, None)
    (_, whole), (config, found) = arrays(source), arrays(out)
    assert config.num_layers == layers and hf.read_eos_ids(out) == (7, 9)
    assert found.keys() == whole.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, whole[path][kept] if path[0] == "layers" else whole[path])


def test_it_is_the_model_that_skips_the_other_layers(source, tmp_path):
    """The blocks that are left out, made the identity in the whole model: the same hidden states."""
    cut.cut(str(source), 3, tmp_path / "cut")
    config, params = hf.load_hf(source)
    stay = jnp.isin(jnp.arange(5), jnp.array([0, 2, 4]))
    silent = [
        (
            path,
            p.replace(p[...] * stay.reshape(-1, *[1] * (p[...].ndim - 1)))
            if path[-1] in ("o", "down")
            else p,
        )
        for path, p in nnx.to_flat_state(params)
    ]
    tokens, lengths = jnp.arange(12)[None] % 97, jnp.array([12])

    def hidden(config, params):
        return nnx.merge(nnx.graphdef(Decoder(config, rngs=nnx.Rngs(0))), params)(tokens, lengths)

    whole = hidden(config, nnx.from_flat_state(silent))
    np.testing.assert_allclose(hidden(*hf.load_hf(tmp_path / "cut")), whole, atol=1e-5)


def test_user_mistakes_are_one_line(source, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for layers, out in ((6, "new"), (0, "new"), (2, "full")):
        assert (
            exit_code(cut.main, [f"--weights={source}", f"--layers={layers}", f"--out={tmp_path / out}"]) == 2
        )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, part in zip(lines, [f"{source} has 5", "--layers", "will not be replaced"], strict=True):
        assert part in line
