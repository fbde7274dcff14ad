"""`diff` and `show --anomalies`: where a run went wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain.checkpoint.tools import stream
from ftrain.checkpoint.tools.anomalies import look_at_metrics
from tests.tools.runs import ckpt, log_metrics, make_run, model


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    ftrain.save(path, {"m": tensors})
    return path


def test_diff_of_the_same_bits_ends_with_zero(tmp_path: Path) -> None:
    nan = torch.tensor([1.0, math.nan])
    one, other = saved(tmp_path / "a", x=nan, e=torch.zeros(0, 2)), saved(tmp_path / "b", x=nan, e=torch.zeros(0, 2))
    found = ckpt("diff", one, other, "--json")
    assert found.code == 0
    assert found.json["same"] is True


def test_diff_tells_norms_the_largest_change_and_where_it_is(tmp_path: Path) -> None:
    before = torch.arange(12.0).reshape(3, 4)
    after = before.clone()
    after[1, 2] += 3
    after[2, 3] -= 4
    found = ckpt("diff", saved(tmp_path / "a", x=before), saved(tmp_path / "b", x=after), "--json")
    assert found.code == 1
    (change,) = found.json["tensors"]
    assert (change["norm"], change["max_change"], change["max_at"]) == (5.0, 4.0, [2, 3])
    assert change["before"]["norm"] == pytest.approx(float(before.norm()))
    assert change["relative"] == pytest.approx(5 / float(before.norm()))


def test_diff_puts_tensors_that_became_nan_first_and_tells_where(tmp_path: Path) -> None:
    sick = torch.ones(4, 5)
    sick[2, 1] = math.inf
    sick[3, 0] = math.nan
    one = saved(tmp_path / "a", aa=torch.ones(3), sick=torch.ones(4, 5))
    other = saved(tmp_path / "b", aa=torch.full((3,), 50.0), sick=sick)
    first = ckpt("diff", one, other, "--json").json["tensors"][0]
    assert (first["key"], first["became_sick"], first["sick_at"]) == ("m.sick", True, [2, 1])
    assert (first["after"]["nans"], first["after"]["infs"], first["max_change"]) == (1, 1, 0.0)
    text = ckpt("diff", one, other).text
    assert "1 NaN, 1 Inf of 20, first at [2, 1]" in text


def test_diff_puts_what_optimizers_keep_behind_what_they_train(tmp_path: Path) -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    for step in (1, 2):
        sum(parameter.pow(step + 1).sum() for parameter in module.parameters()).backward()
        optimizer.step()
        ftrain.save(tmp_path / str(step), {"model": module, "optimizer": optimizer}, step=step)
    found = ckpt("diff", tmp_path / "1", tmp_path / "2", "--json").json["tensors"]
    tensors = [tensor for tensor in found if not tensor["is_same"]]
    owners = [tensor["key"].partition(".")[0] for tensor in tensors]
    assert owners == sorted(owners) and set(owners) == {"model", "optimizer"}
    assert tensors[-1]["relative"] > tensors[0]["relative"], "the moments changed more, and yet they come last"


def test_diff_tells_what_is_on_one_side_only_or_of_another_shape(tmp_path: Path) -> None:
    one = saved(tmp_path / "a", x=torch.ones(3), gone=torch.ones(1), y=torch.ones(2))
    other = saved(tmp_path / "b", x=torch.ones(4), new=torch.ones(1), y=torch.ones(2, dtype=torch.bfloat16))
    found = ckpt("diff", one, other, "--json").json
    assert (found["only_before"], found["only_after"]) == (["m.gone"], ["m.new"])
    assert found["reshaped"] == [{"key": "m.x", "before": [3], "after": [4]}]
    (change,) = found["tensors"]
    assert (change["dtypes"], change["is_same"], change["norm"]) == (["float32", "bfloat16"], False, 0.0)
    assert "m.gone" in ckpt("diff", one, other).text


def test_diff_in_small_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    state = {"x": torch.randn(7, 11, 3), "y": torch.randn(100), "s": torch.tensor(1.5), "c": torch.randn(5, 2) + 1j}
    one = saved(tmp_path / "a", **state)
    other = saved(tmp_path / "b", **{key: value * 1.5 + 1 for key, value in state.items()})
    whole = ckpt("diff", one, other, "--json").json["tensors"]
    monkeypatch.setattr(stream, "BATCH_BYTES", 64)
    monkeypatch.setattr(stream.boxes, "__defaults__", (16,))
    parts = ckpt("diff", one, other, "--json").json["tensors"]
    for a, b in zip(whole, parts, strict=True):
        assert (a["key"], a["max_at"], a["max_change"]) == (b["key"], b["max_at"], b["max_change"])
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-12)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 1, 7), (1, 1, 9), (4, 3, 2)])
@pytest.mark.parametrize("nbytes", [1, 8, 24, 1000])
def test_boxes_of_a_tensor_are_runs_that_follow_each_other(shape: tuple[int, ...], nbytes: int) -> None:
    numbers = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    seen = []
    for box in stream.boxes(stream.TensorInfo("float32", shape), "x", nbytes):
        part = numbers[tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))]
        assert part.numel() * 4 <= max(nbytes, 4)
        seen += part.reshape(-1).tolist()
    assert seen == numbers.reshape(-1).tolist()


def test_anomalies_find_the_first_sick_commit_and_the_last_clean_one(tmp_path: Path) -> None:
    clean, sick = torch.ones(2, 3), torch.ones(2, 3)
    sick[1, 1] = math.nan
    states = {5: clean, 10: clean * 2, 15: sick, 20: sick}
    run = make_run(tmp_path / "run", {step: {"m": {"w": w, "b": torch.ones(2)}} for step, w in states.items()})
    log_metrics(run, [{"step": n, "loss": 1.0 if n < 12 else "nan"} for n in range(20)])
    found = ckpt("show", run, "--anomalies", "--json")
    assert found.code == 1
    assert found.json["clean_until"] == 10
    assert [(one["step"], one["where"], one["since"]) for one in found.json["tensors"]] == [
        (15, "m.w", False),
        (20, "m.w", True),
    ]
    assert [(one["step"], one["kind"]) for one in found.json["metrics"]] == [(12, "nan")]
    text = ckpt("show", run, "--anomalies").text
    assert f"ftrain ckpt fork {run}@10" in text
    assert "1 of 6 elements" in text


def test_anomalies_of_a_healthy_run_end_with_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {step: {"m": {"w": torch.ones(3) * step}} for step in (1, 2)})
    found = ckpt("show", run, "--anomalies")
    assert found.code == 0
    assert "no NaN" in found.text


def test_anomalies_name_what_grew_vanished_or_is_near_its_types_limit(tmp_path: Path) -> None:
    before = {"g": torch.ones(4), "v": torch.ones(4), "h": torch.ones(4).half(), "n": torch.tensor(1)}
    after = {"g": torch.ones(4) * 50, "v": torch.zeros(4), "h": torch.full((4,), 5e4).half(), "n": torch.tensor(10**6)}
    run = make_run(tmp_path / "run", {1: {"m": before}, 2: {"m": after}})
    kinds = [(one["where"], one["kind"]) for one in ckpt("show", run, "--anomalies", "--json").json["tensors"]]
    assert kinds == [
        ("m.g", "grew"),
        ("m.h", "near float16's limit"),
        ("m.h", "grew"),
        ("m.v", "vanished"),
    ]


def test_a_damaged_commit_along_the_way_is_one_of_the_anomalies(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {step: {"m": {"w": torch.ones(3) * step}} for step in (1, 2, 3)})
    next((run / "checkpoints").glob("*2/*/packs/*.index.json")).unlink()
    found = ckpt("show", run, "--anomalies", "--json")
    assert found.code == 1
    assert [(one["step"], one["kind"]) for one in found.json["tensors"]] == [(2, "damaged")]
    assert found.json["clean_until"] == 1


def test_metrics_that_spike_are_found_and_those_that_rise_are_not() -> None:
    steady = [(n, {"loss": 2.0 - n / 100, "lr": n / 100}) for n in range(60)]
    assert look_at_metrics(steady) == []
    (found,) = look_at_metrics([*steady, (60, {"loss": 30.0})])
    assert (found.step, found.kind, found.where) == (60, "spike", "metric loss")
