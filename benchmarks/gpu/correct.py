"""Is this code right on the accelerator at hand? Each check prints one JSON line with its errors and its bounds.

    python -m benchmarks.gpu.correct [--small] [--only=attention,decoder,step]

attention: every backend that runs here, forward and backward, against float64 NumPy. decoder: bfloat16 against
float32, and decoding against teacher forcing. step: loss and gradient norm of one OPD step against the CPU's.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from listopd_jax.errors import Parser, exit_code
from listopd_jax.ops import attention, attention_cudnn
from listopd_jax.ops.attention import Prompt

Q, K, V = range(3)
TINY = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_heads": 4}
TINY |= {"num_kv_heads": 2, "vocab_size": 512}
PRECISIONS = (("float32", "highest"), ("float32", "default"), ("bfloat16", "default"))


def say(check: str, errors: dict[str, float], bound: float, **facts: Any) -> bool:
    """Print the check's line; whether every error is a number within the bound."""
    passed = all(e <= bound for e in errors.values())  # a NaN is not
    errors = {name: float(f"{e:.3g}") for name, e in errors.items()}
    print(
        json.dumps({"check": check, "passed": passed, "bound": bound, "errors": errors, **facts}), flush=True
    )
    return passed


def relative(got: Any, want: Any) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    got, want = (np.asarray(jax.device_get(x), np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- attention ---

_einsum = functools.partial(np.einsum, optimize=True)  # by matrix products: the plain loop takes minutes


def reference(q, k, v, visible, d_out) -> tuple[np.ndarray, ...]:
    """Out, dQ, dK, dV of masked grouped-query attention in float64. q, d_out [R,T,N,H]; k, v [R,S,KV,H]."""
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, groups, axis=2) for x in (k, v))
    scores = _einsum("rtnh,rsnh->rnts", q, wide_k) * q.shape[-1] ** -0.5
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = _einsum("rnts,rsnh->rtnh", weights, wide_v)
    d_weights = _einsum("rtnh,rsnh->rnts", d_out, wide_v)
    delta = np.einsum("rtnh,rtnh->rnt", d_out, out)[..., None]
    d_scores = weights * (d_weights - delta) * q.shape[-1] ** -0.5
    d_q = _einsum("rnts,rsnh->rtnh", d_scores, wide_k)
    d_k, d_v = _einsum("rnts,rtnh->rsnh", d_scores, q), _einsum("rnts,rtnh->rsnh", weights, d_out)
    d_k, d_v = (x.reshape(*k.shape[:3], groups, k.shape[3]).sum(3) for x in (d_k, d_v))
    return out, d_q, d_k, d_v


def check_attention(small: bool) -> list[bool]:
    """Whole sequences, several in a row, and completions after ragged prompts, of each backend in bfloat16."""
    cases = [
        (2, 1, 704, None, 16, 8, 128),
        (3, 2, 97, (192, 5, 101), 16, 8, 128),
        (2, 1, 256, (704, 650), 32, 8, 128),
    ]
    if small:
        cases = [(2, 1, 24, None, 4, 2, 16), (3, 2, 9, (20, 1, 11), 4, 2, 16)]
    cudnn = functools.partial(attention_cudnn.causal, implementation="xla" if small else "cudnn")
    backends = {"xla": attention.causal, "cudnn": cudnn}
    passed = [_attention_case(name, run, case) for case in cases for name, run in backends.items()]
    T = cases[0][2]
    packed = [_attention_case(name, run, cases[0], (0, T // 3, T // 2)) for name, run in backends.items()]
    return passed + packed


def _attention_case(name: str, run: Callable, case: tuple, begins: Sequence[int] = (0,)) -> bool:
    """Several whole sequences begin in each row where `begins` has more than one place."""
    B, n, T, lengths, N, KV, H = case
    label = f"attention {name} {case}" + (f" packed {begins}" if len(begins) > 1 else "")
    starts = np.repeat(begins, np.diff([*begins, T]))
    rng = np.random.default_rng(0)
    P = max(lengths) if lengths else 0

    def draw(*shape):
        return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64)

    q, k, v, d_out = draw(B, n, T, N, H), draw(B, n, T, KV, H), draw(B, n, T, KV, H), draw(B, n, T, N, H)
    past_k, past_v = draw(B, P, KV, H), draw(B, P, KV, H)

    def loss(q, k, v, past_k, past_v):
        prompt = None
        if lengths:
            stored = past_k.transpose(0, 2, 3, 1), past_v.transpose(0, 2, 1, 3)
            prompt = Prompt(*stored, jnp.asarray(lengths, jnp.int32))
        several = jnp.asarray(np.tile(starts, (B, 1)), jnp.int32) if len(begins) > 1 else None
        out = run(q, k, v, prompt, several)
        return (out.astype(jnp.float32) * d_out.astype(np.float32)).sum(), out

    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, past_k, past_v)]
    try:
        grads, out = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))(*arrays)
    except Exception as e:  # a backend that refuses is a finding, not the end of the checks
        return say(label, {"refused": float("nan")}, 2e-2, error=str(e)[:500])
    rows = [x.reshape(B * n, *x.shape[2:]) for x in (q, k, v, d_out)]
    pasts = [np.repeat(x, n, axis=0) for x in (past_k, past_v)]
    keys, values = (np.concatenate([p, own], 1) for p, own in zip(pasts, rows[K : V + 1], strict=True))
    seen = np.arange(P) < np.repeat(np.asarray(lengths or [0] * B), n)[:, None, None]
    own = np.tril(np.ones((B * n, T, T), bool)) & (np.arange(T) >= starts[:, None])
    visible = np.concatenate([np.broadcast_to(seen, (B * n, T, P)), own], -1)
    out_ref, d_q, d_k, d_v = reference(rows[Q], keys, values, visible, rows[3])
    past = [x[:, :P].reshape(B, n, P, KV, H).sum(1) for x in (d_k, d_v)]
    wanted = {"out": out_ref, "d_q": d_q, "d_k": d_k[:, P:], "d_v": d_v[:, P:]}
    got = {"out": out, "d_q": grads[0], "d_k": grads[1], "d_v": grads[2]}
    errors = {
        key: relative(np.asarray(got[key], np.float32).reshape(want.shape), want)
        for key, want in wanted.items()
    }
    if lengths:
        errors |= {"d_past_k": relative(grads[3], past[0]), "d_past_v": relative(grads[4], past[1])}
    return say(label, errors, 2e-2)


# --- decoder ---


def check_decoder(small: bool) -> list[bool]:
    """Hidden states in bfloat16 by each backend, and decoded log-probabilities, against float32 at full precision."""
    from flax import nnx

    from listopd_jax.models.config import named_config
    from listopd_jax.models.decoder import Decoder

    config = dataclasses.replace(named_config("qwen3_1_7b"), num_layers=4, vocab_size=4096)
    if small:
        config = dataclasses.replace(config, **TINY)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(2, config.vocab_size, (4, 96)), jnp.int32)
    lengths = jnp.asarray([96, 70, 33, 1], jnp.int32)

    def hidden(dtype, backend, precision=None):
        decoder = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, attention=backend)
        graph, params = nnx.split(decoder)
        with jax.default_matmul_precision(precision or "default"):
            return jax.jit(lambda p: nnx.merge(graph, p)(tokens, lengths))(params)

    exact = hidden("float32", "xla", "highest")
    runs = {"float32 default precision": ("float32", "xla"), "bfloat16 xla": ("bfloat16", "xla")}
    if not small:
        runs["bfloat16 cudnn"] = ("bfloat16", "cudnn")
    passed = [
        say(f"decoder {name}", {"hidden": relative(hidden(*r), exact)}, 3e-2) for name, r in runs.items()
    ]
    return [*passed, *_decoding(config, small)]


def _decoding(config: Any, small: bool) -> list[bool]:
    """The sampler's log-probabilities against teacher forcing by the training pass, in each dtype."""
    from flax import nnx

    from listopd_jax.models.decoder import Decoder
    from listopd_jax.rollout.decode import generate
    from listopd_jax.rollout.scoring import completion_logprobs

    rng = np.random.default_rng(1)
    prompts = jnp.asarray(rng.integers(2, config.vocab_size, (8, 64)), jnp.int32)
    lengths = jnp.asarray(rng.integers(1, 65, 8), jnp.int32)
    passed = []
    for dtype, precision, bound in (
        ("float32", "highest", 1e-4),
        ("float32", "default", 5e-3),
        ("bfloat16", "default", 0.25),
    ):
        backend = "cudnn" if dtype == "bfloat16" and not small else "xla"
        decoder = Decoder(
            config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=jnp.dtype(dtype), attention=backend
        )
        graph, params = nnx.split(decoder)

        def forced(p, tokens, graph=graph):
            d = nnx.merge(graph, p)
            return completion_logprobs(d, prompts, lengths, tokens, config.vocab_size - 3, 256)[0]

        with jax.default_matmul_precision(precision):
            rollout = generate(
                (graph,), (params,), jnp.ones((1, 2)), prompts, lengths, jax.random.key(0),
                max_tokens=70, vocab=config.vocab_size - 3, eos=(), pad=0,
            )  # fmt: skip
            gap = jnp.abs(jax.jit(forced)(params, rollout.tokens) - rollout.logprobs)
        errors = {"largest gap": float(gap.max()), "mean gap": float(gap.mean())}
        passed.append(say(f"decoding {dtype} {precision} {backend} against teacher forcing", errors, bound))
    return passed


# --- one OPD step ---


def check_step(_: bool) -> list[bool]:
    """Loss and gradient norm of one update on fixed tokens, on this device and on the CPU; small models always."""
    cpu, passed = jax.devices("cpu")[0], []
    for estimator in ("sampled", "full_vocab"):
        with jax.default_device(cpu):
            reference_step = _step(estimator, "float32", "xla")
            tokens = jnp.asarray(reference_step.rollout().tokens)
            state, frozen = jax.device_get((reference_step.state, reference_step.frozen))
            want = _update(reference_step, tokens)
        for (dtype, precision), bound in zip(PRECISIONS, (1e-4, 5e-3, 3e-2), strict=True):
            step = _step(estimator, dtype, "auto")
            dtypes = jax.tree.map(lambda x: x.dtype, (step.state, step.frozen))
            put = jax.tree.map(lambda x, d: jnp.asarray(x, d), (state, frozen), dtypes)
            step.state, step.frozen = put
            with jax.default_matmul_precision(precision):
                got = _update(step, tokens)
            errors = {name: abs(got[name] - want[name]) / abs(want[name]) for name in want}
            passed.append(say(f"step {estimator} {dtype} {precision}", errors, bound, here=got, cpu=want))
    return passed


def _step(estimator: str, dtype: str, backend: str) -> Any:
    from benchmarks.presets import cpu
    from benchmarks.shape import Shape
    from benchmarks.step import Step, random_prompts
    from listopd_jax.config import validate

    shape = Shape(vocab=512, student=(2, 64), teacher=(2, 128), head_dim=32)
    config = cpu(shape)
    config.opd.update(estimator=estimator, ratio="none" if estimator == "full_vocab" else "teacher_student")
    config.attention, config.dtype.compute = backend, dtype
    if dtype == "bfloat16":
        config.dtype.frozen = "bfloat16"
    config = validate(config)
    return Step(config, random_prompts(config, shape.prompt_tokens), shape.prompt_tokens, shape.new_tokens)


def _update(step: Any, tokens: Any) -> dict[str, float]:
    from listopd_jax.rollout.decode import Rollout

    tokens = jnp.asarray(np.asarray(tokens))
    rollout = Rollout(
        tokens, jnp.full(tokens.shape, -1.0), jnp.full(tokens.shape[:2], tokens.shape[2], jnp.int32)
    )
    metrics = step.update(rollout)
    return {name: float(metrics[name]) for name in ("loss", "grad_norm", "entropy", "reverse_kl")}


CHECKS = {"attention": check_attention, "decoder": check_decoder, "step": check_step}


def main(argv: Sequence[str]) -> int:
    """Run the checks; 0 if all passed, else 1."""
    parser = Parser(prog="python -m benchmarks.gpu.correct", description=__doc__)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU; cuDNN's part is done by XLA")
    parser.add_argument("--only", default=",".join(CHECKS))
    args = parser.parse_args(argv)
    passed = [p for name in args.only.split(",") for p in CHECKS[name](args.small)]
    print(json.dumps({"check": "all", "passed": all(passed), "number": len(passed)}), flush=True)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
