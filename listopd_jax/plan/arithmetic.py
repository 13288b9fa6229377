"""The cost of an OPD step by arithmetic from the configuration: FLOPs, memory, traffic, and the time it cannot beat.

FLOPs are counted here because XLA's cost analysis counts the body of a scan once. A multiply-add is two FLOPs; norms,
rotary positions and softmax are left out. Attention is counted with causality, as a kernel can have it. Bytes between
devices are those that arrive at one device by a ring: (g−1)/g of the result of an all-gather, twice that for an
all-reduce.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from listopd_jax.models.config import Lora, ModelConfig, lora_params, num_params
from listopd_jax.models.quantized import GROUPS
from listopd_jax.plan.chips import Topology
from listopd_jax.rounding import ceil_div

WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 4 / GROUPS["int4"]}
AXES = ("data", "fsdp", "tensor")
F32 = 4
PERSISTENT = ("parameters", "optimizer", "average", "teacher", "base")


class Load(NamedTuple):
    """One step's tokens: `prompts` of `prompt` tokens, with `rollouts` completions of `response` tokens each."""

    prompts: int
    rollouts: int
    prompt: float
    response: float

    @property
    def completion_tokens(self) -> float:
        """Sampled tokens of the step."""
        return self.prompts * self.rollouts * self.response

    @property
    def tokens(self) -> float:
        """Tokens that a pass computes: each prompt once."""
        return self.prompts * self.prompt + self.completion_tokens


class Layout(NamedTuple):
    """How the step is laid out: devices along the mesh axes, prompts per gradient pass, remat, dtypes, attention.

    remat is what the policy amounts to: with splash attention, which leaves nothing to store, 'attention' is 'full'.
    """

    sizes: Mapping[str, int]
    microbatch: int
    remat: str
    compute: str = "bfloat16"
    frozen: str = "bfloat16"
    gather_rollout: bool = True
    chunk: int = 1024
    attention: str = "xla"
    drafts: int = 0  # extra tokens per completion that the rollout's cache has room for
    average: bool = False  # whether an average of what the student trains is kept
    lora: Lora | None = None  # the adapter that the student trains; None: it trains all of itself

    @property
    def keeps_scores(self) -> bool:
        """Whether attention scores are arrays in memory: fused kernels hold only blocks of them."""
        return self.attention == "xla"

    def trained(self, student: ModelConfig) -> int:
        """Parameters of the student that have a gradient and moments."""
        return lora_params(student, self.lora) if self.lora else num_params(student)

    @property
    def rolls_out_base(self) -> bool:
        """Whether the student writes with the arrays of the base: with an adapter they need not be a copy."""
        gathers = self.gather_rollout and self.sizes["fsdp"] > 1
        return self.lora is not None and self.compute == self.frozen and not gathers

    @property
    def rows(self) -> int:
        """Devices among which the prompts are split."""
        return self.sizes["data"] * self.sizes["fsdp"]

    @property
    def shards(self) -> int:
        """Parts into which persistent weights are split."""
        return self.sizes["fsdp"] * self.sizes["tensor"]


class Cost(NamedTuple):
    """The cost of one phase on one device: FLOPs, bytes through HBM, bytes that arrive along each mesh axis."""

    flops: float
    hbm: float
    arriving: Mapping[str, float]


def layer_weights(c: ModelConfig) -> int:
    """Weights of all layers' matrix products: what each token is multiplied with, without embedding and head."""
    heads = 2 * c.num_heads + 2 * c.num_kv_heads
    return c.num_layers * c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)


def attention_flops(c: ModelConfig, pairs: float) -> float:
    """Scores and mixture of `pairs` (query, key) pairs in every layer and head."""
    # Two products of head_dim multiply-adds per pair.
    return 4 * c.num_layers * c.num_heads * c.head_dim * pairs


def prompt_pairs(load: Load) -> float:
    """(query, key) pairs of causal prompts."""
    return load.prompts * load.prompt * (load.prompt + 1) / 2


def completion_pairs(load: Load) -> float:
    """(query, key) pairs of completions: with their prompt and with what is not after them."""
    return load.completion_tokens * (load.prompt + (load.response + 1) / 2)


def prompt_flops(c: ModelConfig, load: Load) -> float:
    """Reading the prompts, without the head."""
    return 2 * layer_weights(c) * load.prompts * load.prompt + attention_flops(c, prompt_pairs(load))


def shared_prompt_flops(c: ModelConfig, load: Load) -> float:
    """Reading the prompts for their keys and values only: the last layer ends with them (Decoder.keys_values)."""
    # Two FLOPs per weight of k and of v.
    ends = 2 * 2 * c.hidden_size * c.num_kv_heads * c.head_dim * load.prompts * load.prompt
    return prompt_flops(c, load) * (c.num_layers - 1) / c.num_layers + ends


def completion_flops(c: ModelConfig, load: Load) -> float:
    """Reading the completions after their shared prompts, or writing them: layers and attention, without the head."""
    return 2 * layer_weights(c) * load.completion_tokens + attention_flops(c, completion_pairs(load))


def head_flops(c: ModelConfig, load: Load) -> float:
    """The LM head at every completion position."""
    return 2 * c.hidden_size * c.vocab_size * load.completion_tokens


def frozen_bytes(c: ModelConfig, dtype: str) -> float:
    """Bytes of a frozen model; int8 and int4 leave embedding and head in bfloat16 (models/quantized.py)."""
    tables = c.vocab_size * c.hidden_size * (1 if c.tied else 2)
    return WIDTHS[dtype] * (num_params(c) - tables) + max(WIDTHS[dtype], WIDTHS["bfloat16"]) * tables


def forward_flops(c: ModelConfig, load: Load) -> float:
    """One scoring pass: prompts, completions, head."""
    return shared_prompt_flops(c, load) + completion_flops(c, load) + head_flops(c, load)


def recomputed_flops(c: ModelConfig, load: Load, remat: str) -> float:
    """FLOPs that the backward pass recomputes: in the layers by `remat`, none in the fused head.

    Attention's scores are always recomputed, its mixture only by 'full' (and by splash attention with 'dots' too, about
    0.2 % of a step that is not counted).
    """
    layers = forward_flops(c, load) - head_flops(c, load)
    if remat == "full":
        return layers
    prompts = prompt_pairs(load) * (c.num_layers - 1) / c.num_layers
    # Half of attention's FLOPs; the other half is the mixture.
    scores = attention_flops(c, prompts + completion_pairs(load)) / 2
    return layers - scores if remat == "attention" else scores


def step_flops(
    student: ModelConfig, teacher: ModelConfig, load: Load, remat: str, base: ModelConfig | None = None,
    adapted: bool = False, experts: Sequence[ModelConfig] = (),
) -> dict[str, float]:  # fmt: skip
    """FLOPs of one OPD step by part, over all devices; `base` has the student's shape unless another is given.

    `experts` are further teachers, which read all rows too. All are taken to read the student's prompts. A student that
    is `adapted` has no gradients of its weights; its adapter's own products, about rank/width of the others, are left
    out.
    """
    return {
        "prefill": prompt_flops(student, load),
        "decode": completion_flops(student, load) + head_flops(student, load),
        "teacher": sum(forward_flops(c, load) for c in (teacher, *experts)),
        "base": forward_flops(base or student, load),
        # Forward, gradient of the activations, gradient of the weights; frozen weights have no gradient.
        "student": (2 if adapted else 3) * forward_flops(student, load),
        "recomputed": recomputed_flops(student, load, remat),
    }


def kv_bytes(c: ModelConfig, tensor: int = 1, width: int = 2) -> float:
    """Keys and values of one token on one device; KV heads fewer than `tensor` are held in equal copies."""
    # The least number of copies that `tensor` divides (rules.kv_copies).
    heads = math.lcm(c.num_kv_heads, tensor) / tensor
    return 2 * c.num_layers * heads * c.head_dim * width


def decode_bytes(c: ModelConfig, load: Load, tensor: int = 1, width: int = 2) -> float:
    """Bytes that writing the completions must move on one device, if every row is as long as the mean.

    Each step reads the weights (of the embedding, the head), every prompt's keys and values once for all of its
    completions, and what the completions have cached so far.
    """
    weights = width * (layer_weights(c) + c.vocab_size * c.hidden_size) / tensor
    cached = load.prompts * (load.prompt + load.rollouts * load.response / 2) * kv_bytes(c, tensor, width)
    return load.response * (weights + cached)


def costs(
    student: ModelConfig, teacher: ModelConfig, load: Load, layout: Layout, base: ModelConfig | None = None,
    experts: Sequence[ModelConfig] = (),
) -> dict[str, Cost]:  # fmt: skip
    """The phases of one step on one device, in their order; for `base` and `experts` see `step_flops`."""
    tensor, width = layout.sizes["tensor"], WIDTHS[layout.compute]
    flops = step_flops(student, teacher, load, layout.remat, base, layout.lora is not None, experts)
    share = {part: f / (layout.rows * tensor) for part, f in flops.items()}
    copy = width * num_params(student) / tensor
    prompts = load.prompts / layout.rows
    token = kv_bytes(student, tensor, width)
    # Over `fsdp` once for the copy that decodes, or again for every token.
    gathers = 1 if layout.gather_rollout else 1 + load.response
    sent = _activations(student, load, layout)
    completion_share = load.completion_tokens / load.tokens
    return {
        "prefill": Cost(
            share["prefill"],
            copy + prompts * load.prompt * token,
            {"fsdp": _gathered(copy, layout), "tensor": sent * (1 - completion_share)},
        ),
        "decode": Cost(
            share["decode"],
            decode_bytes(student, load._replace(prompts=prompts), tensor, width),
            {"fsdp": _gathered(copy, layout) * (gathers - 1), "tensor": sent * completion_share},
        ),
        "score": _score_cost((base or student, teacher, *experts), load, layout, share),
        "update": _update_cost(student, load, layout, share),
    }


def _score_cost(
    models: Sequence[ModelConfig], load: Load, layout: Layout, share: Mapping[str, float]
) -> Cost:
    """Teachers and base: all read their weights for the prompts and again for the completions of each microbatch."""
    width, tensor = WIDTHS[layout.compute], layout.sizes["tensor"]
    weights = 2 * _passes(load, layout) * width * sum(map(num_params, models)) / tensor
    sent = sum(_activations(c, load, layout) for c in models)
    return Cost(
        share["teacher"] + share["base"], weights, {"fsdp": _gathered(weights, layout), "tensor": sent}
    )


def _update_cost(student, load: Load, layout: Layout, share: Mapping[str, float]) -> Cost:
    """The student forward and backward, and AdamW: 28 bytes per parameter read and written, 12 more for an average."""
    width, sizes = WIDTHS[layout.compute], layout.sizes
    weights = 2 * _passes(load, layout) * width * num_params(student) / sizes["tensor"]
    # Parameter and two moments are read and written, 24 bytes; the gradient is read, 4. An average takes 8,
    # and the parameter again, 4.
    state = (40 if layout.average else 28) * layout.trained(student) / layout.shards
    gradients = _passes(load, layout) * F32 * layout.trained(student) / layout.shards
    forwards = 3 if layout.remat in ("full", "attention") else 2
    arriving = {
        "data": 2 * gradients * (sizes["data"] - 1) / sizes["data"],
        "fsdp": 3 * _gathered(weights, layout),  # gathered forward and backward, gradients scattered
        "tensor": forwards * _activations(student, load, layout),
    }
    return Cost(share["student"] + share["recomputed"], 3 * weights + state, arriving)


def _passes(load: Load, layout: Layout) -> int:
    return load.prompts // (layout.microbatch or load.prompts)


def _gathered(size: float, layout: Layout) -> float:
    """Bytes of an all-gather over `fsdp` that make `size` bytes on a device."""
    return size * (layout.sizes["fsdp"] - 1) / layout.sizes["fsdp"]


def _activations(c: ModelConfig, load: Load, layout: Layout) -> float:
    """Bytes over `tensor` of one pass: two all-reduces of the hidden states in a layer."""
    tensor = layout.sizes["tensor"]
    hidden = load.tokens / layout.rows * c.hidden_size * WIDTHS[layout.compute]
    # Two all-reduces in a layer, each of which brings (g−1)/g of its result twice.
    return 2 * c.num_layers * 2 * hidden * (tensor - 1) / tensor


def phase_times(cost: Cost, topology: Topology, sizes: Mapping[str, int]) -> dict[str, float]:
    """Seconds that a phase needs of each resource alone: flops, hbm, and every mesh axis with traffic."""
    chip, times = topology.chip, {"flops": cost.flops / topology.chip.flops}
    times["hbm"] = cost.hbm / chip.bandwidth
    for axis, size in cost.arriving.items():
        # Devices that are neighbours on this axis are `stride` apart in the order of the mesh.
        stride = math.prod(sizes[a] for a in AXES[AXES.index(axis) + 1 :])
        if size:
            times[f"{axis} axis"] = size / topology.arriving(sizes[axis], stride)
    return times


def roofline(phases: Mapping[str, Cost], topology: Topology, sizes: Mapping[str, int]) -> dict:
    """The floor of a step: in each phase the slowest resource, all others hidden behind it.

    Returns {"step_s", "bound_by", "phases": {phase: {"seconds", "bound_by", "resources"}}}.
    """
    table = {}
    for phase, cost in phases.items():
        times = phase_times(cost, topology, sizes)
        # A roofline: the slowest resource hides all others.
        worst = max(times, key=times.__getitem__)
        table[phase] = {"seconds": times[worst], "bound_by": worst, "resources": times}
    longest = max(table, key=lambda phase: table[phase]["seconds"])
    return {
        "step_s": sum(row["seconds"] for row in table.values()),
        "bound_by": f"{longest}: {table[longest]['bound_by']}",
        "phases": table,
    }


def memory_estimate(
    student: ModelConfig, teacher: ModelConfig, load: Load, layout: Layout, base: ModelConfig | None = None,
    experts: Sequence[ModelConfig] = (),
) -> dict[str, float]:  # fmt: skip
    """Bytes on one device by kind, without a compiler: weights and cache exact, temporaries rough.

    `load` has the widths that programs are compiled for. Temporaries: three float32 arrays of attention scores at once
    (the XLA attention stores them, fused kernels do not), the logits of four chunks, gathered weights of two layers and
    of the head, gradients twice and the head's once more on every device (ops/fused.py), and the stored activations of
    the layers.
    """
    width, tensor = WIDTHS[layout.compute], layout.sizes["tensor"]
    own, trained = num_params(student), layout.trained(student)
    # Once gathered, the copy that decodes is split over `tensor` alone.
    copies = tensor if layout.gather_rollout else layout.shards
    prompts = load.prompts / layout.rows
    prefill_scores = (
        layout.keeps_scores * 3 * F32 * prompts * ceil_div(student.num_heads, tensor) * load.prompt**2
    )
    return {
        "parameters": F32 * trained / layout.shards,
        "optimizer": 2 * F32 * trained / layout.shards,
        **({"average": F32 * trained / layout.shards} if layout.average else {}),
        "teacher": sum(frozen_bytes(c, layout.frozen) for c in (teacher, *experts)) / layout.shards,
        "base": frozen_bytes(base or student, layout.frozen) / layout.shards,
        "rollout copy": width * (trained if layout.rolls_out_base else own) / copies,
        "kv cache": prompts
        * (load.prompt + load.rollouts * (load.response + layout.drafts))
        * kv_bytes(student, tensor, width),
        "rollout temporaries": prefill_scores + _vocab_bytes(student, layout),
        "update temporaries": 2 * F32 * trained / layout.shards
        + _pass_bytes(student, (teacher, *experts), load, layout),
    }


def _vocab_bytes(c: ModelConfig, layout: Layout) -> float:
    """Logits of four chunks and the gathered head, split over `tensor`."""
    rows = 4 * F32 * layout.chunk + WIDTHS[layout.compute] * c.hidden_size
    return c.vocab_size * rows / layout.sizes["tensor"]


def _pass_bytes(student: ModelConfig, teachers: Sequence[ModelConfig], load: Load, layout: Layout) -> float:
    """Activations of one gradient pass: scores, what the layers store, gathered weights."""
    width, tensor = WIDTHS[layout.compute], layout.sizes["tensor"]
    prompts = (layout.microbatch or load.prompts) / layout.rows
    tokens = prompts * (load.prompt + load.rollouts * load.response)
    keys = load.prompt + load.response
    pairs = layout.keeps_scores * prompts * (load.prompt**2 + load.rollouts * load.response * keys)
    heads = ceil_div(max(c.num_heads for c in (student, *teachers)), tensor)
    scores = 3 * F32 * heads * pairs
    mixed = student.num_heads * student.head_dim / tensor
    units = 3 * student.intermediate_size / tensor + 5 * mixed
    stored = {"full": 0.0, "attention": mixed, "dots": units, "none": 2 * units}[layout.remat]
    layer = max(layer_weights(c) / c.num_layers for c in (student, *teachers))
    # Each layer keeps its input and what the remat policy stores.
    kept = student.num_layers * tokens * width * (student.hidden_size + stored)
    head_gradient = 0 if layout.lora else F32 * student.vocab_size * student.hidden_size / tensor
    return (
        scores
        + kept
        + 2 * width * layer / tensor
        + head_gradient
        + max(_vocab_bytes(c, layout) for c in teachers)
    )


def peak(memory: Mapping[str, float]) -> float:
    """The larger of the two phases: the persistent part, and the rollout's or the update's own."""
    rollout = ("rollout copy", "kv cache", "rollout temporaries")
    return persistent(memory) + max(sum(memory[kind] for kind in rollout), memory["update temporaries"])


def persistent(memory: Mapping[str, float]) -> float:
    """GiB (or bytes) that stay on a device through a whole run, of memory by kind."""
    return sum(memory[kind] for kind in PERSISTENT if kind in memory)
