"""A plan: memory, traffic and time of one OPD step on a topology; and the search for the cheapest layout that fits."""

import copy
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from listopd_jax.config import REMATS
from listopd_jax.errors import UserError, did_you_mean
from listopd_jax.models.build import as_given
from listopd_jax.models.config import NAMED_CONFIGS, ModelConfig, custom_config, named_config, num_params
from listopd_jax.models.quantized import GROUPS
from listopd_jax.plan import arithmetic
from listopd_jax.plan.arithmetic import Layout, Load
from listopd_jax.plan.chips import GIB, RATES, Topology
from listopd_jax.plan.gpu import EXTRA

ROOM = 0.8  # share of the memory that an estimate may fill, since it is rough
TOKENIZERS = {"qwen3": 151669, "llama3": 128256, "smollm2": 49152}
"""Tokens of the published tokenizers: fewer than the padded rows of the embedding."""


def shape_of(model: Any, vocab: int) -> ModelConfig:
    """Dimensions of a config's model without reading weights: of a folder, a known hub id, a name, or custom."""
    if model.weights and pathlib.Path(model.weights).is_dir():
        from listopd_jax.models.hf import read_config

        return read_config(pathlib.Path(model.weights))
    if model.weights:
        return named_config(_name_of(model.weights))
    if model.architecture != "custom":
        return named_config(model.architecture)
    return custom_config(model, vocab)


def _name_of(weights: str) -> str:
    """The published shape of a hub id: Qwen/Qwen3-1.7B-Base is qwen3_1_7b."""
    plain = _letters(re.split("[/:]", weights)[-1])
    # A prefix: -Base, -Instruct and the like have the same shape.
    names = [name for name in NAMED_CONFIGS if plain.startswith(_letters(name))]
    if names:
        return max(names, key=len)
    hint = did_you_mean(plain, map(_letters, NAMED_CONFIGS))
    raise UserError(f"{weights}: shape not known without its files; {hint}known: {', '.join(NAMED_CONFIGS)}")


def _letters(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())


def vocabulary(config: Any) -> int:
    """Tokens of the tokenizer, without reading it where it is a published one."""
    path = config.tokenizer.path
    if not path:
        return config.tokenizer.vocab_size
    if pathlib.Path(path).is_dir():
        from listopd_jax.data.tokenizer import load_tokenizer

        return len(load_tokenizer(path))
    family = next((n for n in TOKENIZERS if _letters(re.split("[/:]", path)[-1]).startswith(n)), None)
    if family is None:
        raise UserError(
            f"tokenizer.path={path}: size not known; give a folder, or one of {', '.join(TOKENIZERS)}"
        )
    return TOKENIZERS[family]


def shapes_of(config: Any) -> dict[str, ModelConfig]:
    """Dimensions of the models by role."""
    from listopd_jax.stages.job import models_of

    if config.teacher.server:
        raise UserError(
            "teacher.server: a plan is of models on these devices; plan without it, less the teacher's memory"
        )
    return {role: shape_of(model, vocabulary(config)) for role, model in models_of(config).items()}


def layout_of(config: Any, topology: Topology) -> Layout:
    """The layout that the config asks for; UserError if its mesh does not fit the devices or the models."""
    from listopd_jax.models.build import lora_of
    from listopd_jax.ops.attention_backends import resolve
    from listopd_jax.parallel.mesh import mesh_sizes
    from listopd_jax.stages.job import draft_tokens
    from listopd_jax.train.preflight import check_mesh, check_rounding

    backend = resolve(config.attention, topology.platform, config.dtype.compute)
    sizes = mesh_sizes(config.parallel, topology.devices)
    check_mesh(config, shapes_of(config), sizes)
    check_rounding(config, shapes_of(config))
    remat = "full" if config.remat == "attention" and backend == "splash" else config.remat
    return Layout(
        sizes, config.opd.microbatch, remat, config.dtype.compute, config.dtype.frozen,
        config.parallel.gather_rollout, config.opd.head_chunk, backend, draft_tokens(config), config.opd.ema > 0,
        lora_of(config.student),
    )  # fmt: skip


def worst_load(config: Any) -> Load:
    """The widths that programs are compiled for."""
    opd, task = config.opd, config.task
    return Load(opd.batch_size, opd.rollouts, task.max_prompt, task.max_response)


def make_plan(config: Any, topology: Topology, load: Load, compile_it: bool) -> dict[str, Any]:
    """Everything that is known about one OPD step of `config` on `topology`, as JSON values.

    load: mean tokens, for FLOPs and times; memory is of the widest prompts and completions. Memory is the compiler's if
    `compile_it` and there is a compiler for the topology, else an estimate, which says how to get the compiler.
    """
    from listopd_jax.stages.job import base_of
    from listopd_jax.stages.teachers import experts_of

    shapes, layout = shapes_of(config), layout_of(config, topology)
    models = {"student": shapes["student"], "teacher": shapes["teacher"], "base": base_of(shapes)}
    models |= {"experts": experts_of(shapes)}
    phases = arithmetic.costs(**models, load=load, layout=layout)
    floor = arithmetic.roofline(phases, topology, layout.sizes)
    flops = arithmetic.step_flops(**models, load=load, remat=layout.remat, adapted=layout.lora is not None)
    plan = {
        "topology": topology.name,
        "devices": topology.devices,
        "mesh": dict(layout.sizes),
        "microbatch": layout.microbatch,
        "sft_microbatch": {role: config.sft[role].microbatch for role in _trained_roles(config)},
        "remat": layout.remat,
        "attention": layout.attention,
        "tokens": [load.prompt, load.response],
        "flops": sum(flops.values()),
        "flops_by_part": flops,
        "bytes": _arriving(phases),
        "step_s_floor": floor["step_s"],
        "chip_s_floor": floor["step_s"] * topology.devices,
        "bound_by": floor["bound_by"],
        "phases": floor["phases"],
        "hbm_gib": topology.chip.hbm_gib,
    }
    memory = _compiled_memory(config, shapes, topology, layout) if compile_it else None
    if memory is None:
        memory = _estimated_memory(
            models, worst_load(config), layout, f"; {EXTRA} compiles" if compile_it else ""
        )
    refused = memory["refused"] is not None
    return plan | memory | {"fits": not refused and memory["peak_gib"] <= topology.chip.hbm_gib}


def model(config: Any, topology: Topology, load: Load, top: int) -> dict[str, Any]:
    """The times of `config` by its compiled kernels, see modelled.py; UserError where they cannot be had."""
    from listopd_jax.parallel.mesh import make_mesh
    from listopd_jax.plan.compile import devices_of
    from listopd_jax.plan.modelled import modelled_step

    if topology.kind not in RATES:
        raise UserError(f"--kernels: no rates are known for {topology.kind}; known: {', '.join(RATES)}")
    if load.response <= 1:
        raise UserError(
            "--tokens: with --kernels, give completions of at least 2 tokens: the first is not decoded"
        )
    devices = devices_of(topology)
    if devices is None:
        raise UserError(f"--kernels: needs XLA's compiler for GPUs; {EXTRA}")
    mesh = make_mesh(layout_of(config, topology).sizes, devices)
    return modelled_step(config, shapes_of(config), vocabulary(config), mesh, load, RATES[topology.kind], top)


def _arriving(phases: Mapping[str, arithmetic.Cost]) -> dict[str, float]:
    """Bytes of a step that arrive at a device along each mesh axis."""
    axes = {axis for cost in phases.values() for axis in cost.arriving}
    return {axis: sum(cost.arriving.get(axis, 0.0) for cost in phases.values()) for axis in sorted(axes)}


def _estimated_memory(
    models: Mapping[str, ModelConfig], load: Load, layout: Layout, hint: str
) -> dict[str, Any]:
    memory = arithmetic.memory_estimate(**models, load=load, layout=layout)
    return {
        "memory_source": f"estimate by arithmetic, not compiled{hint}",
        "refused": None,
        "memory_gib": _gib(memory),
        "peak_gib": arithmetic.peak(memory) / GIB,
        "bytes_compiled": None,
    }


def _compiled_memory(config, shapes, topology: Topology, layout: Layout) -> dict[str, Any] | None:
    """Memory of all programs that train, by the compiler; None without devices to compile for."""
    from listopd_jax.parallel.mesh import make_mesh
    from listopd_jax.plan import compile as aot

    devices = aot.devices_of(topology)
    if devices is None:
        return None
    mesh = make_mesh(layout.sizes, devices)
    memory = aot.state_memory(config, shapes, mesh, layout.rolls_out_base)
    result = {"memory_source": f"compiled for {devices[0].device_kind}", "refused": None}
    # What is not among a program's arguments takes memory all the same: the teacher, until it is needed; for the
    # rollout, whose arguments are a copy of the model (or the base, with an adapter) and the prompts, all else.
    shared = memory["base"] if layout.rolls_out_base else 0
    waiting = {
        "sft student": memory["teacher"],
        "evaluation": evaluated_teacher(config, shapes["teacher"], memory["teacher"]),
        "rollout": arithmetic.persistent(memory) - shared,
    }
    peaks, moved = {}, {}
    for phase, build in _builds(config).items():
        try:
            program = build(config, shapes, vocabulary(config), mesh)
        except aot.TooLarge as e:
            peaks[phase] = e.bytes + waiting.get(phase, 0)
            result["refused"] = str(e)
            continue
        peaks[phase] = waiting.get(phase, 0) + program.peak
        listed = memory["rollout copy"] + memory["kv cache"] + shared
        if phase != "evaluation":
            memory[f"{phase} temporaries"] = (
                program.peak - listed if phase == "rollout" else program.temporaries
            )
        moved[phase] = dict(program.traffic)
    return result | {
        "memory_gib": _gib(memory),
        "peaks_gib": _gib(peaks),
        "peak_gib": max(peaks.values()) / GIB,
        "bytes_compiled": moved,
    }


def with_largest_sft(config: Any, topology: Topology) -> Any:
    """`config` with the largest microbatch of each SFT whose program fits by the compiler, the smallest if none does.

    As it is where there is no compiler for the topology.
    """
    from listopd_jax.parallel.mesh import make_mesh
    from listopd_jax.plan import compile as aot

    devices = aot.devices_of(topology)
    if devices is None:
        return config
    shapes, layout = shapes_of(config), layout_of(config, topology)
    mesh = make_mesh(layout.sizes, devices)
    memory = aot.state_memory(config, shapes, mesh, layout.rolls_out_base)
    changed = ml_collections.ConfigDict(copy.deepcopy(config.to_dict()))
    for role in _trained_roles(config):
        room = topology.chip.hbm_gib * GIB - (memory["teacher"] if role == "student" else 0)
        changed.sft[role].microbatch = _largest_that_fits(changed, shapes, mesh, layout, role, room)
    return changed


def _largest_that_fits(config: Any, shapes, mesh, layout: Layout, role: str, room: float) -> int:
    """The largest microbatch with which the SFT of `role` takes at most `room` bytes of a device."""
    from listopd_jax.plan import compile as aot

    batch, tried = config.sft[role].batch_size, ml_collections.ConfigDict(copy.deepcopy(config.to_dict()))
    sizes = [m for m in range(1, batch + 1) if batch % m == 0 and m % layout.rows == 0]
    for i, size in enumerate(sizes):
        tried.sft[role].microbatch = size
        try:
            needed = aot.compile_sft(tried, shapes, vocabulary(config), mesh, role=role).peak
        except aot.TooLarge as e:
            needed = e.bytes
        if needed > room:
            return sizes[max(i - 1, 0)]
    return sizes[-1]


def _trained_roles(config: Any) -> list[str]:
    """The roles that an SFT trains."""
    return [role for role in ("teacher", "student") if config.sft[role].steps or config.sft[role].epochs]


def evaluated_teacher(config: Any, shape: ModelConfig, frozen: float) -> float:
    """Bytes of the teacher in addition to the copy that decodes, of `frozen` as it is kept: in float32 from its SFT."""
    dtype = config.dtype
    if as_given(config):
        return 0 if dtype.frozen == dtype.compute or dtype.frozen in GROUPS else frozen
    return frozen * arithmetic.F32 * num_params(shape) / arithmetic.frozen_bytes(shape, dtype.frozen)


def _builds(config: Any) -> dict[str, Callable[..., Any]]:
    """Functions that compile each phase's programs: a role's SFT if it is trained, evaluation always."""
    from listopd_jax.plan import compile as aot

    sft = {f"sft {role}": functools.partial(aot.compile_sft, role=role) for role in _trained_roles(config)}
    others = {
        "evaluation": aot.compile_evaluation,
        "rollout": aot.compile_rollout,
        "update": aot.compile_update,
    }
    return sft | others


def _gib(sizes: Mapping[str, float]) -> dict[str, float]:
    return {kind: size / GIB for kind, size in sizes.items()}


def candidates(config: Any, topology: Topology) -> Iterator[ml_collections.ConfigDict]:
    """Configs like `config` with every mesh, microbatch and remat policy that divides what it must."""
    batch = config.opd.batch_size
    for sizes in _meshes(topology.devices):
        for microbatch in (m for m in range(1, batch + 1) if batch % m == 0):
            for remat in REMATS:
                changed = ml_collections.ConfigDict(copy.deepcopy(config.to_dict()))
                changed.parallel.update(sizes)
                changed.remat = remat
                for section in (changed.opd, changed.sft.teacher, changed.sft.student):
                    # SFT batches may have another size: the microbatch shrinks to one that divides it.
                    section.microbatch = math.gcd(microbatch, section.batch_size)
                try:
                    layout = layout_of(changed, topology)
                except UserError:
                    continue
                if layout.remat == remat:  # else it is another policy by another name
                    yield changed


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    for fsdp in (n for n in range(1, devices + 1) if devices % n == 0):
        for tensor in (n for n in range(1, devices // fsdp + 1) if (devices // fsdp) % n == 0):
            yield {"data": devices // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}


def search(config: Any, topology: Topology, load: Load, compiles: int) -> dict[str, Any]:
    """The plan of the fastest layout that fits; all use the same number of devices.

    By arithmetic all are ranked, those that fit first; the best is compiled. If it does not fit after all, the working
    memory of the others is taken to be underestimated as much, and the best of them is compiled, at most `compiles` in
    all. The microbatches of SFT are chosen apart, by the compiler. If none fits, the one that misses by least.
    UserError if nothing divides. The plan has `tried` too.
    """
    from listopd_jax.ops.attention_backends import resolve

    resolve(config.attention, topology.platform, config.dtype.compute)  # no layout fixes that
    left = [(make_plan(c, topology, load, False), c) for c in candidates(config, topology)]
    if not left:
        raise UserError(
            f"--search: no mesh of {topology.devices} devices divides the models' heads and opd.batch_size="
            f"{config.opd.batch_size}; change the batch or the topology"
        )
    count, factor, done = len(left), 1.0, []
    left.sort(key=lambda pair: _rank(pair[0]))
    best = left[0][0]
    while left and len(done) < compiles:
        i = min(range(len(left)), key=lambda i: _rank(_enlarged(left[i][0], factor)))
        estimate, candidate = left.pop(i)
        plan = make_plan(with_largest_sft(candidate, topology), topology, load, True)
        done.append(plan)
        best = min(done, key=_rank)
        if plan["fits"]:
            break
        # One compilation corrects all estimates: they are assumed to be off by the same factor.
        factor = max(factor, _working_gib(plan, estimate) / _working_gib(estimate, estimate))
    return best | {"tried": {"by_arithmetic": count, "compiled": [summary(p) for p in done]}}


def _working_gib(plan: Mapping[str, Any], estimate: Mapping[str, Any]) -> float:
    """GiB needed at the peak on top of the persistent part (known exactly, from the estimate)."""
    return max(plan["peak_gib"] - arithmetic.persistent(estimate["memory_gib"]), 1e-3)


def _enlarged(estimate: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """An estimated plan with `factor` times the working memory."""
    return {**estimate, "peak_gib": estimate["peak_gib"] + (factor - 1) * _working_gib(estimate, estimate)}


def _rank(plan: Mapping[str, Any]) -> tuple:
    """Fitting plans by time, ties by the largest microbatch; then the others by memory, ties likewise."""
    room = 1.0 if plan["bytes_compiled"] is not None else ROOM
    # To three digits: arithmetic does not know more, and within that the larger microbatch wins.
    seconds, peak = (float(f"{plan[name]:.3g}") for name in ("step_s_floor", "peak_gib"))
    if plan["peak_gib"] <= room * plan["hbm_gib"]:
        return (0, seconds, -plan["microbatch"], plan["peak_gib"])
    return (1, peak, seconds, -plan["microbatch"])


def summary(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in which plans differ."""
    return {k: plan[k] for k in ("mesh", "microbatch", "remat", "fits", "peak_gib", "step_s_floor")}
