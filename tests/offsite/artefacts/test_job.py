"""The job: what may be stated, and that it is read back as it was written."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from offsite.artefacts.job import JOB_LIMIT_BYTES, Policy, parse_job, read_job, write_job
from offsite.errors import ArtefactError, BadSchema, ConfigError, TooLarge, WrongBinding, WrongNames


def test_what_was_written_is_read(tmp_path, make_job):
    job = make_job(terms="No weights leave the owner.\nNo text leaves the client.", policy=Policy())
    digest = write_job(tmp_path / "job", job)
    opened = read_job(tmp_path / "job")
    assert (opened.job, opened.digest) == (job, digest)
    assert opened.raw == (tmp_path / "job" / "job.json").read_bytes()


def test_parties(make_job, parties):
    owner, client = parties
    job = make_job()
    assert job.other_party(owner.fingerprint) == client.fingerprint
    assert job.other_party(client.fingerprint) == owner.fingerprint
    assert job.other_party("x") is None


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 0},
        {"job_id": "A" * 32},
        {"owner": "aaaa"},
        {"expires": 0},
        {"terms": "\x1b[31m"},
        {"package_digest": "sha256:0"},
        {"policy": {"max_relative_frobenius": 0}},
        {"created": 2**41},
        {"extra": 1},
    ],
)
def test_terms_that_cannot_be_stated(make_job, change):
    stated = {**make_job().model_dump(mode="json"), **change}
    with pytest.raises(BadSchema, match=r"job\.json"):
        parse_job(json.dumps(stated).encode())


def test_one_key_is_not_two_parties(make_job, parties):
    with pytest.raises(ValidationError, match="same key"):
        make_job(client=parties[0].fingerprint)


def test_another_version_is_not_negotiated(make_job):
    stated = {**make_job().model_dump(mode="json"), "format": "offsite/job/2"}
    with pytest.raises(WrongBinding, match="offsite/job/2, expected offsite/job/1"):
        parse_job(json.dumps(stated).encode())


def test_what_is_no_job(tmp_path, make_job):
    for raw, error in ((b" " * (JOB_LIMIT_BYTES + 1), TooLarge), (b'{"a": 1, "a": 1}', BadSchema), (b"[]", BadSchema)):
        with pytest.raises(error):
            parse_job(raw)
    with pytest.raises(ArtefactError, match="no job folder named 'nowhere'"):
        read_job(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match=r"holds no job.json"):
        read_job(tmp_path)
    write_job(tmp_path / "job", make_job())
    with pytest.raises(ConfigError, match="already exists"):
        write_job(tmp_path / "job", make_job())
    (tmp_path / "job" / "more.txt").touch()
    with pytest.raises(WrongNames, match=r"holds 'more\.txt' besides"):
        read_job(tmp_path / "job")
