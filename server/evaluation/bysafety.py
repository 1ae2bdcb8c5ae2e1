"""Whether every row of an evaluation refuses harmful requests, and what plugging in changed of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offsite.artefacts.bundle import Head
from offsite.console import say
from offsite.digests import sha256_file
from offsite.errors import ConfigError
from offsite.evaluation.preferences import wilson
from offsite.evaluation.results import SAFETY, Results, Safety, SafetyChange, Summary
from offsite.generation.asked import ids_of, in_words
from offsite.generation.generate import end_of_turn_tokens, end_tokens
from offsite.report.figures import Refusals
from offsite.safety.prompts import KINDS, Kind, Request, of_kind, read_requests, set_path
from offsite.safety.refusals import is_refusal
from offsite.safety.shares import change
from server.evaluation.answers import greedy_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from server.evaluation.config import EvaluateConfig

BEFORE, AFTER = "zero-shot", "plugged in, "
"""What rows are called while they are measured: before plugging in, and after it with a seed behind."""


@dataclass(frozen=True)
class BySafety:
    """The requests that every model is asked; `refused` keeps of each model, by its label, which ones it refused."""

    requests: Sequence[Request] = field(repr=False)
    num_new: int
    limit: float
    refused: dict[str, list[bool]] = field(default_factory=dict, repr=False)

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str, *, batch_size: int, bf16: bool
    ) -> dict[str, float]:
        """Return the shares of harmful and of harmless requests that greedy answers refuse, under ``safety/KIND``.

        Raises:
            ConfigError: when a request and its answer are longer than the model's context.
            RunFailed: when the model's output is not finite.
        """
        is_chat = bool(tokenizer.chat_template)
        prompts = [ids_of(one, tokenizer) for one in in_words([one.prompt for one in self.requests], chat=is_chat)]
        turns = end_of_turn_tokens(tokenizer) if is_chat else frozenset()
        answers = greedy_answers(
            model,
            tokenizer,
            prompts,
            f"{label}: safety",
            asked="a request",
            num_new=self.num_new,
            batch_size=batch_size,
            bf16=bf16,
            end=next(iter(turns), tokenizer.eos_token_id),  # type: ignore[arg-type]
            ends=end_tokens(model, tokenizer) | turns,
        )
        refused = [is_refusal(one.text) for one in answers]
        self.refused[label] = refused
        shares = {f"refuses_{kind}": _share([refused[at] for at in of_kind(self.requests, kind)]) for kind in KINDS}
        found = {"num_rows": float(len(refused)), **shares}
        return {f"{SAFETY}/{name}": value for name, value in found.items()}

    def found(self) -> Safety:
        """Return what plugging in changed, by seed."""
        before = self.refused[BEFORE]
        changes: dict[str, dict[Kind, SafetyChange]] = {}
        for label, after in self.refused.items():
            if not label.startswith(AFTER):
                continue
            changes[label.removeprefix(AFTER)] = {
                kind: change([before[at] for at in places], [after[at] for at in places])
                for kind, places in ((kind, of_kind(self.requests, kind)) for kind in KINDS)
            }
        return Safety(
            set_sha256=sha256_file(set_path()),
            num_harmful=len(of_kind(self.requests, "harmful")),
            num_harmless=len(of_kind(self.requests, "harmless")),
            num_tokens=self.num_new,
            limit=self.limit,
            changes=changes,
        )


def by_safety(config: EvaluateConfig, head: Head | None) -> BySafety | None:
    """Return what an evaluation measures of refusals; None where it is not asked for.

    Args:
        head: of the bundles.

    Raises:
        ConfigError: when the bundles write no text, or something else is measured under that name.
    """
    if not config.safety:
        return None
    if head is not None:
        raise ConfigError(f"--safety: it is of answers, these bundles are for {head.task}", hint="leave --safety out")
    if any(path.stem == SAFETY for path in config.task):
        raise ConfigError(f"--task: {SAFETY!r} is what --safety is measured as", hint="give the file another name")
    return BySafety(read_requests(set_path()), config.answer_tokens, config.safety_limit)


def show_safety(results: Results) -> None:
    """What plugging in changed of refusals is on stderr, loudly where it lowered them past the limit."""
    safety = results.safety
    if safety is None:
        return
    for line in _lines(results, safety):
        say(f"  {line}")
    found = Refusals.of(results)
    if found is not None and found.warning:
        say(f"WARNING: {found.warning} (--safety-limit)")


def told_of_safety(results: Results) -> dict[str, object]:
    """Return the same as JSON takes it: shares of every row with their intervals, changes by seed, and the flag."""
    safety = results.safety
    if safety is None:
        return {}
    nums = {"harmful": safety.num_harmful, "harmless": safety.num_harmless}
    rows = {
        row: {
            kind: {"share": one.mean, "interval": list(wilson(one.mean, num))}
            for kind, num in nums.items()
            for one in [found.tasks[SAFETY][f"refuses_{kind}"]]
        }
        for row, found in results.rows.items()
    }
    changes = {seed: {kind: one.model_dump() for kind, one in both.items()} for seed, both in safety.changes.items()}
    return {SAFETY: {"rows": rows, "changes": changes, "limit": safety.limit, "flagged": safety.flagged}}


def _lines(results: Results, safety: Safety) -> list[str]:
    nums: Mapping[str, int] = {"harmful": safety.num_harmful, "harmless": safety.num_harmless}
    lines = []
    for kind, num in nums.items():
        shares = [results.rows[row].tasks[SAFETY][f"refuses_{kind}"] for row in ("zero_shot", "plugged_in")]
        before, after = (_sure(one, num) for one in shares)
        lines.append(f"{num} {kind} requests, 95%: refused {before} as it was, {after} plugged in")
    for seed, both in safety.changes.items():
        one = both["harmful"]
        lines.append(
            f"harmful, {seed}: {one.difference:+.1%} ({one.low:+.1%} to {one.high:+.1%}), {one.num_lost} no longer "
            f"refused, {one.num_gained} newly"
        )
    return lines


def _sure(share: Summary, num: int) -> str:
    low, high = wilson(share.mean, num)
    return f"{share.mean:.1%} ({low:.1%} to {high:.1%})"


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)
