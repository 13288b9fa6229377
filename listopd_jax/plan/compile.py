"""The real rollout and update programs, compiled ahead of time for devices that need not exist.

Nothing is allocated: arguments are shapes with shardings. For TPUs it is libtpu's own compiler, so its memory figures
are those of a chip; for GPUs it is XLA's, with the options that a job gives it.
"""

import contextlib
import copy
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from listopd_jax.config import guard_knows_contract
from listopd_jax.data.packing import RowShape
from listopd_jax.errors import UserError
from listopd_jax.models.build import PARAM_DTYPE, abstract_frozen, as_given, cast, graph_of, lora_of
from listopd_jax.models.config import Lora, ModelConfig
from listopd_jax.models.decoder import KVCache, abstract
from listopd_jax.models.lora import abstract_adapter, with_adapter
from listopd_jax.ops.attention_backends import resolve
from listopd_jax.ops.grammar import Grammar
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel import rules
from listopd_jax.parallel.compiler import ROLLOUT, UPDATE, Options, backend_options, product_precision
from listopd_jax.parallel.mesh import use_mesh
from listopd_jax.plan import gpu
from listopd_jax.plan.arithmetic import PERSISTENT
from listopd_jax.plan.chips import GIB, Topology
from listopd_jax.plan.traffic import traffic
from listopd_jax.rollout.decode import (
    Rollout,
    Sampler,
    Settings,
    cache_sizes,
    first_segment,
    pass_tokens,
    segment,
)
from listopd_jax.rollout.scoring import RowWidth
from listopd_jax.rounding import ceil_div
from listopd_jax.stages.job import base_of, draft_tokens
from listopd_jax.stages.opd import hyper_at, make_step
from listopd_jax.stages.teachers import experts_of
from listopd_jax.train.opd_step import OpdBatch
from listopd_jax.train.optimizer import TrainState, adamw
from listopd_jax.train.sft_step import NONE, make_sft_step

HINT = 256  # tokens of the answer that drafts are copied from: about what a list of eight takes
# states for each set of ids, kinds of tokens: about what Qwen's takes
GRAMMAR_PLACES, GRAMMAR_TOKENS = 24, 512
_TOO_LARGE = (
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
    re.compile(r"total memory required[^(]*\(([\d.]+)([KMGT])\)"),
)


class Program(NamedTuple):
    """One compiled program, in bytes on one device; `traffic` by mesh axis, see traffic.py."""

    arguments: int
    results: int  # without those that reuse an argument's memory
    temporaries: int
    traffic: Mapping[str, float]
    text: str  # the compiled HLO

    @property
    def peak(self) -> int:
        """Bytes while it runs."""
        return self.arguments + self.results + self.temporaries


class TooLarge(Exception):
    """The compiler found that a program does not fit; `bytes` is what it needs on one device."""

    def __init__(self, program: str, needed: float):
        super().__init__(f"{program} needs {needed / GIB:.0f} GiB")
        self.program, self.bytes = program, needed


def devices_of(topology: Topology) -> list[Any] | None:
    """Devices to compile for: those at hand, or described ones; None where there is no compiler for GPUs.

    Raises UserError if libtpu is missing.
    """
    if not topology.is_tpu:
        here = [d for d in jax.devices() if d.platform == topology.platform]
        if len(here) >= topology.devices:
            return here[: topology.devices]
        return gpu.described_devices(topology) if topology.platform == "gpu" and gpu.can_compile() else None
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name}: needs the TPU compiler; pip install 'listopd_jax[tpu]', or --compiles=0"
        )
    # libtpu takes a host of 2x2 chips for granted, which a slice of one chip is not.
    options = {"chips_per_host_bounds": [1, 1, 1]} if topology.devices == 1 else {}
    return topologies.get_topology_desc(topology.name, "tpu", **options).devices


def state_memory(
    config: Any, shapes: Mapping[str, ModelConfig], mesh: Mesh, rolls_out_base: bool
) -> dict[str, int]:
    """Bytes on one device that are persistent, by kind, and of the rollout's copy (but for the base) and cache."""
    state, frozen = _state(config, shapes, mesh)
    trees = (state.params, state.opt_state, state.average, frozen.teachers, frozen.base)
    named = zip(PERSISTENT, trees, strict=True)
    memory = {kind: _shard_bytes(tree) for kind, tree in named if tree is not None}
    copied = state.params if rolls_out_base else with_adapter(frozen.base, state.params)
    memory["rollout copy"] = _shard_bytes(_rollout_params(config, copied, mesh))
    memory["kv cache"] = _shard_bytes(_caches(config, shapes["student"], mesh))
    return memory


def compile_rollout(
    config: Any, shapes: Mapping[str, ModelConfig], vocab: int, mesh: Mesh, of_base: bool = False
) -> Program:
    """The programs of `generate` in the OPD stage, at the widest prompts; TooLarge if the compiler refuses.

    `of_base`: the base writes, as it is kept, not the student. Memory is that of its hungrier program, of the first
    token or of the last segment; traffic that of both.
    """
    sizes = cache_sizes(config.task.max_response, draft_tokens(config))
    first, (last,) = rollout_programs(config, shapes, vocab, mesh, sizes[-1:], of_base)
    # While the caches grow one by one, the shorter twin of the one at hand is there too.
    own = max(map(_shard_bytes, _caches(config, shapes["student"], mesh)[1]))
    twin = own * sizes[-2] // sizes[-1] if len(sizes) > 1 else 0
    last = last._replace(temporaries=max(last.temporaries, twin))
    moved = dict(Counter(first.traffic) + Counter(last.traffic))
    return max(first, last, key=lambda program: program.peak)._replace(traffic=moved)


def compile_evaluation(config: Any, shapes: Mapping[str, ModelConfig], vocab: int, mesh: Mesh) -> Program:
    """The programs that evaluate the teacher: the same, for its own batch, in the compute dtype or as it is kept."""
    alone = ml_collections.ConfigDict(copy.deepcopy(config.to_dict()))
    # The teacher writes here in place of the student, and has no adapter.
    alone.student.lora.rank = 0
    with use_mesh(mesh):
        alone.opd.update(batch_size=rules.round_up_rows(config.evaluation.batch_size), rollouts=1)
    return compile_rollout(alone, {**shapes, "student": shapes["teacher"]}, vocab, mesh, as_given(config))


def rollout_programs(
    config: Any,
    shapes: Mapping[str, ModelConfig],
    vocab: int,
    mesh: Mesh,
    sizes: Sequence[int],
    of_base: bool = False,
) -> tuple[Program, list[Program]]:
    """The program of the first token, and for each of `sizes` that of a segment with room for so many tokens."""
    sampler = _sampler(config, shapes, vocab, mesh, of_base)
    prompts, lengths, rollout = _batch(config, mesh)
    hint = jax.ShapeDtypeStruct((*lengths.shape, HINT), jnp.int32)
    hint = rules.abstract(hint, rules.batch_shardings(hint, mesh))

    def start(capacity):
        return first_segment.lower(sampler, prompts, lengths, None, hint, capacity)

    with _target(config, mesh):
        smallest = start(cache_sizes(config.task.max_response, draft_tokens(config))[0])
        first, shardings = _compiled(smallest, "rollout", ROLLOUT, mesh)
        segments = []
        for size in sizes:
            # Shapes of the cache at hand, with the shardings that the compiler chose for the first one.
            state = rules.abstract(start(size).out_info, shardings)
            lowered = segment.lower(sampler, *state, least=rollout.lengths.size)
            segments.append(_compiled(lowered, "rollout", ROLLOUT, mesh)[0])
    return first, segments


def _sampler(
    config: Any, shapes: Mapping[str, ModelConfig], vocab: int, mesh: Mesh, of_base: bool
) -> Sampler:
    """The abstract student as the OPD stage samples from it, or the base."""
    state, frozen = _state(config, shapes, mesh)
    writer = frozen.base if of_base else with_adapter(frozen.base, state.params)
    params = _rollout_params(config, writer, mesh)
    weights, key, temperature = _replicate(
        jax.eval_shape(lambda: (jnp.ones((1, config.opd.rollouts)), jax.random.key(0), jnp.float32(1))), mesh
    )
    # Ids decide no shapes, so 0 stands for the end and for padding.
    settings = Settings(
        config.task.max_response, vocab, eos=(0,), pad=0, draft_tokens=draft_tokens(config),
        pass_tokens=pass_tokens(platform_of(mesh)),
    )  # fmt: skip
    graphs = (_graph(config, shapes["student"], mesh, lora_of(config.student)),)
    return Sampler(graphs, (params,), weights, key, temperature, settings)


def compile_update(
    config: Any, shapes: Mapping[str, ModelConfig], vocab: int, mesh: Mesh, tokens: int = 0
) -> Program:
    """The OPD stage's update at the widest prompts and completions; TooLarge if the compiler refuses.

    `tokens`: of the longest prompt with its completion, if these do not fill those widths.
    """
    graphs = {role: _graph(config, shape, mesh) for role, shape in shapes.items()}
    graphs |= {
        "base": graphs["student"],
        "student": _graph(config, shapes["student"], mesh, lora_of(config.student)),
    }
    step = make_step(
        config.opd, _optimizer(config), graphs, vocab=vocab, attention=_attention(config, mesh),
        grammar=_grammar(config, vocab),
    )  # fmt: skip
    state, frozen = _state(config, shapes, mesh)
    scalars = jax.eval_shape(lambda: (hyper_at(config.opd, lam=1.0, step=0), jnp.float32(config.opd.lr)))
    with _target(config, mesh):
        width = RowWidth.holding(tokens) if tokens else None
        batch = OpdBatch(*_batch(config, mesh), None, *_for_teachers(config, mesh), width=width)
        lowered = step.lower(state, frozen, batch, *_replicate(scalars, mesh))
        return _compiled(lowered, "update", UPDATE, mesh)[0]


def _for_teachers(config: Any, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Abstract choice of teacher, prompts of teachers and their lengths, each None where the configuration has none."""
    rows, width = config.opd.batch_size, config.teachers.max_prompt
    length = jax.ShapeDtypeStruct((rows,), jnp.int32)
    own = (jax.ShapeDtypeStruct((rows, width), jnp.int32), length) if width else (None, None)
    tree = (length if config.teachers.route else None, *own)
    return rules.abstract(tree, rules.batch_shardings(tree, mesh))


def _grammar(config: Any, vocab: int) -> Grammar | None:
    """Tables about as large as those of the contract, for a guard that needs them; a plan has no tokenizer."""
    if not guard_knows_contract(config.opd.guard):
        return None
    shape = (GRAMMAR_PLACES << config.task.k, GRAMMAR_TOKENS)
    return Grammar(jnp.zeros(shape, jnp.int32), jnp.zeros(vocab, jnp.int32), jnp.zeros(shape, bool))


def compile_sft(config: Any, shapes: Mapping[str, ModelConfig], vocab: int, mesh: Mesh, role: str) -> Program:
    """The update of the SFT of `role`, at the widest prompts and answers; TooLarge if the compiler refuses."""
    sft = config.sft[role]
    tx = adamw(config.optimizer, sft.b2, sft.moments)
    lora = lora_of(config[role])
    step = make_sft_step(
        _graph(config, shapes[role], mesh, lora), tx, vocab, config.opd.head_chunk, sft.microbatch
    )
    params = _trained(shapes[role], lora)
    frozen = abstract_frozen(shapes[role], config.dtype.frozen) if lora else NONE
    trees = TrainState(params, jax.eval_shape(tx.init, params)), frozen
    state, frozen = (rules.abstract(tree, rules.state_shardings(tree, mesh)) for tree in trees)
    lr = _replicate(jax.ShapeDtypeStruct((), jnp.float32), mesh)
    with _target(config, mesh):
        lowered = step.lower(state, _answers(config, sft, mesh), lr, frozen)
        return _compiled(lowered, f"sft {role}", UPDATE, mesh)[0]


def _answers(config: Any, sft: Any, mesh: Mesh) -> dict[str, Any]:
    """Abstract batch of prompts and right answers, at the widths of the configuration; packed if section `sft` says."""
    prompt, answer = config.task.max_prompt, config.task.max_response
    rows, widths = sft.batch_size, {"prompt": prompt, "answer": answer}
    if sft.packing:
        a_row = sft.packing // (prompt + answer)
        shape = RowShape(sft.packing, a_row * answer, sft.microbatch, rules.row_multiple())
        rows = shape.rows(ceil_div(rows, a_row))
        widths = dict.fromkeys(("row", "starts"), shape.tokens) | dict.fromkeys(
            ("places", "answer"), shape.answers
        )
    tree = {name: jax.ShapeDtypeStruct((rows, width), jnp.int32) for name, width in widths.items()}
    lengths = {"prompt_length", "answer_length"} if not sft.packing else {"answer_length"}
    tree |= {name: jax.ShapeDtypeStruct((rows,), jnp.int32) for name in lengths}
    return rules.abstract(tree, rules.batch_shardings(tree, mesh))


@contextlib.contextmanager
def _target(config: Any, mesh: Mesh) -> Iterator[None]:
    """While inside, programs are lowered as a job on the devices of `mesh` would have them."""
    platform = platform_of(mesh)
    cudnn = gpu.assumed_cudnn() if platform == "gpu" and _is_described(mesh) else contextlib.nullcontext()
    precision = jax.default_matmul_precision(product_precision(config.dtype.compute, platform))
    with use_mesh(mesh), cudnn, precision:
        yield


def platform_of(mesh: Mesh) -> str:
    """gpu, tpu or cpu."""
    return mesh.devices.flat[0].platform


def _is_described(mesh: Mesh) -> bool:
    return mesh.devices.flat[0] not in jax.devices()


def _options(options: Options, mesh: Mesh) -> dict[str, Any]:
    """A job's compiler options for the mesh's devices, and extra ones where the devices are absent."""
    platform = platform_of(mesh)
    added = gpu.OPTIONS if platform == "gpu" and _is_described(mesh) else {}
    return (backend_options(options, platform) or {}) | added


def _attention(config: Any, mesh: Mesh) -> str:
    """The attention backend for the devices of the mesh, not for those at hand."""
    return resolve(config.attention, platform_of(mesh), config.dtype.compute)


def _graph(config: Any, shape: ModelConfig, mesh: Mesh, lora: Lora | None = None) -> nnx.GraphDef:
    """The static half of a decoder."""
    return graph_of(shape, config.dtype.compute, config.remat, _attention(config, mesh), lora)


def _trained(shape: ModelConfig, lora: Lora | None) -> nnx.State:
    """The parameters that train: an adapter, or all of the model."""
    return abstract_adapter(shape, lora) if lora else abstract(shape, param_dtype=jnp.dtype(PARAM_DTYPE))[1]


def _optimizer(config: Any) -> optax.GradientTransformation:
    """The optimizer of the OPD stage."""
    return adamw(config.optimizer, config.opd.b2, config.opd.moments)


def _state(config: Any, shapes: Mapping[str, ModelConfig], mesh: Mesh) -> tuple[TrainState, Frozen]:
    """Abstract student, optimizer, teachers and base, sharded as they are stored."""
    student = _trained(shapes["student"], lora_of(config.student))
    teacher, base, *experts = (
        abstract_frozen(shape, config.dtype.frozen)
        for shape in (shapes["teacher"], base_of(shapes), *experts_of(shapes))
    )
    average = student if config.opd.ema else None
    state = TrainState(student, jax.eval_shape(_optimizer(config).init, student), average)
    trees = (state, Frozen(teacher, base, tuple(experts)))
    return tuple(rules.abstract(tree, rules.state_shardings(tree, mesh)) for tree in trees)


def _rollout_params(config: Any, params: Any, mesh: Mesh) -> Any:
    """The copy in the compute dtype that decodes."""
    copy = jax.eval_shape(lambda p: cast(p, config.dtype.compute), params)
    split = rules.rollout_shardings if config.parallel.gather_rollout else rules.state_shardings
    return rules.abstract(copy, split(copy, mesh))


def _batch(config: Any, mesh: Mesh) -> tuple[Any, Any, Rollout]:
    """Abstract prompts, lengths and rollout of one step, at the widths of the configuration."""
    opd, task = config.opd, config.task
    rows = (opd.batch_size, opd.rollouts)
    tokens = (*rows, task.max_response)
    tree = (
        jax.ShapeDtypeStruct((opd.batch_size, task.max_prompt), jnp.int32),
        jax.ShapeDtypeStruct((opd.batch_size,), jnp.int32),
        Rollout(
            jax.ShapeDtypeStruct(tokens, jnp.int32),
            jax.ShapeDtypeStruct(tokens, jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.int32),
        ),
    )
    return rules.abstract(tree, rules.batch_shardings(tree, mesh))


def _caches(config: Any, c: ModelConfig, mesh: Mesh) -> Any:
    """Abstract keys and values of the prompts and of the completions."""
    opd, task, dtype = config.opd, config.task, jnp.dtype(config.dtype.compute)
    with use_mesh(mesh):
        heads = c.num_kv_heads * rules.kv_copies(c.num_kv_heads)
    rows = (c.num_layers, opd.batch_size)
    prompt = jax.ShapeDtypeStruct((*rows, heads, task.max_prompt, c.head_dim), dtype)
    room = cache_sizes(task.max_response, draft_tokens(config))[-1]
    own = jax.ShapeDtypeStruct((*rows, opd.rollouts, heads, room, c.head_dim), dtype)
    tree = KVCache(prompt, prompt), KVCache(own, own)
    return rules.abstract(tree, rules.cache_shardings(tree, mesh))


def _replicate(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays, a copy on every device."""
    return rules.abstract(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def _shard_bytes(tree: Any) -> int:
    """Bytes that a device holds of an abstract tree with shardings."""
    sizes = (x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
    return sum(sizes)


def _compiled(lowered: Any, name: str, options: Options, mesh: Mesh) -> tuple[Program, Any]:
    """The compiled program's figures, and the shardings of its results."""
    try:
        compiled = lowered.compile(compiler_options=_options(options, mesh))
    except jax.errors.JaxRuntimeError as e:
        needed = needed_bytes(str(e))
        if needed is None:
            raise
        raise TooLarge(name, needed) from e
    memory, text = compiled.memory_analysis(), compiled.as_text()
    program = Program(
        memory.argument_size_in_bytes,
        # Donated arguments are counted once.
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        traffic(text, dict(mesh.shape)),
        text,
    )
    return program, compiled.output_shardings


def needed_bytes(message: str) -> float | None:
    """Bytes that a compiler's refusal says a program needs; None if it is another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = next((m for pattern in _TOO_LARGE if (m := pattern.search(message))), None)
    if found is None:
        return None
    return float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))
