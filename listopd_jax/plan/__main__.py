"""python -m listopd_jax.plan --config=configs/fashion.py:paper --topology=v5p:2x2x2 [--search] [--json]

Will it fit, and how fast can it be? Before anyone pays: the rollout and update programs of the OPD stage are compiled
for devices that need not exist, and a step's FLOPs, traffic and shortest time are counted (docs/planner.md). Exit
code 0: it fits; 1: it does not; 2: a mistake to fix.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from listopd_jax import config as config_module
from listopd_jax.errors import UserError, print_error
from listopd_jax.lifecycle import say
from listopd_jax.plan.arithmetic import Load
from listopd_jax.plan.chips import Topology, known, parse_topology

PHASES = {"prefill": ("prefill",), "decode": ("decode",), "update": ("score", "update")}
"""The phases of the arithmetic that each compiled part of a step consists of."""

FIRST = flags.FlagValues()  # read before the config file, which may start jax
_TOPOLOGY = flags.DEFINE_string("topology", None, f"one of: {known()}", flag_values=FIRST)
FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py[:PRESET]; override with --config.field=value", flag_values=FLAGS
)
_TOKENS = flags.DEFINE_string(
    "tokens", "700,225", "mean tokens of prompt and response, for times", flag_values=FLAGS
)
_SEARCH = flags.DEFINE_bool("search", False, "try meshes, microbatches and remat policies", flag_values=FLAGS)
_COMPILES = flags.DEFINE_integer(
    "compiles", 3, "layouts to compile at most; 0: arithmetic only", lower_bound=0, flag_values=FLAGS
)
_KERNELS = flags.DEFINE_integer(
    "kernels", 0, "model a step's time by its compiled kernels, and list this many of each program (h100:N)",
    lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_bool("json", False, "print the plan as JSON", flag_values=FLAGS)


def main(argv: list[str]) -> int:
    """Print the plan and return the exit code; a user's mistake is one line on stderr."""
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\ntopologies: {known()}\n{FLAGS.get_help()}")
        return 0
    try:
        config, topology, load = parse(argv)
        plan = plan_of(config, topology, load)
    except UserError as e:
        print_error(str(e))
        return 2
    except KeyboardInterrupt:
        return 130
    say(json.dumps(plan, indent=1, allow_nan=False) if _JSON.value else render(plan))
    return 0 if plan["fits"] else 1


def parse(argv: list[str]) -> tuple[Any, Topology, Load]:
    """The checked config, the topology and the mean load; UserError for whatever cannot be planned.

    Sets the environment that jax needs for the topology.
    """
    with config_module.flag_mistakes(argv):
        rest = FIRST(argv, known_only=True)
        if not _TOPOLOGY.value:
            raise UserError("--topology is missing: e.g. --topology=v5p:2x2x2")
        topology = parse_topology(_TOPOLOGY.value)
        set_environment(topology)
        rest = FLAGS(config_module.find_config_file(rest))
        config = _CONFIG.value
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; overrides are written --config.field=value")
    if not config:
        raise UserError("--config is missing: e.g. --config=configs/fashion.py:paper")
    config = config_module.validate(config_module.for_its_task(config, argv))
    if config.opd.sweep:
        raise UserError("opd.sweep: a plan is of one point; leave it out and set the options of the largest")
    return config, topology, Load(config.opd.batch_size, config.opd.rollouts, *_tokens(config))


def _tokens(config: Any) -> tuple[float, float]:
    limits = config.task.max_prompt, config.task.max_response
    if not limits[1]:
        raise UserError("task.max_response=0: follows the answers, which the planner does not read; set it")
    try:
        prompt, response = map(float, _TOKENS.value.split(","))
    except ValueError:
        raise UserError(
            f"--tokens={_TOKENS.value}: give two numbers, mean prompt and response: 700,225"
        ) from None
    if not (prompt > 0 and response > 0):
        raise UserError(f"--tokens={_TOKENS.value}: both must be > 0")
    return min(prompt, limits[0]), min(response, limits[1])


def set_environment(topology: Topology) -> None:
    """Set what jax must find when it starts: no TPU is looked for or taken, and cpu:N has N devices."""
    if topology.kind == "h100":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's messages about memory are in the plan
        # The GPU that is here compiles; without one XLA's GPU compiler runs on the CPU (gpu.py).
        if shutil.which("nvidia-smi"):
            return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.kind == "cpu":
        count = f"--xla_force_host_platform_device_count={topology.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    if topology.is_tpu:
        # Only the compiler is used, so the lock that guards a host's TPUs is neither needed nor taken from a training
        # run next to this one. The rest keeps libtpu from asking a metadata server, and from writing logs.
        os.environ.update(
            TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_ACCELERATOR_TYPE=accelerator_type(topology),
            TPU_WORKER_HOSTNAMES="localhost", TPU_LOG_DIR="disabled", TPU_MIN_LOG_LEVEL="3",
            TPU_STDERR_LOG_LEVEL="3",
        )  # fmt: skip


def accelerator_type(topology: Topology) -> str:
    """Google's name of a slice: v5litepod-8, v6e-8; for a v5p in TensorCores, two per chip."""
    kind = {"v5e": "v5litepod"}.get(topology.kind, topology.kind)
    return f"{kind}-{topology.devices * (2 if kind == 'v5p' else 1)}"


def plan_of(config: Any, topology: Topology, load: Load) -> dict[str, Any]:
    """The plan that the flags ask for."""
    from listopd_jax.plan.search import make_plan, model, search

    if _KERNELS.value and _SEARCH.value:
        raise UserError("--kernels: is for one layout; search first, then give it what --search recommends")
    if _SEARCH.value:
        return search(config, topology, load, _COMPILES.value)
    modelled = {"modelled": model(config, topology, load, _KERNELS.value)} if _KERNELS.value else {}
    return make_plan(config, topology, load, _COMPILES.value > 0) | modelled


def render(plan: Mapping[str, Any]) -> str:
    """The plan for a reader: the verdict first, in one line."""
    parts = _memory_lines(plan), _time_lines(plan), _kernel_lines(plan), _tried_lines(plan)
    return "\n\n".join([verdict(plan), *("\n".join(lines) for lines in parts if lines)])


def verdict(plan: Mapping[str, Any]) -> str:
    """fits: 61 GiB of 95 … or does not fit: 113 GiB of 95 …"""
    word = "fits" if plan["fits"] else "does not fit"
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    setting = f"{plan['topology']}, {mesh}, microbatch {plan['microbatch']}, remat {plan['remat']}"
    setting += f", attention {plan['attention']}"
    size = f"{plan['peak_gib']:.3g} GiB of {plan['hbm_gib']:.4g} per device"
    size += ", estimated" if plan["bytes_compiled"] is None else ""
    return (
        f"{word}: {size} ({setting}); a step takes at least {plan['step_s_floor']:.3g} s ({plan['bound_by']})"
    )


def _memory_lines(plan: Mapping[str, Any]) -> list[str]:
    lines = [f"memory per device, GiB ({plan['memory_source']})"]
    lines += [f"  {kind:<22}{size:>9.2f}" for kind, size in plan["memory_gib"].items()]
    lines += [f"  peak of the {phase:<11}{size:>8.2f}" for phase, size in plan.get("peaks_gib", {}).items()]
    if plan.get("refused"):
        lines.append(f"  refused by the compiler: {plan['refused']}")
    return lines


def _time_lines(plan: Mapping[str, Any]) -> list[str]:
    prompt, response = plan["tokens"]
    lines = [
        f"one step at {prompt:g} + {response:g} tokens: {plan['flops']:.3g} FLOP on {plan['devices']} devices"
    ]
    for phase, row in plan["phases"].items():
        resources = ", ".join(f"{name} {s:.3g}" for name, s in row["resources"].items())
        lines.append(f"  {phase:<10}{row['seconds']:>9.3f} s, bound by {row['bound_by']} ({resources})")
    moved = ", ".join(f"{axis} {size / 1e9:.3g}" for axis, size in plan["bytes"].items() if size)
    lines.append(f"GB that arrive at a device, by arithmetic at mean widths: {moved or 'none'}")
    for phase, sizes in (plan["bytes_compiled"] or {}).items():
        moved = ", ".join(f"{axes} {size / 1e9:.3g}" for axes, size in sizes.items())
        lines.append(f"  in the compiled {phase}, at full widths: {moved or 'none'}")
    return lines


def _kernel_lines(plan: Mapping[str, Any]) -> list[str]:
    """Times by the kernels against the floors of the phases, and the longest kernels."""
    if "modelled" not in plan:
        return []
    modelled = plan["modelled"]
    lines = ["one step by its compiled kernels, at {} + {} tokens".format(*modelled["widths"])]
    for name, floors in PHASES.items():
        row, floor = modelled[name], sum(plan["phases"][f]["seconds"] for f in floors)
        kinds = ", ".join(f"{kind} {s:.3g}" for kind, s in row["seconds_by_kind"].items())
        memory = ", ".join(f"{kind} {size:.3g}" for kind, size in row["memory_gib"].items())
        lines.append(f"  {name:<10}{row['seconds']:>9.3f} s, {row['seconds'] / floor:.2f} x floor ({kinds})")
        lines.append(f"{'':>12}{row['kernels']} kernels; GiB: {memory}")
        lines += [f"{'':>12}{_kernel_line(k)}" for k in row["top"]]
    total = sum(modelled[name]["seconds"] for name in PHASES)
    return [*lines, f"  {'step':<10}{total:>9.3f} s, {total / plan['step_s_floor']:.2f} x floor"]


def _kernel_line(k: Mapping[str, Any]) -> str:
    """Time, runs, what one run computes and moves, and where the program asks for it."""
    size = f"{k['flops'] / 1e9:.4g} GFLOP, {k['read'] / 1e6:.4g} + {k['written'] / 1e6:.4g} MB"
    source = "/".join(k["source"].split("/")[-2:])
    return f"{k['seconds'] * 1e3:8.2f} ms, {k['runs']:.0f} x {size}: {k['kind']} {k['name']} ({source})"


def _tried_lines(plan: Mapping[str, Any]) -> list[str]:
    if "tried" not in plan:
        return []
    tried = plan["tried"]
    fields = {f"parallel.{axis}": size for axis, size in plan["mesh"].items()} | {"remat": plan["remat"]}
    fields["opd.microbatch"] = plan["microbatch"]
    fields |= {f"sft.{role}.microbatch": size for role, size in plan["sft_microbatch"].items()}
    return [
        f"tried {tried['by_arithmetic']} layouts by arithmetic, {len(tried['compiled'])} compiled; recommended:",
        "  " + " ".join(f"--config.{name}={value}" for name, value in fields.items()),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
