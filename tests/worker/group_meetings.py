"""What the ranks of ranks.py do with groups themselves, for the tests of groups that meet, and of ranks alone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ftrain.errors import FtrainError, PeerLost, Unrecoverable
from ftrain.worker import after_failure, gloo_sockets, groups
from tests.worker.ranks import Rank

SETTLED_SECONDS = 60.0  # within which destructors of other threads are done


def blocked(rank: Rank, how: str) -> None:
    """Every rank waits for one that lives, and for the last one, which stops itself."""
    mesh = init_device_mesh("cpu", (rank.size,))
    part = dist.new_group(list(range(rank.size)))
    own = torch.ones(4)
    dist.all_reduce(own)
    if rank.rank == rank.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    reduced = DistributedDataParallel(nn.Linear(2, 2), init_sync=False)
    rank.say("waits")
    try:
        if how == "chain":
            dist.recv(own, rank.rank + 1)
        elif how == "mesh":
            dist.all_reduce(own, group=mesh.get_group())
        elif how == "reducer":
            reduced(torch.ones(1, 2)).sum().backward()
        else:
            dist.all_reduce(own, group=part)
    except RuntimeError as error:
        rank.say("raised", str(error))
    rank.next_generation()
    _say_what_collectives_raise(rank, [None, part, mesh.get_group()])


def in_the_middle(rank: Rank, broken: str) -> None:
    """A message of rank 0 to rank 1 of which one of them has half in memory: its end of the connection fails there."""
    whole, half = 32 << 20, 16 << 20
    path = rank.path / f"message-{rank.rank}"
    path.write_bytes(bytes(whole))
    message = torch.from_file(str(path), shared=True, size=whole, dtype=torch.uint8)
    dist.barrier()
    if broken == ("sender", "receiver")[rank.rank]:
        os.truncate(path, half)
    rank.say("waits")
    try:
        if rank.rank == 0:
            dist.send(message, 1)
        else:
            dist.recv(message, 0)
    except RuntimeError as error:
        rank.say("raised", str(error))
    rank.next_generation()


def waiting(rank: Rank) -> None:
    """Rank 0 waits for rank 1, which is idle."""
    dist.barrier()
    if rank.rank == 0:
        try:
            dist.recv(torch.ones(4), 1)
        except RuntimeError as error:
            rank.say("raised", str(error))
    else:
        rank.say("idle")
    rank.next_generation()


def idle(rank: Rank) -> None:
    """Revoked while nothing is under way."""
    part = dist.new_group([0])
    dist.barrier()
    rank.say("idle")
    rank.next_generation()
    _say_what_collectives_raise(rank, [None, part] if rank.rank == 0 else [None])
    rank.connect()
    own = torch.ones(1)
    dist.all_reduce(own)
    rank.say("sum", own.item())
    dist.barrier()


def _say_what_collectives_raise(rank: Rank, of: list[Any]) -> None:
    raised = []
    for group in of:
        try:
            dist.all_reduce(torch.ones(4), group=group)
        except PeerLost as error:
            raised.append(str(error))
    rank.say("later", raised)


def swapped(rank: Rank, times: int) -> None:
    """Revoked and connected again, over and over; says how many descriptors and threads there are at times."""
    part = dist.new_group(list(range(rank.size)))
    for number in range(times):
        own = torch.ones(8)
        dist.all_reduce(own)
        dist.all_reduce(own, group=part)
        assert own[0] == rank.size**2
        if number in (times // 10, times - 1):
            rank.say("open", *_settled_counts())
        generation = rank.next_generation()
        if number % 3 == 0:  # with a collective that its peer has not begun
            rank.store.set(f"begun/{generation}", "")
            if rank.rank == 0:
                with contextlib.suppress(RuntimeError, PeerLost):
                    dist.broadcast(own, src=1)
        groups.revoke(generation - 1)
        if number % 2:
            groups.rehearse()
            dist.all_reduce(own)
        rank.connect()
    dist.barrier()


def _settled_counts() -> tuple[int, int]:
    """(open descriptors, threads) once they stand still."""
    seen: list[tuple[int, int]] = []
    deadline = time.monotonic() + SETTLED_SECONDS
    while time.monotonic() < deadline and not (len(seen) > 9 and len(set(seen[-10:])) == 1):
        seen.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
        time.sleep(0.05)
    return seen[-1]


def interrupted(rank: Rank) -> None:
    """Rank 0 connects with a peer that never comes, is revoked, then connects with one that does."""
    dist.barrier()
    rank.next_generation()
    if rank.rank == 0:
        for _ in range(2):
            rank.say("connecting")
            try:
                rank.connect()
            except PeerLost as error:
                rank.say("raised", str(error))
            rank.next_generation()
    else:
        while rank.next_generation() < 4:
            pass
    rank.connect()
    dist.barrier()
    rank.say("connected")


def overtaken(rank: Rank) -> None:
    """Connects in each generation that it is told of, until it succeeds. Then it is told of an old one."""
    dist.barrier()
    rank.say("ready")
    while True:
        rank.next_generation()
        try:
            rank.connect()
        except PeerLost as error:
            rank.say("raised", str(error))
        else:
            break
    dist.barrier()
    rank.say("connected", rank.generation)
    rank.next_generation()
    dist.barrier()
    rank.say("still connected", groups.is_revoked())


def met_later(rank: Rank) -> None:
    """Groups made after a newcomer was met; the survivor has made and destroyed one more before."""
    half = dist.new_group(list(range(rank.size)))
    if not rank.alone:
        more = dist.new_group(list(range(rank.size)))
        dist.barrier()  # whoever has connected first would otherwise hang up on those that are still connecting
        dist.destroy_process_group(more)
        dist.barrier()
        rank.say("met")
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        rank.next_generation()
    rank.connect()
    later = dist.new_group(list(range(rank.size)))
    mesh = init_device_mesh("cpu", (rank.size,))
    for group in (None, half, later, mesh.get_group()):
        own = torch.ones(1)
        dist.all_reduce(own, group=group)
        assert own.item() == rank.size
    rank.say("summed", later.group_name)
    dist.barrier()


def unequal(rank: Rank) -> None:
    """The survivor has a group that the newcomer has not made."""
    if not rank.alone:
        extra = dist.new_group(list(range(rank.size)))
        dist.barrier(group=extra)
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        rank.next_generation()
    try:
        rank.connect()
    except (Unrecoverable, PeerLost) as error:
        rank.say(type(error).__name__, str(error))


def beside_strangers(rank: Rank) -> None:
    """Sockets that are not gloo's, some where gloo's were, outlive a revoke."""
    watched = select.epoll()
    listening = socket.create_server(("127.0.0.1", 0))
    watched.register(listening)
    client = socket.create_connection(listening.getsockname())
    server, _ = listening.accept()
    plain = dist.new_group([0, 1], backend="gloo")
    dist.barrier()
    dist.barrier(group=plain)
    gloo_sockets.shut_down()
    client.sendall(b"still there")
    assert server.recv(20) == b"still there"
    dist.barrier(group=plain)
    groups.revoke(1)
    groups.rehearse()  # closes what gloo had
    pairs = [socket.socketpair() for _ in range(8)]
    gloo_sockets.shut_down()
    for one, other in pairs:
        one.sendall(b"new")
        assert other.recv(3) == b"new"
    rank.say("untouched")
    rank.next_generation()


# ------------------------------------------------------------------------------------------------------------ alone


def every_collective(rank: Rank) -> None:
    """All of torch.distributed's collectives, with nobody there: what is given comes back, nothing stays unfilled."""
    size, me = rank.size, rank.rank
    own = torch.tensor([1.0, 2.0])
    total = own.clone()
    dist.all_reduce(total)
    work = dist.all_reduce(total, async_op=True)
    assert work is not None
    work.wait()
    assert work.get_future().value()[0] is total
    dist.reduce(total, dst=0)
    dist.broadcast(total, src=size - 1)
    assert total.tolist() == [1.0, 2.0]
    gathered = _unfilled(size)
    dist.all_gather(gathered, own)
    assert all(torch.equal(one, own) for one in gathered)
    flat = torch.full((2 * size,), torch.nan)
    dist.all_gather_into_tensor(flat, own)
    assert flat.tolist() == [1.0, 2.0] * size
    mine = torch.full((1,), torch.nan)
    dist.reduce_scatter_tensor(mine, torch.arange(float(size)))
    assert mine.item() == me
    dist.reduce_scatter(mine, [torch.tensor([10.0 * one]) for one in range(size)])
    assert mine.item() == 10 * me
    gathered = _unfilled(size)
    dist.gather(own, gathered if me == 0 else None, dst=0)
    assert me != 0 or all(torch.equal(one, own) for one in gathered)
    dist.scatter(mine, [torch.ones(1)] * size if me == 0 else None, src=0)
    assert mine.item() == (1.0 if me == 0 else 0.0)
    swapped_ = torch.full((3,), torch.nan)
    dist.all_to_all_single(swapped_, own, output_split_sizes=[1, 2, 0], input_split_sizes=[0, 1, 1])
    assert swapped_.isfinite().all()
    gathered = _unfilled(size)
    dist.all_to_all(gathered, [own] * size)
    assert all(torch.equal(one, own) for one in gathered)
    received = torch.full((2,), torch.nan)
    dist.send(own, (me + 1) % size)
    dist.recv(received, (me + 1) % size)
    assert received.tolist() == [0.0, 0.0]
    received.fill_(torch.nan)
    assert dist.recv(received) == (me + 1) % size
    assert received.tolist() == [0.0, 0.0]
    for request in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, own, (me + 1) % size), dist.P2POp(dist.irecv, received, (me + 1) % size)]
    ):
        request.wait()
    found: list[object] = [None] * size
    dist.all_gather_object(found, {"rank": me})
    assert found == [{"rank": me}] * size
    told: list[object] = ["mine"]
    dist.broadcast_object_list(told, src=me)
    assert told == ["mine"]
    with contextlib.suppress(Unrecoverable):
        dist.broadcast_object_list(told, src=(me + 1) % size)
        rank.say("made an object of nothing")
    dist.barrier()
    part = dist.new_group([1, me])
    assert dist.get_world_size(part) == 2
    dist.barrier(group=part)
    assert rank.collectives == 0
    rank.say("done")


def _unfilled(size: int) -> list[torch.Tensor]:
    return [torch.full((2,), torch.nan) for _ in range(size)]


class Failed(Exception):
    """What a step in these trainings raises."""


def recovered(rank: Rank, kind: str, where: str, at: int) -> None:
    """Trains alone, twice: the second time a step raises at some place, is recovered and done again."""
    ends = []
    for fails in (False, True):
        network, model = _built(kind, rank)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        failing = _Failing(network, where)
        failing.armed = False
        for step in range(4):
            layouts = after_failure.bucket_layouts([model])
            if fails and step == at:
                failing.armed = True
                with contextlib.suppress(Failed):
                    _train(model, optimizer, step, failing)
                    rank.say("did not fail")
                failing.armed = False
                after_failure.recover_modules([model], first_step=step == 0)
                assert all(parameter.grad is None for parameter in network.parameters())
                if layouts != [None]:
                    assert after_failure.bucket_layouts([model]) == layouts
            _train(model, optimizer, step, failing)
        ends.append([p.detach().clone() for p in network.parameters()])
        if kind == "ddp":
            assert model.reducer._rebuild_buckets() is False  # or survivors would broadcast where newcomers do not
    for plain, hurt in zip(*ends, strict=True):
        plain, hurt = (one.to_local() if kind == "fsdp" else one for one in (plain, hurt))
        assert torch.equal(plain, hurt)
    rank.say("equal")


def _built(kind: str, rank: Rank) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 1))
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (rank.size,))
        for layer in (network[0], network[2]):
            fully_shard(layer, mesh=mesh)
        return network, fully_shard(network, mesh=mesh)
    return network, DistributedDataParallel(
        network,
        bucket_cap_mb=1 / 4096,
        find_unused_parameters=kind == "ddp unused",
        gradient_as_bucket_view=kind == "ddp views",
    )


class _Failing:
    def __init__(self, network: nn.Module, where: str) -> None:
        self.armed = False
        self._where = where
        network[3].register_forward_hook(self._forward)  # type: ignore[index]

    def at(self, where: str) -> None:
        if self.armed and where == self._where:
            raise Failed(where)

    def _forward(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        self.at("forward")
        output.register_hook(lambda _gradient: self.at("backward"))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, failing: _Failing) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(4, 6, generator=generator)).square().sum().backward()
    failing.at("optimizer")
    optimizer.step()
    optimizer.zero_grad()


def unrecoverable(rank: Rank) -> None:
    """Modules that torch gives no way out for."""
    _, static = _built("ddp", rank)
    static._set_static_graph()
    _, sharded = _built("fsdp", rank)
    sharded(torch.ones(1, 6))
    sharded.reset_iter_state = _absent
    _, small = _built("ddp", rank)
    for what, does in {
        "static": lambda: after_failure.recover_modules([static]),
        "other modules": lambda: after_failure.lay_out_buckets([small], [None, None]),
        "other parameters": lambda: after_failure.lay_out_buckets([small], [[[0, 1]]]),
        "a name": lambda: after_failure.recover_modules([sharded]),
    }.items():
        _say_refusal(rank, what, does)


def _absent() -> None:
    raise AttributeError("no such name in this torch")


def _say_refusal(rank: Rank, what: str, does: Callable[[], object]) -> None:
    try:
        does()
        rank.say(what, "went through")
    except FtrainError as error:
        rank.say(what, type(error).__name__, str(error))
