"""``offsite invite``: what an owner writes and seals for a client, and what is refused before anything stands."""

from __future__ import annotations

import time

import pytest

from offsite.artefacts.job import read_job, write_job
from offsite.config import build
from offsite.errors import ConfigError, Expired, OffsiteError, Untrusted, WrongBinding
from offsite.exchange.verbs import open_run
from offsite.keys.trust import TrustStore
from offsite.sealed.config import OpenConfig
from offsite.sealed.invitation import read_invitation
from server.exchange.config import InviteConfig
from server.exchange.invite import run
from server.http.certificates import write_certificate


@pytest.fixture
def job(tmp_path, make_job):
    found = make_job()
    write_job(tmp_path / "job", found)
    return found


@pytest.fixture
def invite(tmp_path, parties, dropped_package, job):
    """Invite with these flags, as the owner."""
    owner, _ = parties

    def call(what="job", **flags):
        own = {"keys": str(owner.keys), "passphrase_file": str(owner.passphrase)}
        given = {"what": str(tmp_path / what), "output": str(tmp_path / "mail" / "invitation.offsite.json"), **own}
        return run(build(InviteConfig, flags={**given, **{name: str(value) for name, value in flags.items()}}))

    (tmp_path / "mail").mkdir()
    return call


def test_a_client_opens_what_is_sealed_beside_an_invitation(invite, tmp_path, parties, dropped_package, job, capsys):
    _, client = parties
    told = invite(package=dropped_package.path, title="a trial")
    found = read_invitation(tmp_path / "mail" / "invitation.offsite.json", now=int(time.time())).invitation
    assert (found.job_id, found.job_digest, found.client) == (
        job.job_id,
        read_job(tmp_path / "job").digest,
        client.fingerprint,
    )
    assert (found.title, found.url, found.expires) == ("a trial", None, job.expires)
    for kind in ("job", "package"):
        sealed = tmp_path / "mail" / told["sealed"][kind]
        keys = {"keys": client.keys, "passphrase_file": client.passphrase}
        open_run(OpenConfig(sealed=sealed, output=tmp_path / "opened" / kind, **keys))
    assert "the client runs: offsite join invitation.offsite.json --data FILE" in capsys.readouterr().err


def test_called_again_it_keeps_what_it_sealed(invite, tmp_path, dropped_package):
    first = invite(package=dropped_package.path)
    (tmp_path / "mail" / "invitation.offsite.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "mail").rglob("*.json")}
    assert invite(package=dropped_package.path)["sealed"] == first["sealed"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    other = tmp_path / "mail" / first["sealed"]["job"]
    (tmp_path / "mail" / "invitation.offsite.json").unlink()
    other.rename(tmp_path / "mail" / "aside")
    (tmp_path / "mail" / first["sealed"]["package"]).rename(other)
    with pytest.raises(WrongBinding, match="is in the way"):
        invite(package=dropped_package.path)


def test_an_exchange_and_the_certificate_to_trust(invite, tmp_path, dropped_package):
    write_certificate(tmp_path / "tls", ("owner.example",), days=1)
    place = tmp_path / "outbox"
    place.mkdir()
    certificate = tmp_path / "tls" / "certificate.pem"
    invite(url="https://owner.example:8443", certificate=certificate, outbox=place, package=dropped_package.path)
    found = read_invitation(tmp_path / "mail" / "invitation.offsite.json", now=int(time.time())).invitation
    assert (found.url, found.certificate) == ("https://owner.example:8443", certificate.read_text())
    assert len(list(place.iterdir())) == 2


def test_for_a_client_whose_card_is_not_here_yet(invite, tmp_path, dropped_package):
    told = invite(what=dropped_package.path, days=3)
    found = read_invitation(tmp_path / "mail" / "invitation.offsite.json", now=int(time.time())).invitation
    assert (found.job_id, found.package_digest, told["sealed"]) == (None, dropped_package.digest, {})
    assert found.expires - found.created == 3 * 86400


WRONG = {
    "a certificate alone": ({"certificate": "job"}, ConfigError, "there is no --url"),
    "an address with a path": ({"url": "https://owner.example/in"}, ConfigError, "address of your exchange"),
    "days of a job": ({"days": 3}, ConfigError, "counts as long as the job"),
    "no certificate": ({"url": "https://owner.example", "certificate": "job/job.json"}, ConfigError, "not one in PEM"),
    "no folder": ({"what": "none"}, OffsiteError, "none"),
    "sealed before there is a job": ({"what": "package", "package": "job"}, ConfigError, "before there is a job"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(invite, tmp_path, dropped_package, case, monkeypatch):
    flags, error, message = WRONG[case]
    (tmp_path / "package").symlink_to(dropped_package.path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        invite(**flags)
    assert list((tmp_path / "mail").iterdir()) == []


def test_jobs_that_nobody_is_invited_to(invite, tmp_path, parties, make_job, dropped_package):
    owner, client = parties
    now = int(time.time())
    for name, changes, error in (
        ("late", {"created": now - 100, "expires": now - 50}, Expired),
        ("foreign", {"owner": "-".join(["aaaa"] * 13)}, WrongBinding),
    ):
        write_job(tmp_path / name, make_job(**changes))
        with pytest.raises(error):
            invite(what=name)
    TrustStore(owner.keys).revoke(client.fingerprint)
    with pytest.raises(Untrusted):
        invite(package=dropped_package.path)
    assert list((tmp_path / "mail").iterdir()) == []
