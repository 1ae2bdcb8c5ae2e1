"""Somebody tuned for hours under a job that had ended; only sealing the bundle said so, in millions of seconds."""

from __future__ import annotations

import re
import time

import pytest
from two_parties import TwoParties

from client.tuning import ready as module
from offsite.errors import Expired

DAY = 86_400


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    return TwoParties(tmp_path, monkeypatch, capsys)


def job_of(parties):
    from offsite.artefacts.job import read_job

    return read_job(parties.client / "job").job


def test_tune_refuses_it_before_it_reads_anything(parties, monkeypatch):
    ends = job_of(parties).expires
    monkeypatch.setattr(module.time, "time", lambda: ends + 30 * DAY)
    monkeypatch.setattr(module, "read_as", lambda *_: pytest.fail("the data was read"))
    parties.run("client", "tune package --job job --data private.jsonl -o late", code=3)
    assert time.strftime("expired on %Y-%m-%d %H:%M UTC", time.gmtime(ends)) in parties.told
    assert "seconds" not in parties.told
    assert not (parties.client / "late.work").exists()


@pytest.mark.parametrize(("days_left", "is_said"), [(2.9, True), (3.1, False)])
def test_an_end_that_is_near_is_said(parties, capsys, days_left, is_said):
    job = job_of(parties)
    module.require_in_time(job, now=job.expires - days_left * DAY)
    assert ("ends on" in capsys.readouterr().err) is is_said


def test_the_very_last_second_still_counts(parties):
    job = job_of(parties)
    module.require_in_time(job, now=job.expires)
    with pytest.raises(Expired):
        module.require_in_time(job, now=job.expires + 1)


def test_seal_and_open_say_dates_too(parties, monkeypatch):
    ends = job_of(parties).expires
    monkeypatch.setattr("time.time", lambda: ends + 400)
    for words in ("seal bundle --job job --accept-leakage --keys keys -o late", "open job.sealed --keys keys -o late"):
        parties.run("client", words, code=3)
        assert re.search(r"expired|not valid", parties.told), parties.told
        assert not re.search(r"\d{3,} seconds", parties.told)
        assert not (parties.client / "late").exists()
