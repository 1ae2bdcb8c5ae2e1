"""Scores that stay with the client: bound to their audit, giving its figures, in no order of the data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offsite.audits.keptscores import kept_scores, read_scores
from offsite.audits.membership import membership_of
from offsite.audits.record import BundleAudit
from offsite.errors import ArtefactError, BadSchema, ConfigError, RunFailed, WrongBinding

DIGEST, OTHER = ("sha256:" + letter * 64 for letter in "ab")
MEMBERS, OTHERS = 60, 50


@pytest.fixture
def attacks():
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=MEMBERS + OTHERS) for name in ("loss", "reference")}


@pytest.fixture
def audit(attacks):
    found = tuple(membership_of(name, by[:MEMBERS], by[MEMBERS:]) for name, by in attacks.items())
    return BundleAudit.model_construct(membership=found)


@pytest.fixture
def path(attacks, tmp_path):
    with kept_scores(tmp_path / "scores.json", attacks, MEMBERS, audit=DIGEST):
        pass
    return tmp_path / "scores.json"


def test_they_come_back_of_the_same_rows_and_in_another_order(path, attacks, audit):
    assert path.stat().st_mode & 0o077 == 0
    kept = read_scores(path, audit, DIGEST)
    loss, reference = kept.signals["loss"], kept.signals["reference"]
    for part, stated in (("members", slice(MEMBERS)), ("nonmembers", slice(MEMBERS, None))):
        pairs = list(zip(attacks["loss"][stated], attacks["reference"][stated], strict=True))
        found = list(zip(getattr(loss, part), getattr(reference, part), strict=True))
        assert found != pairs
        assert sorted(found) == sorted(pairs)
    assert str(loss.members[0]) not in repr(kept)


def test_nothing_stands_when_the_audit_could_not_be_written(attacks, tmp_path):
    with pytest.raises(RunFailed), kept_scores(tmp_path / "scores", attacks, MEMBERS, audit=DIGEST):
        raise RunFailed("full")
    assert list(tmp_path.iterdir()) == []


def test_where_no_row_was_scored_the_audit_is_kept_and_that_is_said(tmp_path, capsys):
    with kept_scores(tmp_path / "scores.json", {}, 0, audit=DIGEST):
        (tmp_path / "audit").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["audit"]
    assert "no row was scored: scores.json is not written" in capsys.readouterr().err


def swapped(stated):
    scores = stated["signals"]["loss"]
    scores["members"][:20], scores["nonmembers"][:20] = scores["nonmembers"][:20], scores["members"][:20]


TAMPERED = {
    "another audit": (lambda stated: stated.update(audit=OTHER), WrongBinding),
    "another format": (lambda stated: stated.update(format="offsite/scores/2"), WrongBinding),
    "an attack more": (lambda stated: stated["signals"].update({"min-k": stated["signals"]["loss"]}), BadSchema),
    "an attack less": (lambda stated: stated["signals"].pop("loss"), BadSchema),
    "a row less of one attack": (lambda stated: stated["signals"]["loss"]["members"].pop(), BadSchema),
    "rows of the other side": (swapped, ArtefactError),
    "text": (lambda stated: stated["signals"]["loss"]["members"].append("a row's text"), BadSchema),
    "another key": (lambda stated: stated.update(rows=["text"]), BadSchema),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_scores_that_are_not_the_audits_are_refused(change, path, audit):
    edit, error = TAMPERED[change]
    stated = json.loads(path.read_bytes())
    edit(stated)
    path.write_text(json.dumps(stated))
    with pytest.raises(error) as caught:
        read_scores(path, audit, DIGEST)
    assert type(caught.value) is error
    assert "a row's text" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path, audit):
    with pytest.raises(ConfigError, match="no file of scores named 'none'"):
        read_scores(tmp_path / "none", audit, DIGEST)
