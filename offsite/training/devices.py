"""Where a run computes: the device a person names, or the best one there is."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

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


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory is free there, in bytes: a GPU's own, else what the system or its control group leaves.

    None where the system does not say.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, free again
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")  # a container's limit
    with suppress(OSError, ValueError, KeyError):
        limit, used = ((group / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        told = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = int(told["active_file"]) + int(told["inactive_file"])  # the kernel gives it up when it is asked to
        found.append(max(0, int(limit) - int(used) + cached))  # no number, "max", is no limit
    return min(found, default=None)
