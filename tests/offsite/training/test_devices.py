from __future__ import annotations

import pytest
import torch

from offsite.errors import ConfigError
from offsite.training import devices
from offsite.training.devices import choose_device
from offsite.training.processes import Processes


def test_auto_is_what_this_machine_has():
    assert choose_device() == choose_device("auto")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "name", ["", "gpu", "meta", "mps", "xla", "cpu:0", "auto:1", "cuda:", "cuda:x", "cuda:-1", "CUDA"]
)
def test_what_is_no_device_here(name):
    with pytest.raises(ConfigError, match="is not a device") as caught:
        choose_device(name)
    assert caught.value.hint == "use auto, cpu, cuda or cuda:N"


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match="no CUDA device") as caught:
            choose_device(name)
        assert caught.value.hint == "use --device cpu"


def test_a_gpu_by_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="this machine has 2 GPUs"):
        choose_device("cuda:2")


def test_launched_processes_have_their_own(monkeypatch):
    own = torch.device("cpu")
    monkeypatch.setattr(devices, "is_launched", lambda: True)
    monkeypatch.setattr(devices, "world", lambda: Processes(1, 2, own, False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device() is own
    assert choose_device("cpu") is own
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="launched processes compute on cpu"):
            choose_device(name)
