"""Where a run computes: the device a person names, or the best one there is."""

from __future__ import annotations

import re

import torch

from offsite.errors import ConfigError
from offsite.training.processes import is_launched, world


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; ``auto`` is an accelerator if there is one, and each process's own.

    Args:
        name: auto, cpu, cuda, or cuda:N for the GPU of that number.

    Raises:
        ConfigError: when there is no such device here, or launched processes have others.
    """
    found = re.fullmatch(r"(auto|cpu|cuda)(?::([0-9]{1,4}))?", name)
    if found is None or (found[2] and found[1] != "cuda"):
        raise ConfigError(f"--device: {name!r} is not a device", hint="use auto, cpu, cuda or cuda:N")
    if found[1] == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: no CUDA device on this machine", hint="use --device cpu")
    if found[2] and int(found[2]) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    if name == "auto" or is_launched():
        chosen = world().device
        if name not in ("auto", chosen.type):  # the launcher gives each process a device of its own
            raise ConfigError(f"--device {name}: launched processes compute on {chosen.type}", hint="use --device auto")
        return chosen
    return torch.device(name)
