from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from offsite.errors import ConfigError, RunFailed
from offsite.training.processes import (
    Processes,
    assert_sharded,
    fill,
    full_state,
    gather,
    is_launched,
    launch,
    shard,
    stop_on_interrupt,
    whole,
    world,
)

ALONE = Processes(0, 1, torch.device("cpu"), True)


def test_without_a_launcher_there_is_one_main_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    found = world()
    assert (found.rank, found.size, found.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()


def test_a_world_of_one_is_not_several(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_launched()


def test_alone_nothing_is_sharded_and_sums_are_the_values():
    model = nn.Linear(3, 2)
    shard(model, [], ALONE)
    assert type(model) is nn.Linear
    assert ALONE.total([1.5, 2.0]) == [1.5, 2.0]
    assert ALONE.largest(3.0) == ALONE.from_main(3.0) == 3.0
    ALONE.require_same(b"x", "weights")
    ALONE.wait()


def test_whole_parameters_are_not_sharded():
    with pytest.raises(RunFailed, match="parameter 'weight' is held whole"):
        assert_sharded(nn.Linear(3, 2))


def test_alone_a_gathered_tensor_shares_storage():
    model = nn.Linear(3, 2)
    found = full_state(model, ["weight"], ALONE)
    assert found["weight"].data_ptr() == model.weight.data_ptr()
    assert not found["weight"].requires_grad
    assert whole(model.weight) is model.weight
    assert set(gather({"a": torch.ones(1)}, ALONE)) == {"a"}


def test_fill_copies_into_a_parameter():
    model = nn.Linear(3, 2)
    fill(model.weight, torch.full((2, 3), 7.0))
    assert torch.equal(model.weight.detach(), torch.full((2, 3), 7.0))
    assert model.weight.requires_grad


def test_the_first_interrupt_asks_and_a_later_one_interrupts(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)  # the launcher's copy of the same key press
        stop.since -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_installs_no_handler():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def body() -> None:
        with stop_on_interrupt() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_a_launched_process_launches_no_more(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="already one of several"):
        launch(2, [])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes asked for, this machine has 1 GPUs"):
        launch(2, [])


def run_worker(num: int, tmp_path: Path, name: str, **given: object) -> tuple[int, Path]:
    out = tmp_path / name
    settings = {"work": str(tmp_path / f"{name}.work"), "out": str(out), **given}
    return launch(num, [json.dumps(settings)], module="loop_worker"), out


@pytest.fixture
def worker_module(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def figures(out: Path) -> dict[str, object]:
    found = json.loads((out / "facts-0.json").read_text())
    timed = ("seconds", "tokens_per_second", "peak_bytes")
    return {name: value for name, value in found.items() if name not in timed}


def assert_near(found: Path, expected: Path, tolerance: float) -> None:
    left, right = load_file(found / "tensors.safetensors"), load_file(expected / "tensors.safetensors")
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        torch.testing.assert_close(left[name], tensor, rtol=0, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("worker_module")
def test_two_processes_shard_and_end_as_one_and_resume(tmp_path):
    environment = dict(os.environ)
    assert run_worker(1, tmp_path, "one", accumulate=2)[0] == 0
    code, two = run_worker(2, tmp_path, "two")
    assert code == 0
    one = tmp_path / "one"
    assert_near(two, one, 1e-5)
    for rank in (0, 1):
        facts = json.loads((two / f"facts-{rank}.json").read_text())
        assert facts["launched"]
        assert facts["types"] == ["DTensor"]
        assert facts["local_share"] == pytest.approx(0.5, abs=0.02)
        assert facts["num_tensors"] == (18 if rank == 0 else 0)
    assert json.loads((one / "facts-0.json").read_text())["types"] == ["Tensor"]
    alone, together = figures(one), figures(two)
    assert [loss for _, loss in together["evaluations"]] == pytest.approx([loss for _, loss in alone["evaluations"]])
    assert together["best_step"] == alone["best_step"]

    # killed in the eighth step, resumed from the sixth
    code, killed = run_worker(2, tmp_path, "killed", kill_at_call=8)
    assert code == RunFailed.exit_code
    shutil.copytree(tmp_path / "killed.work", tmp_path / "mixed.work")
    assert run_worker(2, tmp_path, "killed", resume=True)[0] == 0
    assert figures(killed) == together
    assert_near(killed, two, 0.0)

    # what two processes left, one goes on from
    code, mixed = run_worker(1, tmp_path, "mixed", resume=True)
    assert code == 0
    assert_near(mixed, one, 1e-5)
    assert dict(os.environ) == environment


@pytest.mark.slow
@pytest.mark.usefixtures("worker_module")
def test_processes_that_start_from_different_weights_are_refused(tmp_path, capfd):
    code, out = run_worker(2, tmp_path, "out", disagree=True)
    assert code == RunFailed.exit_code
    assert not out.exists()
    assert "initial weights differ between processes" in capfd.readouterr().err
