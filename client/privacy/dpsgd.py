"""DP-SGD: how a run of `offsite tune --dp` draws rows, clips, adds noise, and what it may say of itself.

A step draws every privacy unit by its own coin (Poisson), sums the clipped gradients of those drawn
(`client.privacy.clipping`), adds Gaussian noise of `sigma * clip`, divides by a constant and lets AdamW follow; a step
that drew nobody adds the same noise. Coins and noise are read from the operating system at each step: no seed leads to
them, none is stored, and a resumed run draws new ones. Rate, steps and divisor are settings, not properties of the
data, except for the number of units where rate or delta are left to it; `Guarantee.is_number_public` says so.

What a run shows on this machine - losses, counts, the held-out loss - is a function of the private text and not covered
by the guarantee. Only the weights after the last step are: no checkpoint is chosen by looking at private text.

Source: DP-SGD, arXiv:1607.00133; noise in float64 before rounding against arXiv:2112.05307.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from client.privacy.clipping import Clipper, Unit, choose, zeros
from client.privacy.config import DPSettings
from offsite.audits.accounting import Mechanism, Spent, account, accountant, calibrate
from offsite.audits.noise import gaussian, uniform, unknown_seed
from offsite.audits.runs import MAX_STEPS
from offsite.errors import ConfigError, DataError
from offsite.text.batches import Example
from offsite.training.config import LoopConfig
from offsite.training.processes import Processes
from offsite.training.step import Batch, StepLoss, Stepped, Stepper, rate, require_finite

_PER_ROW_COPIES = 3  # of the trained parameters: the per-row gradient, its computation, its norm
_FEWEST_ROWS = 4
_MOST_ROWS = 8
_FREE_SHARE = 4  # a quarter of what is free may go into per-row gradients


@dataclass(frozen=True)
class Guarantee:
    """What a run spends, and the public constants that say so.

    Args:
        clip: largest L2 norm of one unit's gradient.
        divisor: what the noisy sum is divided by, the expected number of units of a step.
        is_number_public: the number of units was used to set the rate or delta, so it counts as known.
        mechanism: of one run.
        num_runs: runs of that mechanism whose mean is released; ``spent`` is of all of them together.
    """

    mechanism: Mechanism
    clip: float
    divisor: int
    unit: Literal["example", "user"]
    rows_per_user: int | None
    is_number_public: bool
    spent: Spent
    num_runs: int = 1

    @property
    def composed(self) -> Mechanism:
        """All runs as one: as they draw and add the same, their steps add up."""
        return self.mechanism._replace(steps=self.mechanism.steps * self.num_runs)

    def figures(self) -> dict[str, object]:
        """Return everything, as JSON takes it."""
        return {
            "mechanism": "Poisson-subsampled Gaussian",
            "neighbours": "one unit added or removed",
            "unit": self.unit,
            "rows_per_user": self.rows_per_user,
            "number_of_units_public": self.is_number_public,
            "epsilon": self.spent.epsilon,
            "epsilon_rdp": self.spent.epsilon_rdp,
            "epsilon_prv": self.spent.epsilon_prv,
            "delta": self.spent.delta,
            "noise_multiplier": self.mechanism.sigma,
            "clip": self.clip,
            "sample_rate": self.mechanism.rate,
            "divisor": self.divisor,
            "steps": self.composed.steps,
            "accountant": accountant(),
            "sampler": "poisson",
            "noise": "operating system, float64",
            "released": "weights after the last step"
            if self.num_runs == 1
            else "mean of each run's weights after its last step",
        }


def plan(
    settings: DPSettings,
    *,
    num_units: int,
    batch_size: int,
    steps: int | None,
    epochs: float,
    charged: tuple[Mechanism, float] | None = None,
    num_runs: int = 1,
) -> Guarantee:
    """Return the guarantee of a run with these settings on so many units; nothing is drawn or spent yet.

    Args:
        charged: what a run that is resumed was charged for, and its delta; it stays as it is.
        num_runs: runs of these settings whose mean is released: epsilon is what all of them spend together.

    Raises:
        ConfigError: when the settings give no meaningful guarantee.
        RunFailed: when the accountants disagree.
    """
    mechanism, delta = charged or _mechanism(settings, num_units, batch_size, steps, epochs, num_runs)
    composed = mechanism._replace(steps=mechanism.steps * num_runs)
    if num_runs > 1 and composed.steps > MAX_STEPS:
        raise ConfigError(
            f"--runs {num_runs}: {composed.steps:,} steps in all, --dp accounts for {MAX_STEPS:,} at most",
            hint="take fewer runs or fewer --steps",
        )
    return Guarantee(
        mechanism=mechanism,
        clip=settings.clip,
        divisor=batch_size,
        unit=settings.unit,
        rows_per_user=settings.rows_per_user if settings.unit == "user" else None,
        is_number_public=settings.sample_rate is None or settings.delta is None,
        spent=account(composed, delta),
        num_runs=num_runs,
    )


def _mechanism(
    settings: DPSettings, num_units: int, batch_size: int, steps: int | None, epochs: float, num_runs: int
) -> tuple[Mechanism, float]:
    largest_delta = num_units**-1.1
    delta = largest_delta if settings.delta is None else settings.delta
    if delta > largest_delta:
        raise ConfigError(
            f"--dp: delta {delta:g} is more than {largest_delta:.3g}, which is 1/N^1.1 for {num_units} units",
            hint="leave delta out to have exactly that",
        )
    drawn = batch_size / num_units if settings.sample_rate is None else settings.sample_rate
    if drawn > 1:
        raise ConfigError(
            f"--dp: {batch_size} units are to be drawn at each step, there are {num_units}",
            hint="use a smaller --batch-size",
        )
    num_steps = steps or max(1, round(epochs / drawn))
    if settings.noise_multiplier is not None:
        return Mechanism(settings.noise_multiplier, drawn, num_steps), delta
    epsilon = float(settings.epsilon or 0)
    return Mechanism(calibrate(epsilon, delta, rate=drawn, steps=num_steps * num_runs), drawn, num_steps), delta


def units_of(examples: Sequence[Example], *, unit: Literal["example", "user"], rows_per_user: int) -> list[Unit]:
    """Return the privacy units: every example its own, or the first rows of every user (`Example.document`).

    Which rows of a user are taken depends on that user's rows alone.
    """
    if unit == "example":
        return [(example,) for example in examples]
    users: dict[str, list[Example]] = {}
    for example in examples:
        users.setdefault(example.document, []).append(example)
    return [tuple(rows[:rows_per_user]) for rows in users.values()]


class PoissonBatches:
    """The units of a step, each drawn by its own coin; the numbers of those drawn, possibly none."""

    def __init__(self, num_units: int, rate: float) -> None:
        self._num_units, self._rate = num_units, rate

    def batch(self, step: int) -> Batch:
        """Draw anew, whatever the step: the coins are the operating system's."""
        return {"units": (uniform(self._num_units) < self._rate).nonzero().flatten()}


class PrivateStepper(Stepper):
    """A `Stepper` whose step is differentially private in the units of its batch."""

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        step_loss: StepLoss,
        config: LoopConfig,
        processes: Processes,
        *,
        units: Sequence[Unit],
        guarantee: Guarantee,
        pad_id: int,
        engine: Literal["auto", "hooks", "ghost", "one-by-one"] = "auto",
        rows_at_once: int | None = None,
        weighs_tokens: bool = False,
    ) -> None:
        """Choose the engine that clips, by memory unless it is named, and check it against the one-by-one loop."""
        super().__init__(model, trainable, step_loss, config, processes)
        self._units, self._guarantee = units, guarantee
        num_bytes = _PER_ROW_COPIES * 4 * sum(tensor.numel() for tensor in trainable.values())
        fitting = max(1, free_bytes(self.device) // _FREE_SHARE // max(1, num_bytes))
        wanted = engine if engine != "auto" else by_memory(fitting, guarantee)
        self.clipper: Clipper = choose(
            model,
            trainable,
            clip=guarantee.clip,
            rows=rows_at_once or (min(fitting, _MOST_ROWS) if wanted == "hooks" else _MOST_ROWS),
            pad_id=pad_id,
            autocast=self._autocast,
            wanted=wanted,
            is_bf16=self._bf16,
            weighs_tokens=weighs_tokens,
        )

    def step(self, number: int, batch: Batch) -> Stepped:
        """The weights are updated once, whoever was drawn. Its loss is the mean over the units, 0 where there is none.

        Raises:
            RunFailed: when the noisy gradient is not finite, which no unit can bring about.
        """
        drawn = [self._units[place] for place in batch["units"].tolist()]
        # Masks of dropout are part of the mechanism's chance: they must not be known, as a seed would make them.
        torch.manual_seed(unknown_seed())
        sums = zeros(self._trainable)
        losses = self.clipper.add(drawn, sums)
        norm = self._set_gradients(sums)
        require_finite("noisy gradient", norm, number)
        current = rate(self._config, number)
        for group in self._optimizer.param_groups:
            group["lr"] = current
        self._optimizer.step()
        num_tokens = sum(len(row.input_ids) for unit in drawn for row in unit)
        return Stepped(sum(losses) / len(losses) if losses else 0.0, current, norm, num_tokens)

    def _set_gradients(self, sums: Mapping[str, Tensor]) -> float:
        """Every tensor's gradient is its sum with noise, over the divisor. Returns their global norm."""
        sigma = self._guarantee.mechanism.sigma * self._guarantee.clip
        squares = 0.0
        for name, tensor in self._trainable.items():
            noise = gaussian(tensor.numel()).to(self.device).view(tensor.shape)
            noisy = (sums[name] + sigma * noise) / self._guarantee.divisor
            tensor.grad = noisy.float()
            squares += float(noisy.square().sum())
        return math.sqrt(squares)


def by_memory(num_rows: int, guarantee: Guarantee) -> Literal["hooks", "ghost", "one-by-one"]:
    """Return how to clip when per-row gradients of so many rows fit: hooks, unless it is but a few."""
    if guarantee.unit == "user":  # the norm is of a sum over a user's rows, an ordinary gradient
        return "one-by-one"
    return "hooks" if num_rows >= min(_FEWEST_ROWS, guarantee.divisor) else "ghost"


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on the device; four gigabytes where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def require_enough(num_held_out: int) -> None:
    """Return only if the split between training and held-out text can't hinge on a single document.

    Raises:
        DataError: when fewer than two documents are held out.
    """
    if num_held_out < 2:
        raise DataError(
            f"--dp: {num_held_out} document(s) held out, expected at least 2",
            hint="raise --validation, or give more data",
        )
