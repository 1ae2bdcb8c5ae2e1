"""What a training run leaves on disk to go on from: weights, optimizer moments and where it stood.

::

    WORK/
      checkpoint-<step>/        the last two; each appears whole, by rename
        state.json              `State`: step, settings, figures so far
        trainable.safetensors   the trained tensors, whole, float32
        optimizer.safetensors   AdamW's moments: "<name>.exp_avg", "<name>.exp_avg_sq"
        best.safetensors        the best weights up to this step, where a run keeps them
      best.safetensors          the best weights so far (in a checkpoint: a link to the file of its time)
      log.jsonl                 one record per step

No pickle: JSON and safetensors, whose exact names, shapes and dtypes are checked before use.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offsite.errors import ConfigError, RunFailed
from offsite.staging import remove, staged_file, staged_folder
from offsite.training.processes import fill

_FORMAT = 1
_KEPT = 2
_PREFIX = "checkpoint-"
_PARTIAL = re.compile(r"\.[^/]+\.[0-9a-f]{8}\.partial")  # as offsite.staging names what is not whole yet
_STATE = "state.json"
_TRAINABLE = "trainable.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_BEST = "best.safetensors"
_BROKEN = "delete that checkpoint to go on from the one before it, or the work folder to begin anew"


class State(BaseModel):
    """Where a run stands after a step, all that a resumed run must know besides tensors.

    Seconds are summed over all the runs that led here. `updates` counts AdamW's updates of each
    tensor; a tensor that never had a gradient is absent.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    format: int = _FORMAT
    settings: dict[str, str | int | float | bool] = Field(default_factory=dict)
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    peak_bytes: int = 0
    first_loss: float | None = None
    final_loss: float | None = None
    before_loss: float | None = None
    evaluations: list[tuple[int, float]] = Field(default_factory=list)
    updates: dict[str, int] = Field(default_factory=dict)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest evaluation, the earliest of equals."""
        return min(self.evaluations, key=lambda pair: pair[1], default=None)


def require_work(work: Path, *, resume: bool) -> None:
    """Return only if `work` may be used: nothing of another run is in it, or the run is to be resumed.

    Raises:
        ConfigError: when it holds something and `resume` is false, or is not a folder.
    """
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ConfigError(
            f"work folder {work.name!r} is not a folder of its own", hint="put the output itself on the bigger disk"
        )
    if not resume and work.is_dir() and any(work.iterdir()):
        raise ConfigError(
            f"work folder {work.name!r} holds an unfinished run", hint="add --resume to go on from it, or delete it"
        )


def collect_stale(work: Path) -> None:
    """Remove what a killed run was still writing; all under `work` is whole afterwards."""
    for path in work.glob(".*.partial"):
        if _PARTIAL.fullmatch(path.name):
            remove(path)


def write_checkpoint(
    work: Path, state: State, trainable: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, with_best: bool
) -> None:
    """``checkpoint-<state.step>`` stands whole under `work`, and at most one older one.

    Args:
        with_best: link ``best.safetensors`` into it, so that it can be resumed after a later best.

    Raises:
        RunFailed: when it cannot be written; the earlier checkpoints are as they were.
    """
    with _disk(work), staged_folder(work / f"{_PREFIX}{state.step}") as stage:
        _save(trainable, stage / _TRAINABLE)
        _save(moments, stage / _OPTIMIZER)
        if with_best:
            _link(work / _BEST, stage / _BEST)
        (stage / _STATE).write_text(state.model_dump_json(indent=1), encoding="utf-8")
    for old in _checkpoints(work)[:-_KEPT]:
        shutil.rmtree(old)


def write_best(work: Path, trainable: Mapping[str, Tensor]) -> None:
    """``best.safetensors`` under `work` holds these weights, whole or as before."""
    with _disk(work), staged_file(work / _BEST, replace=True) as stage:
        _save(trainable, stage)


def newest_checkpoint(work: Path) -> Path | None:
    """Return the checkpoint of the highest step, or none."""
    return next(reversed(_checkpoints(work)), None)


def read_state(checkpoint: Path) -> State:
    """Return a checkpoint's `State`.

    Raises:
        RunFailed: when it is missing or not in the form this version writes.
    """
    try:
        state = State.model_validate_json((checkpoint / _STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise RunFailed(f"{checkpoint.name}/{_STATE} cannot be read: {type(error).__name__}", hint=_BROKEN) from None
    if state.format != _FORMAT:
        raise RunFailed(f"{checkpoint.name}: format {state.format}, expected {_FORMAT}", hint=_BROKEN)
    return state


def read_trainable(checkpoint: Path, targets: Mapping[str, Tensor]) -> None:
    """`targets` hold the checkpoint's weights. Raises RunFailed as `read_tensors` does."""
    read_tensors(checkpoint / _TRAINABLE, targets)


def read_moments(checkpoint: Path, targets: Mapping[str, Tensor]) -> None:
    """`targets` hold the checkpoint's optimizer moments. Raises RunFailed as `read_tensors` does."""
    read_tensors(checkpoint / _OPTIMIZER, targets)


def read_best(work: Path, targets: Mapping[str, Tensor]) -> None:
    """`targets` hold the best weights so far. Raises RunFailed as `read_tensors` does."""
    read_tensors(work / _BEST, targets)


def restore_best(work: Path, checkpoint: Path) -> None:
    """``best.safetensors`` under `work` is the best at the time of `checkpoint`, not a later one.

    Raises:
        RunFailed: when the checkpoint holds none or it cannot be copied.
    """
    if not (checkpoint / _BEST).is_file():
        raise RunFailed(f"{checkpoint.name} has no {_BEST}", hint=_BROKEN)
    with _disk(work), staged_file(work / _BEST, replace=True) as stage:
        _link(checkpoint / _BEST, stage)


def read_tensors(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Every tensor of the file is in the target of its name; the exact set is checked before the first is changed.

    Raises:
        RunFailed: naming the first difference in names, shapes or dtypes; `targets` are then unchanged.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        with safe_open(path, framework="pt") as file:
            _require_names(where, set(file.keys()), set(targets))
            for name, target in targets.items():
                _require_form(where, name, file.get_slice(name), target)
            for name, target in targets.items():
                fill(target, file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"{where} cannot be read: {type(error).__name__}", hint=_BROKEN) from None


def _require_names(where: str, found: set[str], expected: set[str]) -> None:
    for name in sorted(found ^ expected):
        problem = "is missing" if name in expected else "is not of this run"
        raise RunFailed(f"{where}: tensor {name!r} {problem}", hint=_BROKEN)


def _require_form(where: str, name: str, found: object, target: Tensor) -> None:
    shape, dtype = tuple(found.get_shape()), found.get_dtype()  # type: ignore[attr-defined]
    if shape != tuple(target.shape) or dtype != "F32":
        raise RunFailed(f"{where}: tensor {name!r}: {dtype} {shape}, expected F32 {tuple(target.shape)}", hint=_BROKEN)


def _checkpoints(work: Path) -> list[Path]:
    found = [path for path in work.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no hard links; a copy costs space only
        shutil.copyfile(source, target)


@contextmanager
def _disk(work: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises into RunFailed that says what is kept."""
    try:
        yield
    except (RunFailed, OSError, SafetensorError) as error:
        newest = newest_checkpoint(work)
        kept = f"{newest.name} is kept" if newest else "no checkpoint was finished"
        hint = f"{kept}; free space, then --resume"
        raise RunFailed(f"cannot write under {work.name!r}: {_reason(error)}", hint=hint) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    text = str(error)
    return "no space left on device" if "no space left" in text.lower() else text.partition(": ")[2] or text
