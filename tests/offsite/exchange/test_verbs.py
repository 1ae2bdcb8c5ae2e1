"""The verbs seal, open and rewrap, between two parties' folders, and everything they refuse."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from offsite import cli
from offsite.artefacts.job import write_job
from offsite.keys.trust import TrustStore
from offsite.sealed.ledger import Ledger


class Desk:
    """Runs verbs as one of the parties, and keeps what they printed."""

    def __init__(self, capsys, folder: Path):
        self.capsys, self.folder = capsys, folder

    def __call__(self, party, *words, code=0):
        found = cli.run([str(word) for word in (*words, *party.flags)])
        captured = self.capsys.readouterr()
        assert found == code, captured.err
        if code:
            lines = captured.err.splitlines()
            assert lines[0].startswith("offsite: error: ")
            assert len(lines) <= 2
            assert str(self.folder) not in captured.err
            return lines[0]
        return json.loads(captured.out)


@pytest.fixture
def desk(capsys, tmp_path):
    return Desk(capsys, tmp_path)


@pytest.fixture
def job(tmp_path, make_job):
    job = make_job()
    write_job(tmp_path / "job", job)
    return job


@pytest.fixture
def opened(tmp_path, desk, parties, job, dropped_package):
    """The owner's job and package, sealed by the owner and opened by the client."""
    owner, client = parties
    desk(owner, "seal", tmp_path / "job", "-o", tmp_path / "job.sealed")
    desk(owner, "seal", dropped_package.path, "--job", tmp_path / "job", "-o", tmp_path / "package.sealed")
    desk(client, "open", tmp_path / "job.sealed", "-o", tmp_path / "client-job")
    desk(client, "open", tmp_path / "package.sealed", "-o", tmp_path / "client-package")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_there_and_back(opened, desk, parties, job, dropped_package, tiny_bundle):
    owner, client = parties
    assert content(opened / "client-job") == content(opened / "job")
    assert content(opened / "client-package") == content(dropped_package.path)
    assert (opened / "client-package").stat().st_mode & 0o077 == 0
    words = ("--job", opened / "client-job", "--accept-leakage", "-o", opened / "bundle.sealed")
    told = desk(client, "seal", tiny_bundle.path, *words)
    assert (told["kind"], told["round"], told["sequence"], told["digest"]) == ("bundle", 1, 1, tiny_bundle.digest)
    found = desk(owner, "open", opened / "bundle.sealed", "-o", opened / "owner-bundle")
    assert found["sealed_digest"] == told["sealed_digest"]
    assert (found["admission"], found["verified"], found["job_id"]) == ("new", True, job.job_id)
    assert content(opened / "owner-bundle") == content(tiny_bundle.path)
    assert not [path for path in opened.iterdir() if path.name.startswith(".")]


def test_reports_go_both_ways(opened, desk, parties):
    owner, client = parties
    for sender, receiver, name in ((owner, client, "down"), (client, owner, "up")):
        (opened / name).mkdir()
        (opened / name / "report.json").write_text('{"figure": 1}')
        words = ("--job", opened / "job", "--round", 2, "-o", opened / f"{name}.sealed")
        assert desk(sender, "seal", opened / name, *words)["round"] == 2
        desk(receiver, "open", opened / f"{name}.sealed", "-o", opened / f"{name}.open")
        assert content(opened / f"{name}.open") == content(opened / name)


def test_opening_again_is_no_error_and_says_so(opened, desk, parties):
    again = desk(parties[1], "open", opened / "package.sealed", "-o", opened / "again")
    assert again["admission"] == "again"


def test_an_older_package_is_refused_after_a_newer_one(opened, desk, parties, dropped_package):
    owner, client = parties
    for name in ("second", "third"):
        desk(owner, "seal", dropped_package.path, "--job", opened / "job", "-o", opened / name)
    desk(client, "open", opened / "third", "-o", opened / "out-third")
    error = desk(client, "open", opened / "second", "-o", opened / "out-second", code=3)
    assert "number 2 of its issuer's, number 3 came before it" in error
    assert not (opened / "out-second").exists()


def test_the_job_comes_first(tmp_path, desk, parties, job, dropped_package):
    owner, client = parties
    error = desk(owner, "seal", dropped_package.path, "--job", tmp_path / "job", "-o", tmp_path / "out", code=3)
    assert "is not known here" in error
    desk(owner, "seal", tmp_path / "job", "-o", tmp_path / "job.sealed")
    desk(owner, "seal", dropped_package.path, "--job", tmp_path / "job", "-o", tmp_path / "package.sealed")
    error = desk(client, "open", tmp_path / "package.sealed", "-o", tmp_path / "out", code=3)
    assert "is not known here" in error
    assert not (tmp_path / "out").exists()


REFUSALS = [
    ("client", "seal job -o out", 3, "may not seal a job"),
    ("client", "seal {package} --job job -o out", 3, "may not seal a package"),
    ("owner", "seal {bundle} --job job -o out", 3, "may not seal a bundle"),
    ("client", "seal {bundle} -o out", 2, "--job is missing"),
    ("client", "seal {bundle} --job job --round 3 -o out", 2, "rounds 1 to 2, found 3"),
    ("owner", "seal {package} --job job --round 1 -o out", 2, "rounds 0 to 0, found 1"),
    ("client", "seal {bundle} --job nowhere -o out", 3, "no job folder named 'nowhere'"),
    ("client", "seal {bundle} --job job -o job", 2, "output 'job' already exists"),
    ("client", "seal nowhere --job job -o out", 3, "no folder named 'nowhere'"),
    ("client", "seal odd --job job -o out", 3, "no job, package, round, bundle or report"),
    ("client", "seal page --job job -o out", 3, "no job, package, round, bundle or report"),
    ("client", "seal broken --job job -o out", 3, "is not JSON with distinct keys"),
    ("client", "seal results --job job -o out", 3, "results.json of 'results' is not offsite/results/1"),
    ("owner", "seal {narrow} --job job -o out", 3, "the job is about"),
    ("client", "seal {bundle} --job edited --accept-leakage -o out", 3, "is known here with other terms"),
    ("client", "seal {other} --job job -o out", 3, "another adapter than the job asks for"),
    ("owner", "seal job --job edited -o out", 2, "--job names another job"),
    ("client", "open nowhere -o out", 3, "no sealed folder named 'nowhere'"),
    ("client", "open job -o out", 3, "'job' is a job, not sealed"),
    ("owner", "open package.sealed -o out", 3, "this package is sealed for another key, {client_key}, not for"),
    ("client", "open {package} -o out", 3, "is a package, not sealed"),
    ("client", "open {bundle} -o out", 3, "is a bundle, not sealed"),
    ("client", "seal package.sealed --job job -o out", 3, "'package.sealed' is a sealed package already"),
    ("client", "seal {keys} --job job -o out", 3, "it is a keys folder"),
    ("client", "seal {package} --job job.sealed -o out", 3, "'job.sealed' holds no job.json: it is a sealed job"),
    ("client", "open package.sealed -o job", 2, "output 'job' already exists"),
]


def test_refusals(opened, desk, parties, job, dropped_package, narrow_package, tiny_bundle, tamper, monkeypatch):
    monkeypatch.chdir(opened)
    for name, file, text in (
        ("odd", "notes.txt", "x"),
        ("page", "report.html", "<p>"),
        ("broken", "report.json", '{"a": 1, "a": 2}'),
        ("results", "results.json", "{}"),
    ):
        (opened / name).mkdir()
        (opened / name / file).write_text(text)
    write_job(opened / "edited", job.model_copy(update={"rounds": 1}))
    names = {"package": dropped_package.path, "bundle": tiny_bundle.path, "narrow": narrow_package.path}
    names |= {"keys": parties[1].keys, "client_key": parties[1].fingerprint[:9]}
    names["other"] = tamper(tiny_bundle.path, edit=lambda stated: stated["adapter"].update(alpha=4.0))
    before = sorted(path.name for path in opened.iterdir())
    for who, words, code, message in REFUSALS:
        party = parties[("owner", "client").index(who)]
        error = desk(party, *words.format(**names).split(), code=code)
        assert message.format(**names) in error, words
        assert sorted(path.name for path in opened.iterdir()) == before, words


def test_an_untrusted_recipient_is_not_sealed_for(opened, desk, parties, tiny_bundle):
    owner, client = parties
    TrustStore(client.keys).revoke(owner.fingerprint)
    words = ("seal", tiny_bundle.path, "--job", opened / "client-job", "--accept-leakage", "-o", opened / "out")
    assert "is revoked" in desk(client, *words, code=3)


def test_an_expired_job_is_not_sealed_for(tmp_path, desk, parties, make_job):
    past = int(time.time()) - 10
    write_job(tmp_path / "job", make_job(created=past - 10, expires=past))
    error = desk(parties[0], "seal", tmp_path / "job", "-o", tmp_path / "out", code=3)
    assert "expired on" in error


def test_rewrapping_touches_only_the_wrapped_keys(opened, desk, parties, make_party, dropped_package):
    owner, client = parties
    new = make_party("client-new")
    TrustStore(new.keys).add(owner.identity.public.card, owner.fingerprint)
    for name in ("job", "package"):
        words = ("--to", new.keys, "--to-passphrase-file", new.passphrase, "-o", opened / f"{name}.moved")
        told = desk(client, "rewrap", opened / f"{name}.sealed", *words)
        before, after = content(opened / f"{name}.sealed"), content(opened / f"{name}.moved")
        assert {key for key in before if before[key] != after[key]} == {"keys.json"}
        assert before.keys() == after.keys()
        found = desk(new, "open", opened / f"{name}.moved", "-o", opened / f"{name}.new")
        assert found["sealed_digest"] == told["sealed_digest"]
    assert content(opened / "package.new") == content(dropped_package.path)
    error = desk(client, "open", opened / "package.moved", "-o", opened / "out", code=3)
    assert "sealed for another key" in error
    newest = make_party("stranger")
    TrustStore(newest.keys).add(owner.identity.public.card, owner.fingerprint)
    words = ("--to", newest.keys, "--to-passphrase-file", newest.passphrase, "-o", opened / "out")
    assert "does not name key" in desk(new, "rewrap", opened / "package.moved", *words, code=3)
    shutil.rmtree(opened / "package.sealed" / "payload")
    (opened / "package.sealed" / "payload").mkdir()
    assert "missing" in desk(client, "rewrap", opened / "package.sealed", *words, code=3)
    assert not (opened / "out").exists()


def test_a_refused_opening_leaves_the_ledger_as_it_was(opened, desk, parties):
    client = parties[1]
    with Ledger(client.keys) as ledger:
        before = ledger._store.head
    payload = sorted((opened / "package.sealed" / "payload").iterdir())[-1]
    payload.write_bytes(payload.read_bytes()[:-1] + b"\0")
    shutil.copytree(opened / "package.sealed", opened / "copy")
    desk(client, "open", opened / "copy", "-o", opened / "out", code=3)
    with Ledger(client.keys) as ledger:
        assert ledger._store.head == before


def test_a_break_between_ledger_and_publishing_is_mended_by_opening_again(
    opened, desk, parties, dropped_package, monkeypatch
):
    owner, client = parties
    desk(owner, "seal", dropped_package.path, "--job", opened / "job", "-o", opened / "second")
    rename = Path.rename

    def broken(self, target):
        if Path(target).name == "out":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        error = desk(client, "open", opened / "second", "-o", opened / "out", code=5)
    assert "cannot write 'out': input/output error" in error
    assert not (opened / "out").exists()
    assert desk(client, "open", opened / "second", "-o", opened / "out")["admission"] == "again"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        desk(owner, "seal", dropped_package.path, "--job", opened / "job", "-o", opened / "out", code=2)
        shutil.rmtree(opened / "out")
        desk(owner, "seal", dropped_package.path, "--job", opened / "job", "-o", opened / "out", code=5)
    told = desk(owner, "seal", dropped_package.path, "--job", opened / "job", "-o", opened / "fourth")
    assert told["sequence"] == 4  # the third was signed and never published; nothing else bears its number
    assert desk(client, "open", opened / "fourth", "-o", opened / "out-fourth")["admission"] == "new"


# --- the round of a federation


@pytest.fixture
def make_round(opened, job):
    """Write a plain round of the job."""
    from offsite.artefacts.round import ROUND_FORMAT, RoundManifest, write_round

    def make(name="round-1", number=1, **changes):
        stated = {
            "format": ROUND_FORMAT,
            "federation_id": "5" * 32,
            "round": number,
            "num_rounds": 2,
            "package_digest": job.package_digest,
            "base_digest": job.base_digest,
            "adapter": job.adapter,
            "steps": 4 + number,
        }
        return write_round(opened / name, RoundManifest(**{**stated, **changes}))

    return make


def test_a_round_goes_from_owner_to_client(opened, desk, parties, make_round):
    owner, client = parties
    rounds = [make_round(f"round-{number}", number) for number in (1, 2)]
    for number, plain in enumerate(rounds, start=1):
        sealed = opened / f"round-{number}.sealed"
        told = desk(owner, "seal", plain.path, "--job", opened / "job", "-o", sealed)
        assert (told["kind"], told["round"], told["sequence"], told["digest"]) == (
            "round",
            number,
            number,
            plain.digest,
        )
        found = desk(client, "open", sealed, "-o", opened / f"found-{number}")
        assert (found["kind"], found["round"], found["admission"]) == ("round", number, "new")
        assert content(opened / f"found-{number}") == content(plain.path)
        shown = cli.run(["inspect", str(opened / f"found-{number}")])
        captured = desk.capsys.readouterr()
        assert shown == 0
        assert json.loads(captured.out)["digest"] == plain.digest
        assert f"{number} of 2: train" in captured.err


ROUND_REFUSALS = [
    ("client", {}, [], 3, "may not seal a round"),
    ("owner", {}, ["--round", "0"], 2, "--round"),
    ("owner", {}, ["--round", "2"], 2, "--round 2: this is round 1"),
    ("owner", {"number": 3, "num_rounds": 3}, [], 2, "has rounds 1 to 2, found 3"),
    ("owner", {"package_digest": "sha256:" + "0" * 64}, [], 3, "package_digest"),
    ("owner", {"base_digest": "sha256:" + "0" * 64}, [], 3, "base_digest"),
    ("owner", {}, ["--accept-leakage"], 2, "not for a round"),
]


@pytest.mark.parametrize(("who", "changes", "words", "code", "message"), ROUND_REFUSALS)
def test_a_round_that_is_not_to_be_sealed(opened, desk, parties, make_round, who, changes, words, code, message):
    plain, party = make_round(**changes), dict(zip(("owner", "client"), parties, strict=True))[who]
    place = opened / ("job" if who == "owner" else "client-job")
    error = desk(party, "seal", plain.path, "--job", place, "-o", opened / "out", *words, code=code)
    assert message in error
    assert not (opened / "out").exists()


def test_an_older_round_is_refused_after_a_newer_one(opened, desk, parties, make_round):
    owner, client = parties
    for number in (1, 2):
        desk(owner, "seal", make_round(f"r{number}", number).path, "--job", opened / "job", "-o", opened / f"s{number}")
    desk(client, "open", opened / "s2", "-o", opened / "out-2")
    error = desk(client, "open", opened / "s1", "-o", opened / "out-1", code=3)
    assert "number 1 of its issuer's, number 2 came before it" in error
    assert not (opened / "out-1").exists()


def test_the_seal_s_round_is_the_round_s_own(opened, desk, parties, make_round, monkeypatch):
    """An owner whose program seals round 2 as round 1 gets nothing opened."""
    owner, client = parties
    with monkeypatch.context() as patch:
        patch.setattr("offsite.exchange.verbs._round", lambda *_: 1)
        desk(owner, "seal", make_round(number=2).path, "--job", opened / "job", "-o", opened / "sealed")
    error = desk(client, "open", opened / "sealed", "-o", opened / "out", code=3)
    assert "sealed as round 1, what came out is round 2" in error
    assert not (opened / "out").exists()
