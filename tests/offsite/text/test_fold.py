"""Folding: what says the same folds alike, what says something else does not."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite.text.fold import folded, said, words_of


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@given(st.text())
def test_forms_and_white_space_around_do_not_count(form, text):
    assert said(unicodedata.normalize(form, text)) == said(text) == said(f" {text}\n")


@given(st.text())
def test_folding_twice_is_folding_once(text):
    assert folded(folded(text)) == folded(text)


def test_words_are_letters_and_digits_and_characters_of_unspaced_scripts():
    assert words_of("The \u200bwin\u00addow, No. 12: Stra\u00dfe_b") == ["the", "window", "no", "12", "strasse", "b"]
    assert words_of("\u6771\u4eac") == ["\u6771", "\u4eac"]
    assert (said("!? !"), said("\u200b"), said(" ")) == ("!?!", "", "")
