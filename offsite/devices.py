"""Where a run computes: the device a person names, or the best one there is."""

from __future__ import annotations

import torch

from offsite.errors import ConfigError
from offsite.processes import is_launched, world


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; ``auto`` is an accelerator if there is one, and each process's own.

    Raises:
        ConfigError: when there is no such device here.
    """
    if name == "auto" or is_launched():
        return world().device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: {name!r} is not a device", hint="use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: no CUDA device on this machine", hint="use --device cpu")
    return device
