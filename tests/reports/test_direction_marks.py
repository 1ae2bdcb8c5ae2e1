"""Licences, terms and other words of the other side with marks in them that are not seen.

Direction marks show "may be used" where it says otherwise, zero-width characters make two names look like one, and a
separator of paragraphs breaks a line where a terminal does. What a person is shown, and agrees to, is what is there.
"""

from __future__ import annotations

import unicodedata

import pytest
from checkpoints_lab import distill, save
from pydantic import TypeAdapter, ValidationError

from emulator.distillation.publish import read_terms
from offsite.artefacts.layout import Line, Text
from offsite.artefacts.package import open_package
from offsite.errors import BadSchema, ConfigError
from offsite.privacyreport.record import Sentence

UNSEEN = {
    "right-to-left override": "\u202e",
    "left-to-right isolate": "\u2066",
    "pop isolate": "\u2069",
    "right-to-left mark": "\u200f",
    "arabic letter mark": "\u061c",
    "zero-width space": "\u200b",
    "zero-width joiner": "\u200d",
    "byte-order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "tag letter": "\U000e0041",
    "interlinear anchor": "\ufff9",
    "private use": "\ue000",
    "escape": "\x1b",
    "delete": "\x7f",
    "next line": "\x85",
    "null": "\x00",
    "carriage return": "\r",
}
SEEN = "Nutzung nur für Forschung; 許可証, رخصة, רישיון, naïve, e\u0301, 10 €, Ω, \U0001f600 \u00a0|"


@pytest.fixture(params=list(UNSEEN))
def mark(request):
    return UNSEEN[request.param]


@pytest.mark.parametrize("kind", [Line, Text, Sentence])
def test_no_kind_of_shown_text_takes_one(kind, mark):
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(f"may{mark}be used")
    assert TypeAdapter(kind).validate_python(SEEN) == SEEN


# Signs that Unicode calls format, though they are drawn: of numbers and ends of verses, and of hieroglyphs.
DRAWN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}


def test_the_rule_is_that_of_unicodes_categories():
    """Every character of the first two planes and the tags, by Python's own table of categories."""
    adapter = TypeAdapter(Line)
    hidden, shown = [], []
    for number in [*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200)]:
        category = unicodedata.category(chr(number))
        if category in ("Cc", "Cf", "Co", "Zl", "Zp") and number not in DRAWN:
            hidden.append(chr(number))
        elif category != "Cn":
            shown.append(chr(number))
    for start in range(0, len(shown), 200):
        adapter.validate_python("".join(shown[start : start + 200]))
    for character in hidden if len(hidden) < 500 else [*hidden[:300], *hidden[-200:]]:
        with pytest.raises(ValidationError):
            adapter.validate_python(character)


@pytest.mark.parametrize("field", ["licence", "terms"])
def test_a_package_that_came_with_one_is_refused(field, mark, dropped_package, tamper):
    with pytest.raises(BadSchema) as caught:
        open_package(tamper(dropped_package.path, edit=lambda manifest: manifest.update({field: f"free{mark}use"})))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("field", ["terms"])
def test_so_is_a_job(field, mark, make_job):
    with pytest.raises(ValidationError):
        make_job(**{field: f"free{mark}use"})


def test_the_owner_hears_of_it_before_any_work(tmp_path, full_llama, letters_tokenizer, capsys):
    checkpoint = save(tmp_path / "model", full_llama, letters_tokenizer)
    assert distill(checkpoint, tmp_path / "package", "--licence", "free\u202euse") == 2
    terms = tmp_path / "terms.txt"
    terms.write_text("line one\nfree\u202euse\n", encoding="utf-8")
    capsys.readouterr()
    assert distill(checkpoint, tmp_path / "package", "--terms", str(terms)) == 2
    assert "line 2 of terms 'terms.txt' holds a control, direction or other unseen character" in capsys.readouterr().err


def test_terms_as_editors_write_them(tmp_path):
    """A byte-order mark in front and line ends of two characters are the file's, not the text's."""
    path = tmp_path / "terms.txt"
    path.write_bytes(b"\xef\xbb\xbf" + f"{SEEN}\r\n\tindented\r\n".encode())
    assert read_terms(path) == f"{SEEN}\n\tindented\n"
    path.write_text("one\ntw\u2028o", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2 of terms"):
        read_terms(path)
