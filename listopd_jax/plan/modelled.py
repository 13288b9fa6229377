"""The time of a step on a GPU by a model of its compiled kernels, at the mean widths of the load."""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from jax.sharding import Mesh

from listopd_jax.data.batches import WIDTH_MULTIPLE
from listopd_jax.models.config import ModelConfig
from listopd_jax.plan import compile as aot
from listopd_jax.plan.arithmetic import Load
from listopd_jax.plan.chips import GIB, Rates
from listopd_jax.plan.kernels import Kernel, kernels
from listopd_jax.rollout.decode import cache_sizes
from listopd_jax.rounding import ceil_div, round_up


def modelled_step(
    config: Any, shapes: Mapping[str, ModelConfig], vocab: int, mesh: Mesh, load: Load, rates: Rates, top: int
) -> dict[str, Any]:
    """Per phase (prefill, decode, update), as JSON values: memory, seconds, and the `top` longest kernels.

    Programs are compiled at the widths that a batch of prompts and completions of the mean lengths has.
    """
    narrow = at_mean(config, load)
    first, segments = aot.rollout_programs(
        narrow, shapes, vocab, mesh, [size for size, _ in turns_of(config, load)]
    )
    narrow.task.max_response = trimmed(config.task.max_response, load.response)
    tokens = math.ceil(load.prompt) + math.ceil(load.response)
    update = aot.compile_update(narrow, shapes, vocab, mesh, tokens)
    turns = [turns for _, turns in turns_of(config, load)]
    phases = {"prefill": ([first], [1]), "decode": (segments, turns), "update": ([update], [1])}
    return {
        "widths": [narrow.task.max_prompt, narrow.task.max_response],
        **{name: _described(*programs, rates, top) for name, programs in phases.items()},
    }


def at_mean(config: Any, load: Load) -> ml_collections.ConfigDict:
    """`config` with prompts as wide as those of the mean length; drafts only where they are asked for by number.

    Only a trained policy tells how many will be confirmed: decoding is counted as if none were.
    """
    narrow = ml_collections.ConfigDict(copy.deepcopy(config.to_dict()))
    narrow.task.max_prompt = min(config.task.max_prompt, round_up(math.ceil(load.prompt), WIDTH_MULTIPLE))
    narrow.rollout.draft_tokens = max(0, config.rollout.draft_tokens)
    return narrow


def turns_of(config: Any, load: Load) -> list[tuple[int, int]]:
    """The capacities of the caches that completions of the mean length reach, and the tokens decoded in each."""
    budget, length = config.task.max_response, math.ceil(load.response)
    drafts = max(0, config.rollout.draft_tokens)
    sizes = cache_sizes(budget, drafts)
    # + 1: the newest token is not in the cache yet. And from 1, since the first token is the prefill's.
    ends = [min(size + 1 - drafts, budget, length) for size in sizes]
    tokens = [end - begin for begin, end in itertools.pairwise([1, *ends])]
    return [(size, count) for size, count in zip(sizes, tokens, strict=True) if count > 0]


def trimmed(budget: int, response: float) -> int:
    """The width of the completions that are scored (listopd_jax.rollout.state.trim)."""
    return min(budget, round_up(math.ceil(response), ceil_div(budget, 4)))


def _described(
    programs: Sequence[aot.Program], turns: Sequence[int], rates: Rates, top: int
) -> dict[str, Any]:
    largest = max(programs, key=lambda program: program.peak)
    found = [k for program, count in zip(programs, turns, strict=True) for k in kernels(program.text, count)]
    return {
        "seconds": _seconds(found, rates),
        "kernels": round(sum(k.runs for k in found)),
        "flops": sum(k.runs * k.flops for k in found),
        "bytes": sum(k.runs * (k.read + k.written) for k in found),
        "seconds_by_kind": {kind: _seconds(group, rates) for kind, group in _by_kind(found)},
        "memory_gib": {
            "arguments": largest.arguments / GIB,
            "results": largest.results / GIB,
            "temporaries": largest.temporaries / GIB,
        },
        "top": [_row(k, rates) for k in sorted(found, key=lambda k: -k.seconds(rates))[:top]],
    }


def _seconds(found: Iterable[Kernel], rates: Rates) -> float:
    return sum(kernel.seconds(rates) for kernel in found)


def _by_kind(found: Sequence[Kernel]) -> Iterator[tuple[str, list[Kernel]]]:
    for kind in sorted({k.kind for k in found}):
        yield kind, [k for k in found if k.kind == kind]


def _row(k: Kernel, rates: Rates) -> dict[str, Any]:
    return {**k._asdict(), "seconds": k.seconds(rates)}
