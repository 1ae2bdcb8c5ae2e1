"""Several runs of the same settings, and their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from adapters.average import LOW_RANK, mean_of
from adapters.norms import adapted_names, base_tensors
from adapters.rounds import grown
from client.privacy.dpsgd import free_bytes, units_of
from client.privacy.run import release_mean
from client.tuning import averages
from client.tuning.averages import Kept
from client.tuning.learning import validation_for
from client.tuning.ready import Ready
from client.tuning.sidebyside import num_at_once, train_side_by_side
from client.tuning.tune import Done, attach_to_package, make_room, train_run
from offsite.console import say
from offsite.errors import OffsiteError, RunFailed
from offsite.evaluation.measure import perplexity
from offsite.training.precision import uses_bf16

if TYPE_CHECKING:
    from offsite.artefacts.bundle import AdapterSpec


_MODEL_COPIES = 3  # in float32: as it is loaded, as it stands, and its activations, about
_TRAINED_COPIES = 5  # of what is trained: gradients, two moments, the best ones, room


def mean_run(ready: Ready) -> Done:
    """Return the mean of several runs, once all of them are done; those that are, are not run again."""
    config, numbers = ready.config, range(1, ready.config.runs + 1)
    missing = [number for number in numbers if _kept(ready, number) is None]
    for number in sorted(set(numbers) - set(missing)):
        say(f"run {number} of {config.runs}: done before")
    make_room(ready.work)
    at_once = 1 if config.parallel == 1 else _num_at_once(ready, len(missing))
    if at_once > 1:
        ready.planted.mark(config)
        child = config.model_copy(update={"resume": True})
        given = child.model_fields_set | {"resume"}
        settings = child.model_dump_json(include=given, exclude={"parallel"})
        train_side_by_side(settings, missing, num_runs=config.runs, at_once=at_once)
    else:
        for number in missing:
            try:
                train_run(ready, number)
            except OffsiteError as error:
                raise type(error)(f"run {number} of {config.runs}: {error}", hint=error.hint) from error
    runs = [run for run in (_kept(ready, number) for number in numbers) if run is not None]
    if len(runs) < config.runs:
        raise RunFailed(f"{config.runs - len(runs)} of {config.runs} runs are not done", hint="--resume goes on")
    spec, tensors, lost = mean_of(config.spec(), [run.tensors for run in runs], _base(ready), rank=ready.mean_rank)
    loss, figures = _measured(ready, spec, tensors)
    outcome = averages.together(runs, tensors, loss=loss)
    averages.say_runs(runs, loss=loss, lost=lost, rank=ready.mean_rank)
    guarantee = _released(ready, runs, tensors)
    how = "exact" if ready.mean_rank is None else "cut"
    return Done(
        config,
        spec,
        tensors,
        outcome,
        [*averages.losses_of(runs), *([] if loss is None else [loss])],
        guarantee,
        averages.averaged(runs),
        {"mean": how, "mean_lost": lost, "rank": spec.rank, "runs": averages.told(runs), **figures},
    )


def _kept(ready: Ready, number: int) -> Kept | None:
    """Return a run that is done, or None."""
    folder, seed = averages.folder_of(ready.work, number), ready.config.seed + number - 1
    return averages.kept(folder, ready.names, seed=seed, settings=ready.binding(number))


def _num_at_once(ready: Ready, num_missing: int) -> int:
    """Return how many runs may go on at once; each holds the model, its gradients' share and its activations."""
    package = sum(math.prod(spec.shape) for spec in ready.package.manifest.tensors.values())
    adapter = sum(math.prod(spec.shape) for spec in ready.names.values())
    return num_at_once(
        ready.config.parallel,
        num_missing,
        need_bytes=_MODEL_COPIES * 4 * package + _TRAINED_COPIES * 4 * adapter,
        free_bytes=free_bytes(ready.device),
    )


def _base(ready: Ready) -> dict[str, Tensor]:
    """Return the weights that the runs began with, where the adapter replaces them; nothing is read for others."""
    spec = ready.config.spec()
    if spec.kind in LOW_RANK:
        return {}
    base = base_tensors(ready.package, adapted_names(spec, ready.package.layout, ready.package.block_tensors()))
    return base if ready.round is None else grown(base, ready.round)


def _measured(ready: Ready, spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> tuple[float | None, dict[str, object]]:
    """Return the held-out loss of the package's model with that adapter, None where it is not finite, and what else is
    measured with it.
    """
    attached = attach_to_package(ready.package, spec, device=ready.device, round_=ready.round)
    validation = validation_for(ready.config, attached, ready.text)
    attached.load(tensors)
    model: Any = attached.model
    model.eval()
    precision: Literal["bf16", "fp32"] = (
        "bf16" if uses_bf16(ready.config.precision, next(model.parameters()).device) else "fp32"
    )
    held_out, figures = ready.text.validation, dict[str, object]()
    try:
        if validation is not None:
            found, figures["reward_accuracy"] = validation.measure(model)
        else:
            found = perplexity(model, held_out, batch_size=8, pad_id=ready.text.pad_id, precision=precision).loss
    except RunFailed:
        return None, {}
    return (found if math.isfinite(found) else None), figures


def _released(ready: Ready, runs: Sequence[Kept], tensors: Mapping[str, Tensor]) -> dict[str, object] | None:
    """Return what the mean of private runs may claim, now that the ledger has it; None of others."""
    config = ready.config
    if config.dp is None:
        return None
    units = units_of(ready.text.examples, unit=config.dp.unit, rows_per_user=config.dp.rows_per_user)
    return release_mean(
        config.dp,
        [averages.folder_of(ready.work, number) for number in range(1, config.runs + 1)],
        [run.record.charged or "" for run in runs],
        tensors,
        num_units=len(units),
        batch_size=config.batch_size,
        engine=runs[0].record.engine,
    )
