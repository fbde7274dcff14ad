"""What a power cut may leave of a file system: every state that POSIX allows, no more is promised than was synced.

Content that was written but not synced may be there, absent, zero or torn, each 4 KiB for itself, whatever the file's
size. A name that was made or removed is on the disk once its directory was synced; until then it may be there or not,
each name for itself. `link`, `rename` and `unlink` of one name are atomic. A sync that failed promises nothing, nor
does a later one for what was pending then.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

BLOCK_BYTES = 4096

# What a state is made of: a file is its content, a link is where it leads, a directory is sorted (name, what is there).
State = bytes | str | tuple[tuple[str, "State"], ...]


@dataclass(frozen=True, slots=True)
class Op:
    """Something that was done to the file system, in order."""

    kind: str  # mkdir, create, write, sync, link, symlink, rename, unlink, rmdir
    path: str
    other: str = ""  # where `link` and `rename` go, and what `symlink` leads to
    content: bytes = b""  # of the whole file, after `write`
    failed: bool = False  # `sync`


@dataclass(slots=True)
class _File:
    synced: bytes = b""
    current: bytes = b""
    poisoned: bool = False  # a sync failed: what was written until then is on the disk only by luck


@dataclass(slots=True)
class _Directory:
    durable: dict[str, _Node] = field(default_factory=dict)
    pending: dict[str, list[_Node | None]] = field(default_factory=dict)  # what became of a name since the last sync
    poisoned: dict[str, int] = field(default_factory=dict)  # by name, how many of these a failed sync was asked for

    def get(self, name: str) -> _Node | None:
        changes = self.pending.get(name)
        return changes[-1] if changes else self.durable.get(name)

    def put(self, name: str, node: _Node | None) -> None:
        self.pending.setdefault(name, []).append(node)

    def sync(self, failed: bool) -> None:
        if failed:
            self.poisoned.update({name: len(changes) for name, changes in self.pending.items()})
            return
        for name, changes in list(self.pending.items()):
            if len(changes) <= self.poisoned.get(name, 0):
                continue
            del self.pending[name]
            if changes[-1] is None:
                self.durable.pop(name, None)
            else:
                self.durable[name] = changes[-1]


@dataclass(frozen=True, slots=True)
class _Link:
    """On the disk with its name: all of it, or nothing."""

    to: str


_Node = _File | _Directory | _Link


class Disk:
    """A file system that operations are applied to, and that may lose power after any of them."""

    def __init__(self, state: State = ()) -> None:
        """`state` is what is there from the beginning, durably."""
        root = _built(state)
        assert isinstance(root, _Directory)
        self._root = root

    def apply(self, op: Op) -> None:
        directory, name = self._parent(op.path)
        match op.kind:
            case "mkdir":
                directory.put(name, _Directory())
            case "create":
                directory.put(name, _File())
            case "write":
                file = directory.get(name)
                assert isinstance(file, _File), op
                file.current = op.content
            case "sync":
                node = self._root if not op.path else directory.get(name)
                self._sync(node, op.failed)
            case "link" | "rename":
                to, other = self._parent(op.other)
                to.put(other, directory.get(name))
                if op.kind == "rename":
                    directory.put(name, None)
            case "symlink":
                directory.put(name, _Link(op.other))
            case "unlink" | "rmdir":
                directory.put(name, None)

    def now(self) -> State:
        """What a process sees: everything that was done, in its newest form."""
        return _seen(self._root)

    def count(self) -> int:
        """How many states a power cut may leave now, if all choices are independent."""
        return _count(self._root)

    def states(self, most: int, dice: random.Random) -> Iterator[State]:
        """The states that a power cut may leave now: all if there are no more than `most`, else so many."""
        if self.count() <= most:
            yield from _states(self._root)
            return
        yield self.now()
        for _ in range(most - 1):
            yield _drawn(self._root, dice)

    def _sync(self, node: _Node | None, failed: bool) -> None:
        if isinstance(node, _Directory):
            node.sync(failed)
        elif isinstance(node, _File):
            if failed:
                node.poisoned = True
            elif not node.poisoned:
                node.synced = node.current

    def _parent(self, path: str) -> tuple[_Directory, str]:
        node: _Node | None = self._root
        *parents, name = path.split("/")
        for part in parents:
            assert isinstance(node, _Directory), path
            node = node.get(part)
        assert isinstance(node, _Directory), path
        return node, name


def variants(file: _File) -> list[bytes]:
    """What may be read from a file after a power cut."""
    old, new = file.synced, file.current
    if old == new:
        return [new]
    bounds = range(0, max(len(old), len(new)), BLOCK_BYTES)
    sizes = {len(old), len(new), len(new) // 2, *(size for size in bounds if size > len(old))}
    found: dict[bytes, None] = {}
    for size in sizes:
        blocks = [_block_variants(old, new, begin, min(size, begin + BLOCK_BYTES)) for begin in bounds if begin < size]
        for choice in itertools.product(*blocks):
            found[b"".join(choice)] = None
    return list(found)


def _block_variants(old: bytes, new: bytes, begin: int, end: int) -> list[bytes]:
    before, after = (data[begin:end].ljust(end - begin, b"\0") for data in (old, new))
    half = (end - begin) // 2
    return list(dict.fromkeys([before, after, bytes(end - begin), after[:half] + before[half:]]))


def _choices(directory: _Directory) -> list[tuple[str, list[_Node | None]]]:
    """Each name, and what may be under it."""
    names = sorted(directory.durable.keys() | directory.pending.keys())
    found = []
    for name in names:
        nodes: list[_Node | None] = []
        for node in [directory.durable.get(name), *directory.pending.get(name, [])]:
            if not any(node is other for other in nodes):
                nodes.append(node)
        found.append((name, nodes))
    return found


def _count(node: _Node) -> int:
    if isinstance(node, _File):
        return len(variants(node))
    if isinstance(node, _Link):
        return 1
    return prod(sum(1 if choice is None else _count(choice) for choice in nodes) for _, nodes in _choices(node))


def _states(node: _Node) -> list[State]:
    if isinstance(node, _File):
        return list(variants(node))
    if isinstance(node, _Link):
        return [node.to]
    names, options = [], []
    for name, nodes in _choices(node):
        names.append(name)
        under: list[State | None] = []
        for choice in nodes:
            under += [None] if choice is None else _states(choice)
        options.append(under)
    return [
        tuple((name, state) for name, state in zip(names, combination, strict=True) if state is not None)
        for combination in itertools.product(*options)
    ]


def _drawn(node: _Node, dice: random.Random) -> State:
    if isinstance(node, _File):
        return dice.choice(variants(node))
    if isinstance(node, _Link):
        return node.to
    found = []
    for name, nodes in _choices(node):
        choice = dice.choice(nodes)
        if choice is not None:
            found.append((name, _drawn(choice, dice)))
    return tuple(found)


def _seen(node: _Node) -> State:
    if isinstance(node, _File):
        return node.current
    if isinstance(node, _Link):
        return node.to
    seen = [(name, node.get(name)) for name in sorted(node.durable.keys() | node.pending.keys())]
    return tuple((name, _seen(child)) for name, child in seen if child is not None)


def _built(state: State) -> _Node:
    if isinstance(state, bytes):
        return _File(state, state)
    if isinstance(state, str):
        return _Link(state)
    return _Directory({name: _built(child) for name, child in state})
