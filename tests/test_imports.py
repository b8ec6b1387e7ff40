"""Imports run down the rooms' order, and no two modules need each other, imports within functions included."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "starflow2_jax"
# A room is a folder of the package or a module at its top. Each may import itself and the rooms above it in this list.
ROOMS = (
    "errors",
    "text_files",
    "extensions",
    "fields",
    "random_streams",
    "sequence",
    "stages",
    "parallel",
    "models",
    "codecs",
    "data",
    "config",
    "checkpoints",
    "weights",
    "sampling",
    "training",
    "evaluation",
    "api",
    "serving",
    "planning",
    "sweeps",
    "benchmarks",
    "experiments",
    "commands",
    "cli",
)


def modules() -> dict[str, ast.Module]:
    """Dotted name within the package ("training.loop") -> its syntax tree. Empty __init__ files are left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if (tree := ast.parse(path.read_text())).body:
            found[name] = tree
    return found


def imported(tree: ast.Module, names: set[str]) -> set[str]:
    """Modules of the package that a module imports: at its top, in functions, under TYPE_CHECKING."""
    asked = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports with the package's name"
            asked |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {name.removeprefix(f"{PACKAGE.name}.") for name in asked if name and name.startswith(f"{PACKAGE.name}.")}
    return own & names


def graph() -> dict[str, set[str]]:
    trees = modules()
    return {name: imported(tree, set(trees)) - {name} for name, tree in trees.items() if name != "__init__"}


def upward(edges: dict[str, set[str]], rooms: tuple[str, ...]) -> list[str]:
    def height(name: str) -> int:
        return rooms.index(name.partition(".")[0])

    return [f"{a} -> {b}" for a, targets in edges.items() for b in sorted(targets) if height(b) > height(a)]


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that need each other, directly or through others."""
    reached: dict[str, set[str]] = defaultdict(set)
    for start in edges:
        todo = [start]
        while todo:
            for target in edges[todo.pop()] - reached[start]:
                reached[start].add(target)
                todo.append(target)
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in edges if a in reached[a]}
    return sorted(map(set, found), key=sorted)


def test_every_room_has_its_place():
    assert {name.partition(".")[0] for name in graph()} == set(ROOMS)


def test_imports_run_down():
    assert upward(graph(), ROOMS) == []


def test_no_modules_need_each_other():
    assert circles(graph()) == []


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("import starflow2_jax.training.loop", {"training.loop"}),
        ("def f():\n    from starflow2_jax.training import loop, step", {"training.loop", "training.step"}),
        ("if TYPE_CHECKING:\n    from starflow2_jax.training.loop import Trainer", {"training.loop"}),
        ("import jax", set()),
    ],
)
def test_what_is_seen_of_imports(source, wanted):
    assert imported(ast.parse(source), {"training.loop", "training.step"}) == wanted


def test_what_is_wrong_is_found():
    edges = {"low.a": {"low.b"}, "low.b": {"low.c"}, "low.c": {"low.a", "high"}, "high": {"low.a"}, "other": {"high"}}
    assert upward(edges, ("low", "high", "other")) == ["low.c -> high"]
    assert circles(edges) == [{"low.a", "low.b", "low.c", "high"}]
    assert circles({"a": {"b"}, "b": set()}) == []
