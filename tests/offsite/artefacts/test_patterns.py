"""Patterns of a tokenizer: those in use pass, those that could go on for ever are refused before any text."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from offsite.artefacts.patterns import MAX_LENGTH, MAX_PATTERNS, check_patterns, patterns_of, try_patterns
from offsite.errors import BadSchema

IN_USE = [
    r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?",
    r"[\p{L}\p{M}&&[^\p{Han}]]+|[\p{Han}]+",
    r" ?[^(\s|[.,!?])]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+",
    r"(?<=\d)(?=(\d{3})+(?!\d))",
    r" {2,}|(?>ab)++|.*?x|\x{4e00}|\u00e9",
]
REFUSED = [
    (r"(?:a+b)+c", "repeats what repeats"),  # harmless, and of the form that need not be
    (r"(?:[ab]{1,2})*c", "repeats what repeats"),
    (r"(?:a*){9}", "repeats what repeats"),
    (r"(?:a{40}){40}", "1600 times"),
    (r"a{2000}", "2000 times"),
    (r"(a)\1", "refers back"),
    (r"(?<x>a\g<x>?)", "refers back"),
    (r"(?{a})", "refers back"),
    (r"(*FAIL)", "refers back"),
    (r"[a", "not known"),
    (r"(a", "open group"),
    (r"a)", "closes"),
    ("a" * (MAX_LENGTH + 1), f"{MAX_LENGTH} at most"),
]


def cutting(*patterns: str) -> Tokenizer:
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    core.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return core


@pytest.mark.parametrize("pattern", IN_USE)
def test_patterns_in_use_pass_and_come_to_an_end(pattern):
    core = cutting(pattern)
    assert patterns_of(core) == [pattern]
    check_patterns("it", [pattern])
    try_patterns("it", [pattern], core)


@pytest.mark.parametrize(("pattern", "reason"), REFUSED)
def test_what_could_go_on_for_ever_is_refused_without_showing_it(pattern, reason):
    with pytest.raises(BadSchema, match=reason) as caught:
        check_patterns("it", ["a", pattern])
    assert str(caught.value).startswith("it: pattern 2 ")
    assert pattern not in str(caught.value)


def test_patterns_are_found_in_every_part_and_counted():
    core = cutting("b", "c")
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex("a"), "")])
    core.decoder = decoders.Sequence([decoders.Replace(Regex("d"), ""), decoders.Replace("literal", "")])
    assert patterns_of(core) == ["a", "b", "c", "d"]
    assert patterns_of(Tokenizer(models.WordLevel({"Regex": 0}, unk_token="a"))) == []
    with pytest.raises(BadSchema, match="129 patterns"):
        check_patterns("it", ["a"] * (MAX_PATTERNS + 1))


def test_a_tokenizer_that_fails_on_the_trial_is_refused():
    core = Tokenizer(models.WordLevel({}, unk_token="none"))
    with pytest.raises(BadSchema, match=r"its patterns fail \(\w+\) on"):
        try_patterns("it", ["a"], core)
