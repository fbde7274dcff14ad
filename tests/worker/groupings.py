"""What worker processes do with the process group, for test_worker_process_group.py."""

from __future__ import annotations

from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ftrain
from ftrain.worker.ordinary_group import ordinary_group
from ftrain.worker.swappable_group import SwappableGroup
from tests.worker.harness import record
from tests.worker.trainings import build, digest

SECONDS = timedelta(seconds=60)


def swapped(path: str, parallel: str, swap_at: int) -> None:
    """Trains six steps; the inner group is another one from step `swap_at` on."""
    run = ftrain.join()
    model, optimizer = build(parallel, run)
    world = dist.group.WORLD
    assert isinstance(world, SwappableGroup)
    for step in range(6):
        if step == swap_at:
            before = world.inner
            store = PrefixStore("second", dist.distributed_c10d._get_default_store())
            world.swap(ordinary_group(store, run.rank, run.world_size, SECONDS, "second", loopback=True))
            assert world.inner is not before
        model(torch.full((2, 6), float(run.rank + step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    record(path, f"swapped-{run.rank}", swap_at=swap_at, digest=digest(model, optimizer))


def everything(path: str) -> None:
    """All of torch.distributed's collectives that gloo has, over the default group and a part of it."""
    run = ftrain.join()
    rank = run.rank
    assert dist.get_backend() == "ftrain"
    half = dist.new_group([0, 1])
    for group in (None, half):
        _collectives(rank, group)
    dist.destroy_process_group(half)
    _objects(rank)
    _tensors(rank)
    record(path, f"done-{rank}", listening=_listening())
    dist.barrier()


def _collectives(rank: int, group: dist.ProcessGroup | None) -> None:
    one = torch.full((2,), rank + 1.0)
    total = one.clone()
    dist.all_reduce(total, group=group)
    assert total.tolist() == [3.0, 3.0]
    work = dist.all_reduce(total, async_op=True, group=group)
    assert work is not None
    work.wait()
    assert total.tolist() == [6.0, 6.0]
    gathered = [torch.zeros(2) for _ in range(2)]
    dist.all_gather(gathered, one, group=group)
    assert [t.tolist() for t in gathered] == [[1.0, 1.0], [2.0, 2.0]]
    flat = torch.zeros(4)
    dist.all_gather_into_tensor(flat, one, group=group)
    assert flat.tolist() == [1.0, 1.0, 2.0, 2.0]
    mine = torch.zeros(1)
    dist.reduce_scatter_tensor(mine, torch.arange(2.0), group=group)
    assert mine.tolist() == [2.0 * rank]
    sent = torch.full((2,), float(rank))
    dist.broadcast(sent, src=1, group=group)
    assert sent.tolist() == [1.0, 1.0]
    reduced = one.clone()
    dist.reduce(reduced, dst=0, group=group)
    assert rank or reduced.tolist() == [3.0, 3.0]
    dist.gather(one, gathered if rank == 0 else None, dst=0, group=group)
    dist.scatter(mine, [torch.zeros(1), torch.ones(1)] if rank == 0 else None, src=0, group=group)
    assert mine.item() == rank
    swapped_ = torch.zeros(2)
    dist.all_to_all_single(swapped_, torch.tensor([rank * 10.0, rank * 10.0 + 1]), group=group)
    assert swapped_.tolist() == [float(rank), 10.0 + rank]
    if rank == 0:
        dist.send(one, 1, group=group)
    else:
        received = torch.zeros(2)
        dist.recv(received, 0, group=group)
        assert received.tolist() == [1.0, 1.0]
    for request in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, one, 1 - rank, group), dist.P2POp(dist.irecv, sent, 1 - rank, group)]
    ):
        request.wait()
    assert sent.tolist() == [2.0 - rank] * 2
    dist.barrier(group=group)


def _objects(rank: int) -> None:
    found: list[object] = [None, None]
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": 0}, {"rank": 1}]
    told: list[object] = ["hello" if rank == 0 else None]
    dist.broadcast_object_list(told, src=0)
    assert told == ["hello"]


def _tensors(rank: int) -> None:
    """DTensor's functional collectives over a mesh with a group for each dimension."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model"))
    whole = torch.arange(8.0).reshape(4, 2)
    sharded = distribute_tensor(whole, mesh["data"], [Shard(0)])
    assert torch.equal(sharded.to_local(), whole[rank * 2 : rank * 2 + 2])
    assert torch.equal(sharded.redistribute(mesh["data"], [Shard(1)]).to_local(), whole[:, rank : rank + 1])
    assert torch.equal(sharded.redistribute(mesh["data"], [Replicate()]).to_local(), whole)
    assert isinstance(sharded, DTensor)
    assert sharded.sum().full_tensor().item() == whole.sum()
    assert mesh.get_group("model").size() == 1


def _listening() -> list[str]:
    """Addresses on which this process listens, as the kernel writes them."""
    return [found.laddr.ip for found in psutil.Process().net_connections() if found.status == "LISTEN"]
