"""One private run, from its charge to the budget ledger to the release of its weights: what `--dp` adds to tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from client.privacy.budget import Account, BudgetLedger, Charged
from client.privacy.clipping import Unit
from client.privacy.config import DPSettings
from client.privacy.dpsgd import Guarantee, PoissonBatches, PrivateStepper, plan, require_enough, units_of
from offsite.console import say
from offsite.digests import sha256_bytes, tensors_digest
from offsite.errors import PolicyError, RunFailed
from offsite.text.batches import Example
from offsite.text.records import Record
from offsite.training.checkpoints import newest_checkpoint
from offsite.training.config import LoopConfig
from offsite.training.processes import Processes
from offsite.training.step import StepLoss

_HOW = {"hooks": "by hooks", "ghost": "by ghost norms", "one-by-one": "one unit at a time"}
_NOT_PART = {"ledger", "budget", "engine", "rows_at_once"}  # of what a resumed run must share


@dataclass(frozen=True)
class Series:
    """A run's place among several whose mean is released, all of them charged for the same draws and noise.

    Attributes:
        number: of this run, from 1.
        first: folder of the first run's checkpoints.
    """

    number: int
    num_runs: int
    first: Path


@dataclass
class PrivateRun:
    """A run that is in the ledger, with the units it draws from; see `private_run`."""

    units: list[Unit] = field(repr=False)
    guarantee: Guarantee
    account: Account
    settings: DPSettings
    pad_id: int
    ledger: BudgetLedger = field(repr=False)
    weighs_tokens: bool = False
    stepper: PrivateStepper | None = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        """Steps that the run was charged for."""
        return self.guarantee.mechanism.steps

    def batches(self) -> PoissonBatches:
        """Return what the loop reads."""
        return PoissonBatches(len(self.units), self.guarantee.mechanism.rate)

    def make_stepper(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        step_loss: StepLoss,
        config: LoopConfig,
        processes: Processes,
    ) -> PrivateStepper:
        """Return the stepper for `offsite.training.loop.train`."""
        self.stepper = PrivateStepper(
            model,
            trainable,
            step_loss,
            config,
            processes,
            units=self.units,
            guarantee=self.guarantee,
            pad_id=self.pad_id,
            engine=self.settings.engine,
            rows_at_once=self.settings.rows_at_once,
            weighs_tokens=self.weighs_tokens,
        )
        say(f"private: gradients are clipped {_HOW[self.stepper.clipper.name]}")
        return self.stepper

    def require_moved(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Return only if every tensor moved; the noise alone moves them all.

        Raises:
            RunFailed: naming the first that did not.
        """
        for name, tensor in after.items():
            if bool((tensor.cpu() == before[name]).all()):
                raise RunFailed(f"tensor {name!r} did not move, noise moves every one", hint="raise --learning-rate")

    def release(self, tensors: Mapping[str, Tensor]) -> dict[str, object]:
        """These weights may leave, and the ledger has it. Returns what the run may claim, as JSON takes it.

        Raises:
            PolicyError: when the data set is past its budget, or other weights of this run were released.
        """
        self.account = self.ledger.release(self.account.run, tensors_digest(tensors))
        return _claimed(self.guarantee, self.account, self.engine)

    @property
    def engine(self) -> str | None:
        """Name of what clips, once there is one."""
        return self.stepper.clipper.name if self.stepper else None


def release_mean(
    settings: DPSettings,
    works: Sequence[Path],
    runs: Sequence[str],
    tensors: Mapping[str, Tensor],
    *,
    num_units: int,
    batch_size: int,
    engine: str | None,
) -> dict[str, object]:
    """The mean of these runs may leave, and the ledger has it of each. Returns what it may claim, as JSON takes it.

    Args:
        works: folder of each run's checkpoints, by which the ledger knows it.
        runs: each run's id in the ledger.
        num_units, batch_size: as the runs were planned with.

    Raises:
        PolicyError: when a run is not the one charged in its place, or was charged for other draws or noise than the
            first; when the data set is past its budget, or other weights of a run were released.
    """
    with BudgetLedger(settings.ledger) as ledger:
        found = [ledger.newest(ledger.place(work)) for work in works]
        charged = [one for one in found if one is not None]
        if [one.run for one in charged] != list(runs):
            raise PolicyError(
                "a run of the mean is not the one that this ledger was charged for in its place",
                hint="give the ledger they were charged to (dp.ledger), or tune again without --resume",
            )
        _require_alike(charged)
        guarantee = plan(
            settings,
            num_units=num_units,
            batch_size=batch_size,
            steps=None,
            epochs=1.0,
            charged=(charged[0].mechanism, charged[0].delta),
            num_runs=len(charged),
        )
        digest = tensors_digest(tensors)
        for run in runs:
            ledger.release(run, digest)
        return _claimed(guarantee, ledger.account(runs[0]), engine)


def _require_alike(charged: Sequence[Charged]) -> None:
    """Return only if all runs draw alike and add the same noise: only then do their steps add up.

    Raises:
        PolicyError: naming the first that does not.
    """
    for number, one in enumerate(charged, 1):
        if (one.mechanism, one.delta) != (charged[0].mechanism, charged[0].delta):
            raise PolicyError(
                f"run {number} was charged for other draws or noise than run 1: no epsilon of their mean can be stated",
                hint="tune again without --resume",
            )


def _claimed(guarantee: Guarantee, account: Account, engine: str | None) -> dict[str, object]:
    ledger = {"data_set" if name == "data" else name: value for name, value in asdict(account).items()}
    return {**guarantee.figures(), **ledger, "engine": engine}


def private_binding(settings: DPSettings) -> dict[str, str]:
    """Return what a resumed run must share of these settings, one entry per setting."""
    shared = settings.model_dump(mode="json", exclude=_NOT_PART)
    return {f"dp.{name}": str(value) for name, value in shared.items()}


@contextmanager
def private_run(
    settings: DPSettings,
    *,
    examples: Sequence[Example],
    num_validation_documents: int,
    records: Sequence[Record],
    pad_id: int,
    batch_size: int,
    steps: int | None,
    epochs: float,
    resume: bool,
    work: Path,
    binding: Mapping[str, str],
    weighs_tokens: bool = False,
    series: Series | None = None,
) -> Iterator[PrivateRun]:
    """Yield the run these settings ask for, charged in full; a resumed one as it was charged, at no further cost.

    Every record that the run reads is in the ledger, those validated on and canaries among them; documents set aside
    for an audit are not: nothing that leaves is computed from them.

    Args:
        examples: what is trained on, a row each.
        num_validation_documents: documents of the text that are held out for the one validation at the end.
        records: every record that the run reads.
        pad_id: token that fills up a row.
        batch_size, steps, epochs: as `offsite tune` takes them.
        resume: go on with the run whose checkpoints are in `work`, if there are any.
        work: folder of the run's checkpoints.
        binding: what a resumed run must share, `private_binding` among it.
        weighs_tokens: each token's loss counts times its own probability, held fixed (arXiv:2508.05629).
        series: the run's place among several whose mean is released; what the settings allow is for all of them. The
            first is charged only if the budget holds all; the others draw and add as the first.

    Raises:
        ConfigError, DataError: when the settings or the text give no meaningful guarantee.
        PolicyError: when the data set's budget does not allow it, or a run to be resumed was never charged.
        Replayed: when the ledger was turned back.
        RunFailed: when the accountants disagree, or the ledger cannot be written.
    """
    require_enough(num_validation_documents)
    units = units_of(examples, unit=settings.unit, rows_per_user=settings.rows_per_user)
    digest = sha256_bytes(json.dumps(dict(binding), sort_keys=True).encode())
    with BudgetLedger(settings.ledger) as ledger:
        place = ledger.place(work)
        earlier = ledger.newest(place) if resume else None
        has_checkpoint = resume and newest_checkpoint(work) is not None
        if has_checkpoint and earlier is None:
            raise PolicyError(
                f"{work.name!r} holds a run that this ledger was not charged for",
                hint="give the ledger it was charged to (dp.ledger), or delete the work folder to begin anew",
            )
        goes_on = earlier is not None and (has_checkpoint or (earlier.settings == digest and not earlier.is_released))
        first = None if series is None or series.number == 1 else ledger.newest(ledger.place(series.first))
        if series is not None and series.number > 1 and first is None:
            raise PolicyError(
                "the first of the runs was never charged to this ledger", hint="give its ledger (dp.ledger)"
            )
        like = earlier if goes_on else first
        if first is not None and like is not None:
            _require_alike([first, like])
        guarantee = plan(
            settings,
            num_units=len(units),
            batch_size=batch_size,
            steps=steps,
            epochs=epochs,
            charged=None if like is None else (like.mechanism, like.delta),
            num_runs=1 if series is None else series.num_runs,
        )
        if goes_on and earlier:
            account = ledger.resumed(earlier.run)
        else:
            users = {unit[0].document for unit in units} if settings.unit == "user" else ()
            members = ledger.members(records, users=users)
            to_come = 0 if series is None else series.num_runs - series.number
            account = ledger.charge(
                members, guarantee, place=place, settings=digest, budget=settings.budget, num_to_come=to_come
            )
        run = PrivateRun(units, guarantee, account, settings, pad_id, ledger, weighs_tokens)
        _say(run)
        try:
            yield run
        finally:
            if run.stepper is not None:
                run.stepper.clipper.close()


def _say(run: PrivateRun) -> None:
    spent, mechanism, account = run.guarantee.spent, run.guarantee.mechanism, run.account
    say(
        f"private: epsilon {spent.epsilon:.3f} at delta {spent.delta:.2g} per {run.guarantee.unit}, "
        f"noise {mechanism.sigma:.3f} x {run.guarantee.clip:g}, {mechanism.steps} steps at rate {mechanism.rate:.4g}"
        + (f" in each of {run.guarantee.num_runs} runs" if run.guarantee.num_runs > 1 else "")
    )
    say(
        f"private: this data set has spent {account.epsilon_total:.3f} of {account.budget:.3f} "
        f"in {account.num_runs} run(s)"
    )
