"""The rooms of the code: who imports whom, with no arrow back up, and how long a function may be."""

import ast
import builtins
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("listopd_jax", "launch", "benchmarks", "configs")
LONGEST = 60  # lines of a function

ARROWS = {
    "plan": "stages config train rollout models ops parallel data lifecycle rounding errors",
    "prereg": "main config records theory files errors",
    "export": "config stages report models lifecycle errors",
    "evaluate": "main config stages report parallel lifecycle errors",
    "label": "config data task lifecycle metrics_log files errors",
    "forecast": "config main stages data parallel records lifecycle errors",
    "watch": "report metrics_log records files errors",
    "main": "stages config report parallel records lifecycle trackers files errors",
    "stages": "config train rollout models ops parallel tasks data task recommend records theory lifecycle "
    "metrics_log trackers files rounding errors",
    "config": "models trackers task files errors",
    "train": "rollout models ops parallel metrics_log trackers lifecycle files errors",
    "report": "recommend records metrics_log task files rounding errors",
    "rollout": "models ops parallel rounding",
    "models": "ops parallel data lifecycle files errors",
    "simulate": "ops theory files rounding errors",
    "ops": "parallel rounding errors",
    "parallel": "files rounding errors",
    "tasks": "data task files errors",
    "data": "task metrics_log files rounding errors",
    "task": "rounding errors",
    "recommend": "records",
    "records": "files errors",
    "theory": "errors",
    "lifecycle": "errors",
    "metrics_log": "trackers files errors",
    "trackers": "files errors",
    "files": "errors",
    "rounding": "",
    "errors": "",
}
"""What each room of listopd_jax imports from others, in the order of README's list: downwards only."""


def modules(package: str) -> dict[str, ast.Module]:
    """The syntax trees of a package by dotted name; a package's own name stands for its __init__."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    return {name: ast.parse(path.read_text("utf-8")) for name, path in zip(names, paths, strict=True)}


TREES = {name: tree for package in PACKAGES for name, tree in modules(package).items()}


def imported(tree: ast.Module) -> set[str]:
    """The modules of this repository that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= full & TREES.keys() or {node.module}
    return found & TREES.keys()


def room(module: str) -> str:
    """plan of listopd_jax.plan.chips, errors of listopd_jax.errors, launch of launch.grid."""
    parts = module.split(".")
    return parts[1] if parts[0] == "listopd_jax" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_imports_what_its_arrows_say_and_no_more(name):
    used = {
        m: imported(tree) for m, tree in TREES.items() if m.startswith("listopd_jax.") and room(m) == name
    }
    arrows = {room(target) for targets in used.values() for target in targets} - {name}
    assert arrows == set(ARROWS[name].split()), used


def test_every_room_has_its_arrows_and_all_run_down():
    rooms = {room(m) for m in TREES if m.startswith("listopd_jax.")}
    assert rooms == ARROWS.keys()
    order = list(ARROWS)
    for name, arrows in ARROWS.items():
        below = order[order.index(name) + 1 :]
        assert set(arrows.split()) <= set(below), name


def test_readme_lists_the_rooms_in_the_same_order():
    section = (ROOT / "README.md").read_text("utf-8").split("\n## The code\n")[1].split("\n## ")[0]
    listed = re.findall(r"^    ([a-z_]+)(?:/|\.py)  ", section, re.M)
    assert listed == list(ARROWS)


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imported(tree) - {name} for name, tree in TREES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_function_is_too_long():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, functions) and node.end_lineno - node.lineno >= LONGEST
    ]
    assert not long


def undefined(tree: ast.Module) -> set[str]:
    """Names that a module reads and nothing in it binds; shape strings of jaxtyping are no names."""
    bound = {*dir(builtins), "__file__", "__name__", "__doc__", "__path__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - bound


def test_every_name_is_defined():
    """The linter's own check is off, because it takes shape strings for names."""
    assert undefined(ast.parse("import a.b as c\ndef f(x): return c, x, len, y")) == {"y"}
    assert {name: found for name, tree in TREES.items() if (found := undefined(tree))} == {}
