from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offsite.errors import ConfigError, RunFailed
from offsite.training import checkpoints
from offsite.training.checkpoints import State, newest_checkpoint, read_state, read_tensors, write_checkpoint


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), float(value)), "a.bias": torch.full((3,), float(value))}


def moments(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{name}.{kind}": t.clone() for name, t in tensors(value).items() for kind in ("exp_avg", "exp_avg_sq")}


def write(work, step: int, *, with_best: bool = False) -> None:
    work.mkdir(exist_ok=True)
    write_checkpoint(work, State(step=step), tensors(step), moments(step), with_best=with_best)


def test_a_checkpoint_reads_back(tmp_path):
    state = State(
        settings={"steps": 9, "rate": 0.1, "keep_best": True, "schedule": "cosine"}, step=7, tokens=70, seconds=1.5,
        first_loss=2.5, final_loss=1.0 / 3, evaluations=[(3, 0.1), (6, 0.1)], updates={"a.weight": 7},
    )  # fmt: skip
    write_checkpoint(tmp_path, state, tensors(7), moments(8), with_best=False)
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "checkpoint-7"
    assert read_state(folder) == state
    assert read_state(folder).best == (3, 0.1)
    found, found_moments = tensors(0), moments(0)
    checkpoints.read_trainable(folder, found)
    checkpoints.read_moments(folder, found_moments)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(7).items())
    assert all(torch.equal(found_moments[name], tensor) for name, tensor in moments(8).items())


def test_the_last_two_are_kept_by_step_not_by_name(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-11"


def test_nothing_but_json_and_safetensors_is_written(tmp_path):
    write(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir()) == [
        "optimizer.safetensors", "state.json", "trainable.safetensors",
    ]  # fmt: skip


def test_a_checkpoint_keeps_the_best_of_its_time(tmp_path):
    checkpoints.write_best(tmp_path, tensors(1))
    write(tmp_path, 1, with_best=True)
    checkpoints.write_best(tmp_path, tensors(2))
    assert torch.equal(load_file(tmp_path / "best.safetensors")["a.bias"], tensors(2)["a.bias"])
    checkpoints.restore_best(tmp_path, tmp_path / "checkpoint-1")
    found = tensors(0)
    checkpoints.read_best(tmp_path, found)
    assert torch.equal(found["a.weight"], tensors(1)["a.weight"])


def test_without_hard_links_the_best_is_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints.write_best(tmp_path, tensors(1))
    write(tmp_path, 1, with_best=True)
    assert (tmp_path / "checkpoint-1" / "best.safetensors").is_file()


def test_a_missing_best_is_refused(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(RunFailed, match=r"checkpoint-1 has no best\.safetensors"):
        checkpoints.restore_best(tmp_path, tmp_path / "checkpoint-1")


def without(name):
    return {other: tensor for other, tensor in tensors().items() if other != name}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (without("a.bias"), "tensor 'a.bias' is missing"),
        ({**tensors(), "b": torch.ones(1)}, "tensor 'b' is not of this run"),
        ({**tensors(), "a.bias": torch.ones(4)}, r"tensor 'a.bias': F32 \(4,\), expected F32 \(3,\)"),
        ({**tensors(), "a.bias": torch.ones(3).half()}, r"tensor 'a.bias': F16 \(3,\), expected F32 \(3,\)"),
    ],
)
def test_other_names_shapes_and_dtypes_are_refused_and_nothing_changes(tmp_path, found, message):
    save_file(found, tmp_path / "trainable.safetensors")
    targets = tensors(5)
    with pytest.raises(RunFailed, match=message) as caught:
        read_tensors(tmp_path / "trainable.safetensors", targets)
    assert "delete that checkpoint" in str(caught.value.hint)
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors(5).items())


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 100])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "trainable.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunFailed, match=r"trainable\.safetensors cannot be read"):
        read_tensors(path, tensors())


@pytest.mark.parametrize(
    "change", [{"step": "7"}, {"step": None}, {"extra": 1}, {"format": 2}, {"evaluations": [[1, "x"]]}, {"tokens": 0.5}]
)
def test_a_state_of_another_form_is_refused(tmp_path, change):
    write(tmp_path, 7)
    path = tmp_path / "checkpoint-7" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RunFailed, match="checkpoint-7"):
        read_state(tmp_path / "checkpoint-7")


def test_a_missing_state_is_refused(tmp_path):
    with pytest.raises(RunFailed, match=r"state\.json cannot be read"):
        read_state(tmp_path)


def full_disk(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def full_disk_in_safetensors(*_args, **_kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("stand_in", [full_disk, full_disk_in_safetensors])
@pytest.mark.parametrize("where", ["save_file", "fsync"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, where, stand_in):
    write(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-3").iterdir()}
    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    else:
        monkeypatch.setattr(checkpoints, "save_file", stand_in)
    with pytest.raises(RunFailed, match="no space left on device") as caught:
        write(tmp_path, 6)
    assert caught.value.hint == "checkpoint-3 is kept; free space, then --resume"
    with pytest.raises(RunFailed, match="no space left on device"):
        checkpoints.write_best(tmp_path, tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-3").iterdir()} == before


def test_stale_stages_are_collected_and_nothing_else(tmp_path):
    write(tmp_path, 3)
    (tmp_path / ".checkpoint-6.0123abcd.partial").mkdir()
    (tmp_path / ".checkpoint-6.0123abcd.partial" / "state.json").write_text("{}")
    (tmp_path / ".best.safetensors.0123abcd.partial").write_bytes(b"")
    (tmp_path / "log.jsonl").write_text("")
    checkpoints.collect_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "log.jsonl"]


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    checkpoints.require_work(tmp_path / "none", resume=False)
    checkpoints.require_work(tmp_path, resume=False)
    write(tmp_path, 3)
    checkpoints.require_work(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="holds an unfinished run") as caught:
        checkpoints.require_work(tmp_path, resume=False)
    assert "--resume" in str(caught.value.hint)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        checkpoints.require_work(tmp_path / "file", resume=True)
