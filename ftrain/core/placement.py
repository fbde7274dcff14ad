"""How DTensor cuts a tensor: from placements and a rank's coordinate in the mesh to indexes of each dimension.

A placement is written "R" (replicated), "S<dim>" (sharded) or "S<dim>/<factor>" (sharded with strides: the dimension
was cut into `factor` parts before, and of each of them this mesh dimension takes its share).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

REPLICATED = "R"

Run = tuple[int, int]  # begin and count of neighbouring indexes


def sharded(dim: int, factor: int = 1) -> str:
    """The placement that shards a dimension."""
    return f"S{dim}" if factor == 1 else f"S{dim}/{factor}"


def local_runs(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[str]
) -> list[list[Run]]:
    """For each dimension the runs of indexes that are there, in the order in which they lie in the local tensor.

    Mesh dimensions cut in their order, each what the ones before left, into chunks of ceil(size / ranks). Source:
    torch's `_compute_local_shape_and_global_offset`. There is one exception, which `_order` has.
    """
    runs = [[(0, size)] for size in shape]
    cuts: dict[int, list[tuple[int, int, int]]] = {}  # by dimension: ranks, which of them, factor
    for ranks, at, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement != REPLICATED:
            dim, factor = _parsed(placement)
            cuts.setdefault(dim, []).append((ranks, at, factor))
    for dim, made in cuts.items():
        for ranks, at, factor in _order(made):
            runs[dim] = _share(runs[dim], ranks, at, factor)
    return runs


def _parsed(placement: str) -> tuple[int, int]:
    dim, _, factor = placement[1:].partition("/")
    return int(dim), int(factor or 1)


def _order(cuts: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The cuts of one dimension in the order in which they were made.

    `fully_shard` cuts what tensor parallelism left, so the mesh dimensions on its right come first, and says so by a
    factor that is the number of their shards. Where sizes are uneven this is not the same as taking a share of each
    part, which is what DTensor makes of that placement: what lies in memory is what `fully_shard` did.
    """
    ordered: list[tuple[int, int, int]] = []
    for place in reversed(range(len(cuts))):
        ranks, at, factor = cuts[place]
        if factor == 1:
            ordered.insert(0, (ranks, at, 1))
        elif factor == prod(ranks for ranks, _, _ in cuts[place + 1 :]):
            ordered.append((ranks, at, 1))
        else:
            return cuts
    return ordered


def _share(runs: list[Run], ranks: int, at: int, factor: int) -> list[Run]:
    """Of each of `factor` parts of the runs, the chunk that the rank `at` of `ranks` gets."""
    size = sum(count for _, count in runs)
    found: list[Run] = []
    for part in range(factor):
        begin, count = _chunk(size, factor, part)
        inner, count = _chunk(count, ranks, at)
        found += _within(runs, begin + inner, count)
    return _joined(found)


def _chunk(size: int, parts: int, number: int) -> Run:
    chunk = -(-size // parts)
    begin = min(number * chunk, size)
    return begin, min(chunk, size - begin)


def _within(runs: list[Run], begin: int, count: int) -> list[Run]:
    """What lies at `begin` of the runs laid end to end."""
    found = []
    for start, length in runs:
        first, last = max(begin, 0), min(begin + count, length)
        if first < last:
            found.append((start + first, last - first))
        begin -= length
    return found


def _joined(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    for begin, count in runs:
        if joined and sum(joined[-1]) == begin:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((begin, count))
    return joined
