"""Train some parameters of a model: the one loop under the owner's distillation and the client's tuning.

Neither the number of parts a step is cut into nor the number of processes changes the result (as long as
nothing random is drawn; with dropout their product must stay the same), and a run that was killed and
resumed ends with the figures of an unbroken one. What is on disk meanwhile: `offsite.training.checkpoints`.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from offsite.console import Progress, progress, say
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.training import checkpoints
from offsite.training.checkpoints import State
from offsite.training.config import LoopConfig
from offsite.training.journal import Journal, truncate
from offsite.training.processes import Processes, gather, shard, stop_on_interrupt, world
from offsite.training.step import Batch, StepLoss, Stepper, require_finite
from offsite.training.trackers import open_trackers

_LOG = "log.jsonl"
_Record = dict[str, int | float | None]
MakeStepper = Callable[[nn.Module, Mapping[str, nn.Parameter], StepLoss, LoopConfig, Processes], Stepper]


class EndOfRun(Exception):
    """Raised where batches are made or weights evaluated: the run is to end here, with the best weights so far.

    Nothing of it is kept on disk: a run that is resumed comes to the same end.
    """

    def __init__(self, kind: str, reason: str, *, hint: str) -> None:
        super().__init__(reason)
        self.kind, self.hint = kind, hint


class Batches(Protocol):
    """What the loop reads: a pure function of the step, so that resuming needs no state of the reader."""

    def batch(self, step: int) -> Batch:
        """Return the batch of `step`, from 0: tensors that share their first axis, the rows."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run did. Losses are per counted position, in the unit of the step loss.

    Args:
        steps: optimizer steps, with those before a resume.
        tokens: tokens that went through the model in training.
        seconds: wall-clock seconds, with evaluations, checkpoints and earlier runs.
        tokens_per_second: tokens over the seconds spent in steps alone.
        peak_bytes: most memory held: by tensors on a GPU, else by the process (resident); of several
            processes or runs, the largest.
        first_loss: training loss of the first step.
        final_loss: training loss of the last step.
        best_step: step of the lowest evaluation; the last step when nothing was evaluated.
        best_loss: that evaluation; none when nothing was evaluated.
        evaluations: (step, loss) of every evaluation.
        before_loss: the evaluation before the first step.
        ended: the kind of `EndOfRun` that ended the run before its last step; none when nothing did.
        tensors: the trained tensors by name, whole, float32. In one process they are the parameters,
            detached, not copied; of several, the main one has them on the CPU and the others none.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    first_loss: float
    final_loss: float
    best_step: int
    best_loss: float | None
    evaluations: list[tuple[int, float]]
    tensors: dict[str, Tensor] = field(repr=False)
    before_loss: float | None = None
    ended: str | None = None

    def figures(self) -> dict[str, object]:
        """Return everything but the tensors, as JSON takes it; how it ended only of a run that ended early."""
        left_out = {"tensors"} | ({"ended"} if self.ended is None else set())
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in left_out}


def train(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    batches: Batches,
    step_loss: StepLoss,
    config: LoopConfig,
    *,
    work: Path,
    resume: bool,
    label: str,
    evaluate: Callable[[], float] | None = None,
    evaluate_before: bool = False,
    keep_best: bool = True,
    shard_blocks: Sequence[nn.Module] = (),
    binding: Mapping[str, str] | None = None,
    make_stepper: MakeStepper = Stepper,
    figures: Callable[[], Mapping[str, float]] | None = None,
) -> Outcome:
    """`trainable` holds the trained weights: the best evaluated ones, or the last.

    The model is used where it stands (several processes: `shard` places it) and in the modes, train or
    eval, that it is in.

    Args:
        model: passed to `step_loss`; nothing in it but `trainable` requires a gradient.
        trainable: parameters of `model` in float32, by the names they have on disk. With several
            processes they are emptied, for `model` then holds shards in their place: read
            `Outcome.tensors`.
        batches: read at steps 0, 1, ...; every process reads the whole batch and takes its rows.
        step_loss: maps (model, some rows of a batch) to the loss summed over counted positions and their
            number, under autocast. It must run `model`, or blocks of it, through their own forwards.
        config: how to train.
        work: folder for checkpoints and log, created; the caller removes it when it is of no more use.
        resume: go on from the newest checkpoint in `work`; begin when there is none.
        label: what the progress line calls this.
        evaluate: returns a loss, the lower the better; called on every process.
        evaluate_before: evaluate once before the first step too; it is told, and is no candidate for what is kept.
        keep_best: end with the weights of the lowest evaluation.
        shard_blocks: the modules that `shard` gathers one at a time.
        binding: what else a resumed run must share, such as the digests of model and data.
        make_stepper: makes what takes the steps; the client's private tuning has its own.
        figures: returns what else is told of a step, right after it, in the log and the progress line.

    Raises:
        ConfigError: when `work` holds an unfinished run and `resume` is false, or a run of other
            settings; when `trainable` is not as above; when the device lacks the precision.
        DataError: when a batch has fewer rows than parts, or nothing counts in any step. RunFailed: when a loss or
            gradient is not finite, the disk is full, or a checkpoint is damaged; when the run is to end before any
            weights were evaluated.
        KeyboardInterrupt: after Ctrl-C, at the end of the step, when its checkpoint is written.
    """
    processes = world()
    checkpoints.require_work(work, resume=resume)
    names = _names_in(model, trainable)
    if processes.size > 1:
        processes.require_same(_digest(trainable), "initial weights")
    if processes.is_main:
        work.mkdir(parents=True, exist_ok=True)
        checkpoints.collect_stale(work)
    processes.wait()
    held = _sharded(model, trainable, names, shard_blocks, processes)
    stepper = make_stepper(model, held, step_loss, config, processes)
    state = State(settings={**config.binding(), "keep_best": keep_best, **(binding or {})})
    run = _Run(
        model, held, batches, stepper, config, work, evaluate, evaluate_before, keep_best, processes, state, label
    )
    run.figures = figures
    with torch.random.fork_rng(devices=[stepper.device] if stepper.device.type == "cuda" else []):
        if resume:
            run.resume()
        run.go()
    return run.outcome()


def require_resumable(work: Path, config: LoopConfig, binding: Mapping[str, str]) -> None:
    """Return only if the newest checkpoint in `work`, where there is one, was made with these settings.

    Whoever writes into `work` before `train` asks this first. Settings that the caller comes to know later are not
    compared; `train` compares all.

    Raises:
        ConfigError: naming every setting that differs.
        RunFailed: when the checkpoint is damaged.
    """
    folder = checkpoints.newest_checkpoint(work)
    if folder is not None:
        expected = {**config.binding(), **binding}
        found = checkpoints.read_state(folder).settings
        _require_settings(folder.name, {name: found.get(name) for name in expected}, expected)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU, else by this process, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux VmHWM is preferred: ru_maxrss of a child starts from the peak of the process that spawned it.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


@dataclass
class _Run:
    """A run between its first and last step; `state` says where it stands."""

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    batches: Batches
    stepper: Stepper
    config: LoopConfig
    work: Path
    evaluate: Callable[[], float] | None
    evaluate_before: bool
    keep_best: bool
    processes: Processes
    state: State
    label: str
    figures: Callable[[], Mapping[str, float]] | None = None
    ended: EndOfRun | None = None

    def resume(self) -> None:
        """Weights, optimizer, best weights, log and state are those of the newest checkpoint, if there is one."""
        folder = checkpoints.newest_checkpoint(self.work)
        if folder is not None:
            state = checkpoints.read_state(folder)
            _require_settings(folder.name, state.settings, self.state.settings)
            checkpoints.read_trainable(folder, self.trainable)
            self.stepper.restart({name: num for name, num in state.updates.items() if name in self.trainable})
            checkpoints.read_moments(folder, self.stepper.moments())
            self.state = state
        self.processes.wait()
        if self.processes.is_main:
            if folder is not None and self._has_best():
                checkpoints.restore_best(self.work, folder)
            truncate(self.work / _LOG, self.state.step)
            say(f"{self.label}: going on after step {self.state.step}" if folder else f"{self.label}: starting anew")
        self.processes.wait()

    def go(self) -> None:
        """The last step is done and has its checkpoint."""
        if self.evaluate is not None and self.evaluate_before and self.state.step == 0:
            try:
                self.state.before_loss = self._measured(self.evaluate)
            except EndOfRun as end:
                self._end(end)
        try:
            self._require_patience()  # of a run that was interrupted in the very step in which it was to end
        except EndOfRun as end:
            self._end(end)
        began, earlier = time.monotonic(), self.state.seconds
        with self._journal() as log, self._progress() as bar, stop_on_interrupt() as stop:
            while self.state.step < self.config.steps and self.ended is None:
                try:
                    record = self._advance()
                except EndOfRun as end:
                    self._end(end)
                    break
                self.state.seconds = earlier + time.monotonic() - began
                if log is not None:
                    log.write({**record, "seconds": round(self.state.seconds, 3)}, self._beside())
                stopping = self.processes.largest(float(stop.requested)) > 0
                if stopping or (self._is_due(self.config.checkpoint_every) and self.ended is None):
                    if log is not None:
                        log.sync()
                    self._checkpoint()
                self._show(bar, record)
                if stopping:
                    raise KeyboardInterrupt

    def outcome(self) -> Outcome:
        """The kept weights are in the model. Returns them and the figures.

        Raises:
            DataError: when nothing counted in any step.
        """
        state, best = self.state, self.state.best
        if state.first_loss is None or state.final_loss is None:
            raise DataError(f"nothing counts in the loss of any of the {state.step} steps")
        if self._has_best() and best is not None and best[0] != state.step:
            checkpoints.read_best(self.work, self.trainable)
        return Outcome(
            steps=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=self._tokens_per_second(),
            peak_bytes=state.peak_bytes,
            first_loss=state.first_loss,
            final_loss=state.final_loss,
            best_step=best[0] if best else state.step,
            best_loss=best[1] if best else None,
            evaluations=list(state.evaluations),
            tensors=gather(self.trainable, self.processes),
            before_loss=state.before_loss,
            ended=None if self.ended is None else self.ended.kind,
        )

    def _advance(self) -> _Record:
        """One step further, evaluated where due. Returns its record, without the time."""
        began, state = time.monotonic(), self.state
        with self._hint():
            done = self.stepper.step(state.step + 1, self.batches.batch(state.step))
        state.step, state.tokens = state.step + 1, state.tokens + done.num_tokens
        state.step_seconds += time.monotonic() - began
        if done.loss is not None:
            state.first_loss = done.loss if state.first_loss is None else state.first_loss
            state.final_loss = done.loss
        record: _Record = {"step": state.step, "loss": done.loss, "rate": done.rate, "tokens": state.tokens}
        record["gradient_norm"] = done.gradient_norm
        record |= {} if self.figures is None else self.figures()
        if self.evaluate is not None and self._is_due(self.config.evaluate_every):
            try:
                record["evaluation_loss"] = self._evaluated(self.evaluate)
                self._require_patience()
            except EndOfRun as end:
                self._end(end)
        return record

    def _require_patience(self) -> None:
        """Return only while a lower evaluation may still come: of a run that keeps its best weights."""
        best, patience = self.state.best, self.config.patience
        if not patience or best is None or not self.keep_best or self.state.step == self.config.steps:
            return
        since = sum(step > best[0] for step, _ in self.state.evaluations)
        if since >= patience:
            reason = f"{since} validation(s) in a row found no lower loss"
            raise EndOfRun("patience", reason, hint="more --patience waits longer, --patience 0 to the last step")

    def _end(self, end: EndOfRun) -> None:
        """The run ends here, with the best weights so far. Raises RunFailed when none were evaluated."""
        step, best = self.state.step, self.state.best
        if not self._has_best() or best is None:
            raise RunFailed(f"{end} at step {step}, before any weights were validated", hint=end.hint) from None
        self.ended = end
        say(f"{self.label}: ended after step {step}: {end}; the weights of step {best[0]} are kept")
        say(f"  {end.hint}")

    def _is_due(self, every: int) -> bool:
        step = self.state.step
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _evaluated(self, evaluate: Callable[[], float]) -> float:
        """Return the evaluation of this step, noted in the state; the best weights are on disk."""
        loss = self._measured(evaluate)
        self.state.evaluations.append((self.state.step, loss))
        if self._has_best() and self.state.best == (self.state.step, loss):
            tensors = gather(self.trainable, self.processes)
            if self.processes.is_main:
                checkpoints.write_best(self.work, tensors)
        return loss

    def _measured(self, evaluate: Callable[[], float]) -> float:
        modes = [(module, module.training) for module in self.model.modules()]
        loss = self.processes.from_main(evaluate())
        for module, mode in modes:
            module.training = mode
        with self._hint():
            require_finite("evaluation loss", loss, self.state.step)
        return loss

    def _has_best(self) -> bool:
        return self.keep_best and bool(self.state.evaluations)

    def _checkpoint(self) -> None:
        state, processes = self.state, self.processes
        state.updates = self.stepper.updates()
        state.peak_bytes = int(processes.largest(max(state.peak_bytes, peak_bytes(self.stepper.device))))
        tensors, moments = gather(self.trainable, processes), gather(self.stepper.moments(), processes)
        if processes.is_main:
            checkpoints.write_checkpoint(self.work, state, tensors, moments, with_best=self._has_best())
        processes.wait()

    @contextmanager
    def _hint(self) -> Iterator[None]:
        """Say in the hint of a failed step which checkpoint is there to go on from."""
        try:
            yield
        except RunFailed as error:
            newest = checkpoints.newest_checkpoint(self.work)
            kept = f"{newest.name} is kept" if newest else "no checkpoint was written yet"
            raise RunFailed(str(error), hint=f"{error.hint}; {kept}" if error.hint else kept) from error

    @contextmanager
    def _journal(self) -> Iterator[Journal | None]:
        """Yield the log on the main process, none elsewhere."""
        if not self.processes.is_main:
            yield None
            return
        step, report = self.state.step, self.config.report
        trackers = open_trackers(report, label=self.label, step=step) if step < self.config.steps else []
        log = Journal(self.work / _LOG, tensorboard=self.config.tensorboard, step=step, trackers=trackers)
        try:
            yield log
        finally:
            log.close()

    @contextmanager
    def _progress(self) -> Iterator[Progress | None]:
        shown = self.processes.is_main and self.state.step < self.config.steps
        with progress(self.config.steps, self.label, start=self.state.step) if shown else nullcontext() as bar:
            yield bar

    def _show(self, bar: Progress | None, record: _Record) -> None:
        if bar is not None:
            figures = {"loss": record["loss"], "evaluated": record.get("evaluation_loss")}
            figures |= {} if self.figures is None else {name: record[name] for name in self.figures()}
            shown = {name: value for name, value in figures.items() if value is not None}
            bar.update(self.state.step, **shown, **{"tokens/s": self._tokens_per_second()})

    def _beside(self) -> _Record:
        """Return what is told of a step and stands in no log."""
        report = self.config.report
        epsilon = None if report is None else report.epsilon
        return {"tokens_per_second": self._tokens_per_second(), "epsilon": epsilon}

    def _tokens_per_second(self) -> float:
        return self.state.tokens / max(self.state.step_seconds, 1e-9)


def _names_in(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return the model's own name of every trained parameter.

    Raises:
        ConfigError: when they are not float32 parameters of the model, each once, and all of its that learn.
    """
    if not trainable:
        raise ConfigError("nothing to train: no parameter was given")
    places = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[str, str] = {}
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise ConfigError(f"trained parameter {name!r} is {parameter.dtype}, expected float32")
        if id(parameter) not in places or not parameter.requires_grad:
            raise ConfigError(f"trained parameter {name!r} is not one of the model that requires a gradient")
        names[name] = places[id(parameter)]
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for stray in sorted(learning - set(names.values())):
        raise ConfigError(f"parameter {stray!r} requires a gradient and is not among those to train")
    if len(set(names.values())) < len(names):
        raise ConfigError("a trained parameter was given under two names")
    return names


def _sharded(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    names: Mapping[str, str],
    blocks: Sequence[nn.Module],
    processes: Processes,
) -> dict[str, nn.Parameter]:
    """Return the parameters that `model` now holds: the same ones, or shards in place of emptied ones."""
    shard(model, blocks, processes)
    parameters = dict(model.named_parameters())
    held = {own: parameters[name] for own, name in names.items()}
    for own, parameter in trainable.items():
        if held[own] is not parameter:  # an old copy would look right and be stale
            parameter.data = parameter.data.new_empty(0)
    return held


def _digest(trainable: Mapping[str, nn.Parameter]) -> bytes:
    """Return a digest of names and values, to tell whether processes start alike; shards have only names."""
    digest = hashlib.sha256()
    for name, parameter in trainable.items():
        digest.update(name.encode())
        if not hasattr(parameter, "to_local"):
            values = parameter.detach().cpu().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _require_settings(where: str, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Raise ConfigError naming every setting in which a run to be resumed differs."""
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if names:
        changed = ", ".join(f"{name} {found.get(name)!r} (now {expected.get(name)!r})" for name in names)
        hint = "resume with the settings it was begun with"
        if any("hidden" in name for name in names):
            hint += "; whether hidden states are kept is up to --cache-bytes, 0 keeps none"
        raise ConfigError(f"{where} was made with {changed}", hint=hint)
