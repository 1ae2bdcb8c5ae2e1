"""`--data a.jsonl --data b.jsonl` read the last file alone, in silence; the first need not even exist.

Every file that is given is read, in the order given; one that is missing, or given twice, is refused before any work.
Documents of different files are different, whatever they are called. A single file is read, split and named as before.
"""

from __future__ import annotations

import hashlib
import json

import pytest

from client.audit.config import AuditBundleConfig
from client.tuning.config import TuneConfig
from offsite import cli
from offsite.audits.runs import read_run, run_path
from offsite.config import build
from offsite.digests import sha256_file, sha256_files
from offsite.errors import ConfigError, DataError
from offsite.text.records import read_files, read_records, split_by_document


def put(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def two(tmp_path):
    """Two files that share a document's name and a row."""
    return (
        put(tmp_path / "a.jsonl", *({"text": f"one {n}", "document": n % 4} for n in range(12))),
        put(tmp_path / "b.jsonl", *({"text": f"two {n}", "document": n % 4} for n in range(12))),
    )


def texts(records):
    return [record.segments[0][0] for record in records]


def test_every_file_is_read_in_order_and_rows_name_theirs(two):
    a, b = two
    assert texts(read_files([a, b])) == texts(read_records(a)) + texts(read_records(b))
    assert texts(read_files([b, a])) == texts(read_records(b)) + texts(read_records(a))
    assert [record.place for record in read_files([a, b])][11:13] == ["a.jsonl: line 12", "b.jsonl: line 1"]
    assert read_files([a]) == read_records(a)


def test_documents_of_different_files_are_different_but_rows_that_are_alike_stay_together(two, tmp_path):
    documents = [record.document for record in read_files(two)]
    assert len(set(documents[:12])) == len(set(documents[12:])) == 4
    assert not set(documents[:12]) & set(documents[12:])
    shared = [record.document for record in read_files(two, share_documents=True)]
    assert set(shared[:12]) == set(shared[12:]) == {"0", "1", "2", "3"}
    alike = [put(tmp_path / name, {"text": "same"}, {"text": name}) for name in ("c.jsonl", "d.jsonl")]
    found = read_files(alike)
    assert found[0].document == found[2].document != found[1].document
    train, held = split_by_document(found, fraction=0.5, seed=0)
    assert not {record.document for record in train} & {record.document for record in held}


def test_files_of_one_name_are_told_apart(tmp_path):
    one, two = put(tmp_path / "x" / "a.jsonl", {"text": "1"}), put(tmp_path / "y" / "a.jsonl", {"text": "2"})
    assert [record.place for record in read_files([one, two])] == ["x/a.jsonl: line 1", "y/a.jsonl: line 1"]
    two.write_text("{")
    with pytest.raises(DataError, match=r"^y/a\.jsonl: line 1: not valid JSON"):
        read_files([one, two])


def test_a_missing_file_and_one_given_twice_are_refused(two, tmp_path):
    a, b = two
    for missing in ([tmp_path / "c.jsonl", a], [a, tmp_path / "c.jsonl"]):
        with pytest.raises(DataError, match=r"^c\.jsonl: no such file$"):
            read_files(missing)
    (tmp_path / "link.jsonl").symlink_to(b)
    for twice in ([a, b, a], [b, tmp_path / "link.jsonl"]):
        with pytest.raises(ConfigError, match="given twice"):
            read_files(twice)


def test_one_digest_names_them_all_and_a_single_files_is_its_own(two):
    a, b = two
    both = hashlib.sha256(f"offsite/v1/files\0{sha256_file(a)}\n{sha256_file(b)}".encode()).hexdigest()
    assert sha256_files([a]) == sha256_file(a)
    assert sha256_files([a, b]) == f"sha256:{both}" != sha256_files([b, a])


@pytest.mark.parametrize(
    ("flags", "yaml"),
    [({"data": ["a", "b"]}, ""), ({"data": "a,b"}, ""), ({}, "data: [a, b]"), ({}, "data: a"), ({"data": "a"}, "")],
)
def test_the_setting_takes_one_or_several_however_it_is_given(tmp_path, flags, yaml):
    (tmp_path / "c.yaml").write_text(f"{yaml}\npackage: p\noutput: o\n")
    found = build(TuneConfig, file=tmp_path / "c.yaml", flags=flags).data
    assert [str(path) for path in found] == (["a", "b"] if "b" in f"{flags}{yaml}".replace("pack", "") else ["a"])
    (tmp_path / "d,e.txt").write_text("x")
    assert build(TuneConfig, overrides=[f"data={tmp_path}/d,e.txt", "package=p", "output=o"]).data == (
        tmp_path / "d,e.txt",
    )


def test_python_callers_may_give_one_path(two):
    a, _ = two
    given = {"package": a, "output": a}
    assert TuneConfig(data=a, **given).data == TuneConfig(data=[a], **given).data == (a,)
    assert AuditBundleConfig(data=a, bundle=a, **given).nonmembers == ()


@pytest.fixture
def ward(tmp_path, monkeypatch):
    """Two files of private text in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        put(tmp_path / f"{name}.jsonl", *({"text": f"case {name} {n} of a ward"} for n in range(20)))
    return tmp_path


def test_tune_reads_both_and_its_record_has_the_digest_of_each(ward, dropped_package, capsys):
    small = ["--steps", "2", "--block-tokens", "32", "--device", "cpu", "--precision", "fp32"]
    words = ["tune", str(dropped_package.path), *small]
    assert cli.run([*words, "--data", "a.jsonl", "--data", "b.jsonl", "-o", "both"]) == 0
    assert cli.run([*words, "--data", "b.jsonl", "-o", "one"]) == 0
    both, one = (read_run(run_path(ward / name)) for name in ("both", "one"))
    assert both.num_records > one.num_records
    assert both.data_files == (sha256_file(ward / "a.jsonl"), sha256_file(ward / "b.jsonl"))
    assert both.data_sha256 == sha256_files([ward / "a.jsonl", ward / "b.jsonl"])
    assert (one.data_files, one.data_sha256) == ((), sha256_file(ward / "b.jsonl"))
    assert "data_files" not in run_path(ward / "one").read_text()
    capsys.readouterr()
    for given in (["gone.jsonl", "a.jsonl"], ["a.jsonl", "gone.jsonl"]):
        assert cli.run(["tune", "no-package", "--data", given[0], "--data", given[1], "-o", "none"]) == 2
        assert "\noffsite: error: gone.jsonl: no such file\n" in f"\n{capsys.readouterr().err}"
    audit = ["audit", "bundle", str(dropped_package.path), "both", "-o", "audit"]
    for files, reason in (
        (["a.jsonl"], "--data: 1 file(s), this bundle was tuned on 2"),
        (["b.jsonl", "a.jsonl"], "b.jsonl: not the file that this bundle was tuned on"),
    ):
        assert cli.run([*audit, *(word for name in files for word in ("--data", name))]) == 3
        assert reason in capsys.readouterr().err
    assert not (ward / "audit").exists()
