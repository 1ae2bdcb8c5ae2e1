"""How much of the full model's skill an emulator has: held-out text and tasks, both above what chance would score.

*kept* is ``(chance - emulator) / (chance - full)``: 1 is an emulator as good as the full model, 0 one that knows no
more than how often each token occurs. In nats per token of text, chance is a unigram model; in a task's metric it is
one over the number of choices, and 0 where text is generated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offsite.audits.record import Capability
from offsite.console import progress
from offsite.digests import sha256_bytes
from offsite.errors import ConfigError, DataError
from offsite.evaluation.measure import perplexity
from offsite.evaluation.results import Results
from offsite.evaluation.tasks import multiple_choice_task, run_tasks
from offsite.text.batches import IGNORED, Example, encode, pack, pad_id
from offsite.text.records import Record
from offsite.text.rows import read_rows

PERPLEXITY = "perplexity"
"""The name of the capability that is measured on held-out text; a task cannot have it."""

_LOSSES = frozenset("perplexity word_perplexity byte_perplexity bits_per_byte brier_score ter".split())

SAME_LOSS = 0.02
"""Nats per token by which the same model, text and cut may differ between two runs, in other arithmetic."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out text as it is measured on, the same for every model.

    Attributes:
        examples: blocks filled across rows, or one example a row.
        num_tokens: positions that count.
    """

    examples: Sequence[Example] = field(repr=False)
    pad_id: int
    batch_size: int

    @property
    def num_tokens(self) -> int:
        """Positions that count in the loss."""
        return sum(example.num_loss_tokens for example in self.examples)

    @property
    def digest(self) -> str:
        """A digest of the tokens and of which of them count."""
        return sha256_bytes(json.dumps([[one.input_ids, one.labels] for one in self.examples]).encode())

    def loss(self, model: PreTrainedModel, label: str) -> float:
        """Return the model's mean loss in nats per token, in the model's own dtype; `label` is shown meanwhile.

        Raises:
            RunFailed: when it is not finite.
        """
        with progress(len(self.examples), label) as bar:
            found = perplexity(
                model,
                self.examples,
                batch_size=self.batch_size,
                pad_id=self.pad_id,
                progress=lambda done, _: bar.update(done),
            )
        return found.loss


def held_out(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    packed: bool,
    block_tokens: int,
    limit_tokens: int,
    batch_size: int,
) -> HeldOut:
    """Return the records as ``offsite evaluate`` measures them with the same settings.

    Args:
        limit_tokens: tokens at most, at least one example; 0 for all.

    Raises:
        DataError: when nothing counts.
    """
    encoded = encode(records, tokenizer, context=block_tokens, whole_text=packed)
    examples = pack(encoded.examples, block_tokens=block_tokens) if packed else list(encoded.examples)
    kept: list[Example] = []
    num_tokens = 0
    for example in examples:
        num_tokens += len(example.input_ids)
        if limit_tokens and kept and num_tokens > limit_tokens:
            break
        kept.append(example)
    return HeldOut(kept, pad_id(tokenizer), batch_size)


# --- chance


def unigram(examples: Iterable[Example], vocabulary: int) -> Tensor:
    """Return (vocabulary,) float64: the log-probability of each token by how often it counts, add-one smoothed."""
    targets = [_targets(example) for example in examples]
    return _log_frequencies(torch.cat(targets) if targets else torch.empty(0, dtype=torch.int64), vocabulary)


def _log_frequencies(targets: Tensor, vocabulary: int) -> Tensor:
    counts = torch.bincount(targets, minlength=vocabulary).double() + 1
    return (counts / counts.sum()).log()


def unigram_loss(examples: Sequence[Example], log_probabilities: Tensor) -> float:
    """Return the mean loss in nats per token of a unigram model over the positions that count."""
    targets = torch.cat([_targets(example) for example in examples])
    return -float(log_probabilities[targets].mean())


def floor_by_public(text: HeldOut, public: Sequence[Example], vocabulary: int) -> float:
    """Return the loss on held-out text of a unigram model that was fitted on public text."""
    return unigram_loss(text.examples, unigram(public, vocabulary))


def floor_by_halves(text: HeldOut, vocabulary: int) -> float:
    """Return the loss on held-out text, each half by a unigram model that was fitted on the other half.

    The positions that count are those that models are measured on, no others. They are cut in the middle, in the order
    of the file, so that at most one document is on both sides.

    Raises:
        DataError: when but one position counts.
    """
    targets = torch.cat([_targets(example) for example in text.examples])
    if len(targets) < 2:
        raise DataError(f"{len(targets)} token(s) of held-out text count, expected at least two to halve them")
    halves = targets.tensor_split(2)
    sums = [float(_log_frequencies(other, vocabulary)[half].sum()) for half, other in (halves, reversed(halves))]
    return -sum(sums) / len(targets)


def share_kept(chance: float, full: float, emulator: float) -> float:
    """Return ``(chance - emulator) / (chance - full)``, of losses or of scores; 1 where the full model has no skill.

    Where it is no better than chance there is nothing to withhold, so that nothing is said to be withheld.
    """
    return 1.0 if full == chance else (chance - emulator) / (chance - full)


def text_capability(
    text: HeldOut, *, chance: float, full: float, emulator: float, results: Results | None = None
) -> Capability:
    """Return what the emulator has of the full model's skill on held-out text, from losses in nats per token.

    Args:
        results: what ``offsite evaluate`` found, checked by `require_same`: fills in tuned and plugged-in.

    Raises:
        DataError: when the full model is no better than chance on this text.
    """
    if full >= chance:
        raise DataError(
            f"the full model has {full:.2f} nats per token on the held-out text, a unigram model {chance:.2f}",
            hint="measure on text that the model is good at",
        )
    tuned, plugged = (
        None if results is None else _mean_loss(results.rows[row].perplexity.values)
        for row in ("emulator_tuned", "plugged_in")
    )
    return Capability(
        name=PERPLEXITY,
        metric="nats_per_token",
        num_rows=len(text.examples),
        chance=chance,
        full=full,
        emulator=emulator,
        emulator_tuned=tuned,
        plugged_in=plugged,
        kept=share_kept(chance, full, emulator),
    )


def require_same(results: Results, *, package_digest: str, data_sha256: str, text: HeldOut, full: float) -> None:
    """Return only if the results are of this package, on this text, cut alike.

    Args:
        full: the full model's loss as measured here.

    Raises:
        ConfigError: naming what differs.
    """
    hint = "evaluate this package on this text, with the same --block-tokens, --limit-tokens and --pack"
    if results.package.digest != package_digest:
        raise ConfigError("--results: measured with another package", hint=hint)
    if results.data.sha256 != data_sha256:
        raise ConfigError("--results: measured on another text than --heldout", hint=hint)
    if results.data.num_tokens != text.num_tokens:
        found = f"{results.data.num_tokens} tokens, here {text.num_tokens}"
        raise ConfigError(f"--results: measured on another cut of the text: {found}", hint=hint)
    theirs = _mean_loss(results.rows["zero_shot"].perplexity.values)
    if abs(theirs - full) > SAME_LOSS:
        found = f"{theirs:.3f} nats per token, here {full:.3f}"
        raise ConfigError(f"--results: the full model measured otherwise: {found}", hint=hint)


# --- tasks


def task_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Path], *, batch_size: int, limit: int
) -> dict[str, dict[str, float]]:
    """Return every task's metrics by its name, as `offsite.evaluation.tasks.run_tasks` does.

    Raises:
        ConfigError: when the ``eval`` extra is missing or a task file asks for more than local data.
        DataError: when a row has the wrong form.
    """
    if not tasks:
        return {}
    specs = [path if _is_yaml(path) else multiple_choice_task(path.stem, path) for path in tasks]
    return run_tasks(model, tokenizer, specs, batch_size=batch_size, limit=limit or None)


def task_chance(path: Path, limit: int) -> float:
    """Return what guessing scores in the task: the mean of one over the number of choices, 0 for generated text.

    Raises:
        ConfigError: when a task file does not show how many choices there are, or measures what is better when lower.
        DataError: when the rows cannot be read.
    """
    if not _is_yaml(path):
        return _mean_chance(path, [row.values.get("choices") for row in read_rows(path)], limit)
    task = yaml.safe_load(path.read_bytes())
    _refuse_losses(path, task)
    if task.get("output_type") != "multiple_choice":
        return 0.0
    choices = task.get("doc_to_choice")
    if isinstance(choices, list):
        return _mean_chance(path, [choices], limit)
    split = task.get("test_split") or task.get("validation_split") or "train"
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    named = files.get(split) if isinstance(files, dict) else files
    names = [named] if isinstance(named, str) else named or []
    rows = [row.values.get(str(choices)) for name in names for row in read_rows(path.parent / name)]
    return _mean_chance(path, rows, limit)


def _refuse_losses(path: Path, task: Mapping[str, Any]) -> None:
    """Return only if more is better in all that the task measures, as in shares of what is above chance."""
    kind, stated = task.get("output_type"), task.get("metric_list")
    metrics = stated if isinstance(stated, list) else [{"metric": "perplexity"}] if kind == "loglikelihood" else []
    found = [
        str(one.get("metric"))
        for one in metrics
        if isinstance(one, dict) and (one.get("metric") in _LOSSES or one.get("higher_is_better") is False)
    ]
    if kind == "loglikelihood_rolling" or found:
        what = found[0] if found else f"output_type {kind}"
        raise ConfigError(
            f"{path.name}: {what} is better when lower, expected metrics of which more is better",
            hint="give such text as --heldout, which measures perplexity against chance",
        )


def task_capabilities(
    tasks: Sequence[Path],
    full: Mapping[str, Mapping[str, float]],
    emulator: Mapping[str, Mapping[str, float]],
    *,
    limit: int,
) -> tuple[Capability, ...]:
    """Return one capability for every metric of every task, in the order of `tasks`.

    Raises:
        ConfigError: when a task has a reserved name, or its chance cannot be told.
    """
    found = []
    for path, (name, scores) in zip(tasks, full.items(), strict=True):
        if name == PERPLEXITY:
            raise ConfigError(f"task {name!r} has the name of another figure", hint="rename the task's file")
        chance = task_chance(path, limit)
        for metric, score in scores.items():
            if metric == "num_rows":
                continue
            other = emulator[name][metric]
            found.append(
                Capability(
                    name=name,
                    metric=re.sub(r"[^a-z0-9_]+", "_", metric.lower())[:64],
                    num_rows=int(scores["num_rows"]),
                    chance=chance,
                    full=score,
                    emulator=other,
                    kept=share_kept(chance, score, other) if score > chance else 1.0,
                )
            )
    return tuple(found)


def _mean_chance(path: Path, rows: Sequence[Any], limit: int) -> float:
    rows = rows[: limit or None]
    if not rows or not all(isinstance(choices, list) and choices for choices in rows):
        raise ConfigError(
            f"{path.name}: does not show how many choices a row has",
            hint="let doc_to_choice be a list, or name a column of lists",
        )
    return sum(1 / len(choices) for choices in rows) / len(rows)


def _is_yaml(path: Path) -> bool:
    return path.suffix == ".yaml"


def _mean_loss(perplexities: Mapping[str, float]) -> float:
    return sum(map(math.log, perplexities.values())) / len(perplexities)


def _targets(example: Example) -> Tensor:
    labels = torch.tensor(example.labels[1:])
    return labels[labels != IGNORED]
