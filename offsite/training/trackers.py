"""Curves of a run in other tools: TensorBoard's event files, Weights & Biases, MLflow.

What is reported is an allow-list of figures (`FIGURES`), built up one by one: never a setting, a text, a path, or the
name of a machine or a user. What these tools collect of themselves is switched off, and where one of them sends figures
to another machine, that is said.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from offsite.console import say
from offsite.errors import ConfigError
from offsite.staging import staged_file
from offsite.training.config import Report, TrackerName

FIGURES: Mapping[str, str] = {
    "loss": "loss",
    "evaluation_loss": "evaluation_loss",
    "rate": "learning_rate",
    "tokens_per_second": "tokens_per_second",
    "epsilon": "epsilon",
}
"""What may be reported beside the step: by its name in the log, what it is called."""

_MODULES: Mapping[TrackerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
_PROJECT = "offsite"
_NOBODY = "unnamed"
_IDS = "runs.json"

Record = Mapping[str, int | float | None]


class Tracker(Protocol):
    """Takes the figures of a run, step by step."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of one step are with it, or on their way."""

    def close(self) -> None:
        """Nothing is open any more."""


def require_trackers(names: Collection[TrackerName]) -> None:
    """Return only if the packages of these tools are installed; nothing is imported.

    Raises:
        ConfigError: naming the one that is missing.
    """
    for name in names:
        missing = next((module for module in _MODULES[name] if not _is_there(module)), None)
        if missing is not None:
            raise ConfigError(
                f"--report-to {name}: {missing} is not installed",
                hint="pip install 'offsite-tuning[track]', or leave it out",
            )


def load(names: Collection[TrackerName]) -> None:
    """The modules of these tools are imported: before a run is sealed off, for some of them ask for the machine's kind.

    Raises:
        ConfigError: as `require_trackers`.
    """
    require_trackers(names)
    if "tensorboard" in names:
        importlib.import_module("tensorboard.summary.writer.record_writer")
        importlib.import_module("tensorboard.compat.proto.event_pb2")
    if "mlflow" in names:
        _mlflow()


def figures_of(record: Record) -> dict[str, float]:
    """Return what of a step's record may be reported, under the names it has there."""
    found = {}
    for name, told in FIGURES.items():
        value = record.get(name)
        if value is not None:
            found[told] = float(value)
    return found


def open_trackers(report: Report | None, *, label: str, step: int) -> list[Tracker]:
    """Return what the run reports to; where figures leave this machine, that was said.

    Args:
        label: what the run is called there.
        step: last step that was done before.

    Raises:
        ConfigError: when a package is missing, or a tool cannot be begun with.
    """
    if report is None:
        return []
    require_trackers(report.to)
    opened: list[Tracker] = []
    try:
        for name in report.to:
            if name == "tensorboard":
                opened.append(EventFile(report.folder / name, step=step))
            elif name == "wandb":
                opened.append(_Wandb(report, label, is_new=step == 0))
            else:
                opened.append(_Mlflow(report, label, is_new=step == 0))
    except ConfigError:
        for tracker in opened:
            tracker.close()
        raise
    return opened


class EventFile:
    """TensorBoard's scalars in a file whose name, unlike those of its own writer, holds no host's."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Open a file in `folder`; what earlier files there say of later steps than `step` counts no more."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise ConfigError("tensorboard is not installed", hint="pip install tensorboard, or leave it out") from None
        seconds, rest_ns = divmod(time.time_ns(), 10**9)
        now = float(seconds)
        name = f"events.out.tfevents.{seconds:010d}.offsite.{rest_ns:09d}.{os.getpid()}"  # read in this order
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter((folder / name).open("xb"))
        except OSError as error:
            why = (error.strerror or "i/o error").lower()
            raise ConfigError(f"--tensorboard: cannot write in {folder.name!r}: {why}", hint="name a folder") from None
        self._event, self._summary = Event, Summary
        self._put(Event(wall_time=now, file_version="brain.Event:2"))
        self._put(Event(wall_time=now, step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures stand in the file."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._put(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """The file is closed."""
        self._writer.close()

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


class _Wandb:
    """A run of Weights & Biases, without anything of what it collects by itself."""

    def __init__(self, report: Report, label: str, *, is_new: bool) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        report.folder.mkdir(parents=True, exist_ok=True)
        known = None if is_new else _known(report, "wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=label,
                id=known,
                resume=None if known is None else "allow",
                config={},
                settings=wandb.Settings(root_dir=str(report.folder), **_SILENT_WANDB),
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"--report-to wandb: it does not begin ({type(error).__name__})",
                hint="wandb login, or WANDB_MODE=offline to keep figures here",
            ) from None
        if not (self._run.offline or self._run.disabled):  # nothing of a step was sent yet
            _say_away("Weights & Biases, as this machine's wandb is set up", report)
        self._logs = Path(self._run.dir).parent / "logs"
        _keep(report, "wandb", self._run.id)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures are with wandb's own process."""
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        """wandb's process has written, or sent, everything; its debug logs, which hold paths, are gone."""
        self._run.finish()
        shutil.rmtree(self._logs, ignore_errors=True)


_SILENT_WANDB: Mapping[str, Any] = {
    **{"host": _NOBODY, "username": _NOBODY, "email": _NOBODY, "program": _PROJECT},
    **{"disable_git": True, "disable_code": True, "save_code": False, "disable_job_creation": True},
    **{"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False},
    **{"console": "off", "silent": True, "symlink": False},
}
"""Nothing of host, user, git, source, requirements, arguments, terminal or hardware is collected."""


class _Mlflow:
    """A run of MLflow: in the user's own store, or in a database beside the output."""

    def __init__(self, report: Report, label: str, *, is_new: bool) -> None:
        client = _mlflow()
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        given = None if report.is_sealed else os.environ.get("MLFLOW_TRACKING_URI")
        if given is not None and not given.startswith(("file:", "sqlite:", "/", ".")):
            _say_away("MLflow, as MLFLOW_TRACKING_URI says", report)
        report.folder.mkdir(parents=True, exist_ok=True)
        local = f"sqlite:///{Path(os.path.abspath(report.folder)) / 'mlflow.db'}"  # noqa: PTH100 - links stay links
        self._errors: tuple[type[Exception], ...] = (MlflowException, SQLAlchemyError, OSError)
        project, self._is_lost = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT), False
        try:
            self._client = client(tracking_uri=given or local)
            found = self._client.get_experiment_by_name(project)
            artifacts = None if given is not None else (Path(os.path.abspath(report.folder)) / "mlflow").as_uri()  # noqa: PTH100
            place = found.experiment_id if found else self._client.create_experiment(project, artifacts)
            known = None if is_new else _known(report, "mlflow")
            if known is None:
                tags = {"mlflow.user": _NOBODY, "mlflow.source.name": _PROJECT}
                known = self._client.create_run(place, run_name=label, tags=tags).info.run_id
            else:
                self._client.get_run(known)
        except self._errors as error:
            raise ConfigError(
                f"--report-to mlflow: it does not begin ({type(error).__name__})",
                hint="look at MLFLOW_TRACKING_URI; without it figures are kept beside the output",
            ) from None
        self._id = str(known)
        _keep(report, "mlflow", self._id)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures are in the store; where it is lost on the way, that is said once and the run goes on."""
        from mlflow.entities import Metric

        if self._is_lost:
            return
        now = int(time.time() * 1000)
        try:
            self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in figures.items()])
        except self._errors as error:
            self._is_lost = True
            say(f"--report-to mlflow: figures from step {step} on are not in it ({type(error).__name__})")

    def close(self) -> None:
        """The run is said to be over, as far as this process goes."""
        if not self._is_lost:
            with suppress(*self._errors):  # every figure is there
                self._client.set_terminated(self._id)


def _mlflow() -> Any:
    """Return MLflow's client, which reports nothing to its makers and logs nothing of itself."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "true"
    platform.processor()  # asks the system, by a process, once
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    for name in ("sqlalchemy", "alembic.config", "mlflow.entities", "mlflow.store.tracking.sqlalchemy_store"):
        importlib.import_module(name)
    return MlflowClient


def _say_away(where: str, report: Report) -> None:
    what = "loss, evaluated loss, learning rate, tokens/s and step" + (", epsilon" if report.epsilon else "")
    say(f"figures leave this machine, to {where}: {what}, and nothing else")
    if report.epsilon:
        say("  losses are functions of the private text that --dp does not cover")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _known(report: Report, name: str) -> str | None:
    """Return under which name the tool has the run that is gone on from."""
    try:
        found = json.loads((report.folder / _IDS).read_bytes()).get(name)
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _keep(report: Report, name: str, run: str) -> None:
    path = report.folder / _IDS
    try:
        stated = json.loads(path.read_bytes())
    except (OSError, ValueError):
        stated = {}
    with staged_file(path, replace=True) as stage:
        stage.write_text(json.dumps({**stated, name: run}), encoding="ascii")
