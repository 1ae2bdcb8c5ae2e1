"""The job and its package: the invitation's, for these keys, in time; from a folder and over the exchange."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from client.exchange.http import ExchangeClient
from client.join.fetch import NotYet, fetch
from client.join.party import Joining
from offsite.artefacts.job import write_job
from offsite.errors import ArtefactError, Expired, WrongBinding
from offsite.keys.trust import TrustStore
from offsite.sealed.invitation import Invitation


@pytest.fixture
def known(players):
    """The client has keys, and the owner has pinned their card; return the client's fingerprint."""
    players.join(players.invitation(), name="Client", fingerprint=players.owner.public.fingerprint)
    return players.pin_client()


def sealed_job(players, client, **changes):
    """Return the job that was sealed into the mail, and what names it in an invitation."""
    folder = players.mail.parent / f"job-{len(list(players.mail.parent.iterdir()))}"
    job = players.job(client, folder, **changes)
    players.seal(folder, f"{folder.name}.sealed")
    from offsite.artefacts.job import read_job

    return folder, {"job_id": job.job_id, "job_digest": read_job(folder).digest, "client": client}


def test_a_job_that_is_not_there_is_said(players, known):
    named = {"job_id": "5" * 32, "job_digest": f"sha256:{'6' * 64}", "client": known}
    with pytest.raises(ArtefactError, match="no sealed job for this key lies beside the invitation"):
        players.join(players.invitation(**named))


def test_a_job_with_other_terms_than_those_invited_to_is_not_kept(players, known):
    _, named = sealed_job(players, known)
    wrong = {**named, "job_digest": f"sha256:{'6' * 64}"}
    with pytest.raises(WrongBinding, match="the invitation is to another, or to other terms"):
        players.join(players.invitation(**wrong))
    assert not (players.client / "joined" / "job").exists()


def test_a_job_past_its_date(players, known, monkeypatch):
    _, named = sealed_job(players, known)
    invitation = players.invitation(**named, expires=int(time.time()) + 10**7)
    monkeypatch.setattr("client.join.fetch.time", SimpleNamespace(time=lambda: time.time() + 2 * 86400))
    with pytest.raises(Expired):
        players.join(invitation)


def test_a_job_about_another_package(players, known):
    sealed_job(players, known, package_digest=f"sha256:{'7' * 64}")
    assert players.join(players.invitation())["state"] == "card", "it is passed over: it is not the one meant"
    _, named = sealed_job(players, known, package_digest=f"sha256:{'7' * 64}", job_id="6" * 32)
    with pytest.raises(WrongBinding, match="another package than the invitation"):
        players.join(players.invitation(**named))


def test_what_is_no_sealed_folder_is_passed_over(players, known, capsys):
    (players.mail / "odd").mkdir()
    (players.mail / "odd" / "manifest.json").write_text("{}")
    assert players.join(players.invitation())["state"] == "card"
    assert "'odd' beside the invitation is passed over" in capsys.readouterr().err


def test_over_the_exchange(live_exchange, make_job, tmp_path):
    """Both come from the exchange, once its owner has pinned the card; the newest job of the package is taken."""
    live, job = live_exchange, make_job()
    client, work = live.client, tmp_path / "work"
    for place in (work, tmp_path / "job"):
        place.mkdir()
    (tmp_path / "job").rmdir()
    write_job(tmp_path / "job", job)
    live.offer("job", job, source=tmp_path / "job", kind="job")
    live.offer("package", job)
    live.start()
    now = int(time.time())
    invitation = Invitation(card="", package_digest=job.package_digest, url=live.url, created=now, expires=now + 100)
    trust = TrustStore(client.keys)
    joining = Joining(client.identity, trust, client.keys, live.owner.fingerprint, False)
    with ExchangeClient(live.url, client.identity, joining.owner, patience_seconds=5) as exchange:
        found = fetch(invitation, joining, exchange, beside=tmp_path, work=work)
        assert (found.job.job, found.package.digest) == (job, job.package_digest)
    TrustStore(live.owner.keys).revoke(client.fingerprint)
    with ExchangeClient(live.url, client.identity, joining.owner, patience_seconds=5) as exchange:
        again = fetch(invitation, joining, exchange, beside=tmp_path, work=work)
        assert again.job.digest == found.job.digest, "what was opened is not asked for again"
        (tmp_path / "other").mkdir()
        with pytest.raises(NotYet, match="has not pinned this card"):
            fetch(invitation, joining, exchange, beside=tmp_path, work=tmp_path / "other")
