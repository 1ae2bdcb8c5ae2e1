"""What every row of an evaluation answers to held-out prompts itself, by rules that anybody can check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offsite.console import say
from offsite.errors import ConfigError
from offsite.evaluation.results import RULES
from offsite.tasks.rules import Rules, read_rules, require_answers
from offsite.text.batches import Example, encode_questions
from offsite.text.records import read_files
from offsite.vision.reader import Reader, tokenizer_in
from server.evaluation.answers import greedy_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offsite.artefacts.bundle import Head
    from server.evaluation.config import EvaluateConfig


@dataclass(frozen=True)
class ByRules:
    """Rules, and the prompts whose answers are held to them."""

    rules: Rules
    questions: Sequence[Example] = field(repr=False)
    num_new: int

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str, *, batch_size: int, bf16: bool
    ) -> dict[str, float]:
        """Return the mean reward of greedy answers, and of each rule the share that meets it, under ``rules/NAME``.

        Raises:
            ConfigError: when a prompt and its answer are longer than the model's context.
            RunFailed: when the model's output is not finite.
        """
        answers = greedy_answers(
            model,
            tokenizer,
            [one.prompt for one in self.questions],
            f"{label}: answers by rules",
            asked="a prompt",
            num_new=self.num_new,
            batch_size=batch_size,
            bf16=bf16,
            end=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
        )
        met = [
            self.rules.met(said.text, num_tokens=said.num_tokens, answer=one.answer)
            for one, said in zip(self.questions, answers, strict=True)
        ]
        num = len(met)
        found: dict[str, float] = {"num_rows": float(num), "reward": math.fsum(map(self.rules.worth, met)) / num}
        found |= {name: sum(one[name] for one in met) / num for name in self.rules.settings.names}
        return {f"{RULES}/{name}": value for name, value in found.items()}


def by_rules(config: EvaluateConfig, reader: Reader, head: Head | None) -> ByRules | None:
    """Return what an evaluation measures by rules; None where it names none.

    Args:
        head: of the bundles.

    Raises:
        ConfigError: when the bundles write no text, something else has its name, or a schema cannot be followed.
        DataError: when a row holds no prompt, or an answer is missing that a rule compares with.
    """
    if config.rules is None:
        return None
    if head is not None:
        raise ConfigError(f"--rules: they are of answers, these bundles are for {head.task}", hint="leave --rules out")
    if any(path.stem == RULES for path in config.task):
        raise ConfigError(f"--task: {RULES!r} is what --rules are measured as", hint="give the file another name")
    rules = read_rules(config.rules)
    records = read_files(config.data, fields=config.fields, document_field=config.document_field, questions=True)
    encoded = encode_questions(
        records[: config.task_limit or None],
        tokenizer_in(reader),
        context=config.block_tokens,
        num_new=config.answer_tokens,
    )
    if encoded.num_dropped:
        say(f"--rules: {encoded.num_dropped} prompts leave no room for an answer and are left out")
    require_answers(encoded.examples, rules)
    return ByRules(rules, encoded.examples, config.answer_tokens)
