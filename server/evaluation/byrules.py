"""What every row of an evaluation answers to held-out prompts itself, by rules that anybody can check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offsite.console import progress, say
from offsite.errors import ConfigError
from offsite.evaluation.results import RULES
from offsite.evaluation.sampling import continuations
from offsite.modelling.context import require_context
from offsite.tasks.rules import Rules, read_rules, require_answers
from offsite.text.batches import Example, encode_questions
from offsite.text.calls import decoded
from offsite.text.records import read_files
from offsite.vision.reader import Reader, tokenizer_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offsite.artefacts.bundle import Head
    from offsite.tasks.config import RuleName
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
        prompts = [one.prompt for one in self.questions]
        require_context(model, max(map(len, prompts)) + self.num_new, "a prompt and its answer")
        end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        with progress(len(prompts), f"{label}: answers by rules") as bar:
            answers = continuations(
                model,
                prompts,
                num_tokens=self.num_new,
                batch_size=batch_size,
                precision="bf16" if bf16 else "fp32",
                progress=lambda done, _: bar.update(done),
                end=end,
            )
        rewards: list[float] = []
        met: list[dict[RuleName, bool]] = []
        for one, ids in zip(self.questions, answers, strict=True):
            said = ids[:-1] if ids[-1:] == [end] else ids
            text = decoded(tokenizer, said, what="an answer", skip_special=True)
            met.append(self.rules.met(text, num_tokens=len(said), answer=one.answer))
            rewards.append(self.rules.worth(met[-1]))
        num = len(prompts)
        found: dict[str, float] = {"num_rows": float(num), "reward": math.fsum(rewards) / num}
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
