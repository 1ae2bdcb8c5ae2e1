"""Ways of asking a model for an answer: zero-shot, in-context, chain of thought, least-to-most.

Chain of thought: Kojima et al. (2022), arXiv:2205.11916, in two passes: the reasoning, then the answer after it.
Least-to-most: Zhou et al. (2022), arXiv:2205.10625: the question's parts first, then each in turn, with the earlier
ones' answers before it, and the question last.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from offsite.baselines.answering import Answerer
from offsite.baselines.config import Method
from offsite.tasks.rows import TaskRow
from offsite.tasks.task import Sample

STEPS = "Let's think step by step."
THEREFORE = "Therefore, the answer is"
_DECOMPOSE = "To answer this, these simpler questions come first:\n1."
_ITEM = re.compile(r"^\s*(?:[0-9]{1,2}[.)]|[-*])?\s*(\S.*?)\s*$")


@dataclass(frozen=True)
class Given:
    """An answer; ``short``: with fewer samples or parts than were asked for, ``too_long``: none, for want of room."""

    text: str
    short: bool = False
    too_long: bool = False


@dataclass(frozen=True)
class Asker:
    """Asks one model in one way.

    Args:
        prompt: which of the task's prompts.
        shots: samples that are shown, at most.
        thought_tokens: of a chain of thought, or a decomposition.
        part_tokens: of the answer to a part.
        parts: of a question, at most.
        seed: of the choice and order of the samples of every row.
    """

    answerer: Answerer
    method: Method
    prompt: int = 0
    shots: int = 4
    thought_tokens: int = 48
    part_tokens: int = 24
    parts: int = 3
    seed: int = 0

    def ask(self, rows: Sequence[TaskRow]) -> list[Given]:
        """Return an answer for every row.

        Raises:
            RunFailed: when the model's output is not finite.
        """
        prompts = [self.prompt_of(row) for row in rows]
        room = [self._fits(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        fitting = [row for row, fits in zip(rows, room, strict=True) if fits]
        given = iter(self._asked(fitting) if fitting else [])
        return [next(given) if fits else Given("", too_long=True) for fits in room]

    def prompt_of(self, row: TaskRow, *parts: str) -> str:
        """Return what the model reads of a row: the description, what is shown before, and the question."""
        return self.answerer.task.introduced(*parts, self._question(row))

    def _asked(self, rows: Sequence[TaskRow]) -> list[Given]:
        match self.method:
            case "zero-shot":
                prompts = [(self.prompt_of(row), False) for row in rows]
            case "in-context" | "nearest":
                prompts = self._with_samples(rows)
            case "chain-of-thought":
                prompts = self._after_thought(rows)
            case "least-to-most":
                prompts = self._after_parts(rows)
        labels = [self._labels(row) for row in rows]
        texts = self.answerer.answers([prompt for prompt, _ in prompts], labels)
        return [Given(text, short) for text, (_, short) in zip(texts, prompts, strict=True)]

    def _with_samples(self, rows: Sequence[TaskRow]) -> list[tuple[str, bool]]:
        chosen = self._nearest(rows) if self.method == "nearest" else [self._drawn(row) for row in rows]
        found = []
        for row, samples in zip(rows, chosen, strict=True):
            kept = [self._shown(sample) for sample in samples]
            while kept and not self._fits(row, self.prompt_of(row, *kept)):
                kept = kept[1:]  # the nearest stand last
            found.append((self.prompt_of(row, *kept), len(kept) < len(samples)))
        return found

    def _drawn(self, row: TaskRow) -> list[Sample]:
        """Return the samples of a row: chosen and ordered by the seed and the row's input alone."""
        samples = self.answerer.task.samples
        draw = random.Random(f"offsite/v1/shots/{self.seed}/{self._question(row)}")  # noqa: S311 - no secret
        return draw.sample(samples, min(self.shots, len(samples)))

    def _nearest(self, rows: Sequence[TaskRow]) -> list[list[Sample]]:
        """Return the samples of every row that are nearest to it by the model's own mean hidden state, nearest last."""
        samples = self.answerer.task.samples
        known = self.answerer.near([self.answerer.task.asked(one.vars, prompt=self.prompt) for one in samples])
        likeness = self.answerer.near([self._question(row) for row in rows]) @ known.T
        best = torch.topk(likeness, min(self.shots, len(samples)), dim=1).indices
        return [[samples[number] for number in reversed(few)] for few in best.tolist()]

    def _after_thought(self, rows: Sequence[TaskRow]) -> list[tuple[str, bool]]:
        asked = [f"{self.prompt_of(row).rstrip()} {STEPS}" for row in rows]
        room = [
            self._fits(row, f"{one}\n{THEREFORE}", self.thought_tokens) for row, one in zip(rows, asked, strict=True)
        ]
        thought = self._texts([one for one, fits in zip(asked, room, strict=True) if fits], self.thought_tokens, "\n\n")
        return [
            (f"{one} {next(thought)}\n{THEREFORE}", False) if fits else (self.prompt_of(row), True)
            for row, one, fits in zip(rows, asked, room, strict=True)
        ]

    def _after_parts(self, rows: Sequence[TaskRow]) -> list[tuple[str, bool]]:
        asked = [f"{self.prompt_of(row).rstrip()}\n\n{_DECOMPOSE}" for row in rows]
        more = self.thought_tokens + self.parts * (self.part_tokens + 16)
        room = [self._fits(row, one, more) for row, one in zip(rows, asked, strict=True)]
        listed = self._texts([one for one, fits in zip(asked, room, strict=True) if fits], self.thought_tokens, "\n\n")
        parts = [self._parts_in(next(listed)) if fits else [] for fits in room]
        solved: list[list[str]] = [[] for _ in rows]
        for number in range(self.parts):
            open_ = [n for n, several in enumerate(parts) if number < len(several)]
            questions = [self.prompt_of(rows[n]).rstrip() + "".join(f"\n\n{one}" for one in solved[n]) for n in open_]
            posed = [
                f"{before}\n\nQuestion: {parts[n][number]}\nAnswer:" for n, before in zip(open_, questions, strict=True)
            ]
            for n, answer in zip(open_, self._texts(posed, self.part_tokens, "\n"), strict=True):
                solved[n].append(f"Question: {parts[n][number]}\nAnswer: {answer}")
        found = []
        for row, pairs in zip(rows, solved, strict=True):
            kept = list(pairs)
            while kept and not self._fits(row, self.prompt_of(row, *kept)):
                kept = kept[1:]
            found.append((self.prompt_of(row, *kept), not kept or len(kept) < len(pairs)))
        return found

    def _parts_in(self, text: str) -> list[str]:
        """Return the simpler questions that a list of them names, each once."""
        lines = [match[1] for line in text.splitlines() if (match := _ITEM.match(line))]
        return list(dict.fromkeys(lines))[: self.parts]

    def _texts(self, prompts: Sequence[str], num_tokens: int, stop: str) -> Iterator[str]:
        return iter(self.answerer.texts(prompts, num_tokens=num_tokens, stop=(stop,)) if prompts else [])

    def _question(self, row: TaskRow) -> str:
        return self.answerer.task.asked(row.vars, prompt=self.prompt)

    def _labels(self, row: TaskRow) -> tuple[str, ...]:
        return self.answerer.task.labels_of(row.vars)

    def _shown(self, sample: Sample) -> str:
        task = self.answerer.task
        prompt = task.asked(sample.vars, prompt=self.prompt)
        return f"{prompt}{task.led(prompt)}{task.spelled(sample.answer)}"

    def _fits(self, row: TaskRow, prompt: str, more_tokens: int = 0) -> bool:
        return self.answerer.fits(prompt, self._labels(row), more_tokens=more_tokens)
