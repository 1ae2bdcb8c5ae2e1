"""How much of the full model's ability somebody regains who has the package and public text, and nothing else.

An attack has a start (`emulator.audit.refill`) and a way to heal it by next-token loss: low-rank adapters on every
linear, or every weight but the embeddings. It never sees the owner's record or the full model; what it knows besides
the package is `Knowledge`. A mark of so many tokens is one run of that length, whose rate falls to its end: what that
many tokens buy. At the first mark all given rates are tried; at each longer one the best of the mark before and its
neighbours, the next lower and the next higher that was given, as the best rate changes with length. What is best on
public text held out is what counts. With two rates that is all of them at every mark, with many it is three at most.

*Regained* is ``(emulator - attacked) / (emulator - full)``, in nats per token of the owner's held-out text. Where the
emulator is as good as the full model, nothing is left to regain, and all of it counts as regained: 1.

A *rehearsed client* is one more run of the same kind, of `emulator.audit.heal.tuning` on text of the field.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from emulator.audit.capability import HeldOut
from emulator.audit.heal import healing, mean_loss, next_token_loss, tuning
from emulator.audit.refill import missing, refilled
from emulator.distillation.public import PublicText
from offsite.artefacts.package import Package
from offsite.audits.record import Recovery, RecoveryPoint
from offsite.console import say
from offsite.errors import ConfigError, RunFailed
from offsite.staging import staged_file
from offsite.training.config import LoopConfig, Precision
from offsite.training.loop import train

LEAST_LOST = 0.01
"""Nats per token: where the emulator lost no more than this, nothing is left to regain."""


CLIENT = "client"
"""The way of tuning of a rehearsed client, beside the attacks' ways of healing."""


@dataclass(frozen=True)
class Knowledge:
    """What an attacker knows besides the package, because it is public."""

    num_blocks: int


@dataclass(frozen=True)
class Setting:
    """How attacks are run.

    Attributes:
        marks: tokens trained on, ascending; 0 among them or not, it is always measured.
        rates: learning rates to try, by way of healing; at longer marks those near the best one.
        step_tokens: tokens of one step.
        work: folder for what is done, and for checkpoints of what is not; the caller removes it.
    """

    marks: Sequence[int]
    rates: Mapping[str, Sequence[float]]
    step_tokens: int
    work: Path
    seed: int = 0
    precision: Precision = "auto"
    checkpoint_every: int = 50
    device: str = "cpu"


@dataclass(frozen=True)
class Losses:
    """Nats per token on the owner's held-out text, of the full model and of the package's."""

    full: float
    emulator: float

    def regained(self, attacked: float) -> float:
        """Return the share of what the emulator lost that a model of that loss has regained."""
        lost = self.emulator - self.full
        return 1.0 if lost < LEAST_LOST else (self.emulator - attacked) / lost

    @property
    def is_anything_lost(self) -> bool:
        """Whether there is anything to regain."""
        return self.emulator - self.full >= LEAST_LOST


@dataclass(frozen=True)
class Run:
    """What one run ended with: losses in nats per token, on public text held out and on the owner's."""

    chosen_by: float
    loss: float
    num_tokens: int
    trained_parameters: int
    rate: float
    seconds: float


@dataclass
class Attacker:
    """Somebody with one package, public text and patience."""

    package: Package
    knowledge: Knowledge
    text: PublicText
    setting: Setting
    ruler: HeldOut = field(repr=False)
    losses: Losses

    def attack(self, names: Sequence[str]) -> tuple[Recovery, ...]:
        """Return what each attack regained, in order, and every start that was looked at but not healed.

        Args:
            names: START_HEAL; a start of ``refill`` is the best on public text of those that there are, and is left
                out where nothing is missing.

        Raises:
            ConfigError: a start that has nothing to do here, or what is in the work folder is of other attacks.
            RunFailed: no rate ends with a finite loss, or the disk is full.
        """
        starts = [name.rpartition("_")[0] for name in names]
        at_zero: dict[str, float] = {}
        if not self.losses.is_anything_lost:
            say("recovery: the package is as good as the full model: nothing to regain")
            return (self._unhealed("as_is", self.losses.emulator),)
        if "refill" in starts:
            best, at_zero = self._best_refill()
            starts = [best if start == "refill" else start for start in starts]
        found: dict[str, Recovery] = {}
        for start, name in zip(starts, names, strict=True):
            heal = name.rpartition("_")[2]
            if start and f"{start}_{heal}" not in found:
                if start not in at_zero:
                    at_zero[start] = self._measured(start)
                found[f"{start}_{heal}"] = self.heal(start, heal, at_zero[start])
        healed = {key.rpartition("_")[0] for key in found}
        rest = [self._unhealed(start, loss) for start, loss in at_zero.items() if start not in healed]
        return (*found.values(), *rest)

    def heal(self, start: str, heal: str, loss_at_zero: float) -> Recovery:
        """Return the curve of one attack: at 0 tokens and at every mark."""
        points, runs = [self._point(0, loss_at_zero)], list[Run]()
        for mark in filter(None, self.setting.marks):
            rates = _neighbours(self.setting.rates[heal], runs[-1].rate) if runs else self.setting.rates[heal]
            runs.append(self._best_run(start, heal, mark, rates))
            points.append(self._point(runs[-1].num_tokens, runs[-1].loss))
            regained, num_tokens = points[-1].regained, points[-1].num_tokens
            say(f"recovery: {start}_{heal} has regained {regained:.3f} after {num_tokens:,} tokens")
        trained = runs[-1].trained_parameters if runs else 0
        return Recovery(attack=f"{start}_{heal}", trained_parameters=trained, points=tuple(points))

    def rehearse(self, steps: int) -> Run:
        """Return what a client of usual settings ends with after so many steps, at the best of its rates.

        Raises:
            ConfigError: what is in the work folder is of other settings.
            RunFailed: no rate ends with a finite loss, or the disk is full.
        """
        return self._best_run("as_is", CLIENT, steps * self.setting.step_tokens, self.setting.rates[CLIENT])

    def start(self, name: str) -> PreTrainedModel:
        """Return a model of its own, in float32, where that start leaves off."""
        model = self.package.load_model()
        model = refilled(name, model, self.package.layout, self.knowledge.num_blocks, seed=self.setting.seed)
        return model.requires_grad_(False).to(self.setting.device)  # type: ignore[no-any-return, arg-type]

    def _best_refill(self) -> tuple[str, dict[str, float]]:
        """Return the start that is best on public text, "" for none, and the held-out losses of all."""
        public, held = dict[str, float](), dict[str, float]()
        for name in missing(self.package.load_model(), self.package.layout, self.knowledge.num_blocks):
            model = self.start(name)
            public[name] = mean_loss(model, self.text.held_out)
            held[name] = self.ruler.loss(model, f"recovery: {name}")
        return min(public, key=lambda name: public[name], default=""), held

    def _measured(self, start: str) -> float:
        return self.losses.emulator if start == "as_is" else self.ruler.loss(self.start(start), f"recovery: {start}")

    def _unhealed(self, start: str, loss: float) -> Recovery:
        return Recovery(attack=start, trained_parameters=0, points=(self._point(0, loss),))

    def _point(self, num_tokens: int, loss: float) -> RecoveryPoint:
        return RecoveryPoint(num_tokens=num_tokens, perplexity=math.exp(loss), regained=self.losses.regained(loss))

    def _best_run(self, start: str, heal: str, mark: int, rates: Sequence[float]) -> Run:
        """Return the run that is best on public text held out; a rate too high to end with a number is left out."""
        tried, problem = list[Run](), None
        for rate in rates:
            try:
                tried.append(self._run(start, heal, mark, rate))
            except RunFailed as error:
                problem = error
                say(f"{_told(start, heal)} at rate {rate:g} failed: {error}")
        if not tried and problem is not None:
            raise problem
        return min(tried, key=lambda run: run.chosen_by)

    def _run(self, start: str, heal: str, mark: int, rate: float) -> Run:
        """Return what a run found; one that ended before is not run again, one that was broken off goes on."""
        setting = self.setting
        tried = "rehearsed_client" if heal == CLIENT else f"{start}_{heal}"
        name, told = f"{tried}-{mark}-{rate:g}", f"{_told(start, heal)}, {mark:,} tokens at {rate:g}"
        done, work = setting.work / f"{name}.json", setting.work / name
        steps = max(1, round(mark / setting.step_tokens))
        epoch = self.text.train.num_steps_per_epoch
        loop = LoopConfig(
            steps=steps,
            learning_rate=rate,
            warmup_steps=max(1, steps // 20),
            precision=setting.precision,
            seed=setting.seed,
            checkpoint_every=setting.checkpoint_every,
            evaluate_every=steps // 4 if steps > epoch else 0,  # text read twice can be learnt by heart
        )
        binding = {"package": self.package.digest, "public text": self.text.digest, "attack": tried}
        stated = json.dumps([loop.binding(), binding, self.ruler.digest], sort_keys=True)
        if done.is_file():
            return _read(done, stated)
        model = self.start(start)
        if heal == CLIENT:
            learner, trainable = tuning(model, self.package, seed=setting.seed)
        else:
            learner, trainable = healing(model, heal, seed=setting.seed)
        outcome = train(
            learner,
            trainable,
            self.text.train,
            next_token_loss,
            loop,
            work=work,
            resume=work.is_dir(),
            label=told,
            evaluate=lambda: mean_loss(learner, self.text.held_out),
            keep_best=loop.evaluate_every > 0,
            binding=binding,
        )
        found = Run(
            chosen_by=math.inf if outcome.best_loss is None else outcome.best_loss,
            loss=self.ruler.loss(learner, told),  # type: ignore[arg-type]
            num_tokens=outcome.tokens,
            trained_parameters=sum(parameter.numel() for parameter in trainable.values()),
            rate=rate,
            seconds=outcome.seconds,
        )
        with staged_file(done, replace=True) as stage:
            stage.write_text(json.dumps({"stated": stated, "found": vars(found)}), encoding="utf-8")
        shutil.rmtree(work)
        return found


def _told(start: str, heal: str) -> str:
    return "rehearsed client" if heal == CLIENT else f"recovery: {start}_{heal}"


def _neighbours(rates: Sequence[float], rate: float) -> Sequence[float]:
    """Return the rate and those next to it by size."""
    ordered = sorted(set(rates))
    at = ordered.index(rate)
    return ordered[max(0, at - 1) : at + 2]


def _read(done: Path, stated: str) -> Run:
    try:
        content = json.loads(done.read_text(encoding="utf-8"))
        found = Run(**content["found"]) if content["stated"] == stated else None
    except (ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise ConfigError(
            f"{done.name!r} is of an attack with other settings",
            hint="resume with those settings, or delete the folder",
        )
    return found
