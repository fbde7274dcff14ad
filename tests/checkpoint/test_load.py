"""`ftrain.load` of a part, under other names, in other dtypes, and what it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ftrain
from ftrain.errors import CheckpointNotFound, MismatchedState, UsageError
from tests.checkpoint.world import bits


class Net(nn.Module):
    def __init__(self, classes: int = 3, trunk: str = "trunk") -> None:
        super().__init__()
        setattr(self, trunk, nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
        self.head = nn.Linear(6, classes)
        self._trunk = trunk

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(getattr(self, self._trunk)(x))  # type: ignore[no-any-return]


def training(model: nn.Module, steps: int = 0) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125 if steps else 0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {"model": model, "optim": optimizer, "schedule": schedule, "epoch": steps}


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, Any]:
    state = training(Net(), steps=3)
    ftrain.save(tmp_path / "c", state, step=3)
    return state


def moments(state: dict[str, Any], parameter: nn.Parameter) -> list[bytes]:
    return [bits(one) for one in state["optim"].state[parameter].values()]


def parts(state: dict[str, Any], prefix: str) -> list[bytes]:
    return [bits(one) for key, one in state["model"].state_dict().items() if key.startswith(prefix)]


def test_a_load_of_everything_reports_every_tensor_and_nothing_else(tmp_path: Path, trained: dict[str, Any]) -> None:
    report = ftrain.load(tmp_path / "c", state := training(Net()))
    assert report.step == 3
    assert set(report.loaded) == {
        *(f"model.{key}" for key in trained["model"].state_dict()),
        *(
            f"optim.state.model.{key}.{part}"
            for key, _ in trained["model"].named_parameters()
            for part in ("step", "exp_avg", "exp_avg_sq")
        ),
    }
    assert (report.missing, report.unexpected, report.reshaped, report.cast) == ((), (), (), ())
    assert str(report) == f"step 3: {len(report.loaded)} tensors loaded"
    assert parts(state, "") == parts(trained, "")
    assert state["schedule"].last_epoch == 3


def test_only_what_a_pattern_matches_is_loaded_and_optimizer_state_with_it(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    state = training(Net(), steps=1)
    before = parts(state, "head"), moments(state, state["model"].head.weight)
    report = ftrain.load(tmp_path / "c", state, only="model.trunk")
    assert parts(state, "trunk") == parts(trained, "trunk")
    assert (parts(state, "head"), moments(state, state["model"].head.weight)) == before
    weight, saved = state["model"].trunk[0].weight, trained["model"].trunk[0].weight
    assert moments(state, weight) == moments(trained, saved)
    assert "optim.state.model.trunk.0.weight.exp_avg" in report.loaded
    assert not any("head" in key for key in report.loaded)
    assert (report.missing, report.unexpected) == ((), ())
    assert (state["epoch"], state["schedule"].last_epoch) == (1, 1)


@pytest.mark.parametrize(
    ("only", "epoch", "scheduled"),
    [("epoch", 3, 0), (["schedule", "no such name"], 0, 3), ("sched*", 0, 3), ([], 0, 0), ("*.weight", 0, 0)],
)
def test_patterns_choose_values_and_objects_too(
    tmp_path: Path, trained: dict[str, Any], only: str | list[str], epoch: int, scheduled: int
) -> None:
    del trained
    state = training(Net())
    report = ftrain.load(tmp_path / "c", state, only=only)
    assert (state["epoch"], state["schedule"].last_epoch) == (epoch, scheduled)
    assert all(key.endswith("weight") or "weight." in key for key in report.loaded)
    assert bool(report.loaded) == (only == "*.weight")


def test_names_that_are_called_otherwise_here_are_found_with_their_optimizer_state(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    made = training(Net(trunk="body"))
    state = {"net": made["model"], "adam": made["optim"]}
    rename = {"model": "net", "model.trunk": "net.body", "optim": "adam"}
    report = ftrain.load(tmp_path / "c", state, rename=rename)
    assert "adam.state.net.body.0.weight.exp_avg" in report.loaded
    assert parts({"model": state["net"]}, "") == parts(trained, "")
    body, trunk = made["model"].body[0].weight, trained["model"].trunk[0].weight
    assert [bits(one) for one in state["adam"].state[body].values()] == moments(trained, trunk)
    assert state["adam"].param_groups[0]["lr"] == 0.125
    ftrain.load(tmp_path / "c", other := {"model": Net(trunk="body")}, rename=lambda key: key.replace("trunk", "body"))
    assert parts(other, "") == parts(trained, "")


def test_a_part_of_a_model_is_loaded_under_a_name_of_its_own(tmp_path: Path, trained: dict[str, Any]) -> None:
    trunk = Net().trunk
    report = ftrain.load(tmp_path / "c", {"encoder": trunk}, rename={"model.trunk": "encoder"})
    assert parts({"model": trunk}, "") == parts(trained, "trunk")
    assert len(report.loaded) == len(trunk.state_dict())


def test_two_tensors_that_get_one_name_are_refused(tmp_path: Path, trained: dict[str, Any]) -> None:
    del trained
    rename = {"model.trunk.0": "model.head"}
    with pytest.raises(UsageError, match=r"rename: model\.\S+ and model\.\S+ would both be model\.head\.weight"):
        ftrain.load(tmp_path / "c", {"model": Net()}, rename=rename)
    with pytest.raises(UsageError, match="has to return a name"):
        ftrain.load(tmp_path / "c", {"model": Net()}, rename=lambda _: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match='"cast"'):
        ftrain.load(tmp_path / "c", {"model": Net()}, dtype="bfloat16")


def test_a_load_that_is_not_strict_takes_what_fits_and_says_what_does_not(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    model = Net(classes=5)
    model.extra = nn.Linear(1, 1)
    del model.trunk[1]
    state = {**training(model), "best": 0.5}
    before = parts(state, "head"), parts(state, "extra")
    with pytest.raises(MismatchedState, match=r"model\.head\.weight \(float32\[3, 6\] saved, float32\[5, 6\] here\)"):
        ftrain.load(tmp_path / "c", {"model": Net(classes=5)})
    report = ftrain.load(tmp_path / "c", state, strict=False)
    assert parts(state, "trunk") == parts(trained, "trunk.0")
    assert (parts(state, "head"), parts(state, "extra")) == before
    assert set(report.reshaped) == {"model.head.weight", "model.head.bias"}
    assert {"model.extra.weight", "optim.state.model.extra.bias", "best"} <= set(report.missing)
    assert {"model.trunk.1.running_mean", "optim.state.model.trunk.1.weight.exp_avg"} <= set(report.unexpected)
    assert not any(key.startswith("optim.state.model.head") for key in (*report.loaded, *report.missing))
    text = str(report)
    assert "\nmissing: " in text
    assert "reshaped: model.head.weight, model.head.bias" in text
    assert model.head.weight not in state["optim"].state  # it has another shape: its state begins anew
    model.trunk[0](torch.ones(1, 4)).sum().backward()
    state["optim"].step()


def test_other_dtypes_are_converted_on_request_and_refused_otherwise(tmp_path: Path, trained: dict[str, Any]) -> None:
    state = training(Net().to(torch.bfloat16))
    for strict in (True, False):
        with pytest.raises(MismatchedState, match=r'float32\[6, 4\] saved, bfloat16\[6, 4\] here.*"cast"'):
            ftrain.load(tmp_path / "c", state, strict=strict)
    assert not state["optim"].state
    report = ftrain.load(tmp_path / "c", state, dtype="cast")
    assert "model.trunk.0.weight" in report.cast
    assert "model.trunk.1.num_batches_tracked" not in report.cast
    for key, tensor in state["model"].state_dict().items():
        assert torch.equal(tensor, trained["model"].state_dict()[key].to(tensor.dtype))
    one, saved = state["model"].head.weight, trained["model"].head.weight
    found, expected = state["optim"].state[one], trained["optim"].state[saved]
    assert (found["exp_avg"].dtype, found["step"].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(found["exp_avg"], expected["exp_avg"].bfloat16())
    ftrain.load(tmp_path / "c", wide := {"model": Net().double()}, dtype="cast")
    assert torch.equal(wide["model"].head.weight, saved.double())


def test_a_conversion_that_would_lose_the_values_is_refused(tmp_path: Path) -> None:
    ftrain.save(tmp_path / "c", {"m": {"a": torch.tensor([1.5])}})
    with pytest.raises(MismatchedState, match=r"m\.a was saved as float32, which does not become int64"):
        ftrain.load(tmp_path / "c", {"m": {"a": torch.tensor([0])}}, dtype="cast")


def test_a_state_dict_and_its_module_load_each_other(tmp_path: Path, trained: dict[str, Any]) -> None:
    ftrain.load(tmp_path / "c", {"model": (found := Net().state_dict())})
    assert [bits(one) for one in found.values()] == parts(trained, "")
    ftrain.save(tmp_path / "d", {"model": found})
    ftrain.load(tmp_path / "d", other := {"model": Net()})
    assert parts(other, "") == parts(trained, "")
    ftrain.save(tmp_path / "e", {"model": found, "optim": {"lr": 1.0}})
    with pytest.raises(MismatchedState, match="optim: the checkpoint has no optimizer under this name"):
        ftrain.load(tmp_path / "e", training(Net()) | {"schedule": 0})


def test_parameter_groups_may_be_cut_anew_where_their_options_agree(tmp_path: Path) -> None:
    def grouped(model: Net, *decays: float) -> dict[str, Any]:
        weights = [one for key, one in model.named_parameters() if key.endswith("weight")]
        rest = [one for key, one in model.named_parameters() if not key.endswith("weight")]
        parameters = [weights, rest] if len(decays) > 1 else [weights + rest]
        groups = [{"params": one, "weight_decay": decay} for one, decay in zip(parameters, decays, strict=True)]
        return {"model": model, "optim": torch.optim.SGD(groups, lr=0.25)}

    ftrain.save(tmp_path / "one", grouped(Net(), 0.5))
    ftrain.load(tmp_path / "one", state := grouped(Net(), 0.0, 0.0))
    assert [group["weight_decay"] for group in state["optim"].param_groups] == [0.5, 0.5]
    ftrain.save(tmp_path / "two", grouped(Net(), 0.5, 0.125))
    ftrain.load(tmp_path / "two", state)
    assert [group["weight_decay"] for group in state["optim"].param_groups] == [0.5, 0.125]
    with pytest.raises(
        MismatchedState, match=r"in one parameter group here, but .* different options \(weight_decay\)"
    ):
        ftrain.load(tmp_path / "two", grouped(Net(), 0.0))


def test_nothing_at_all_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        ftrain.load(tmp_path, {"model": Net()})


def test_what_others_wrote_is_loaded_like_our_own(tmp_path: Path, trained: dict[str, Any]) -> None:
    saved = trained["model"]
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    torch.save({"model": saved.state_dict(), "step": 5}, tmp_path / "both.pt")
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        report = ftrain.load(tmp_path / name, state := {"net": Net(trunk="body")}, rename={"trunk": "body"})
        assert parts({"model": state["net"]}, "") == parts(trained, "")
        assert len(report.loaded) == len(saved.state_dict())
        ftrain.load(tmp_path / name, flat := Net().state_dict())
        assert [bits(one) for one in flat.values()] == parts(trained, "")
    ftrain.load(tmp_path / "both.pt", {"model": (model := Net())})
    assert parts({"model": model}, "") == parts(trained, "")
    state = training(Net(classes=5))
    report = ftrain.load(tmp_path / "model.pt", state, strict=False)
    assert report.reshaped == ("model.head.weight", "model.head.bias")
    assert {"optim", "schedule", "epoch"} <= set(report.missing)
    assert state["epoch"] == 0
    with pytest.raises(MismatchedState, match="nothing tracked as 'optim'"):
        ftrain.load(tmp_path / "model.pt", training(Net()))
    (tmp_path / "letter.txt").write_text("Dear Sir")
    with pytest.raises(CheckpointNotFound, match=r"letter\.txt is neither a safetensors file nor one of torch's"):
        ftrain.load(tmp_path / "letter.txt", {"model": Net()})
