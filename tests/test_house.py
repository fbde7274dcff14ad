"""The house keeps its order: who may import whom, what may never be called, and how long a file may grow.

docs/architecture.md has the layers. Imports are read from the syntax tree, wherever in a file they stand; those under
`if TYPE_CHECKING:` do not count, for they never run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ftrain"
LINES_MAX = 500

# What each part of ftrain may import of ftrain, besides itself. "" is ftrain/__init__.py with its public names.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "core": {"errors"},
    "spec": {"core", "errors"},
    "_native": set(),
    "storage": {"core", "errors", "_native"},
    "control": {"storage", "core", "errors", "spec", "_native", ""},
    "checkpoint": {"storage", "control", "core", "errors", "spec", "_native", ""},
    "agent": {"checkpoint", "control", "storage", "core", "errors", "spec", "_native", ""},
    "worker": {"checkpoint", "control", "storage", "core", "errors", "spec", "_native", ""},
    "cli": {"agent", "worker", "checkpoint", "control", "storage", "core", "errors", "spec", "_native", ""},
    "": {"worker", "checkpoint", "errors"},
    "__main__": {"cli"},
}

IMPURE = {
    "aiohttp", "asyncio", "multiprocessing", "numcodecs", "numpy", "os", "pathlib", "psutil", "random", "secrets",
    "select", "selectors", "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time", "torch",
    "zarr",
}  # fmt: skip

# Below these, a file may import torch: the training process, and what holds tensors.
TORCH_ALLOWED = ("worker/", "checkpoint/")
# The agent and the coordinator import these parts of checkpoint/, so they must start without torch.
STARTS_WITHOUT_TORCH = ("", "errors", "spec", "core", "storage", "control", "agent", "cli")

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "torch.jit.load", "numpy.load", "np.load", "os.system"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


FILES = python_files("ftrain")
TEXT_FILES = [
    *python_files("ftrain", "tests", "examples", "bench"),
    *sorted(PACKAGE.rglob("*.pyi")),
    *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()),
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)
each_text = pytest.mark.parametrize("path", TEXT_FILES, ids=name_of)


def part_of(path: Path) -> str:
    """The name in ARROWS of the part of ftrain that holds a file."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree, except the bodies of `if TYPE_CHECKING:`."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from running_nodes(child)


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives both "a" and "a.b", for b may be a module."""
    found: list[tuple[int, str]] = []
    for node in running_nodes(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import: write the whole name"
            assert node.module is not None
            if node.module != "ftrain":
                found.append((node.lineno, node.module))
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def imported_part(name: str) -> str | None:
    """The part of ftrain that a dotted name belongs to, None for other packages."""
    first, _, rest = name.partition(".")
    if first != "ftrain":
        return None
    part = rest.partition(".")[0]
    return part if part in ARROWS else ""


@each_file
def test_file_belongs_to_a_known_part(path: Path) -> None:
    assert part_of(path) in ARROWS, f"{name_of(path)} is in no part that tests/test_house.py knows: place it or add it"


@each_file
def test_imports_follow_the_arrows(path: Path) -> None:
    part = part_of(path)
    allowed = ARROWS.get(part, set()) | {part}
    wrong = [
        f"{name_of(path)}:{line}: {part or 'ftrain'} may not import {name}"
        for line, name in imports(path)
        if (target := imported_part(name)) is not None and target not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in ("core", "errors")], ids=name_of)
def test_core_is_pure(path: Path) -> None:
    wrong = [
        f"{name_of(path)}:{line}: the core decides without clock, file, socket, thread or tensor, but imports {name}"
        for line, name in imports(path)
        if name.partition(".")[0] in IMPURE
    ]
    assert not wrong, "\n".join(wrong)


@each_file
def test_torch_is_imported_only_where_tensors_are(path: Path) -> None:
    inside = str(path.relative_to(PACKAGE)).startswith(TORCH_ALLOWED)
    wrong = [
        f"{name_of(path)}:{line}: torch belongs in {' and '.join(TORCH_ALLOWED)}, not here"
        for line, name in imports(path)
        if name.partition(".")[0] == "torch" and not inside
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", STARTS_WITHOUT_TORCH, ids=lambda part: part or "ftrain")
def test_part_starts_without_torch(part: str) -> None:
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES if part_of(p) == part]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'importing {name} brings torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@each_file
def test_nothing_runs_code_from_data(path: Path) -> None:
    wrong = [
        f"{name_of(path)}:{line}: {name} can run code that the data brings"
        for line, name in imports(path)
        if name.partition(".")[0] in FORBIDDEN_MODULES
    ]
    wrong += [
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node.func)}(...) is not for this house"
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS
    ]
    assert not wrong, "\n".join(wrong)


@each_file
def test_annotations_are_not_evaluated(path: Path) -> None:
    first_line = "from __future__ import annotations"
    assert first_line in path.read_text() or len(ast.parse(path.read_text()).body) <= 1, (
        f"{name_of(path)} lacks `{first_line}`"
    )


@each_text
def test_file_is_short_enough_to_read(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LINES_MAX, f"{name_of(path)} has {lines} lines, {LINES_MAX} is the most: it is two files"


@each_text
def test_no_work_is_left_as_a_mark(path: Path) -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")
    wrong = [
        f"{name_of(path)}:{number}: {mark}: do it, or open an issue"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for mark in marks
        if mark in line.split() or f"{mark}:" in line or f"{mark}(" in line
    ]
    assert not wrong, "\n".join(wrong)
