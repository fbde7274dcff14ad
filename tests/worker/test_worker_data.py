"""A loader's position, restored into a fresh loader: what follows is what would have followed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from ftrain.core import plain
from ftrain.errors import MismatchedState, NotPlainData, UsageError
from ftrain.worker import random_state
from ftrain.worker.data import Batches
from ftrain.worker.packing import pack, unpack

SAMPLES = 11


class Numbers(Dataset[int]):
    loaded: list[int]

    def __init__(self) -> None:
        self.loaded = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class Noisy(Numbers):
    """Augments with the random numbers of whichever process loads."""

    def __getitem__(self, index: int) -> float:  # type: ignore[override]
        return index + float(torch.rand(()))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES).tolist())


class Drawing(Sampler[int]):
    """Draws as it goes, from generators that training uses too."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield random.randrange(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES


class Positioned:
    """Keeps its own position, with a tensor in it, as torchdata's StatefulDataLoader does."""

    def __init__(self) -> None:
        self.at = 0
        self.resumed_at = 0

    def __iter__(self) -> Iterator[int]:
        self.at, self.resumed_at = self.resumed_at, 0
        while self.at < SAMPLES:
            self.at += 1
            yield self.at - 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": torch.tensor([self.at], dtype=torch.int16), "more": [(1,)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["more"] == [(1,)]
        assert state["at"].dtype == torch.int16
        self.resumed_at = int(state["at"])


def shuffled(**more: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(), shuffle=True, **more)


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "shuffled": lambda: shuffled(batch_size=2),
    "dropping-the-last": lambda: shuffled(batch_size=2, drop_last=True),
    "with-processes": lambda: shuffled(batch_size=2, num_workers=2),
    "with-lasting-processes": lambda: shuffled(batch_size=2, num_workers=1, persistent_workers=True),
    "with-a-generator": lambda: shuffled(batch_size=2, generator=torch.Generator().manual_seed(5)),
    "without-batches": lambda: DataLoader(Numbers(), batch_size=None, shuffle=True),
    "augmented": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True),
    "drawing-sampler": lambda: DataLoader(Numbers(), batch_size=2, sampler=Drawing()),
    "batch-sampler": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), 3, False)),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "list": lambda: list(range(5)),
    "positioned": Positioned,
}


def draw(batches: Batches, count: int) -> list[Any]:
    """Batches, with training's own use of random numbers in between."""
    found = []
    for _ in range(count):
        batch = next(batches)
        found.append(
            (batch.tolist() if isinstance(batch, torch.Tensor) else batch, random.random(), torch.rand(()).item())
        )
    return found


@pytest.fixture(autouse=True)
def no_loader_left() -> Iterator[None]:
    """A loader's processes end when its iterator is collected."""
    yield
    gc.collect()


def seed() -> None:
    random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("before", [0, 1, 4, 6, 9])
def test_position_restored_in_another_process_gives_what_would_have_followed(name: str, before: int) -> None:
    seed()
    unhurt = Batches(LOADERS[name](), "test", 1)
    draw(unhurt, before)
    saved = plain.decode(plain.encode({"position": unhurt.state(), "random": random_state.capture()}, "test"))
    expected = draw(unhurt, 12)
    torch.manual_seed(99)  # the other process has drawn other numbers by now
    resumed = Batches(LOADERS[name](), "test", 1)
    draw(resumed, 1)  # as a rehearsed step does
    assert isinstance(saved, dict)
    resumed.restore(saved["position"])
    resumed.prepare()
    random_state.restore(saved["random"])
    assert draw(resumed, 12) == expected


def test_samples_that_were_done_are_not_loaded_again() -> None:
    batches = Batches(DataLoader(Numbers(), batch_size=2), "test", 1)
    draw(batches, 3)
    data = Numbers()
    resumed = Batches(DataLoader(data, batch_size=2), "test", 1)
    resumed.restore(batches.state())
    resumed.prepare()
    next(resumed)
    assert data.loaded == [6, 7]


def test_another_batch_size_goes_on_at_the_same_sample() -> None:
    batches = Batches(DataLoader(Numbers(), batch_size=2), "test", 1)
    draw(batches, 3)
    resumed = Batches(DataLoader(Numbers(), batch_size=4), "test", 1)
    resumed.restore(batches.state())
    resumed.prepare()
    assert next(resumed).tolist() == [6, 7, 8, 9]


def test_loader_that_became_shorter_is_refused() -> None:
    batches = Batches(list(range(9)), "batches 0", 1)
    draw(batches, 7)
    resumed = Batches(list(range(5)), "batches 0", 1)
    resumed.restore(batches.state())
    with pytest.raises(MismatchedState, match="only 5"):
        resumed.prepare()


def test_loader_that_lost_its_generator_is_refused() -> None:
    batches = Batches(LOADERS["with-a-generator"](), "batches 0", 1)
    draw(batches, 2)
    resumed = Batches(LOADERS["shuffled"](), "batches 0", 1)
    with pytest.raises(MismatchedState, match="generators"):
        resumed.restore(batches.state())


def test_loader_whose_own_state_is_not_plain_is_named() -> None:
    class Odd(Positioned):
        def state_dict(self) -> dict[str, Any]:
            return {"deep": [object()]}

    with pytest.raises(NotPlainData, match=r"batches 0\.deep\[0\]"):
        Batches(Odd(), "batches 0", 1).state()


def test_iterator_is_refused_for_it_has_one_epoch_only() -> None:
    with pytest.raises(UsageError, match="only once"):
        Batches(iter([1, 2]), "batches 0", 1)


def redo(batches: Batches, count: int) -> list[Any]:
    """Rolled back to the last boundary by what it gave, as after a failed step."""
    saved = unpack(pack({"position": batches.mark(), "random": random_state.capture()}, "test"))
    draw(batches, count)
    batches.roll_back(saved["position"])
    random_state.restore(saved["random"])
    return draw(batches, count)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_step_rolled_back_and_redone_gives_the_same_batches_and_what_would_have_followed(
    name: str, before: int
) -> None:
    seed()
    expected = draw(Batches(LOADERS[name](), "test", 1), before + 15)
    seed()
    hurt = Batches(LOADERS[name](), "test", 1)
    found = draw(hurt, before)
    for count in (1, 3, 0, 2):  # steps, each of which fails once; some are of another epoch in the middle
        found += redo(hurt, count)
    assert found + draw(hurt, 9) == expected


@pytest.mark.parametrize("name", LOADERS)
def test_rank_that_was_a_step_ahead_goes_back_two_boundaries(name: str) -> None:
    seed()
    batches = Batches(LOADERS[name](), "test", 1)
    draw(batches, 2)
    saved = unpack(pack({"position": batches.mark(), "random": random_state.capture()}, "test"))
    expected = draw(batches, 4)
    batches.mark()
    expected += draw(batches, 3)
    batches.roll_back(saved["position"])
    random_state.restore(saved["random"])
    batches.mark()
    found = draw(batches, 1)
    saved = unpack(pack({"position": batches.mark(), "random": random_state.capture()}, "test"))
    draw(batches, 4)  # fails again, in another step
    batches.roll_back(saved["position"])
    random_state.restore(saved["random"])
    assert found + draw(batches, 6) == expected


@pytest.mark.parametrize("name", LOADERS)
def test_successor_of_a_process_that_failed_gets_the_same_batches(name: str) -> None:
    seed()
    dead = Batches(LOADERS[name](), "test", 1)
    draw(dead, 7)
    saved = unpack(pack({"position": dead.mark(), "random": random_state.capture()}, "test"))
    expected = draw(dead, 8)
    torch.manual_seed(99)
    successor = Batches(LOADERS[name](), "test", 1)
    draw(successor, 2)  # as a rehearsed step does
    successor.roll_back(saved["position"])
    random_state.restore(saved["random"])
    assert draw(successor, 8) == expected


def test_loading_processes_live_on_when_a_step_is_rolled_back() -> None:
    batches = Batches(LOADERS["with-processes"](), "test", 1)
    first = draw(batches, 1)
    assert first
    children = {child.pid for child in psutil.Process().children()}
    redo(batches, 2)
    assert children
    assert {child.pid for child in psutil.Process().children()} == children


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batch: batch["x"].add_(1),
        lambda batch: batch["deep"][0].mul_(2),
        lambda batch: batch.pop("x"),
        lambda batch: batch["deep"].append(1),
        lambda batch: batch["x"].requires_grad_(),
    ],
    ids=["tensor-written", "deep-tensor-written", "key-taken", "list-grown", "gradient-asked"],
)
def test_batch_that_the_failed_step_changed_is_handed_out_as_it_was(spoil: Callable[[Any], Any]) -> None:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            for place in range(5):
                yield {"x": torch.full((2,), float(place)), "deep": [torch.ones(2)], "name": "n", "pair": (1, 2.0)}

    batches = Batches(Loader(), "test", 1)
    saved = batches.mark()
    for _ in range(2):
        spoil(next(batches))
    batches.roll_back(saved)
    for place in range(2):
        batch = next(batches)
        assert batch["x"].tolist() == [place, place]
        assert not batch["x"].requires_grad
        assert batch["deep"][0].tolist() == [1, 1]
        assert (batch["name"], batch["pair"], len(batch["deep"])) == ("n", (1, 2.0), 1)


def test_batch_of_a_kind_that_may_change_unnoticed_is_drawn_anew() -> None:
    drawn = []

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            for place in range(5):
                drawn.append(place)
                yield {place}

    batches = Batches(Loader(), "test", 1)
    next(batches)
    saved = unpack(pack(batches.mark(), "test"))
    next(batches).add(99)
    batches.roll_back(saved)
    assert [next(batches), next(batches)] == [{1}, {2}]
    assert drawn == [0, 1, 0, 1, 2]


def test_loader_that_failed_in_the_middle_begins_anew() -> None:
    class Loader:
        failing = True

        def __iter__(self) -> Iterator[Any]:
            first = torch.rand(()).item()
            if self.failing:
                raise KeyError("the disk is away")
            yield from (first, torch.rand(()).item())

    seed()
    unhurt = Loader()
    unhurt.failing = False
    expected = draw(Batches(unhurt, "test", 1), 2)
    seed()
    loader = Loader()
    batches = Batches(loader, "test", 1)
    saved, drawn = batches.mark(), random_state.capture()
    with pytest.raises(KeyError):
        next(batches)
    loader.failing = False
    batches.roll_back(saved)
    random_state.restore(drawn)
    assert draw(batches, 2) == expected
    assert batches.epoch == 0
