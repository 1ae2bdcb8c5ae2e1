"""Pairs for ``--objective spin``: a private answer, and what the untuned emulator itself answers to the same prompt.

The loss is that of any pair (`client.objectives.preferences`, sigmoid): the client's answer is the chosen one, the
emulator's the rejected one. In a chat the answer is the last of the assistant's turns.

Answers are drawn once, before the first step, only to the prompts that the run comes to; so are the untuned emulator's
log-probabilities. They lie beside the checkpoints, are as private as the data, and go with them.

Source: SPIN, arXiv:2401.01335, with the logistic loss; beta is its lambda.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from client.objectives import preferences
from client.objectives.preferences import BATCH, Measured, Pair, Precision, Rows
from offsite.console import progress, say
from offsite.errors import DataError
from offsite.evaluation.preferences import log_probabilities
from offsite.evaluation.sampling import continuations
from offsite.text.batches import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS_AT_ONCE = preferences.ROWS_AT_ONCE
_LONGEST = 2  # times the client's own answer: an emulator need not come to an end


class _Drawn(Measured):
    """What is kept of some rows: the emulator's answers too, which are the rejected ones."""

    answers: tuple[tuple[int, ...], ...]


def require_prompts(text: Rows, *, steps: int) -> None:
    """Return only if every row of the first `steps` batches has a prompt to answer.

    Raises:
        DataError: when one is running text.
    """
    for example in {id(one): one for step in range(steps) for one in text.batches.chosen(step)}.values():
        _halves(example)


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
    precision: Precision,
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
    bound = preferences.bound_name({**binding, "steps": steps, "seed": seed, "precision": precision})
    pairs: dict[int, Pair] = {}
    say(f"the untuned emulator answers {len(order)} prompts, once")
    with progress(len(order), "answers") as bar:
        for number, keys in enumerate(preferences.in_parts(order, _ROWS_AT_ONCE)):
            path = work / f"spin-{bound}-{number:05d}.json"
            chosen = [halves[key] for key in keys]
            drawn = preferences.read_kept(path, _Drawn, len(keys))
            if drawn is None or not all(drawn.answers):
                drawn = _draw(model, chosen, eos=eos, context=context, seed=_seed(seed, number), precision=precision)
                preferences.keep(path, drawn)
            for key, (prompt, own), answer, log_own, log_drawn in zip(
                keys, chosen, drawn.answers, drawn.log_chosen, drawn.log_rejected, strict=True
            ):
                pairs[key] = Pair(_row(prompt, own), _row(prompt, answer), log_own, log_drawn)
            bar.update(len(pairs))
    return pairs


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


def _draw(
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], list[int]]],
    *,
    eos: int,
    context: int,
    seed: int,
    precision: Precision,
) -> _Drawn:
    """Return the model's answers to these prompts, and how probable both answers are to it."""
    limits = [min(_LONGEST * len(own), context - len(prompt)) for prompt, own in rows]
    prompts = [prompt for prompt, _ in rows]
    found = continuations(
        model,
        prompts,
        num_tokens=max(limits),
        batch_size=BATCH,
        temperature=1.0,
        seed=seed,
        precision=precision,
    )
    answers = [_ended(ids[:limit], eos) for ids, limit in zip(found, limits, strict=True)]
    owns = [_row(prompt, own) for prompt, own in rows]
    drawn = [_row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    logs = [log_probabilities(model, side, batch_size=BATCH, pad_id=0, precision=precision) for side in (owns, drawn)]
    return _Drawn(
        answers=tuple(tuple(answer) for answer in answers), log_chosen=tuple(logs[0]), log_rejected=tuple(logs[1])
    )


def _ended(ids: Sequence[int], eos: int) -> list[int]:
    """Return the tokens up to the first end-of-sequence token, with it."""
    return list(ids[: ids.index(eos) + 1]) if eos in ids else list(ids)


def _seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"offsite/v1/pairs/{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
