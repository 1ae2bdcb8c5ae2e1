"""Retunings: the run of a bundle once more, several times, each on those rows that a coin of their own puts in.

Everything is as in the run (`client.tuning.tune.train_run`), but that about half of the rows are left out, and as much
of the steps: each row is seen as often. Rows of one document, and rows that are alike, share a coin. What each retuning
came to is kept in ``AUDIT.work`` until the audit stands, as private as the data, so that a killed audit goes on behind
the last one; the one that it was in goes on from its checkpoint. What is counted of them: `offsite.audits.retunings`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.settings import ADAPTER_FIELDS
from client.audit.config import AuditBundleConfig
from client.audit.given import Given
from client.audit.rows import content_of, some, text_of
from client.tuning.config import TuneConfig
from client.tuning.data import TrainingText
from client.tuning.ready import Ready
from client.tuning.runrecord import Planted
from client.tuning.tune import attach_to_package, train_run
from offsite.audits.canaries import records_of
from offsite.audits.gates import MIN_MEMBERS, MIN_TOKENS_PER_ROW
from offsite.audits.record import Retuned, SignalName
from offsite.audits.retunings import coins, enough_retunings, guesses
from offsite.audits.runs import KeptRun
from offsite.audits.scores import RowScores, signals
from offsite.console import say
from offsite.digests import sha256_bytes
from offsite.errors import ConfigError, RunFailed
from offsite.modelling.context import context_of
from offsite.staging import remove, staged_file
from offsite.text.batches import Batches, Example, cut, pack
from offsite.training.devices import choose_device
from offsite.vision.reader import Reader

Score = Callable[[Any, list[Example], str], RowScores]
"""Gives what a model says of rows; progress is shown under the last."""
_OBJECTIVES = ("next-token", "dft", "dpo", "reward", "classify", "regress", "tag")


@dataclass(frozen=True)
class _Coins:
    """The text of the run, which of its rows share a coin, and the row that stands for each of those that are scored.

    ``scored`` are numbers of `shared`, ``rows`` one row of each.
    """

    text: TrainingText = field(repr=False)
    shared: list[list[int]] = field(repr=False)
    scored: list[int]
    rows: list[Example] = field(repr=False)


@dataclass(frozen=True)
class _Attacked:
    """What one retuning came to: the step of its weights, and what each attack goes by."""

    steps: int
    signals: dict[SignalName, list[float]] = field(repr=False)


def work_of(output: Path) -> Path:
    """Return where retunings are kept until the audit `output` stands."""
    return output.with_name(f"{output.name}.work")


def clear(output: Path) -> None:
    """What was kept of retunings is gone; whatever else lies there stays."""
    work = work_of(output)
    for path in work.glob("retuning-*"):
        remove(path)
    with contextlib.suppress(OSError):  # not there, or of somebody else
        work.rmdir()


def why_never(run: KeptRun, *, is_causal: bool) -> str:
    """Return why runs of this kind cannot be retuned; empty where they can."""
    loss = "next-token" if run.objective is None else run.objective.loss
    special = run.objective is not None and (run.objective.anchor_sha256 or run.objective.channel_dropout)
    reasons = {
        "a run with --dp would spend of its data's budget": run.claim is not None,
        "it answers a federation's round": run.round is not None,
        "it is the mean of several runs": bool(run.averaged),
        "retunings are of models that read text from left to right": not is_causal,
        f"retunings do not know what it learned by ({loss})": loss not in _OBJECTIVES or bool(special),
        "its record is of an earlier version, which does not say all settings": run.loop is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def num_coins(config: TuneConfig, rows: Sequence[Example], *, is_causal: bool) -> int:
    """Return how many of these rows would have a coin of their own in retunings; 0 where runs as this have none."""
    special = config.anchor is not None or config.channel_dropout or config.dp is not None or config.round is not None
    if special or config.runs > 1 or config.objective not in _OBJECTIVES or not is_causal:
        return 0
    return sum(any(rows[row].num_loss_tokens for row in group) for group in sharing(rows))


def retune(
    config: AuditBundleConfig, given: Given, reader: Reader, score: Score, *, is_causal: bool, is_needed: bool
) -> Retuned | None:
    """Return what attacks on retunings guess right; None where none are made, which is said.

    Args:
        score: as the audit scores rows.
        is_causal: whether the package's model reads text from left to right.
        is_needed: whether rows are too few to attack the bundle itself.

    Raises:
        ConfigError: when retunings were asked for and cannot be made.
        RunFailed: when a loss is not finite, or the disk is full; what was done is kept.
    """
    asked = config.retunings
    if asked == 0 or (asked is None and (not is_needed or config.tokens_per_row < MIN_TOKENS_PER_ROW)):
        return None
    if told := why_never(given.run, is_causal=is_causal):
        if asked is not None:
            raise ConfigError(f"--retunings: this bundle's run cannot be retuned: {told}", hint="--retunings 0")
        say(f"no retunings: {told}")
        return None
    found = _coins(config, given, reader)
    if len(found.rows) < MIN_MEMBERS:
        told = f"{len(found.rows)} different rows to compare, at least {MIN_MEMBERS} are needed"
        if asked is not None:
            raise ConfigError(f"--retunings: {told}", hint="give more data, or raise --rows")
        say(f"no retunings: {told}")
        return None
    num = enough_retunings(len(found.rows)) if asked is None else asked
    return _Retunings(config, given, score, found).every(num, reader)


def _coins(config: AuditBundleConfig, given: Given, reader: Reader) -> _Coins:
    planted = [] if given.canaries is None else records_of(given.canaries)
    text = text_of(given.records, given.run, reader, planted, held_out=given.held_out)
    own = text.rows[: len(text.rows) - text.num_canaries]
    shared = sharing(own)
    stands = {
        number: next((one for one in rows if own[one].num_loss_tokens), None) for number, rows in enumerate(shared)
    }
    able = [(number, row) for number, row in stands.items() if row is not None]
    chosen = some(able, config.rows, f"{config.seed}/retuned")
    return _Coins(text, shared, [number for number, _ in chosen], [own[row] for _, row in chosen])


def sharing(rows: Sequence[Example]) -> list[list[int]]:
    """Return the numbers of rows, in groups that share a coin: those of one document, and those that are alike."""
    group: dict[object, int] = {}
    groups: list[list[int]] = []
    for number, row in enumerate(rows):
        keys = (("document", row.document), ("content", content_of(row)))
        known = sorted({group[key] for key in keys if key in group})
        home = known[0] if known else len(groups)
        if not known:
            groups.append([])
        for other in known[1:]:  # a row that joins two groups
            groups[home] += groups[other]
            groups[other] = []
            group.update({key: home for key, place in group.items() if place == other})
        groups[home].append(number)
        group.update(dict.fromkeys(keys, home))
    return [sorted(one) for one in groups if one]


class _Retunings:
    """Every retuning of one audit, in turn, each in a folder of its own below `work_of`."""

    def __init__(self, config: AuditBundleConfig, given: Given, score: Score, found: _Coins) -> None:
        self._config, self._given, self._score, self._found = config, given, score, found
        self._work = work_of(config.output)
        self._device = choose_device(config.device)
        self._untuned: RowScores | None = None

    def every(self, num: int, reader: Reader) -> Retuned:
        """Return what attacks on so many retunings guess right, on fewer where the time is over."""
        minutes, began = self._config.retuning_minutes, time.monotonic()
        say(
            f"{num} retunings, each on a random half of the rows with half of the steps: about {num / 2:g} times what "
            f"tuning took; none is begun after {minutes:g} minutes (--retuning-minutes); --retunings 0: none"
        )
        say(f"  what is done is kept in {self._work.name!r}, and the same command goes on from there")
        done: list[_Attacked] = []
        told = False
        for number in range(1, num + 1):
            elapsed = time.monotonic() - began
            if done and elapsed > 60 * minutes:
                say(f"the time is over: {len(done)} of {num} retunings are taken; --retuning-minutes N gives more")
                break
            kept = self._kept(number)
            done.append(kept or self._made(number, num, reader))
            if kept is None and not told:
                seconds, told = time.monotonic() - began - elapsed, True
                say(f"one took {seconds:.0f} s: about {seconds * (num - number) / 60:.0f} minutes more for the others")
        label = self._label(0)
        included = [self._of_scored(self._coins(number)) for number in range(1, len(done) + 1)]
        names = list(done[0].signals)
        return Retuned(
            num_rows=len(self._found.rows),
            num_asked=num,
            num_in=tuple(sum(one) for one in included),
            steps=tuple(one.steps for one in done),
            attacks=tuple(
                guesses(name, [np.array(one.signals[name]) for one in done], included, label) for name in names
            ),
        )

    def _label(self, number: int) -> str:
        return f"{self._given.bundle.digest}/{self._config.seed}/{number}"

    def _coins(self, number: int) -> list[bool]:
        return coins(len(self._found.shared), self._label(number))

    def _of_scored(self, found: Sequence[bool]) -> list[bool]:
        return [found[number] for number in self._found.scored]

    def _bound(self, number: int) -> str:
        """Return the digest of all that a kept result follows from."""
        stated = {
            "of": self._label(number),
            "rows": self._found.scored,
            "tokens_per_row": self._config.tokens_per_row,
            "run": self._given.run.model_dump(mode="json"),
        }
        return sha256_bytes(json.dumps(stated, sort_keys=True).encode())

    def _result(self, number: int) -> Path:
        return self._work / f"retuning-{number:02}.json"

    def _kept(self, number: int) -> _Attacked | None:
        """Return what a retuning came to before the audit was stopped; None where it has to be made."""
        try:
            found = json.loads(self._result(number).read_bytes())
            if found["bound"] != self._bound(number):
                return None
            return _Attacked(int(found["steps"]), {name: list(map(float, by)) for name, by in found["signals"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or torn
            return None

    def _made(self, number: int, num: int, reader: Reader) -> _Attacked:
        """Return what a retuning comes to, once it is made and kept."""
        try:
            self._work.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RunFailed(f"cannot write {self._work.name!r}: {(error.strerror or 'i/o error').lower()}") from None
        if self._untuned is None:
            self._untuned = self._scored(None, "rows under the package alone")
        ready = self._ready(number, reader)
        done = train_run(ready, label=f"retuning {number} of {num}")
        if done is None:
            raise RunFailed("a retuning runs in one process")
        by_signal = signals(self._scored(dict(done.tensors), f"rows under retuning {number}"), self._untuned)
        found = _Attacked(done.outcome.best_step, {name: one.tolist() for name, one in by_signal.items()})
        stated = {"bound": self._bound(number), "steps": found.steps, "signals": found.signals}
        with staged_file(self._result(number), replace=True) as stage:
            stage.write_text(json.dumps(stated), encoding="ascii")
        remove(ready.work)
        return found

    def _scored(self, tensors: dict[str, torch.Tensor] | None, label: str) -> RowScores:
        """Return what the package's model says of the rows, with an adapter of these tensors."""
        attached = attach_to_package(self._given.package, self._given.run.adapter, device=self._device)
        if tensors is not None:
            attached.load(tensors)
        model: Any = attached.model
        context = context_of(model)
        rows = self._found.rows if context is None else [cut(row, context) for row in self._found.rows]
        return self._score(model, rows, label)

    def _ready(self, number: int, reader: Reader) -> Ready:
        """Return the run once more, on the rows whose coins put them in."""
        whole, run = self._found.text, self._given.run
        own = len(whole.rows) - whole.num_canaries
        coin = self._coins(number)
        inside = sorted(row for group, is_in in zip(self._found.shared, coin, strict=True) if is_in for row in group)
        rows = [*(whole.rows[row] for row in inside), *whole.rows[own:]]
        examples = rows if whole.block_tokens is None else pack(rows, block_tokens=whole.block_tokens)
        share = len(examples) / len(whole.examples)
        tune = self._settings(number, share)
        batches = Batches(examples, batch_size=run.batch_size, seed=tune.seed, pad_id=whole.pad_id)
        text = replace(whole, batches=batches, examples=examples, rows=rows, num_records=len(inside))
        bound = self._bound(number).removeprefix("sha256:")
        work = self._work / f"retuning-{number:02}-{bound[:12]}"  # checkpoints of other settings are not gone on from
        digests = (sha256_bytes(bound.encode()),)
        return Ready(
            config=tune,
            package=self._given.package,
            job=None,
            round=None,
            planted=Planted(),
            device=self._device,
            text=text,
            spec=run.adapter,
            digests=digests,
            eval_digests=self._given.run.eval_files,
            anchor=None,
            work=work,
        )

    def _settings(self, number: int, share: float) -> TuneConfig:
        """Return the run's settings, with this share of its steps."""
        config, run = self._config, self._given.run
        loop, objective = run.loop, run.objective
        if loop is None:
            raise ConfigError("the run's record does not say all settings")
        learning: dict[str, Any] = {} if objective is None else {"objective": objective.loss}
        if objective is not None and objective.loss == "dpo":
            learning |= {"dpo_beta": objective.dpo_beta, "dpo_loss": objective.dpo_loss}
            learning |= {"dpo_label_smoothing": objective.dpo_label_smoothing or 0.0}
        if run.adapter.head is not None:
            learning |= {"labels": run.adapter.head.labels}
        return TuneConfig(
            package=config.package,
            data=config.data,
            output=self._work / f"retuning-{number:02}.bundle",
            device=config.device,
            cache_bytes=config.cache_bytes,
            resume=True,
            seed=run.text.seed + number,
            **{name: getattr(run.adapter, of) for name, of in ADAPTER_FIELDS.items()},
            **learning,
            block_tokens=run.text.block_tokens,
            pack=run.text.packed,
            on_long=run.text.on_long,
            **({"eval": config.eval} if run.eval_files else {"validation": run.text.validation}),
            audit_share=run.text.audit_share,
            batch_size=run.batch_size,
            learning_rate=run.learning_rate,
            steps=max(1, round(loop.steps * share)),
            warmup_steps=round(loop.warmup_steps * share),
            schedule=loop.schedule,
            weight_decay=loop.weight_decay,
            clip_norm=loop.clip_norm,
            accumulate=loop.accumulate,
            precision=loop.precision,
            evaluate_every=max(1, round(loop.evaluate_every * share)),
            patience=loop.patience,
        )
