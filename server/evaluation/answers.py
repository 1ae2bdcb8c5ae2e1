"""Greedy answers of one row of an evaluation, read back as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offsite.console import progress
from offsite.evaluation.sampling import continuations
from offsite.modelling.context import require_context
from offsite.text.calls import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What a model said, without the token that ended it."""

    text: str = field(repr=False)
    num_tokens: int


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    label: str,
    *,
    asked: str,
    num_new: int,
    batch_size: int,
    bf16: bool,
    end: int | None,
    ends: Collection[int] = (),
) -> list[Answer]:
    """Return the likeliest answer to each prompt, in their order.

    Args:
        label: of the progress shown.
        asked: names a prompt in errors, as ``a prompt``.
        num_new: tokens of an answer at most.
        end: token after which a model is asked no further.
        ends: tokens beside it that end an answer where they stand.

    Raises:
        ConfigError: when a prompt and its answer are longer than the model's context.
        RunFailed: when the model's output is not finite.
    """
    require_context(model, max(map(len, prompts)) + num_new, f"{asked} and its answer")
    with progress(len(prompts), label) as bar:
        found = continuations(
            model,
            prompts,
            num_tokens=num_new,
            batch_size=batch_size,
            precision="bf16" if bf16 else "fp32",
            progress=lambda done, _: bar.update(done),
            end=end,
        )
    closing = {end, *ends}
    said = [next((ids[:at] for at, one in enumerate(ids) if one in closing), ids) for ids in found]
    return [Answer(decoded(tokenizer, ids, what="an answer", skip_special=True), len(ids)) for ids in said]
