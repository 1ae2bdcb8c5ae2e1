"""Several runs of ``offsite tune --runs`` at once, a process each: how many there may be, and what becomes of them.

A process is given its settings as JSON on its standard input, which stays open: when this process is gone, the other
one reads the end of it and goes, too, so that nobody else is at work in a folder that is resumed. Its last line on
standard output says what went wrong, if anything did.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from offsite.console import say
from offsite.errors import ArtefactError, ConfigError, OffsiteError, PolicyError, RunFailed

_COMMAND = (sys.executable, "-P", "-m", "client.tuning.onerun")
_PATIENCE_SECONDS = 600.0  # for the step that a run is in when it is asked to stop
_LOOK_EVERY_SECONDS = 0.05
_ERRORS: dict[int, type[OffsiteError]] = {
    error.exit_code: error for error in (OffsiteError, ConfigError, ArtefactError, PolicyError, RunFailed)
}


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_at_once(wanted: int, num_runs: int, *, need_bytes: int, free_bytes: int) -> int:
    """Return how many runs may go on at once, and say why where that is fewer than wanted; at least one.

    Args:
        need_bytes: what one run takes, about.
        free_bytes: what there is.
    """
    limits = {"cores": num_cores(), "memory": max(1, free_bytes // max(1, need_bytes))}
    found = min(wanted, num_runs, *limits.values())
    if found < min(wanted, num_runs):
        short = " and ".join(name for name, limit in limits.items() if limit == found)
        say(f"{found} run(s) at once instead of {min(wanted, num_runs)}: {short} allow no more")
    return found


def train_side_by_side(settings: str, numbers: Sequence[int], *, num_runs: int, at_once: int) -> None:
    """Every one of these runs is done, so many at once, each in a process with its share of the cores.

    Args:
        settings: the verb's settings, as JSON.
        numbers: of the runs, from 1.

    Raises:
        OffsiteError: of the class that the first run to fail ended with; the others were stopped, and go on resumed.
        KeyboardInterrupt: after Ctrl-C, when every process has written its checkpoint.
    """
    waiting, running = list(numbers), dict[int, subprocess.Popen[bytes]]()
    threads = max(1, num_cores() // at_once)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number = waiting.pop(0)
                running[number] = _started({"settings": settings, "run": number, "threads": threads})
            for number in [number for number, process in running.items() if process.poll() is not None]:
                _require_done(running.pop(number), number, num_runs)
            time.sleep(_LOOK_EVERY_SECONDS)
    finally:
        _stop(list(running.values()))


def _started(asked: dict[str, object]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stdin = _pipe(process.stdin)
    with suppress(BrokenPipeError):  # it ended at once: how, is looked at with the others
        stdin.write(json.dumps(asked).encode("ascii") + b"\n")
        stdin.flush()
    return process


def _require_done(process: subprocess.Popen[bytes], number: int, num_runs: int) -> None:
    """Return only if the run of a process that has ended is done.

    Raises:
        OffsiteError: with the reason that it gave.
    """
    with _pipe(process.stdout) as stdout:
        lines = stdout.read().splitlines()
    _close(process)
    code = process.returncode
    if code == 0:
        return
    name = f"run {number} of {num_runs}"
    if code < 0:
        raise RunFailed(f"{name} was killed by signal {-code}", hint="--resume goes on; try fewer --parallel")
    try:
        told = json.loads(lines[-1])
        message, hint = str(told["error"]), told["hint"]
    except (IndexError, ValueError, KeyError, TypeError):
        raise RunFailed(f"{name} ended with exit code {code}", hint="why is said above") from None
    raise _ERRORS.get(code, RunFailed)(f"{name}: {message}", hint=None if hint is None else str(hint))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Every process has ended: asked to, as by Ctrl-C, and made to when it takes too long."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(_PATIENCE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        _pipe(process.stdout).close()
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    with suppress(BrokenPipeError):  # what it never read
        _pipe(process.stdin).close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # noqa: S101 - both were asked for
    return stream
