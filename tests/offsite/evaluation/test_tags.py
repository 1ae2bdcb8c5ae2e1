"""Entities and their F1 as seqeval has them, in cases worked by hand; words that nothing is preferred for."""

from __future__ import annotations

import pytest
import torch

from offsite.evaluation.tags import entity_f1, names_entities, said_tags, spans_in, tag_figures


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-A I-A O", {("A", 1, 2)}),
        ("B-A B-A I-A", {("A", 0, 0), ("A", 1, 2)}),
        ("B-A I-B I-B", {("A", 0, 0), ("B", 1, 2)}),
        ("O I-A I-A O I-A", {("A", 1, 2), ("A", 4, 4)}),
        ("I-A B-A", {("A", 0, 0), ("A", 1, 1)}),
        ("B-A I-A", {("A", 0, 1)}),
        ("B-A O I-A", {("A", 0, 0), ("A", 2, 2)}),
        ("B-x-y I-x-y", {("x-y", 0, 1)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_where_entities_begin_and_end(tags, spans):
    assert spans_in(tags.split()) == spans


def test_an_entity_is_right_with_both_ends_and_its_type():
    true = ["B-A I-A O B-B".split(), "B-A O O".split(), "O O".split()]
    said = ["B-A I-A O B-A".split(), "B-A I-A O".split(), "O B-B".split()]
    # right: the first of row 1 alone, of 3 true ones and 4 said
    assert entity_f1(true, said) == pytest.approx(2 * 1 / (3 + 4))
    assert entity_f1(true, true) == 1
    assert entity_f1([["O"]], [["O"]]) == 0


def test_figures_hang_on_what_the_labels_name():
    assert names_entities(("O", "B-A", "I-A"))
    assert not names_entities(("O", "B-A", "NOUN"))
    assert not names_entities(("O",))
    assert not names_entities(("O", "B-"))
    scores = [torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 3.0]]).double(), torch.tensor([[5.0, 0.0, 0.0]]).double()]
    targets = [[1, 2], [1]]
    assert tag_figures(scores, targets, ("O", "B-A", "I-A")) == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3})
    plain = tag_figures(scores, targets, ("D", "N", "V"))
    # D: never true, said once; N: right of 2 true and 1 said; V: right
    assert plain == pytest.approx({"accuracy": 2 / 3, "macro_f1": (0 + 2 / 3 + 1) / 3})


def test_a_head_that_prefers_nothing_names_no_entity():
    zeros = torch.zeros(4, 3).double()
    assert said_tags(zeros, ("B-A", "I-A", "O")) == ["O"] * 4
    assert tag_figures([zeros], [[0, 1, 2, 2]], ("B-A", "I-A", "O")) == pytest.approx({"accuracy": 1 / 3, "f1": 0})
