"""Public functions, classes and methods have docstrings and annotations, and no file is too long to read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "starflow2_jax"
LONGEST = 400  # lines
CALLED = ("__init__", "__call__")  # special methods whose arguments users write
FLAX = "setup"  # Flax calls it; the class's docstring says what it makes
FILES = sorted(PACKAGE.rglob("*.py"))

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes and functions with their qualified names, and the public and called methods of those classes."""
    for node in body:
        if isinstance(node, Definition) and (not node.name.startswith("_") or prefix and node.name in CALLED):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{node.name}.")


def faults(source: str) -> list[str]:
    """What public definitions of a module lack, one line each."""
    found = []
    for name, node in definitions(ast.parse(source).body):
        if node.name == FLAX:
            continue
        if ast.get_docstring(node) is None and node.name not in CALLED:
            found.append(f"{name} has no docstring")
        if isinstance(node, ast.ClassDef):
            continue
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if bare:
            found.append(f"{name} does not annotate {', '.join(bare)}")
        if node.returns is None and node.name != "__init__":
            found.append(f"{name} does not annotate what it returns")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_have_docstrings_and_annotations(path):
    assert faults(path.read_text(encoding="utf-8")) == []


def test_faults_are_found():
    source = (
        "class A:\n def __init__(self, x):\n  pass\n def m(self):\n  'doc'\n def _p(self, y): pass\n"
        "def f(a: int, *b, **c) -> int:\n 'doc'\n def inner(z): pass\n"
    )
    assert faults(source) == [
        "A has no docstring",
        "A.__init__ does not annotate x",
        "A.m does not annotate what it returns",
        "f does not annotate b, c",
    ]


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("starflow2_jax", "benchmarks", "tests")
        for path in (ROOT / folder).glob("**/*.py")
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
