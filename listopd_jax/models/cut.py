"""Write a checkpoint with fewer of its layers: a smaller model to fine-tune.

    python -m listopd_jax.models.cut --weights=FOLDER --layers=6 --out=FOLDER

The layers that stay are evenly spaced, the first and the last among them; embeddings, norms and tokenizer are those of
the checkpoint. Such a model writes nothing sensible until it is trained again.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from flax import nnx

from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import quiet_libraries


def cut(weights: str, layers: int, folder: pathlib.Path) -> None:
    """Write `weights`, a folder, hub id or GGUF file, with `layers` of its layers to the new folder `folder`.

    UserError if it has fewer layers than that, or some that are unlike others.
    """
    # Imported here, once `main` has asked transformers and the hub to be quiet.
    from listopd_jax.data.tokenizer import has_tokenizer, load_tokenizer
    from listopd_jax.models.build import weights_folder
    from listopd_jax.models.hf import load_hf, read_eos_ids, save_hf

    source = weights_folder(weights)
    config, params = load_hf(source)
    if layers > config.num_layers:
        raise UserError(f"--layers={layers}: {weights} has {config.num_layers}; give at most that")
    if config.nope_layers:
        raise UserError(
            f"{weights}: some of its layers have no positions, so none can be left out; use another checkpoint"
        )
    kept = spaced(config.num_layers, layers)
    flat = [(p, v.replace(v[...][kept]) if p[0] == "layers" else v) for p, v in nnx.to_flat_state(params)]
    save_hf(
        folder,
        dataclasses.replace(config, num_layers=layers),
        nnx.from_flat_state(flat),
        load_tokenizer(source) if has_tokenizer(source) else None,
        ends=read_eos_ids(source),
        replace=False,
    )


def spaced(count: int, kept: int) -> np.ndarray:
    """`kept` numbers below `count`, ascending and evenly spaced from 0 to the last; of one alone, 0."""
    return np.linspace(0, count - 1, kept).round().astype(int)


def main(argv: Sequence[str]) -> None:
    """Cut, and say where."""
    parser = Parser(prog="python -m listopd_jax.models.cut", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", required=True, help="folder of a Hugging Face checkpoint, a GGUF file, or a hub id"
    )
    parser.add_argument("--layers", type=positive, required=True, help="how many of its layers stay")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the new folder to write")
    flags = parser.parse_args(argv)
    quiet_libraries()
    cut(flags.weights, flags.layers, flags.out)
    print(f"{flags.layers} layers: {flags.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
