"""Rows of the registry: what holds a round, and how a refusal is told again."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace

import pytest

from offsite.errors import ArtefactError, NormTooLarge, Replayed
from offsite.state.store import Store
from server.registry.rows import MIGRATIONS, Seen, check_unseen, refusal, short_id

MANIFEST = SimpleNamespace(job_id="0" * 32, round=2, sequence=5)
OURS, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.mark.parametrize("seen", [Seen(None, 4), Seen(None, 0), Seen(OURS, 5), Seen(OURS, 9)])
def test_what_is_new_or_the_same_passes(seen):
    check_unseen(MANIFEST, OURS, seen)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (Seen(OTHER, 4), "is taken by sha256:222"),
        (Seen(None, 5), "not newer than 5"),
        (Seen(None, 6), "not newer than 6"),
    ],
)
def test_what_was_passed_is_refused(seen, message):
    with pytest.raises(Replayed, match=message):
        check_unseen(MANIFEST, OURS, seen)


def test_a_refusal_is_told_by_the_class_it_had():
    assert type(refusal("NormTooLarge", "x")) is NormTooLarge
    for unknown in ("PolicyError", "OffsiteError", "annotations", "nothing", ""):
        assert type(refusal(unknown, "x")) is ArtefactError


def test_ids_are_the_beginning_of_the_digest():
    assert short_id(OURS) == "1" * 16


def test_rows_of_before_bundles_could_be_withdrawn_stay_as_they_are(tmp_path):
    """SQLite alters no CHECK: the table is written anew, and what referred to it refers to the new one."""
    place = {"path": tmp_path / "registry.db", "anchor": tmp_path / "head"}
    bundle = ", 'j', 'c', 1, 1, 'served', 5, 6, NULL, NULL, NULL, NULL, NULL)"
    with Store(migrations=MIGRATIONS[:4], **place) as store, store.transaction() as rows:
        rows.execute("INSERT INTO models VALUES ('m', 1)")
        rows.execute("INSERT INTO packages VALUES ('p', 'm', '/', 1)")
        rows.execute("INSERT INTO clients VALUES ('c', 'anna', 1)")
        rows.execute("INSERT INTO jobs VALUES ('j', 'p', 'c', 9, '{}')")
        rows.execute(f"INSERT INTO bundles VALUES ('z', 'dz'{bundle}")
        rows.execute(f"INSERT INTO bundles VALUES ('a', 'da'{bundle.replace(', 1, 1,', ', 2, 2,')}")
        for way in ("1", "0.5"):
            rows.execute("INSERT INTO ways VALUES ('z', 'served', ?, '')", (way,))
        rows.log("made")
    with Store(migrations=MIGRATIONS, **place) as store:
        assert [row["id"] for row in store.rows("SELECT id FROM bundles ORDER BY received, rowid")] == ["z", "a"]
        assert [row["way"] for row in store.rows("SELECT way FROM ways ORDER BY rowid")] == ["1", "0.5"]
        with store.transaction() as rows:
            rows.execute("UPDATE bundles SET state = 'withdrawn' WHERE id = 'z'")
            rows.log("withdrawn")
        for broken in (
            "DELETE FROM bundles WHERE id = 'z'",
            "UPDATE bundles SET state = 'gone' WHERE id = 'a'",
            f"INSERT INTO bundles VALUES ('b', 'db'{bundle}",
        ):
            with pytest.raises(sqlite3.IntegrityError), store.transaction() as rows:
                rows.execute(broken)
    with Store(migrations=MIGRATIONS, **place) as store:
        assert store.verify_log() >= 3
