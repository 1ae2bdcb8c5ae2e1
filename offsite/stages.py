"""Verbs run as processes of their own, each once: for the demo, rehearsals, and realigning between rounds.

A stage that ended well leaves a note, ``NOTES/<name>.json``, with its words, its inputs' digests and its outcome. It is
not run again while all of these and what it left still stand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from offsite import __version__
from offsite.console import PLAYED, say
from offsite.errors import RunFailed
from offsite.staging import leftovers, staged_file

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 10.0
_STEP_SECONDS = 600.0
"""How long a verb that resumes may take to end the step that it is in, and to keep what it did."""


@dataclass
class Stage:
    """One verb run by one party in its own folder.

    Args:
        words: the verb and its arguments; paths in them are relative to `party`.
        leaves: what stands when the verb has ended well; none: run it every time.
        inputs: what the outcome depends on beside the words, by name, such as digests of what it reads.
        outcome: the JSON object that the verb printed.
        reused: whether the outcome is that of an earlier run.
        resumes: whether the verb, given these words, goes on with what it left half done: that is kept as long as
            words and inputs are the same.
        holding: open files that the process holds, too: a lock on one of them outlives whoever plays the stage.
        hiding: environment variables that the process does not get.
    """

    name: str
    party: Path
    words: Sequence[str]
    leaves: Path | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    reused: bool = False
    resumes: bool = False
    holding: Sequence[int] = ()
    hiding: Collection[str] = ()

    def binding(self) -> dict[str, object]:
        """Return what an earlier run must share for its outcome to be this one's."""
        return {"offsite": __version__, "words": list(self.words), "inputs": self.inputs}


def play(stages: Sequence[Stage], notes: Path) -> None:
    """Every stage has its outcome; those that must be run are run side by side, each in a process of its own.

    A signal that ends this process (SIGTERM, SIGHUP) ends theirs first.

    Raises:
        RunFailed: when one fails; the others are then stopped and have ended.
    """
    notes.mkdir(parents=True, exist_ok=True)
    due = [stage for stage in stages if not _recall(stage, notes)]
    if due:
        with _ended_by_signals():
            _run(due, notes)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside, signals that would end this process at once raise SystemExit, with the code that shells give them."""
    theirs: list[tuple[int, Any]] = []

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        known = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        theirs = [(one, signal.signal(one, end)) for one in known if signal.getsignal(one) == signal.SIG_DFL]
    try:
        yield
    finally:
        for number, handler in theirs:
            signal.signal(number, handler)


def _run(due: Sequence[Stage], notes: Path) -> None:
    running: dict[subprocess.Popen[bytes], Stage] = {}
    try:
        for stage in due:
            _clear(stage, notes)
            say(f"  $ offsite {' '.join(word if ' ' not in word else repr(word) for word in stage.words)}")
            running[_start(stage, notes, len(due))] = stage
        while running:
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                _finish(running[process], process.returncode, notes)
                del running[process]
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        _stop(running)


def was_done(stage: Stage, notes: Path) -> bool:
    """Tell whether the stage was done before, and what it left still stands; then it has the outcome of that time."""
    if stage.leaves is None or not stage.leaves.exists():
        return False
    try:
        found = json.loads(_note(stage, notes).read_bytes())
        if {**found, "outcome": None} != {**stage.binding(), "outcome": None}:
            return False
        stage.outcome = dict(found["outcome"])
    except (OSError, ValueError, TypeError, KeyError):  # no note, or one that was torn
        return False
    stage.reused = True
    return True


def _recall(stage: Stage, notes: Path) -> bool:
    """Return whether the stage was done before, and say so."""
    if not was_done(stage, notes):
        return False
    say(f"  {stage.name}: done before")
    return True


def _begun(stage: Stage, notes: Path) -> Path:
    """Return where it stands with which words and inputs a stage that resumes was begun."""
    return notes / f"{stage.name}.begun.json"


def _goes_on(stage: Stage, notes: Path) -> bool:
    """Tell whether what the stage left half done is of the same words and inputs; from now on it is of these."""
    if not stage.resumes:
        return False
    binding = json.loads(json.dumps(stage.binding()))
    try:
        same = json.loads(_begun(stage, notes).read_bytes()) == binding
    except (OSError, ValueError):
        same = False
    if not same:
        _remove_half_done(stage)
        with staged_file(_begun(stage, notes), replace=True) as note:
            note.write_text(json.dumps(binding), encoding="utf-8")
    return True


def _note(stage: Stage, notes: Path) -> Path:
    return notes / f"{stage.name}.json"


def _clear(stage: Stage, notes: Path) -> None:
    """Nothing of an earlier run of the stage stands in the way of this one, but what this one goes on with."""
    if stage.leaves is None:
        return
    if not _goes_on(stage, notes):
        _remove_half_done(stage)
    for path in (stage.leaves, *leftovers(stage.leaves)):
        _remove(path)


def _remove_half_done(stage: Stage) -> None:
    if stage.leaves is not None:
        _remove(stage.leaves.parent / f"{stage.leaves.name}.work")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _start(stage: Stage, notes: Path, num_running: int) -> subprocess.Popen[bytes]:
    command, environment = _command(stage.words), _environment(num_running)
    environment = {name: value for name, value in environment.items() if name not in stage.hiding}
    held = tuple(stage.holding)
    with _printed(stage, notes).open("wb") as out:
        return subprocess.Popen(
            command, cwd=stage.party, stdin=subprocess.DEVNULL, stdout=out, env=environment, pass_fds=held
        )


def _command(words: Sequence[str]) -> list[str]:
    """Safe path: no module of the party's folder stands in for one of ours."""
    return [sys.executable, "-P", "-m", "offsite", *words]


def _printed(stage: Stage, notes: Path) -> Path:
    return notes / f"{stage.name}.out"


def _environment(num_running: int) -> dict[str, str]:
    """Processes side by side share the cores, and threads sleep while they wait.

    Threads that spin instead made a tuning step 2.5 times slower on two cores that something else was using too.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores // num_running)), "OMP_WAIT_POLICY": "PASSIVE"}
    return {**threads, **os.environ, PLAYED: "1"}


def _finish(stage: Stage, code: int, notes: Path) -> None:
    """The stage has its outcome and a note of it."""
    if code:
        ending = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise RunFailed(
            f"step {stage.name!r} {ending}", hint="its own message is above; steps that ended well are kept"
        )
    lines = _printed(stage, notes).read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        stage.outcome = dict(json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        raise RunFailed(f"step {stage.name!r} printed no JSON object as its last line") from None
    _printed(stage, notes).unlink()
    with staged_file(_note(stage, notes), replace=True) as note:
        note.write_text(json.dumps({**stage.binding(), "outcome": stage.outcome}), encoding="utf-8")


def _stop(running: Mapping[subprocess.Popen[bytes], Stage]) -> None:
    """Every process has ended: asked to, as by Ctrl-C where it resumes, and made to when it takes too long."""
    for process, stage in running.items():
        if stage.resumes:
            process.send_signal(signal.SIGINT)
        else:
            process.terminate()
    for process, stage in running.items():
        try:
            process.wait(_STEP_SECONDS if stage.resumes else _PATIENCE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):  # or somebody is in a hurry
            process.kill()
            process.wait()
