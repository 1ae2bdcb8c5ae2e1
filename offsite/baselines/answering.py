"""A model's answers to prompts: the likeliest label, or greedy text that is cut where the task's form ends it.

Shapes: B rows, T tokens, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from offsite.evaluation.beginnings import log_probabilities_behind
from offsite.evaluation.measure import evaluating
from offsite.evaluation.sampling import continuations
from offsite.modelling.context import context_of
from offsite.tasks.forms import FreeText, JsonForm, Scoring, up_to
from offsite.tasks.task import Task
from offsite.text.batches import IGNORED, Example, encode, pad_id
from offsite.text.calls import decoded
from offsite.text.prompts import prompt_ids
from offsite.text.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Precision = Literal["fp32", "bf16"]
_NO_LIMIT = 2**31


@dataclass(frozen=True)
class Answerer:
    """A model that answers a task's prompts; it is neither moved nor changed.

    Args:
        batch_size: sequences in one forward pass.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    task: Task
    batch_size: int = 8
    precision: Precision = "fp32"

    def fits(self, prompt: str, labels: Sequence[str], *, more_tokens: int = 0) -> bool:
        """Tell whether a prompt and the longest answer to it are within the model's context.

        Args:
            labels: that the answer is one of; none: as many tokens as the task's form allows.
            more_tokens: that are to come between the two.
        """
        form = self.task.answer
        if isinstance(form, FreeText | JsonForm):
            reserved = form.max_tokens
        else:
            reserved = max(len(prompt_ids(self.tokenizer, f" {label}")) for label in labels)
        num = len(prompt_ids(self.tokenizer, prompt)) + reserved + more_tokens + 2
        return num <= (context_of(self.model) or _NO_LIMIT)

    def answers(self, prompts: Sequence[str], labels: Sequence[Sequence[str]]) -> list[str]:
        """Return the answer to each prompt, as the task's form has it.

        Args:
            labels: of each prompt, the answers that it may have; none under a form that has no labels.

        Raises:
            RunFailed: when the model's output is not finite.
        """
        form = self.task.answer
        if isinstance(form, JsonForm):
            led = [prompt + self.task.led(prompt) for prompt in prompts]
            return [first_object(text) for text in self.texts(led, num_tokens=form.max_tokens)]
        if isinstance(form, FreeText):
            return self.texts(prompts, num_tokens=form.max_tokens, stop=form.stop)
        return self._likeliest(prompts, labels, form.scoring)

    def texts(self, prompts: Sequence[str], *, num_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what the model greedily goes on with, up to its end of text or the first of the `stop` texts.

        White space at both ends is taken off first.
        """
        asked = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        drawn = continuations(
            self.model, asked, num_tokens=num_tokens, batch_size=self.batch_size, precision=self.precision
        )
        end = self.tokenizer.eos_token_id
        return [
            up_to(
                decoded(
                    self.tokenizer, ids[: ids.index(end)] if end in ids else ids, what="an answer", skip_special=True
                ),
                stop,
            )
            for ids in drawn
        ]

    def near(self, texts: Sequence[str]) -> torch.Tensor:
        """Return of each text the mean of the model's last hidden states, of length 1: (B, H) float32."""
        place, found = next(self.model.parameters()).device, []
        most = context_of(self.model) or _NO_LIMIT
        with (
            torch.no_grad(),
            evaluating(self.model),
            torch.autocast(place.type, torch.bfloat16, self.precision == "bf16"),
        ):
            for text in texts:
                ids_BT = torch.tensor([prompt_ids(self.tokenizer, text)[:most]], device=place)
                hidden_BTH = self.model(input_ids=ids_BT, output_hidden_states=True).hidden_states[-1]
                found.append(torch.nn.functional.normalize(hidden_BTH[0].float().mean(0), dim=0).cpu())
        return torch.stack(found)

    def _likeliest(self, prompts: Sequence[str], labels: Sequence[Sequence[str]], scoring: Scoring) -> list[str]:
        records = [
            Record(((prompt, False), (f"{self.task.led(prompt)}{label}", True)), "", number)
            for number, (prompt, several) in enumerate(zip(prompts, labels, strict=True))
            for label in several
        ]
        examples = [_unclosed(one) for one in encode(records, self.tokenizer, context=_NO_LIMIT).examples]
        given = iter(examples)
        rows = [[next(given) for _ in several] for several in labels]
        logs = log_probabilities_behind(
            self.model, rows, batch_size=self.batch_size, pad_id=pad_id(self.tokenizer), precision=self.precision
        )
        found = []
        for several, own, found_logs in zip(labels, rows, logs, strict=True):
            scores = [
                log / _divisor(scoring, label, row) for log, label, row in zip(found_logs, several, own, strict=True)
            ]
            found.append(several[scores.index(max(scores))])
        return found


def first_object(text: str) -> str:
    """Return the JSON value that the text begins with; the whole text where it begins with none."""
    try:
        return text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return text


def _unclosed(example: Example) -> Example:
    """Return the example without the end of text behind it: a label is scored by itself."""
    return replace(example, input_ids=example.input_ids[:-1], labels=example.labels[:-1])


def _divisor(scoring: Scoring, label: str, example: Example) -> int:
    if scoring == "sum":
        return 1
    return len(label) if scoring == "per-character" else len(example.labels) - example.labels.count(IGNORED)
