"""A job's end was a number of seconds since 1970, in a file that a person had to open: nobody knew when it was over.

What a party has of a job, sealed folders, a registry and its entries, is told with dates as people read them.
"""

from __future__ import annotations

import re
import time

import pytest
from two_parties import TwoParties

from offsite.artefacts.job import read_job

SECONDS = re.compile(r"(?<![0-9a-f-])[12]\d{9}(?![0-9a-f-])")


def date(seconds: int) -> str:
    """The oracle: the same moment, taken apart by the standard library."""
    at = time.gmtime(seconds)
    return f"{at.tm_year:04d}-{at.tm_mon:02d}-{at.tm_mday:02d} {at.tm_hour:02d}:{at.tm_min:02d} UTC"


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    return TwoParties(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("party", "thing"),
    [("client", "job"), ("client", "job.sealed"), ("owner", "bundle.sealed"), ("owner", "registry")],
)
def test_the_end_of_a_job_is_a_date(parties, party, thing):
    expires = read_job(parties.client / "job").job.expires
    parties.run(party, f"inspect {thing} --keys keys")
    assert date(expires) in parties.told
    assert not SECONDS.search(parties.told)


def test_an_entry_of_the_registry_has_dates(parties):
    shown = parties.run("owner", f"registry show {parties.figures['id']} --registry registry --keys keys")
    for name in ("received", "changed"):
        assert re.search(rf"^{name} +{date(shown[name])}$", parties.told, re.MULTILINE)
    assert not SECONDS.search(parties.told)
