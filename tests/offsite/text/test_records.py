"""Files to records: every form read alike, every bad input one line that tells nothing of the rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite.errors import ConfigError, DataError
from offsite.text.records import BUNDLED, Record, bundled, read_records, split_by_document
from offsite.text.writing import write_records

SECRET = "SECRET"


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


SAME_TEXTS = {
    "a.txt": "one\ntwo\n\n\nthree é\n".encode(),
    "b.jsonl": jsonl({"text": "one\ntwo"}, {"text": "three é"}),
    "c.json": json.dumps([{"text": "one\ntwo"}, {"text": "three é"}]).encode(),
    "d.csv": 'text,id\n"one\ntwo",1\nthree é,2\n'.encode(),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", SAME_TEXTS)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, ending: str) -> None:
    plain = read_records(written(tmp_path, name + ending, SAME_TEXTS[name]))
    marked = read_records(written(tmp_path, "bom-" + name + ending, b"\xef\xbb\xbf" + SAME_TEXTS[name]))
    assert [record.segments for record in plain] == [(("one\ntwo", True),), (("three é", True),)]
    assert [record.segments for record in marked] == [record.segments for record in plain]
    assert [record.document for record in plain] == [record.document for record in marked]


def test_rows_are_where_an_editor_shows_them(tmp_path: Path) -> None:
    text = read_records(written(tmp_path, "a.txt", b"\n\none\n\n\n\ntwo\n"))
    cut = read_records(written(tmp_path, "b.txt", b"one\n<|>\n\ntwo<|>three\n<|>\n"), separator="<|>")
    lines = read_records(written(tmp_path, "c.jsonl", b'{"text": "x"}\n\n{"text": "y"}\n'))
    assert [record.row for record in text] == [3, 7]
    assert [(record.segments[0][0], record.row) for record in cut] == [("one", 1), ("two", 4), ("three", 4)]
    assert [record.place for record in lines] == ["c.jsonl: line 1", "c.jsonl: line 3"]


def test_the_loss_counts_on_completions_and_messages_keep_their_order(tmp_path: Path) -> None:
    pairs = read_records(written(tmp_path, "p.jsonl", jsonl({"prompt": "", "completion": "b", "more": 3})))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chats = read_records(written(tmp_path, "m.jsonl", jsonl({"messages": turns})))
    assert pairs[0].segments == (("", False), ("b", True))
    assert chats[0].messages == (("user", "hi"), ("assistant", "ho"))


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", b"prompt,completion,body,who\np,c,one,7\np,c,two,8\n")
    records = read_records(path, fields={"text": "body"}, document_field="who")
    assert [(record.segments[0][0], record.document) for record in records] == [("one", "7"), ("two", "8")]


def test_documents_come_from_the_field_or_from_the_content(tmp_path: Path) -> None:
    named = read_records(
        written(tmp_path, "a.jsonl", jsonl({"text": "x", "document": 4}, {"text": "y", "document": 4}))
    )
    unnamed = read_records(written(tmp_path, "b.jsonl", jsonl({"text": "x"}, {"text": "y"}, {"text": "x"})))
    assert {record.document for record in named} == {"4"}
    assert unnamed[0].document == unnamed[2].document != unnamed[1].document


GOOD = {"text": SECRET}
MESSAGE = {"role": "user", "content": SECRET}
BAD_FILES = [
    ("absent.txt", None, "absent.txt: no such file"),
    ("a.pdf", b"x", "unknown kind of file"),
    ("a.gz", b"x", "unknown kind of file"),
    ("a.txt", b"", "empty"),
    ("a.txt.gz", b"", "empty"),
    ("a.txt", b" \n\n", "empty"),
    ("a.jsonl", b"\n", "empty"),
    ("a.json", b"", "empty"),
    ("a.json", b"[]", "empty"),
    ("a.csv", b"text\n", "empty"),
    ("a.txt", b"fine\nSECRET \xff\n", "line 2: byte 8 is not UTF-8"),
    ("a.jsonl", jsonl(GOOD) + b'{"text": "SECRET\xe9"}', "line 2: byte 17 is not UTF-8"),
    ("a.csv", b"text\nSECRET\xe9\n", "line 2: byte 7 is not UTF-8"),
    ("a.jsonl", jsonl(GOOD) + b'{"text": "SECRET"', "line 2: not valid JSON at column"),
    ("a.jsonl", jsonl(GOOD) + b"SECRET", "line 2: not valid JSON"),
    ("a.jsonl", b'{"text": "SECRET", "n": ' + b"9" * 5000 + b"}", "line 1: JSON beyond what can be read"),
    ("a.jsonl", b"[" * 100_000, "line 1: JSON beyond what can be read"),
    ("a.jsonl", jsonl("SECRET"), "line 1: holds text, expected an object"),
    ("a.jsonl", jsonl([SECRET]), "line 1: holds a list, expected an object"),
    ("a.jsonl", jsonl(None), "line 1: holds null, expected an object"),
    ("a.json", b'[{"text": "SECRET"},\n {"SECRET]', "a.json: not valid JSON at line 2"),
    ("a.json", jsonl(GOOD), "a.json: holds an object, expected a list"),
    ("a.json", json.dumps([GOOD, 3]).encode(), "row 2: holds a number"),
    ("a.jsonl", jsonl({SECRET: "x"}), "line 1: a field is missing, expected 'text'; or 'prompt' and 'completion'"),
    ("a.jsonl", jsonl({"prompt": SECRET}), "line 1: a field is missing"),
    ("a.jsonl", jsonl({**GOOD, "messages": [MESSAGE]}), "line 1: has the fields of text and messages"),
    ("a.jsonl", jsonl(GOOD, {"body": SECRET}), "line 2: field 'text' is missing"),
    ("a.jsonl", jsonl(GOOD, {"prompt": SECRET, "completion": SECRET}), "line 2: holds prompt/completion where line 1"),
    ("a.jsonl", jsonl({"text": None}), "line 1: field 'text' is missing"),
    ("a.jsonl", jsonl({"text": [SECRET]}), "line 1: field 'text' is a list, expected text"),
    ("a.jsonl", jsonl({"text": 3.5}), "line 1: field 'text' is a number, expected text"),
    ("a.jsonl", jsonl({"text": " \n"}), "line 1: field 'text' is empty"),
    ("a.jsonl", jsonl({"text": SECRET + "\ud800"}), "line 1: field 'text' holds half of a surrogate pair"),
    ("a.jsonl", jsonl({"prompt": SECRET, "completion": ""}), "line 1: field 'completion' is empty"),
    ("a.jsonl", jsonl({**GOOD, "document": 1}, GOOD), "line 2: field 'document' is missing"),
    ("a.jsonl", jsonl({"messages": SECRET}), "line 1: field 'messages' is not a list"),
    ("a.jsonl", jsonl({"messages": []}), "line 1: field 'messages' is not a list"),
    ("a.jsonl", jsonl({"messages": [MESSAGE, {"role": "assistant"}]}), "line 1: message 2 does not have exactly"),
    ("a.jsonl", jsonl({"messages": [{**MESSAGE, "tool": SECRET}]}), "line 1: message 1 does not have exactly"),
    ("a.jsonl", jsonl({"messages": [{"role": "user", "content": [SECRET]}]}), "content of message 1 is a list"),
    ("a.jsonl", jsonl({"messages": [MESSAGE]}), "line 1: no message of role assistant"),
    ("a.csv", b"text,who\nSECRET\n", "row 1: 1 columns, the header has 2"),
    ("a.csv", b"text,text\nSECRET,SECRET\n", "two columns have the same name"),
    ("a.csv", b'text\nfine\n"SECRET" SECRET\n', "line 3: not valid CSV"),
    ("a.csv", b"text\n" + b"S" * 200_000 + b"\n", "line 2: not valid CSV"),
]


def assert_one_clear_line(error: DataError, name: str) -> None:
    assert str(error).startswith(f"{name}: ")
    assert error.exit_code == 2
    told = "".join(traceback.format_exception(error)) + (error.hint or "")
    assert SECRET not in told
    assert "\n" not in str(error)


@pytest.mark.parametrize(("name", "data", "expected"), BAD_FILES, ids=lambda value: str(value)[:40])
def test_a_bad_file_gives_one_line_that_tells_nothing(
    tmp_path: Path, name: str, data: bytes | None, expected: str
) -> None:
    path = tmp_path / name if data is None else written(tmp_path, name, data)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert expected in str(caught.value)
    assert_one_clear_line(caught.value, name)


def test_what_only_looks_compressed_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(hashlib.sha256(bytes([n])).hexdigest() for n in range(200)).encode(), mtime=0)
    for data, expected in [(b"SECRET\n", "not a gzip file"), (whole[:900], "breaks off")]:
        path = tmp_path / "a.txt.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=expected) as caught:
            read_records(path)
        assert_one_clear_line(caught.value, "a.txt.gz")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"^a\.txt: a folder, expected a file$"):
        read_records(tmp_path / "a.txt")


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    text, table = written(tmp_path, "a.txt", b"x"), written(tmp_path, "a.jsonl", jsonl(GOOD))
    for call in (
        lambda: read_records(text, fields={"text": "body"}),
        lambda: read_records(text, document_field="id"),
        lambda: read_records(text, separator=""),
        lambda: read_records(table, separator="x"),
        lambda: read_records(table, fields={"body": "text"}),
        lambda: read_records(table, fields={"text": "a", "prompt": "b"}),
        lambda: bundled("../errors"),
    ):
        with pytest.raises(ConfigError):
            call()


def test_printing_a_record_tells_nothing(tmp_path: Path) -> None:
    record = read_records(written(tmp_path, "a.jsonl", jsonl({**GOOD, "document": SECRET})))[0]
    assert SECRET not in repr(record)


def numbered(names: list[str]) -> list[Record]:
    return [Record((("x", True),), name, row) for row, name in enumerate(names)]


@given(st.sets(st.text(), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 2**31), st.randoms())
def test_documents_stay_whole_and_sides_follow_neither_order_nor_row_numbers(names, fraction, seed, random) -> None:
    order = [*names, *names]
    random.shuffle(order)
    train, held = split_by_document(numbered(order), fraction=fraction, seed=seed)
    held_names = {record.document for record in held}
    assert held
    assert train
    assert held_names.isdisjoint(record.document for record in train)
    assert len(train) + len(held) == len(order)
    again = split_by_document(numbered(sorted(names)), fraction=fraction, seed=seed)[1]
    assert {record.document for record in again} == held_names


def test_added_documents_do_not_move_others() -> None:
    names = [f"document {number}" for number in range(1000)]
    few = split_by_document(numbered(names[:500]), fraction=0.2, seed=3)[1]
    many = split_by_document(numbered(names), fraction=0.2, seed=3)[1]
    other = split_by_document(numbered(names), fraction=0.2, seed=4)[1]
    assert {record.document for record in few} == {record.document for record in many} & set(names[:500])
    assert 150 < len(many) < 250
    assert {record.document for record in many} != {record.document for record in other}


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(DataError, match="expected at least two"):
        split_by_document(numbered(["a", "a"]), fraction=0.5, seed=0)
    with pytest.raises(ConfigError):
        split_by_document(numbered(["a", "b"]), fraction=1.0, seed=0)


def test_bundled_texts_are_those_their_readme_describes() -> None:
    readme = bundled("public").with_name("README.md").read_text()
    for name in BUNDLED:
        digest = hashlib.sha256(bundled(name).read_bytes()).hexdigest()
        assert f"{len(read_records(bundled(name)))} | {bundled(name).stat().st_size} | {digest}" in readme


def test_no_held_out_document_or_answer_is_in_the_private_text() -> None:
    private, heldout = read_records(bundled("private")), read_records(bundled("heldout"))
    assert {record.document for record in private}.isdisjoint(record.document for record in heldout)
    assert {record.segments[1] for record in private}.isdisjoint(record.segments[1] for record in heldout)
    assert len({record.document.split("/")[0] for record in private}) == 9


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "one\ntwo"}, {"text": "three \U0001f600"}],
        [{"prompt": "", "completion": "yes"}, {"prompt": "why", "completion": "because"}],
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "document": "d"}],
        [{"text": "one", "document": "x"}, {"text": "two", "document": "x"}],
    ],
)
def test_what_is_written_reads_as_it_was(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_records(path)
    write_records(tmp_path / "again.jsonl", records)
    again = read_records(tmp_path / "again.jsonl")
    assert [(one.segments, one.messages, one.document) for one in again] == [
        (one.segments, one.messages, one.document) for one in records
    ]


# Rows as other tools write them


def parquet(folder: Path, name: str, rows: list[dict]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as tables

    tables.write_table(arrow.Table.from_pylist(rows), folder / name, row_group_size=2)
    return folder / name


def test_parquet_and_tsv_hold_what_jsonl_does(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": turns, "document": number} for number in (1, 2, 3)]
    columns = parquet(tmp_path, "a.parquet", rows)
    assert read_records(columns) == [
        replace(record, place=f"a.parquet: row {record.row}")
        for record in read_records(written(tmp_path, "a.jsonl", jsonl(*rows)))
    ]
    tabs = read_records(written(tmp_path, "b.tsv", b'prompt\tcompletion\nwho, me\tyou\n"Hi" he said\t"b\n'))
    assert [record.segments[0][0] for record in tabs] == ["who, me", '"Hi" he said']
    assert tabs[1].segments[1][0] == '"b'


def test_what_no_parquet_file_is(tmp_path: Path) -> None:
    broken = written(tmp_path, "a.parquet", b"SECRET")
    whole = parquet(tmp_path, "b.parquet", [{"text": "SECRET"}] * 5)
    cut = written(tmp_path, "c.parquet", whole.read_bytes()[:-9])
    for path in (broken, cut):
        with pytest.raises(DataError, match=f"^{path.name}: not a Parquet file, or a broken one$"):
            read_records(path)
    with pytest.raises(DataError, match=r"^d\.parquet: row 2: field 'text' is missing$"):
        read_records(parquet(tmp_path, "d.parquet", [{"text": "SECRET"}, {"text": None}]))
    with pytest.raises(DataError, match=r"^e\.parquet\.gz: Parquet files compress themselves$"):
        read_records(written(tmp_path, "e.parquet.gz", b""))
    with pytest.raises(DataError, match=r"^f\.parquet: no such file$"):
        read_records(tmp_path / "f.parquet")


def test_what_is_no_text_in_a_parquet_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as tables

    def file(name: str, **columns: object) -> Path:
        tables.write_table(arrow.table(columns), tmp_path / name)
        return tmp_path / name

    far = arrow.array([2**30], arrow.int32()).cast(arrow.date32())
    stamped = arrow.array([2**62], arrow.timestamp("us", tz="Nowhere/Land"))
    (found,) = read_records(file("a.parquet", text=["fine"], day=far, at=stamped, raw=arrow.array([b"\xff"])))
    assert found.segments == (("fine", True),)
    bytes_as_text = arrow.Array.from_buffers(arrow.string(), 1, arrow.array([b"SECRET\xff"]).buffers())
    with pytest.raises(DataError, match=r"^b\.parquet: row 1: a text in it is not UTF-8$"):
        read_records(file("b.parquet", text=bytes_as_text))
    with pytest.raises(DataError, match=r"^c\.parquet: row 2: holds NUL, which no text does$"):
        read_records(file("c.parquet", text=["fine", "SECRET\0"]))


def test_alpacas_instructions_are_prompts_with_answers(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "document": "a"},
        {"instruction": " Greet. ", "input": "", "output": "Hello.", "document": "b"},
    ]
    found = read_records(written(tmp_path, "a.json", json.dumps(rows).encode()))
    assert [record.segments for record in found] == [
        (("Add.\n\n1 and 2\n\n", False), ("3", True)),
        (("Greet.\n\n", False), ("Hello.", True)),
    ]
    assert [record.document for record in found] == ["a", "b"]
    whole = [{**row, "text": "### Instruction: filled in"} for row in rows]
    assert read_records(written(tmp_path, "w.jsonl", jsonl(*whole)))[0].segments == found[0].segments
    with pytest.raises(DataError, match=r"^s\.jsonl: line 1: field 'system' would be lost$"):
        read_records(written(tmp_path, "s.jsonl", jsonl({**rows[0], "system": "SECRET"})))
    named = read_records(tmp_path / "a.json", fields={"prompt": "instruction", "completion": "output"})
    assert named[0].segments == (("Add.", False), ("3", True))
    with pytest.raises(DataError, match=r"^b\.jsonl: line 1: field 'output' is empty$"):
        read_records(written(tmp_path, "b.jsonl", jsonl({"instruction": "SECRET", "output": " "})))


def test_sharegpts_conversations_are_messages(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("human", "hi"), ("gpt", "ho")]
    rows = [{"id": "x1", "conversations": [{"from": who, "value": text} for who, text in turns]}]
    (found,) = read_records(written(tmp_path, "a.jsonl", jsonl(*rows)))
    assert found.messages == (("system", "be brief"), ("user", "hi"), ("assistant", "ho"))
    for turn, problem in [
        ({"from": "SECRET", "value": "x"}, "turn 1 is nobody's that is known"),
        ({"from": "gpt"}, "turn 1 does not have the fields from and value"),
        ({"from": "gpt", "value": 3}, "text of turn 1 is a number, expected text"),
        ("SECRET", "turn 1 does not have the fields from and value"),
        ({"from": "gpt", "value": "SECRET", "weight": 0}, "turn 1 has weight 0, which would be lost"),
    ]:
        with pytest.raises(DataError, match=f"^b.jsonl: line 1: {problem}$"):
            read_records(written(tmp_path, "b.jsonl", jsonl({"conversations": [turn]})))
    with pytest.raises(DataError, match="is not a list of turns"):
        read_records(written(tmp_path, "c.jsonl", jsonl({"conversations": []})))
