"""The registry's verbs on the command line: what they show, and what they refuse."""

from __future__ import annotations

import json

import pytest

from offsite import cli


@pytest.fixture
def offsite(exchange, capsys):
    """Run a verb on the exchange's registry; return its exit code, its JSON object and what it said."""

    def run(*words):
        where = ["--registry", str(exchange.registry_folder), "--keys", str(exchange.keys)]
        code = cli.run([*words, *where])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err

    return run


def test_an_empty_registry_is_shown_as_one(offsite):
    code, found, _ = offsite("registry", "list")
    assert (code, found) == (0, {"bundles": [], "refused": []})
    code, found, err = offsite("log", "verify")
    assert (code, found["lines"]) == (0, 1)
    assert "1 line(s)" in err


def test_what_was_refused_on_arrival_is_listed(exchange, offsite, small_bundle, identities, tmp_path):
    stranger = identities["stranger"]
    sealed = exchange.seal(small_bundle.path, exchange.job(), tmp_path / "sealed", identity=stranger)
    verdict = exchange.take_in(sealed)
    code, found, err = offsite("registry", "list")
    assert code == 0
    assert [(one["digest"], one["check"]) for one in found["refused"]] == [(verdict.digest, "Untrusted")]
    assert f"refused on arrival: {verdict.id}, Untrusted: {stranger.public.fingerprint} is not pinned here" in err


def test_one_bundle_in_full(exchange, offsite, small_bundle, tmp_path):
    job = exchange.job()
    verdict = exchange.take_in(exchange.seal(small_bundle.path, job, tmp_path / "sealed"))
    code, found, err = offsite("registry", "show", verdict.id)
    assert (code, found["digest"], found["job_id"]) == (0, verdict.digest, job.job_id)
    assert found["figures"]["largest_module"] in err
    assert found["package_digest"] == exchange.package.digest


@pytest.mark.parametrize("verb", ["show", "accept", "refuse"])
def test_ids_that_name_nothing_are_usage_errors(verb, offsite):
    code, found, err = offsite("registry", verb, "0123456789abcdef")
    assert (code, found) == (2, None)
    assert err.splitlines()[0] == "offsite: error: no bundle 0123456789abcdef in registry 'registry'"
    code, _, err = offsite("registry", verb, "../../etc")
    assert code == 2
    assert "is no id of a bundle" in err


def test_the_latest_is_accepted_while_no_other_waits(exchange, offsite, small_bundle, tmp_path):
    jobs = [exchange.job(), exchange.job()]
    first, second = (
        exchange.take_in(exchange.seal(small_bundle.path, job, tmp_path / f"sealed{number}")).id
        for number, job in enumerate(jobs)
    )
    code, _, err = offsite("registry", "accept", "latest")
    assert code == 2
    assert "2 bundles wait: " in err
    assert offsite("registry", "accept", first[:6])[1]["state"] == "accepted"
    assert offsite("registry", "refuse", "latest")[1]["id"] == second
