"""How right an answer is: every measure of a task, from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from offsite.tasks.forms import JsonForm, object_in
from offsite.tasks.task import MEASURES, Answer, Measure, Task

SHARES: frozenset[Measure] = frozenset({"accuracy", "exact-match", "json-validity"})
"""Measures that are 0 or 1 for each answer."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"[a-z0-9]+")


def scored(task: Task, found: str, expected: Answer) -> dict[Measure, float]:
    """Return every measure of the task's form for an answer, each from 0 to 1."""
    if isinstance(task.answer, JsonForm):
        value = object_in(found.strip(), task.answer.schema_)
        return {"json-validity": float(value is not None), "exact-match": float(value == expected)}
    spelled = task.spelled(expected)
    if task.answer.type != "text":
        return {"accuracy": float(found == spelled)}
    of: Mapping[Measure, Callable[[str, str], float]]
    of = {"exact-match": exact_match, "token-f1": token_f1, "rouge-l": rouge_l}
    return {measure: of[measure](found, spelled) for measure in MEASURES["text"]}


def exact_match(found: str, expected: str) -> float:
    """Return 1 where both texts are one once case, punctuation, articles and blanks are gone; else 0.

    Source: Rajpurkar et al. (2016), SQuAD, arXiv:1606.05250.
    """
    return float(_plain(found) == _plain(expected))


def token_f1(found: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall of words, as `exact_match` sees them.

    Source: Rajpurkar et al. (2016), SQuAD, arXiv:1606.05250.
    """
    return _f1(sum((Counter(_plain(found)) & Counter(_plain(expected))).values()), _plain(found), _plain(expected))


def rouge_l(found: str, expected: str) -> float:
    """Return the F-measure of the longest common subsequence of words: lower case, letters and digits, no stemming.

    Source: Lin (2004), ROUGE: a package for automatic evaluation of summaries.
    """
    left, right = _WORDS.findall(found.lower()), _WORDS.findall(expected.lower())
    row = [0] * (len(right) + 1)
    for word in left:
        before = row
        row = [0]
        for number, other in enumerate(right):
            row.append(before[number] + 1 if word == other else max(row[number], before[number + 1]))
    return _f1(row[-1], left, right)


def _plain(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", kept).split()


def _f1(num_same: int, left: Sequence[str], right: Sequence[str]) -> float:
    return 2 * num_same / (len(left) + len(right)) if num_same else float(not left and not right)
