"""What has not changed since the last commit is referred to: nothing that is referred to is ever lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftrain.checkpoint.catalogue import Commit, problem_of
from ftrain.checkpoint.load import open_checkpoint
from ftrain.checkpoint.pins import pin
from ftrain.checkpoint.publish import publish
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.retain import remove, sweep
from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.tools.verify import verify
from ftrain.checkpoint.writing.unchanged import OWNERS_MAX, Memory
from ftrain.core import journal
from ftrain.core.journal import CommitBody, History, Record, RetireBody
from ftrain.core.layout import TensorSpec
from ftrain.core.manifest import data_path, decode_index, encode_index
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import CorruptCheckpoint
from ftrain.storage import PosixStorage, Storage
from tests.checkpoint.world import World

RANKS = 2
KEYS = tuple("abcdef")
ELEMENTS = 5 << 10  # 20 KiB: its samples leave bytes between them
State = dict[str, torch.Tensor]


class Run:
    """A run's journal and its checkpoints, as a coordinator and the agents of two ranks make them."""

    def __init__(self, place: Path | Storage, keys: Sequence[str] = KEYS) -> None:
        self.storage = PosixStorage(str(place)) if isinstance(place, Path) else place
        self.history = History()
        self.world = World(RANKS)
        self.state = {key: torch.full((ELEMENTS,), float(number)) for number, key in enumerate(keys)}
        self.state["rank-1 alone"] = torch.full((ELEMENTS,), -1.0)
        self.memory = Memory()
        self.saved: dict[Attempt, State] = {}
        self.packs: dict[Attempt, list[PackRecord]] = {}
        self.count = 0
        self.world.plan(self._items(self.state))

    def _items(self, state: State):  # type: ignore[no-untyped-def]
        def items(rank: int) -> list[TensorItem]:
            return [
                TensorItem(TensorSpec(key, "float32", (ELEMENTS,), private=key.endswith("alone")), tensor, late=False)
                for key, tensor in state.items()
                if rank == 1 or not key.endswith("alone")
            ]

        return items

    @property
    def live(self) -> list[CommitBody]:
        return [body for _, body in self.history.commits]

    def train(self, *keys: str) -> None:
        for key in keys:
            self.state[key] += 100.0

    def persist(self) -> Attempt:
        self.count += 1
        attempt = Attempt(1, self.count, self.count)
        base = self.live[-1].attempt if self.live else None
        self.world.take(attempt, self._items(self.state))
        self.packs[attempt] = self.world.persist(self.storage, attempt, 0, self.memory, base)
        return attempt

    def commit(self, *changed: str) -> Attempt:
        self.train(*changed)
        attempt = self.persist()
        packs = self.packs[attempt]
        sha256 = publish(self.storage, attempt, RANKS, packs, "test")
        refers = tuple(sorted({one for pack in packs for one in pack.refers}))
        nbytes = sum(pack.payload_bytes for pack in packs)
        self.append(CommitBody(attempt, RANKS, sha256, nbytes, refers=refers))
        self.saved[attempt] = {key: tensor.clone() for key, tensor in self.state.items()}
        return attempt

    def retire(self, attempt: Attempt) -> None:
        self.append(RetireBody(attempt))

    def append(self, body: journal.Body) -> None:
        head = self.history.head
        record = Record(head.sequence + 1, head.digest, "n", 0.0, body)
        self.history = self.history.after(record, journal.digest(journal.encode(record)))

    def discard(self) -> None:
        for attempt in self.history.let_go:
            remove(self.storage, attempt.path)

    def sweep(self) -> None:
        """A coordinator takes over after a crash: whatever was to be removed is found by looking."""
        sweep(self.storage, {attempt.path for attempt in self.history.needed}, 2)

    def check(self, body: CommitBody) -> None:
        checkpoint = Checkpoint.open(self.storage, body.attempt.path, body.manifest_sha256)
        for rank in range(RANKS):
            into = {key: torch.zeros(ELEMENTS) for key in self.state}
            checkpoint.read_into(self._items(into)(rank), rank)
            for item in self._items(into)(rank):
                assert torch.equal(into[item.spec.key], self.saved[body.attempt][item.spec.key]), (body, item.spec.key)
        commit = Commit(self.storage, body.attempt.path, body.attempt, RANKS, body.payload_bytes, body.manifest_sha256)
        assert problem_of(commit) == ""
        assert verify(commit).strange == ()

    def written_bytes(self, attempt: Attempt) -> int:
        return sum(pack.file_bytes for pack in self.packs[attempt])


def test_frozen_tensors_are_written_once_and_every_commit_has_them(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first = run.commit()
    others = [run.commit("a") for _ in range(3)]
    assert all(run.live[place].refers == (first,) for place in (1, 2, 3))
    assert max(map(run.written_bytes, others)) <= run.written_bytes(first) / 2
    assert all(body.payload_bytes == run.live[0].payload_bytes for body in run.live)
    for body in run.live:
        run.check(body)


def test_retired_commit_stays_on_storage_as_long_as_one_refers_to_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first, second, third = run.commit(), run.commit("a"), run.commit("a")
    run.retire(first)
    run.discard()
    run.retire(second)
    run.discard()
    assert run.history.lingering == {first}
    assert not (tmp_path / second.path).exists()
    run.check(run.live[0])
    fourth = run.commit(*KEYS, "rank-1 alone")
    run.retire(third)
    run.discard()
    assert [(tmp_path / one.path).exists() for one in (first, second, third, fourth)] == [False, False, False, True]
    run.check(run.live[0])


def test_pinned_commit_keeps_what_it_refers_to(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first, second = run.commit(), run.commit("a")
    pin(run.storage, "good", second, "test")
    run.commit(*KEYS, "rank-1 alone")
    for attempt in (first, second):
        run.retire(attempt)
        run.discard()
        run.sweep()
    run.check(CommitBody(second, RANKS, _sha256(tmp_path, second), 0))


def _sha256(path: Path, attempt: Attempt) -> str:
    return journal.digest((path / attempt.path / "manifest.json").read_bytes())


def test_nothing_is_removed_where_a_pinned_commit_cannot_be_read(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first, second = run.commit(), run.commit("a")
    pin(run.storage, "good", second, "test")
    (tmp_path / second.path / "manifest.json").write_bytes(b"{")
    run.retire(first)
    with pytest.raises(CorruptCheckpoint):
        remove(run.storage, first.path)
    assert sweep(run.storage, (), 9) == []
    assert (tmp_path / first.path).exists()


def test_bytes_that_only_look_alike_are_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.commit()
    run.commit()  # all is known to be frozen
    run.state["b"][ELEMENTS // 2 - 600] += 1.0  # between the first sample and the second
    big = run.commit("a")
    run.check(run.live[-1])
    assert big in run.saved


def test_agent_that_comes_back_writes_everything_and_goes_on_from_there(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first, _ = run.commit(), run.commit("a")
    run.memory = Memory()
    third, fourth = run.commit("a"), run.commit("a")
    assert run.written_bytes(third) == run.written_bytes(first)
    assert run.live[-1].refers == (third,)
    assert run.written_bytes(fourth) < run.written_bytes(first)
    run.check(run.live[-1])


def test_attempt_that_came_to_nothing_is_never_referred_to(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first = run.commit()
    run.train("a", "b", "c")
    given_up = run.persist()
    remove(run.storage, given_up.path)
    run.commit("d")
    assert run.live[-1].refers == (first,)
    run.check(run.live[-1])


def test_pack_refers_to_a_few_attempts_only(tmp_path: Path) -> None:
    keys = [f"t{number}" for number in range(OWNERS_MAX + 6)]
    run = Run(tmp_path, keys)
    run.commit()
    for key in keys:
        run.commit(key)
        assert all(len(pack.refers) <= OWNERS_MAX for pack in run.packs[run.live[-1].attempt])
        run.check(run.live[-1])


def test_little_that_did_not_change_is_not_worth_a_reference(tmp_path: Path) -> None:
    run = Run(tmp_path, [f"t{number}" for number in range(20)])
    run.commit()
    run.commit(*(key for key in run.state if key != "t3"))
    assert run.live[-1].refers == ()


def test_plain_zarr_reads_referred_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.commit()
    attempt = run.commit("a")
    monkeypatch.chdir(tmp_path / attempt.path)
    root = zarr.open_group("reference://", storage_options={"fo": "refs.json"}, mode="r")
    for number, key in enumerate(KEYS):
        assert torch.equal(torch.from_numpy(root[key][:]), run.saved[attempt][key]), number
    own = root["rank-00001/rank%2D1 alone" if "rank-00001/rank%2D1 alone" in root else "rank-00001/%72ank-1 alone"]
    assert torch.equal(torch.from_numpy(own[:]), run.saved[attempt]["rank-1 alone"])
    assert zarr.open_array("packs/00000", mode="r").shape[0] > 0


def test_reference_view_without_templates_is_that_of_an_earlier_version(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.commit()
    attempt = run.commit("a")
    path = tmp_path / attempt.path / "refs.json"
    view = json.loads(path.read_text())
    assert view.pop("templates") == {"here": "", "run": "../../../"}
    earlier = json.dumps(view).replace("{{here}}", "").replace("{{run}}", "../../../")
    path.write_text(earlier)
    run.check(run.live[-1])
    for changed in (earlier.replace('"packs/', '"pack/', 1), earlier.replace('"../', '"../../', 1), json.dumps(view)):
        path.write_text(changed)
        with pytest.raises(CorruptCheckpoint, match="does not say what the packs' indexes say"):
            run.check(run.live[-1])


def test_checkpoint_that_refers_opens_by_its_own_path_and_says_why_it_does_not_elsewhere(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.commit()
    attempt = run.commit("a")
    assert open_checkpoint(tmp_path / "run" / attempt.path).step == attempt.step
    (tmp_path / "run" / attempt.path).rename(tmp_path / "moved")
    with pytest.raises(CorruptCheckpoint, match="is not in a run's directory"):
        open_checkpoint(tmp_path / "moved")


def test_damage_of_what_is_referred_to_is_found_and_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first, second = run.commit(), run.commit("a")
    for rank in range(RANKS):
        index = decode_index((tmp_path / first.path / f"packs/{rank:05d}.index.json").read_bytes(), "index")
        for box in index.boxes:
            if box.key == "c":
                path = tmp_path / first.path / data_path(f"packs/{rank:05d}")
                data = bytearray(path.read_bytes())
                data[box.offset + 17] ^= 1
                path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=rf"{first.path}/packs/.*tensor c"):
        run.check(run.live[-1])
    commit = Commit(run.storage, second.path, second, RANKS, 0, run.live[-1].manifest_sha256)
    with pytest.raises(CorruptCheckpoint, match="in tensor c"):
        verify(commit)


def test_references_that_no_writer_makes_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.commit()
    attempt = run.commit("a")
    data = (tmp_path / attempt.path / "packs/00001.index.json").read_bytes()
    index = decode_index(data, "index")
    assert encode_index(index) == data
    fields = json.loads(data)
    for change in (
        lambda one: one["references"].append(one["references"][0]),
        lambda one: one["references"][0].update(boxes=[1, 0]),
        lambda one: one["references"][0].update(boxes=[]),
        lambda one: one["references"][0].update(boxes=[-1]),
        lambda one: one["references"][0].update(index_sha256="../x"),
        lambda one: one["references"][0].update(attempt=one["attempt"]),
    ):
        changed = json.loads(json.dumps(fields))
        change(changed)
        with pytest.raises(CorruptCheckpoint):
            decode_index(json.dumps(changed).encode(), "index")


_STEPS = st.lists(
    st.tuples(
        st.sets(st.sampled_from([*KEYS, "rank-1 alone"])),
        st.sampled_from(["commit", "commit", "commit", "give up", "give up half removed", "agents come back"]),
        st.lists(st.integers(0, 3), max_size=3),  # which commits are retired then, in this order
        st.sampled_from(["remove", "crash before removing", "crash and sweep"]),
        st.sampled_from(["", "", "", "pin"]),
    ),
    min_size=4,
    max_size=10,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_STEPS)
def test_every_kept_commit_restores_whatever_is_retired_in_whatever_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[set[str], str, list[int], str, str]]
) -> None:
    run = Run(tmp_path_factory.mktemp("run"))
    pinned: list[CommitBody] = []
    for changed, what, retired, ending, kept in steps:
        if what == "agents come back":
            run.memory = Memory()
        if what.startswith("give up"):
            run.train(*changed)
            attempt = run.persist()
            if what == "give up":
                remove(run.storage, attempt.path)
        else:
            run.commit(*changed)
        if kept and run.live:
            pin(run.storage, f"pin{run.count}", run.live[-1].attempt, "test")
            pinned.append(run.live[-1])
        for place in retired:
            if place < len(run.live) - 1:  # the newest is always kept
                run.retire(run.live[place].attempt)
                if ending == "remove":
                    run.discard()
        if ending == "crash and sweep":
            run.sweep()
        for body in itertools.chain(run.live, pinned):
            run.check(body)
    run.sweep()
    for body in itertools.chain(run.live, pinned):
        run.check(body)
    needed = {attempt.path for attempt in run.history.needed}
    needed |= {one.path for body in pinned for one in (body.attempt, *body.refers)}
    there = {f"checkpoints/{path.parent.name}/{path.name}" for path in Path(run.storage.url).glob("checkpoints/*/*")}
    assert there == needed
