"""Settings of the owner's verbs: where they find things by default, and problems told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from offsite.config import build
from offsite.errors import ConfigError
from server.registry.config import IntakeConfig, JobCreateConfig, LogVerifyConfig, RegistryShowConfig

JOB = {"package": "p", "client": "f", "registry": "r", "output": "o"}


def test_keys_are_below_home_unless_named(monkeypatch):
    monkeypatch.setenv("HOME", "/home/owner")
    assert build(LogVerifyConfig, flags={"registry": "r"}).keys == Path("/home/owner/.offsite/keys")
    assert build(IntakeConfig, flags={"sealed": "s", "registry": "r", "keys": "k"}).keys == Path("k")
    assert build(RegistryShowConfig, flags={"id": "x", "registry": "r"}).id == "x"


def test_a_job_asks_by_default_for_what_tune_does_by_default():
    from client.tuning.config import TuneConfig

    assert (
        build(JobCreateConfig, flags=JOB).spec()
        == build(TuneConfig, flags={"package": "p", "data": "d", "output": "o"}).spec()
    )


def test_every_problem_of_a_job_is_told_at_once():
    flags = {**JOB, "rounds": "0", "days": "4000", "max_relative_frobenius": "0", "terms": "\x07"}
    with pytest.raises(ConfigError) as caught:
        build(JobCreateConfig, flags=flags)
    for flag in ("--rounds", "--days", "--max-relative-frobenius", "--terms"):
        assert flag in str(caught.value)
    assert "\x07" not in str(caught.value)
