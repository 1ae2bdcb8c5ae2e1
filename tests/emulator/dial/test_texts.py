"""Text shared out: whole documents, no words in two parts, the same again."""

from __future__ import annotations

import pytest

from emulator.dial.texts import read_texts, share_out, write_texts
from offsite.errors import DataError
from offsite.text.records import Record, read_files


def rows(name, num, *, documents=None):
    return [
        Record(((f"{name} {number}", True),), f"{name}-{number // documents if documents else number}", number)
        for number in range(num)
    ]


def words(records):
    return {record.whole_text for record in records}


def test_one_text_is_cut_in_three_by_document():
    shared = share_out(rows("a", 200, documents=2), None, seed=0)
    parts = list(shared.values())
    assert sum(map(len, parts)) == 200
    documents = [{record.document for record in part} for part in parts]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    shares = {name: len(part) / 200 for name, part in shared.items()}
    assert shares == pytest.approx({"calibration": 0.4, "tuned": 0.4, "measured": 0.2}, abs=0.15)
    assert share_out(rows("a", 200, documents=2), None, seed=0) == shared
    assert share_out(rows("a", 200, documents=2), None, seed=1) != shared


def test_a_fields_text_is_cut_in_two_and_its_rows_leave_the_public_text(capsys):
    public, field = rows("p", 50), rows("f", 50)
    twice = [Record(((f"  f   {number} ", True),), "q", 90 + number) for number in (3, 4)]
    third = Record((("q 3", True),), "q", 99)  # of a document that has the field's rows in it
    shared = share_out([*public, *twice, third], field, seed=0)
    assert words(shared["calibration"]) == words(public)
    assert words(shared["tuned"]) | words(shared["measured"]) == words(field)
    assert not words(shared["tuned"]) & words(shared["measured"])
    assert "3 rows of the public text stand in the field's, too" in capsys.readouterr().err


def test_the_same_words_in_two_documents_are_not_measured_on_and_tuned_on():
    field = [Record((("the same", True),), f"d{number}", number) for number in range(20)] + rows("f", 30)
    shared = share_out(rows("p", 5), field, seed=0)
    assert not words(shared["tuned"]) & words(shared["measured"])


@pytest.mark.parametrize(
    ("public", "field", "told"),
    [
        (rows("f", 20), rows("f", 20), "0 document.s. are left to be calibrated on"),
        (rows("p", 20), rows("f", 2), "1 document.s. are left to be tuned on"),
        (rows("p", 1), None, "1 document.s., expected at least two"),
    ],
)
def test_too_little_text_is_told(public, field, told):
    with pytest.raises(DataError, match=told) as caught:
        share_out(public, field, seed=0)
    assert caught.value.hint


def test_files_hold_the_rows_and_their_digests_are_stated(tmp_path):
    mixed = [*rows("a", 20), Record((("how?", False), (" so", True)), "x", 1)]
    shared = {"calibration": mixed, "tuned": rows("t", 3), "measured": rows("m", 2)}
    texts = write_texts(tmp_path, shared)
    assert texts.calibration == ("calibration.jsonl", "calibration2.jsonl")
    assert words(read_files([tmp_path / name for name in texts.calibration])) == words(mixed)
    assert (texts.stated["tuned"].num_rows, texts.stated["calibration"].num_rows) == (3, 21)
    assert write_texts(tmp_path, shared) == texts
    assert write_texts(tmp_path, {**shared, "tuned": rows("t", 4)}).digest("tuned") != texts.digest("tuned")


def test_the_same_file_twice_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three\n")
    plain = {"fields": {}, "document_field": None, "separator": None}
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    assert read_texts([a], [tmp_path / "." / "a.txt"], **plain, own=None)[1] is None
    assert read_texts([a], [], **plain, own=None)[1] is None
    assert words(read_texts([a], [b], **plain, own=None)[1]) == {"three"}
