from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

import colours
import pytest

from offsite.tasks.scores import exact_match, rouge_l, scored, token_f1


def test_rouge_l_is_of_the_longest_common_subsequence() -> None:
    def longest(left: list[str], right: list[str]) -> int:
        every = (set(combinations(range(len(left)), size)) for size in range(len(left), -1, -1))
        return next(len(one) for few in every for one in few if _within([left[place] for place in one], iter(right)))

    draw = random.Random(0)
    for _ in range(50):
        left, right = (draw.choices("abc", k=draw.randint(1, 7)) for _ in range(2))
        expected = 2 * longest(left, right) / (len(left) + len(right))
        assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected)


def _within(few: list[str], many: Iterator[str]) -> bool:
    return all(one in many for one in few)


@pytest.mark.slow
def test_rouge_l_is_that_of_the_published_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    draw = random.Random(0)
    words = ["fever", "cough,", "Ache", "x-ray", "of", "3", "days"]
    for _ in range(50):
        left, right = (" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(2))
        assert rouge_l(left, right) == pytest.approx(scorer.score(right, left)["rougeL"].fmeasure)


def test_words_are_compared_as_in_squad() -> None:
    assert exact_match("The  Fever.", "fever") == 1
    assert exact_match("fevers", "fever") == 0
    assert token_f1("a fever and fever", "the fever of days") == pytest.approx(2 * 1 / (3 + 3))
    assert token_f1("", "fever") == 0


def test_a_label_is_right_or_wrong() -> None:
    assert scored(colours.task(), "red", "red") == {"accuracy": 1}
    assert scored(colours.task(), "", "red") == {"accuracy": 0}
