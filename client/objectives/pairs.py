"""Pairs for ``--objective spin``: a private answer, and what the untuned emulator itself answers to the same prompt.

The loss tells the two apart by log-ratios to the untuned emulator, so that what is wrong with both alike drops out:
-log sigmoid(beta ((log p(y) - log p0(y)) - (log p(y') - log p0(y')))), with y the client's answer, y' the emulator's
and p0 the untuned emulator. In a chat the answer is the last of the assistant's turns.

Answers are drawn once, before the first step, only to the prompts that the run comes to; so are the untuned emulator's
log-probabilities. They lie beside the checkpoints, are as private as the data, and go with them.

Source: SPIN, arXiv:2401.01335, with the logistic loss; beta is its lambda.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.objectives.tokens import by_row, token_losses
from offsite.console import progress, say
from offsite.errors import DataError
from offsite.evaluation.measure import evaluating
from offsite.evaluation.sampling import continuations
from offsite.staging import staged_file
from offsite.strictjson import Strict, parse_strict, write_compact
from offsite.text.batches import IGNORED, Example, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offsite.text.batches import Batches

_ROWS_AT_ONCE = 32  # are drawn, and then kept
_BATCH = 8
_LONGEST = 2  # times the client's own answer: an emulator need not come to an end


class _Drawn(Strict):
    """What is kept of some rows: the emulator's answers, and log-probabilities of both, in nats, before tuning."""

    answers: tuple[tuple[int, ...], ...]
    log_own: tuple[float, ...]
    log_drawn: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """Two rows that begin with one prompt, and by how much the untuned emulator prefers the first, in nats."""

    own: Example = field(repr=False)
    drawn: Example = field(repr=False)
    reference: float


class Rows(Protocol):
    """The client's text: the rows of every step."""

    @property
    def batches(self) -> Batches:
        """The rows of every step."""

    @property
    def pad_id(self) -> int:
        """The token that rows are filled up with."""


class PairBatches:
    """The text's own batches, with the pair of every row: what `spin_loss` takes."""

    def __init__(self, text: Rows, pairs: Mapping[int, Pair]) -> None:
        """Take the pairs by ``id`` of the text's examples."""
        self._text, self._pairs = text, pairs

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return both rows of every pair, collated, and the reference."""
        pairs = [self._pairs[id(example)] for example in self._text.batches.chosen(step)]
        drawn = collate([pair.drawn for pair in pairs], self._text.pad_id)
        found = collate([pair.own for pair in pairs], self._text.pad_id)
        found |= {f"drawn_{name}": tensor for name, tensor in drawn.items()}
        return found | {"reference": torch.tensor([pair.reference for pair in pairs])}


def make_pairs(
    model: PreTrainedModel,
    text: Rows,
    *,
    steps: int,
    eos: int,
    context: int,
    seed: int,
    work: Path,
    binding: Mapping[str, str],
    precision: Literal["fp32", "bf16"],
) -> dict[int, Pair]:
    """Return the pair of every row of the first `steps` batches, by the example's ``id``; progress is shown.

    Args:
        model: the untuned emulator.
        eos: token that ends an answer.
        context: most tokens of a row.
        work: folder that keeps what was drawn.
        binding: what a run must share to take what an earlier one drew.

    Raises:
        DataError: when a row has no prompt to answer.
        RunFailed: when the emulator's output is not finite, or the disk is full.
    """
    rows = {id(one): one for step in range(steps) for one in text.batches.chosen(step)}
    halves = {key: _halves(example) for key, example in rows.items()}
    order = sorted(halves, key=lambda key: (len(halves[key][0]), len(halves[key][1]), halves[key]))
    stated = json.dumps({**binding, "steps": steps, "seed": seed, "precision": precision}, sort_keys=True)
    bound = hashlib.sha256(stated.encode()).hexdigest()[:16]
    pairs: dict[int, Pair] = {}
    say(f"the untuned emulator answers {len(order)} prompts, once")
    with progress(len(order), "answers") as bar:
        for number, keys in enumerate(_parts(order)):
            path = work / f"pairs-{bound}-{number:05d}.json"
            chosen = [halves[key] for key in keys]
            drawn = _read(path, len(keys))
            if drawn is None:
                drawn = _draw(model, chosen, eos=eos, context=context, seed=_seed(seed, number), precision=precision)
                with staged_file(path, replace=True) as stage:
                    stage.write_bytes(write_compact(drawn))
            for key, (prompt, own), answer, log_own, log_drawn in zip(
                keys, chosen, drawn.answers, drawn.log_own, drawn.log_drawn, strict=True
            ):
                pairs[key] = Pair(_row(prompt, own), _row(prompt, answer), log_own - log_drawn)
            bar.update(len(pairs))
    return pairs


def spin_loss(model: nn.Module, batch: Mapping[str, Tensor], *, beta: float) -> tuple[Tensor, Tensor]:
    """Return the summed loss of the batch's pairs in nats, and their number; both scalars.

    Args:
        batch: as `PairBatches` gives it, on the model's device.
        beta: see the module's docstring.
    """
    own_B = _log_probabilities(model, batch, "")
    drawn_B = _log_probabilities(model, batch, "drawn_")
    margins_B = own_B - drawn_B - batch["reference"].to(own_B)
    return functional.softplus(-beta * margins_B).sum(), torch.tensor(len(margins_B))


def _log_probabilities(model: nn.Module, batch: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Return each row's log-probability of what counts in it, in nats, (B,) float32."""
    return -by_row(*token_losses(model, batch, prefix))


def _halves(example: Example) -> tuple[list[int], list[int]]:
    """Return a row's prompt, and its last stretch of tokens that count.

    Raises:
        DataError: when nothing stands before it.
    """
    end = len(example.labels)
    while end and example.labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start and example.labels[start - 1] != IGNORED:
        start -= 1
    if not start or start == end:
        raise DataError(
            "--objective spin: a row of running text holds no prompt that the emulator could answer",
            hint="give rows of prompt and completion, or conversations",
        )
    return example.input_ids[:start], example.input_ids[start:end]


def _row(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    return Example([*prompt, *answer], [IGNORED] * len(prompt) + list(answer))


def _parts(keys: Sequence[int]) -> Iterator[Sequence[int]]:
    return (keys[first : first + _ROWS_AT_ONCE] for first in range(0, len(keys), _ROWS_AT_ONCE))


def _draw(
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], list[int]]],
    *,
    eos: int,
    context: int,
    seed: int,
    precision: Literal["fp32", "bf16"],
) -> _Drawn:
    """Return the model's answers to these prompts, and how probable both answers are to it."""
    limits = [min(_LONGEST * len(own), context - len(prompt)) for prompt, own in rows]
    prompts = [prompt for prompt, _ in rows]
    found = continuations(
        model,
        prompts,
        num_tokens=max(limits),
        batch_size=_BATCH,
        temperature=1.0,
        seed=seed,
        precision=precision,
    )
    answers = [_ended(ids[:limit], eos) for ids, limit in zip(found, limits, strict=True)]
    owns = [_row(prompt, own) for prompt, own in rows]
    drawn = [_row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return _Drawn(
        answers=tuple(tuple(answer) for answer in answers),
        log_own=_measured(model, owns, precision),
        log_drawn=_measured(model, drawn, precision),
    )


@torch.no_grad()
def _measured(model: PreTrainedModel, rows: Sequence[Example], precision: Literal["fp32", "bf16"]) -> tuple[float, ...]:
    place, found = next(model.parameters()).device, list[float]()
    with evaluating(model), torch.autocast(place.type, torch.bfloat16, precision == "bf16"):
        for first in range(0, len(rows), _BATCH):
            batch = {name: one.to(place) for name, one in collate(rows[first : first + _BATCH], 0).items()}
            found += _log_probabilities(model, batch, "").tolist()
    return tuple(found)


def _ended(ids: Sequence[int], eos: int) -> list[int]:
    """Return the tokens up to the first end-of-sequence token, with it."""
    return list(ids[: ids.index(eos) + 1]) if eos in ids else list(ids)


def _seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"offsite/v1/pairs/{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _read(path: Path, num_rows: int) -> _Drawn | None:
    """Return what an earlier run drew, if it is all there.

    Raises:
        BadSchema: when the file is damaged.
    """
    if not path.is_file():
        return None
    found = parse_strict(path.read_bytes(), _Drawn, path.name, {})
    full = all(len(part) == num_rows for part in (found.answers, found.log_own, found.log_drawn))
    return found if full and all(found.answers) else None
