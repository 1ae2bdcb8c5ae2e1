"""Several runs towards one bundle, each in a folder of its own: what is kept of one that is done, and what all did.

::

    OUTPUT.work/
      run1/                     what a single run keeps in OUTPUT.work while it is under way
        tensors.safetensors     once it is done: its adapter, whole, float32
        finished.json           `FinishedRun`: what it did, and with which settings; it comes last
        log.jsonl
      run2/ ...

A run that is done is not run again. Nothing here is taken on trust for lying in the client's own folder: a record of
other settings, another text or another package is refused, and so are tensors that are not those it was written with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError
from torch import Tensor

from offsite.audits.runs import AveragedRun, Digest
from offsite.console import say, table
from offsite.digests import sha256_file
from offsite.errors import BadDigest, BadSchema, ConfigError, RunFailed, TooLarge
from offsite.staging import remove, staged_file
from offsite.strictjson import Strict, parse_strict, write_compact
from offsite.tensors import TensorSpec, read_tensors, write_tensors
from offsite.training.checkpoints import newest_checkpoint
from offsite.training.loop import Outcome

FINISHED_FORMAT: Final = "offsite/finished-run/1"
RECORD_NAME = "finished.json"
TENSORS_NAME = "tensors.safetensors"
LOG_NAME = "log.jsonl"

_LIMIT_BYTES = 2**20
_AGAIN = "delete that run's folder to run it again, the others are kept"

Bound = Mapping[str, str | int | float | bool]


class FinishedRun(Strict):
    """The content of ``finished.json``: the settings and inputs of a run, the digest of its tensors, and what it did.

    Figures are as in `offsite.training.loop.Outcome`. ``charged`` is the run's id in the budget ledger, and ``engine``
    what clipped, of a private run.
    """

    format: Literal["offsite/finished-run/1"] = FINISHED_FORMAT
    settings: dict[str, str | int | float | bool]
    tensors_sha256: Digest
    steps: int = Field(ge=1)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    tokens_per_second: float = Field(ge=0)
    peak_bytes: int = Field(ge=0)
    first_loss: float
    final_loss: float
    best_step: int = Field(ge=1)
    best_loss: float | None
    evaluations: list[tuple[int, float]]
    before_loss: float | None
    charged: str | None = Field(None, pattern=r"^[0-9a-f]{32}$")
    engine: str | None = Field(None, max_length=40)


@dataclass(frozen=True)
class Kept:
    """A run that is done: its record and its adapter, by canonical name, in float32."""

    seed: int
    record: FinishedRun
    tensors: dict[str, Tensor] = field(repr=False)


def folder_of(work: Path, number: int) -> Path:
    """Return the folder of a run, numbered from 1."""
    return work / f"run{number}"


def require_kind(work: Path, *, num_runs: int) -> None:
    """Return only if what is to be resumed in `work` was begun as one run, or as several, as it is now.

    Raises:
        ConfigError: when it was not.
    """
    one, several = newest_checkpoint(work) is not None, any(work.glob("run[0-9]*/"))
    if num_runs > 1 and one:
        raise ConfigError(
            f"work folder {work.name!r} holds a single run, not one of {num_runs}",
            hint="resume without --runs, or delete it to begin anew",
        )
    if num_runs == 1 and several:
        raise ConfigError(
            f"work folder {work.name!r} holds several runs",
            hint="resume with the same --runs, or delete it to begin anew",
        )


def keep(
    folder: Path, outcome: Outcome, *, settings: Bound, charged: str | None = None, engine: str | None = None
) -> None:
    """The run in `folder` is done: its tensors stand there, then its record, and its checkpoints are gone.

    Raises:
        RunFailed: when the disk is full; its checkpoints are then as they were.
    """
    with staged_file(folder / TENSORS_NAME, replace=True) as stage:
        write_tensors(stage, {name: tensor.float() for name, tensor in outcome.tensors.items()})
    before = outcome.before_loss
    record = FinishedRun(
        settings=dict(settings),
        tensors_sha256=sha256_file(folder / TENSORS_NAME),
        **{
            **outcome.figures(),
            "before_loss": None if before is None or not math.isfinite(before) else before,
        },  # type: ignore[arg-type]
        charged=charged,
        engine=engine,
    )
    with staged_file(folder / RECORD_NAME, replace=True) as stage:
        stage.write_bytes(write_compact(record))
    for path in folder.iterdir():
        if path.name not in (TENSORS_NAME, RECORD_NAME, LOG_NAME):
            remove(path)


def kept(folder: Path, expected: Mapping[str, TensorSpec], *, seed: int, settings: Bound) -> Kept | None:
    """Return the run in `folder` if it is done, once its record and tensors are those of these settings; else None.

    Args:
        expected: the adapter's tensors; they are float32, whatever dtype is declared.

    Raises:
        ConfigError: naming every setting in which it differs.
        TooLarge, WrongBinding, BadSchema: when the record is not one of this format.
        BadDigest, WrongNames, WrongShape, NotFinite: when the tensors are not those it was written with.
    """
    path, what = folder / RECORD_NAME, f"{folder.name}/{RECORD_NAME}"
    if not path.exists():
        return None
    with _reading(what), path.open("rb") as handle:
        raw = handle.read(_LIMIT_BYTES + 1)
    if len(raw) > _LIMIT_BYTES:
        raise TooLarge(f"{what}: over {_LIMIT_BYTES} bytes", hint=_AGAIN)
    record = parse_strict(raw, FinishedRun, what, {"format": FINISHED_FORMAT})
    if record.best_step > record.steps:
        raise BadSchema(f"{what}: its best step {record.best_step} is beyond its {record.steps} steps", hint=_AGAIN)
    _require_same(folder.name, record.settings, settings)
    tensors = folder / TENSORS_NAME
    with _reading(f"{folder.name}/{TENSORS_NAME}"):
        found = sha256_file(tensors)
    if found != record.tensors_sha256:
        raise BadDigest(f"{folder.name}/{TENSORS_NAME} is not the file that {RECORD_NAME} binds", hint=_AGAIN)
    whole = {name: TensorSpec(shape=spec.shape, dtype="float32") for name, spec in expected.items()}
    return Kept(seed, record, read_tensors(tensors, whole))


def precision_of(folder: Path) -> str | None:
    """Return the arithmetic that the record of a run that is done states; None without one that can be read."""
    try:
        with (folder / RECORD_NAME).open("rb") as handle:
            record = FinishedRun.model_validate_json(handle.read(_LIMIT_BYTES))
    except (OSError, ValidationError):  # `kept` says what is wrong with it
        return None
    return str(record.settings.get("precision"))


def averaged(runs: Sequence[Kept]) -> tuple[AveragedRun, ...]:
    """Return what the bundle's record says of each run."""
    return tuple(AveragedRun(seed=run.seed, steps=run.record.best_step, steps_run=run.record.steps) for run in runs)


def together(runs: Sequence[Kept], tensors: dict[str, Tensor], *, loss: float | None) -> Outcome:
    """Return what all runs did as one: steps, tokens and seconds are sums, training losses means.

    Args:
        tensors: the mean.
        loss: of the mean on the held-out text, None where it is not finite.
    """
    records = [run.record for run in runs]
    steps, tokens = sum(one.steps for one in records), sum(one.tokens for one in records)
    in_steps = sum(one.tokens / one.tokens_per_second for one in records if one.tokens_per_second)
    return Outcome(
        steps=steps,
        tokens=tokens,
        seconds=sum(one.seconds for one in records),
        tokens_per_second=tokens / in_steps if in_steps else 0.0,
        peak_bytes=max(one.peak_bytes for one in records),
        first_loss=sum(one.first_loss for one in records) / len(records),
        final_loss=sum(one.final_loss for one in records) / len(records),
        best_step=sum(one.best_step for one in records),
        best_loss=loss,
        evaluations=[] if loss is None else [(steps, loss)],
        tensors=tensors,
        before_loss=records[0].before_loss,
    )


def losses_of(runs: Sequence[Kept]) -> list[float]:
    """Return every loss that the runs' records hold."""
    found: list[float | None] = []
    for run in runs:
        one = run.record
        found += [
            one.first_loss,
            one.final_loss,
            one.best_loss,
            one.before_loss,
            *(loss for _, loss in one.evaluations),
        ]
    return [loss for loss in found if loss is not None]


def told(runs: Sequence[Kept]) -> list[dict[str, object]]:
    """Return the figures of each run, as JSON takes them."""
    names = ("steps", "best_step", "best_loss", "first_loss", "final_loss", "seconds")
    return [{"seed": run.seed, **{name: getattr(run.record, name) for name in names}} for run in runs]


def say_runs(runs: Sequence[Kept], *, loss: float | None, lost: float, rank: int | None) -> None:
    """Each run's loss is on stderr beside that of the mean, and a warning where the mean is worse than the best run.

    Args:
        lost: share of the mean's norm that the cut took.
        rank: what the mean was cut to; None where it was not.
    """

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4f}"

    rows = [[f"run {number}", str(run.seed), f"{run.record.best_step:,}", shown(run.record.best_loss)]
            for number, run in enumerate(runs, 1)]  # fmt: skip
    rows.append(["their mean", "", "", shown(loss)])
    table("validation loss of the runs and of their mean, which is what is written", ["", "seed", "step", "loss"], rows)
    if rank is not None:
        say(f"the mean is cut to rank {rank}: {lost:.1%} of its update's norm is lost")
    best = min((run.record.best_loss for run in runs if run.record.best_loss is not None), default=None)
    if best is not None and (loss is None or loss > best):
        say(f"WARNING: the mean is worse on the emulator than the best single run ({shown(loss)}, {best:.4f})")
        say("  what it is worth in the full model only the owner can measure; it was written all the same")


def joined_log(folders: Sequence[Path]) -> bytes:
    """Return the runs' logs as one whose steps, tokens and seconds go on from run to run; ``run`` says which it is."""
    lines: list[bytes] = []
    before = {"step": 0, "tokens": 0, "seconds": 0.0}
    for number, folder in enumerate(folders, 1):
        path, last = folder / LOG_NAME, dict(before)
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            record = json.loads(line)
            last = {name: round(value + record.get(name, 0), 3) for name, value in before.items()}
            lines.append(json.dumps({**record, **last, "run": number}, allow_nan=False).encode() + b"\n")
        before = last
    return b"".join(lines)


def _require_same(where: str, found: Bound, expected: Bound) -> None:
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if names:
        changed = ", ".join(f"{name[:80]} {found.get(name)!r:.80} (now {expected.get(name)!r:.80})" for name in names)
        raise ConfigError(f"{where} was made with {changed}", hint="resume with the settings it was begun with")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Raise RunFailed where a file of a run that is done cannot be read."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{what} cannot be read: {(error.strerror or 'i/o error').lower()}", hint=_AGAIN) from None
