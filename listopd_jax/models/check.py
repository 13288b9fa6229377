"""Compare a checkpoint here with Hugging Face transformers on torch: logits and greedy continuations.

    python -m listopd_jax.models.check --weights=FOLDER [--json] [--tokens=64] [--dtype=float32]

Exit code 0 if the logits agree within the tolerance of the dtype, 1 if they do not, 2 for a user's mistake.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import quiet_libraries
from listopd_jax.models.config import GGUF
from listopd_jax.models.decoder import Decoder, abstract

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def compare(source: pathlib.Path, tokens: int = 64, dtype: str = "float32") -> dict:
    """Compare on 4 random right-padded prompts of up to `tokens` tokens and `tokens` greedy ones after each.

    `source` is the folder of a checkpoint, or a GGUF file, which transformers reads by its own code.
    Keys: `max_abs_logit_diff`, `max_rel_logit_diff` (over the largest absolute logit), `greedy_agreement`
    (share of continuation tokens before the first difference), `tolerance`, `ok`. UserError without torch.
    """
    torch = _torch()
    decoder = _decoder(source, dtype)
    reference = _reference(torch, source, dtype)
    rng = np.random.default_rng(0)
    lengths = np.array([tokens, *rng.integers(1, tokens + 1, 3)])
    prompts = rng.integers(0, decoder.config.vocab_size, (len(lengths), tokens), dtype=np.int32)
    valid = np.arange(tokens) < lengths[:, None]
    with jax.default_matmul_precision("highest"):  # accelerators multiply float32 with fewer bits by default
        ours = np.asarray(_logits(decoder, prompts, lengths))[valid]
        continuations = np.asarray(_greedy(decoder, prompts, lengths, tokens))
    theirs = _their_logits(torch, reference, prompts, valid)[valid]
    largest = float(np.abs(ours - theirs).max())
    relative = largest / float(np.abs(theirs).max())
    same = continuations == _their_greedy(torch, reference, prompts, lengths, tokens)
    return {
        "weights": str(source),
        "dtype": dtype,
        "tokens": tokens,
        "max_abs_logit_diff": largest,
        "max_rel_logit_diff": relative,
        # cumprod: after the first difference the two read different prefixes.
        "greedy_agreement": float(np.cumprod(same, axis=1).mean()),
        "tolerance": TOLERANCE[dtype],
        "ok": relative <= TOLERANCE[dtype],
    }


def _torch():
    try:
        import torch
    except ImportError as e:
        raise UserError(
            "torch is not installed; pip install torch (the CPU build is enough) for this check"
        ) from e
    return torch


def _decoder(source: pathlib.Path, dtype: str) -> Decoder:
    # Imported here and below, once `main` has asked transformers and the hub to be quiet.
    from listopd_jax.models import hf
    from listopd_jax.models.hf.gguf import gguf_folder

    config, params = hf.load_hf(gguf_folder(source) if source.suffix == GGUF else source, dtype)
    return nnx.merge(abstract(config, dtype=dtype, param_dtype=dtype)[0], params)


def _reference(torch, source: pathlib.Path, dtype: str):
    from transformers import AutoModelForCausalLM

    is_gguf = source.suffix == GGUF
    folder, file = (source.parent, {"gguf_file": source.name}) if is_gguf else (source, {})
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, **file
    )
    return reference.eval()


def _their_logits(torch, reference, prompts: np.ndarray, valid: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = reference(
            torch.tensor(prompts, dtype=torch.long), attention_mask=torch.tensor(valid, dtype=torch.long)
        )
    return out.logits.float().numpy()


def _their_greedy(torch, reference, prompts: np.ndarray, lengths: np.ndarray, steps: int) -> np.ndarray:
    rows = []
    for prompt, length in zip(prompts, lengths, strict=True):
        tokens, past, row = torch.tensor(prompt[None, :length], dtype=torch.long), None, []
        for _ in range(steps):
            with torch.no_grad():
                out = reference(tokens, past_key_values=past, use_cache=True)
            tokens, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            row.append(int(tokens))
        rows.append(row)
    return np.array(rows)


@nnx.jit
def _logits(decoder: Decoder, prompts, lengths):
    return _head(decoder, decoder(prompts, lengths))


def _head(decoder: Decoder, hidden):
    weight = decoder.head_weight().astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)


@nnx.jit(static_argnames="steps")
def _greedy(decoder: Decoder, prompts, lengths, steps: int):
    """The `steps` most probable tokens, one after the other, through prefill and decode_step: [B, steps]."""
    hidden, prompt = decoder.prefill(prompts, lengths)
    first = _head(decoder, hidden).argmax(-1)[:, None]

    def step(carry, t):
        token, cache = carry
        hidden, cache = decoder.decode_step(prompt, lengths, cache, t, token[..., None])
        return (_head(decoder, hidden[:, :, 0]).argmax(-1), cache), token[:, 0]

    carry = first, decoder.init_cache(len(prompts), 1, steps)
    return jax.lax.scan(step, carry, jnp.arange(steps))[1].T


def main(argv: Sequence[str]) -> int:
    """Compare and print; 1 if the logits do not agree."""
    parser = Parser(prog="python -m listopd_jax.models.check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", required=True, help="folder of a Hugging Face checkpoint, a GGUF file, or a hub id"
    )
    parser.add_argument(
        "--tokens", type=positive, default=64, help="length of the prompts and of the continuations"
    )
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    flags = parser.parse_args(argv)
    quiet_libraries()
    from listopd_jax.models.hf import resolve

    source = pathlib.Path(flags.weights) if flags.weights.endswith(GGUF) else resolve(flags.weights)
    result = compare(source, flags.tokens, flags.dtype)
    print(json.dumps(result) if flags.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
