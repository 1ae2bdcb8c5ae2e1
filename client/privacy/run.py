"""One private run, from its charge to the budget ledger to the release of its weights: what `--dp` adds to tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from client.privacy.budget import Account, BudgetLedger
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
        clipper = self.stepper.clipper.name if self.stepper else None
        ledger = {"data_set" if name == "data" else name: value for name, value in asdict(self.account).items()}
        return {**self.guarantee.figures(), **ledger, "engine": clipper}


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
        guarantee = plan(
            settings,
            num_units=len(units),
            batch_size=batch_size,
            steps=steps,
            epochs=epochs,
            charged=(earlier.mechanism, earlier.delta) if goes_on and earlier else None,
        )
        if goes_on and earlier:
            account = ledger.resumed(earlier.run)
        else:
            users = {unit[0].document for unit in units} if settings.unit == "user" else ()
            members = ledger.members(records, users=users)
            account = ledger.charge(members, guarantee, place=place, settings=digest, budget=settings.budget)
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
    )
    say(
        f"private: this data set has spent {account.epsilon_total:.3f} of {account.budget:.3f} "
        f"in {account.num_runs} run(s)"
    )
