"""Attempts on a sealed folder on its way: each is refused with its class, leaves no file and no trace in the ledger.

One trace is wanted: what its issuer signed and is refused for what it says counts as seen.

Rows are those of the attack table in ``docs/security.md``. Where an attack needs a signature, its own issuer makes it:
what is refused then is refused although both signatures are good.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from cryptography.cobblestone import Cobblestone256Encryptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offsite.artefacts.job import JOB_NAME, parse_job
from offsite.errors import (
    ArtefactError,
    BadDigest,
    BadEncryption,
    BadSchema,
    BadSignature,
    Expired,
    Replayed,
    RunFailed,
    TooLarge,
    Untrusted,
    WrongBinding,
    WrongNames,
    WrongRecipient,
)
from offsite.exchange import verbs as sealing
from offsite.exchange.verbs import open_sealed
from offsite.keys.trust import TrustStore
from offsite.sealed import encryption as seal
from offsite.sealed.config import SealConfig
from offsite.sealed.encryption import seal_files
from offsite.sealed.folder import read_sealed
from offsite.sealed.ledger import Ledger
from offsite.sealed.manifest import (
    SIGN_PURPOSE,
    SealedManifest,
    payload_context,
    sealed_digest,
    sealed_size,
    write_signatures,
)
from offsite.sealed.recipients import read_keys, unwrap_keys, wrap_keys, write_keys


class Arena:
    """A job both sides know, and what one sealed for the other. `attempt` opens as the receiver."""

    def __init__(self, folder, parties, job, bundle, package):
        self.folder, self.job, self.bundle, self.package = folder, job, bundle, package
        self.owner, self.client = parties
        self.now = int(time.time())
        self.trust = {party: TrustStore(party.keys) for party in parties}
        self.ledger = {party: Ledger(party.keys) for party in parties}
        raw = job.model_dump_json().encode()
        (folder / JOB_NAME).write_bytes(raw)
        for ledger in self.ledger.values():
            ledger.remember(parse_job(raw))

    def close(self):
        for ledger in self.ledger.values():
            ledger.close()

    def seal(self, name="sealed", *, sender=None, job=None, files=None, **changes):
        """Seal the tiny bundle for the owner, unless told otherwise, and return the folder."""
        sender, job = sender or self.client, job or self.job
        receiver = self.owner if sender == self.client else self.client
        listed = {path.name: path for path in self.bundle.path.iterdir()} if files is None else files
        fields = {
            "kind": "bundle",
            "job_id": job.job_id,
            "created": self.now,
            "expires": job.expires,
            "sequence": 1,
            "round": 1,
            "previous": None,
            "base_digest": job.base_digest,
            "package_digest": job.package_digest,
            "identity": sender.identity,
            "recipients": [receiver.identity.public],
        }
        seal_files(listed, self.folder / name, **{**fields, **changes})
        return self.folder / name

    def report(self, content: bytes, name="sealed", **changes):
        (self.folder / "report.json").write_bytes(content)
        files = {"report.json": self.folder / "report.json"}
        return self.seal(name, files=files, **{"kind": "report", "round": 0, **changes})

    def attempt(self, sealed, *, receiver=None, now=None):
        receiver = receiver or self.owner
        return open_sealed(
            sealed,
            self.folder / "out",
            identity=receiver.identity,
            trust=self.trust[receiver],
            ledger=self.ledger[receiver],
            now=self.now if now is None else now,
        )

    def refused(self, sealed, error, *, match=None, receiver=None, now=None, signed=False):
        """The attempt fails with that very class, leaves no file and no trace.

        Args:
            signed: its issuer signed what it is refused for; then it is remembered as seen, and nothing more.
        """
        receiver = receiver or self.owner
        head, before = self.ledger[receiver]._store.head, set(self.folder.iterdir())
        with pytest.raises(ArtefactError, match=match) as caught:
            self.attempt(sealed, receiver=receiver, now=now)
        kinds = error if isinstance(error, tuple) else (error,)
        assert type(caught.value) in kinds, f"{type(caught.value).__name__}: {caught.value}"
        assert set(self.folder.iterdir()) == before
        if signed:
            last = list(self.ledger[receiver]._store.lines())[-1]
            assert (last["number"], last["event"]) == (head.number + 1, "refused")
        else:
            assert self.ledger[receiver]._store.head == head
        message = str(caught.value)
        assert "\n" not in message
        assert str(self.folder) not in message

    def resign(self, sealed, edit, *, keys=None, signer=None, receiver=None):
        """Let the issuer change the manifest, sign it, and wrap the data keys for it."""
        signer, receiver = (signer or self.client).identity, (receiver or self.owner).identity
        raw = read_sealed(sealed)
        stated = json.loads(raw.manifest_raw)
        old = SealedManifest.model_validate_json(raw.manifest_raw)
        keys = keys or unwrap_keys(read_keys(raw.keys_raw), old, raw.digest, receiver)
        changed = edit(stated)
        manifest = changed if isinstance(changed, bytes) else json.dumps(stated).encode()
        (sealed / "manifest.json").write_bytes(manifest)
        fingerprint = signer.public.fingerprint
        (sealed / "signatures.json").write_bytes(write_signatures(fingerprint, signer.sign(SIGN_PURPOSE, manifest)))
        wrap = wrap_keys(keys, sealed_digest(manifest), receiver.public)
        (sealed / "keys.json").write_bytes(write_keys([wrap]))

    def rebind(self, sealed, index, content, *, num_bytes):
        """Let the issuer put other encrypted bytes in place of file `index` and sign for them."""
        digest = sealed_digest(content)

        def edit(stated):
            file = stated["files"][index]
            (sealed / "payload" / f"{file['sealed_sha256'][7:]}.enc").unlink()
            file.update(sealed_sha256=digest, sealed_bytes=len(content), bytes=num_bytes)

        self.resign(sealed, edit)
        (sealed / "payload" / f"{digest[7:]}.enc").write_bytes(content)


@pytest.fixture
def arena(tmp_path, parties, make_job, tiny_bundle, dropped_package):
    (tmp_path / "arena").mkdir()
    found = Arena(tmp_path / "arena", parties, make_job(), tiny_bundle, dropped_package)
    yield found
    found.close()


def payloads(sealed: Path) -> list[Path]:
    """The encrypted files in the order of the manifest."""
    stated = json.loads((sealed / "manifest.json").read_bytes())
    return [sealed / "payload" / f"{file['sealed_sha256'][7:]}.enc" for file in stated["files"]]


REPORT = json.dumps({"figure": "x" * 40_000}).encode()
CHUNK = 16 * 1024 + 16


def test_what_is_not_attacked_opens(arena):
    opened = arena.attempt(arena.seal())
    assert opened.admission == "new"
    found = {path.name: path.read_bytes() for path in (arena.folder / "out").iterdir()}
    assert found == {path.name: path.read_bytes() for path in arena.bundle.path.iterdir()}


# Row 1: every byte


class Pinned:
    """The client's keys, read once: thousands of attempts need not read ``trust.json`` each time."""

    def __init__(self, keys):
        self.keys = keys

    def require(self, fingerprint, *, now):
        if fingerprint != self.keys.fingerprint:
            raise Untrusted("another key")
        return self.keys


def test_row_01_every_byte_of_every_file_flipped(arena):
    sealed, flipped = arena.seal(), 0
    arena.trust[arena.owner] = Pinned(arena.client.identity.public)
    for path in sorted(found for found in sealed.rglob("*") if found.is_file()):
        content = path.read_bytes()
        with path.open("r+b", buffering=0) as handle:
            for position, byte in enumerate(content):
                os.pwrite(handle.fileno(), bytes([byte ^ 1 << position % 8]), position)
                with pytest.raises(ArtefactError):
                    arena.attempt(sealed)
                os.pwrite(handle.fileno(), bytes([byte]), position)
                flipped += 1
        assert path.read_bytes() == content
        assert not [found for found in arena.folder.iterdir() if found.name.startswith((".", "out"))]
    assert flipped == sum(path.stat().st_size for path in sealed.rglob("*") if path.is_file()) > 10_000
    assert arena.ledger[arena.owner]._store.rows("SELECT * FROM received") == []
    assert arena.attempt(sealed).admission == "new"


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_row_01_any_edit_of_any_file(arena, data):
    sealed = arena.folder / "sealed"
    if not sealed.exists():
        arena.seal()
    path = data.draw(st.sampled_from(sorted(found for found in sealed.rglob("*") if found.is_file())))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    broken = content[:start] + data.draw(st.binary(max_size=40)) + content[end:]
    try:
        if broken != content:
            path.write_bytes(broken)
            arena.refused(sealed, tuple(ArtefactError.__subclasses__()))
    finally:
        path.write_bytes(content)


# Rows 2 to 4: cut, lengthened, swapped


@pytest.mark.parametrize("size", [0, 1, 55, 56, 57, 56 + CHUNK - 1, 56 + CHUNK, 56 + CHUNK + 1, 56 + 2 * CHUNK])
def test_row_02_truncated(arena, size):
    sealed = arena.report(REPORT)
    (path,) = payloads(sealed)
    content = path.read_bytes()
    path.write_bytes(content[:size])
    arena.refused(sealed, BadDigest, match=f"has {size} bytes, the manifest says {len(content)}")


@pytest.mark.parametrize("num_bytes", [0, 100, 16 * 1024 - 1, 16 * 1024, 32 * 1024])
def test_row_02_truncated_and_signed_for(arena, num_bytes):
    sealed = arena.report(REPORT)
    (path,) = payloads(sealed)
    arena.rebind(sealed, 0, path.read_bytes()[: sealed_size(num_bytes)], num_bytes=num_bytes)
    arena.refused(sealed, BadEncryption)


def test_row_02_truncated_to_a_length_that_no_content_has(arena):
    sealed = arena.report(REPORT)
    (path,) = payloads(sealed)
    arena.rebind(sealed, 0, path.read_bytes()[: 56 + CHUNK], num_bytes=16 * 1024)
    arena.refused(sealed, BadSchema, match="sealed_bytes")


def test_row_03_appended(arena):
    sealed = arena.report(REPORT)
    (path,) = payloads(sealed)
    content = path.read_bytes()
    for more in (b"\0", content[56 : 56 + CHUNK]):
        path.write_bytes(content + more)
        arena.refused(sealed, BadDigest)
    path.write_bytes(content)
    longer = content[: 56 + CHUNK] + content[56:]
    arena.rebind(sealed, 0, longer, num_bytes=len(REPORT) + 16 * 1024)
    arena.refused(sealed, BadEncryption)


@pytest.mark.parametrize("where", ["extra.json", "payload/extra.enc", f"payload/{'0' * 64}.enc", "payload/x.pkl", ".x"])
def test_row_03_a_file_too_many(arena, where):
    sealed = arena.seal()
    (sealed / where).write_bytes(b"x")
    arena.refused(sealed, WrongNames)


@pytest.mark.parametrize("where", ["manifest.json", "signatures.json", "keys.json", "payload"])
def test_row_02_a_file_too_few(arena, where):
    sealed = arena.seal()
    shutil.rmtree(sealed / where) if where == "payload" else (sealed / where).unlink()
    arena.refused(sealed, WrongNames, match="is missing")
    shutil.rmtree(sealed)
    sealed = arena.seal()
    payloads(sealed)[0].unlink()
    arena.refused(sealed, WrongNames, match="1 missing, 0 foreign")


def two_reports(arena, name="sealed", **changes):
    for file, content in (("report.json", b'{"figure": 1}'), ("results.json", b'{"figure": 2}')):
        (arena.folder / file).write_bytes(content)
    files = {file: arena.folder / file for file in ("report.json", "results.json")}
    return arena.seal(name, kind="report", round=0, files=files, **changes)


def test_row_04_two_files_swapped(arena):
    sealed = two_reports(arena)
    first, second = payloads(sealed)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    arena.refused(sealed, BadEncryption)


def test_row_04_two_files_swapped_and_signed_for(arena):
    sealed = two_reports(arena)
    raw = read_sealed(sealed)
    manifest = SealedManifest.model_validate_json(raw.manifest_raw)
    keys = unwrap_keys(read_keys(raw.keys_raw), manifest, raw.digest, arena.owner.identity)

    def swap(stated):
        first, second = stated["files"]
        for field in ("sealed_sha256", "sha256"):
            first[field], second[field] = second[field], first[field]

    arena.resign(sealed, swap, keys=keys[::-1])
    arena.refused(sealed, BadEncryption, match=r"'report.json' does not decrypt")


@pytest.mark.parametrize("change", ["job", "kind", "name", "index"])
def test_row_04_a_file_from_elsewhere(arena, make_job, change):
    """A file encrypted for another place, with its key and its digest, signed by the issuer."""
    sealed = arena.report(b'{"figure": 1}')
    place = {"job": arena.job.job_id, "kind": "report", "name": "report.json", "index": 0}
    place.update(
        {"job": {"job": "f" * 32}, "kind": {"kind": "bundle"}, "name": {"name": "results.json"}}.get(
            change, {"index": 1}
        )
    )
    key = bytes(32)
    encryptor = Cobblestone256Encryptor(
        key, payload_context(place["job"], place["kind"], place["name"], place["index"])
    )
    content = encryptor.update(b'{"figure": 1}') + encryptor.finalize()
    digest = sealed_digest(content)

    def edit(stated):
        payloads(sealed)[0].unlink()
        stated["files"][0]["sealed_sha256"] = digest

    arena.resign(sealed, edit, keys=[key])
    (sealed / "payload" / f"{digest[7:]}.enc").write_bytes(content)
    arena.refused(sealed, BadEncryption)


# Rows 5 and 6: other recipients


def test_row_05_wrong_recipient(arena, make_party, monkeypatch):
    stranger = make_party("stranger")
    TrustStore(stranger.keys).add(arena.client.identity.public.card, arena.client.fingerprint)
    arena.trust[stranger], arena.ledger[stranger] = TrustStore(stranger.keys), Ledger(stranger.keys)
    arena.ledger[stranger].remember(parse_job(arena.job.model_dump_json().encode()))
    sealed = arena.seal()
    monkeypatch.setattr(seal, "opened_payload", lambda *_: pytest.fail("the payload was opened"))
    arena.refused(sealed, WrongRecipient, match="sealed for another key", receiver=stranger)


def test_row_06_forwarded_by_its_recipient(arena, make_party):
    """The owner wraps the client's bundle for a third party, who would take it for addressed to them."""
    stranger = make_party("stranger")
    TrustStore(stranger.keys).add(arena.client.identity.public.card, arena.client.fingerprint)
    arena.trust[stranger], arena.ledger[stranger] = TrustStore(stranger.keys), Ledger(stranger.keys)
    arena.ledger[stranger].remember(parse_job(arena.job.model_dump_json().encode()))
    sealed = arena.seal()
    raw = read_sealed(sealed)
    manifest = SealedManifest.model_validate_json(raw.manifest_raw)
    keys = unwrap_keys(read_keys(raw.keys_raw), manifest, raw.digest, arena.owner.identity)
    wrap = wrap_keys(keys, raw.digest, stranger.identity.public)
    (sealed / "keys.json").write_bytes(write_keys([wrap]))
    arena.refused(sealed, WrongRecipient, match="does not name key", receiver=stranger)


# Rows 8, 10 and 37: signatures and forms


@pytest.mark.parametrize("change", ["drop", "empty", "short", "other", "swap"])
@pytest.mark.parametrize("name", ["ed25519", "mldsa65"])
def test_row_08_one_signature_is_not_enough(arena, name, change):
    sealed = arena.seal()
    path = sealed / "signatures.json"
    stated = json.loads(path.read_bytes())
    other = {"ed25519": "mldsa65", "mldsa65": "ed25519"}[name]
    if change == "drop":
        del stated[name]
    elif change == "swap":
        stated[name] = stated[other]
    else:
        forged = arena.client.identity.sign("another-purpose", b"x").to_json()[name]
        stated[name] = {"empty": "", "short": stated[name][:-4], "other": forged}[change]
    path.write_bytes(json.dumps(stated, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    arena.refused(sealed, BadSignature)


@pytest.mark.parametrize("suite", ["", None, "none", "ed25519/x25519/cobblestone256", ["ed25519+mldsa65"]])
def test_row_08_no_suite_is_negotiated(arena, suite):
    sealed = arena.seal()
    arena.resign(sealed, lambda stated: stated.update(suite=suite))
    arena.refused(sealed, WrongBinding, match="suite is")


@pytest.mark.parametrize("version", ["offsite/sealed/0", "offsite/sealed/2"])
def test_row_37_no_version_is_negotiated(arena, version):
    sealed = arena.seal()
    arena.resign(sealed, lambda stated: stated.update(format=version))
    arena.refused(sealed, WrongBinding, match=f"format is {version}, expected offsite/sealed/1")


@pytest.mark.parametrize("name", ["signatures", "keys"])
@pytest.mark.parametrize("version", [0, 2])
def test_row_37_nor_one_of_the_files_beside_it(arena, name, version):
    sealed = arena.seal()
    path = sealed / f"{name}.json"
    path.write_bytes(path.read_bytes().replace(f"offsite/{name}/1".encode(), f"offsite/{name}/{version}".encode()))
    arena.refused(sealed, WrongBinding, match=f"format is offsite/{name}/{version}, expected")


def test_row_37_nor_one_inside(arena, tamper):
    other = tamper(arena.bundle.path, edit=lambda stated: stated.update(format="offsite/bundle/2"))
    sealed = arena.seal(files={path.name: path for path in other.iterdir()})
    arena.refused(sealed, WrongBinding, match="offsite/package/1", signed=True)


def test_row_10_signed_bytes_are_not_written_anew(arena):
    sealed = arena.seal()
    path = sealed / "manifest.json"
    stated = json.loads(path.read_bytes())
    for other in (json.dumps(stated), json.dumps(stated, indent=1, sort_keys=True), path.read_text() + "\n"):
        path.write_text(other)
        arena.refused(sealed, BadSignature)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b'"round": 1', b'"round": 1, "round": 2'),
        lambda raw: raw.replace(b'"round": 1', b'"round": NaN'),
        lambda raw: raw.replace(b'"round": 1', b'"round": 1e400'),
        lambda raw: raw.replace(b'"round": 1', b'"round": 1.0'),
        lambda raw: raw.replace(b'"round": 1', b'"round": ' + b"1" * 100_000),
        lambda raw: raw.replace(b'"round": 1', b'"round": ' + b"[" * 500_000 + b"]" * 500_000),
        lambda raw: raw.replace(b'"round": 1', b'"round": ' + b'{"a":' * 150_000 + b"1" + b"}" * 150_000),
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw.decode().encode("utf-16"),
        lambda raw: raw + b"{}",
        lambda raw: b"",
        lambda raw: b"null",
    ],
)
def test_row_10_json_that_parsers_disagree_about(arena, change):
    sealed = arena.seal()
    arena.resign(sealed, lambda stated: change(json.dumps(stated).encode()))
    started = time.perf_counter()
    arena.refused(sealed, BadSchema)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("name", ["manifest.json", "signatures.json", "keys.json"])
def test_row_10_ten_megabytes_of_it(arena, name):
    sealed = arena.seal()
    (sealed / name).write_bytes(b" " * 10_000_000)
    tracemalloc.start()
    arena.refused(sealed, TooLarge)
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()


# Rows 11 to 13 and 36: again, older, elsewhere, too late


def test_row_11_the_same_again_is_answered_and_not_counted(arena):
    sealed = arena.seal()
    assert arena.attempt(sealed).admission == "new"
    for _ in range(2):
        shutil.rmtree(arena.folder / "out")
        arena.ledger[arena.owner].close()
        arena.ledger[arena.owner] = Ledger(arena.owner.keys)
        assert arena.attempt(sealed).admission == "again"
    assert len(arena.ledger[arena.owner]._store.rows("SELECT * FROM received")) == 1


def test_row_11_another_for_the_same_round(arena):
    first, second = arena.seal("first"), arena.seal("second")
    arena.attempt(first)
    shutil.rmtree(arena.folder / "out")
    arena.refused(second, Replayed)
    digest = read_sealed(first).digest
    arena.refused(arena.seal("third", sequence=2, previous=digest), Replayed, match="which has its bundle")


def test_row_11_replayed_to_another_job(arena, make_job):
    other = make_job()
    arena.ledger[arena.owner].remember(parse_job(other.model_dump_json().encode()))
    sealed = arena.seal()
    path = sealed / "manifest.json"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(arena.job.job_id.encode(), other.job_id.encode()))
    arena.refused(sealed, BadSignature)
    path.write_bytes(raw)
    arena.resign(sealed, lambda stated: stated.update(job_id=other.job_id))
    arena.refused(sealed, BadEncryption)
    unknown = make_job()
    arena.refused(arena.seal("unknown", job=unknown), WrongBinding, match="is not known here")


def test_row_11_the_client_refuses_an_older_package(arena):
    files = {path.name: path for path in arena.package.path.iterdir()}
    old, new = (
        arena.seal(f"package-{n}", sender=arena.owner, files=files, kind="package", round=0, sequence=n, previous=link)
        for n, link in ((1, None), (2, arena.job.base_digest))
    )
    arena.attempt(new, receiver=arena.client)
    shutil.rmtree(arena.folder / "out")
    arena.refused(old, Replayed, match="number 1 of its issuer's, number 2 came before", receiver=arena.client)


def test_row_11_the_client_refuses_changed_terms(arena):
    job = arena.job.model_copy(update={"rounds": 1})
    (arena.folder / JOB_NAME).write_text(job.model_dump_json())
    files = {JOB_NAME: arena.folder / JOB_NAME}
    sealed = arena.seal(sender=arena.owner, job=job, files=files, kind="job", round=0)
    arena.refused(sealed, Replayed, match="other terms", receiver=arena.client)


def test_row_12_what_was_held_back_is_no_news_after_a_newer_one_was_refused(arena):
    """Report 1 is held back, report 2 is refused for what it says, then 1 comes; 3 is taken."""
    first = arena.report(REPORT, "first")
    digest = read_sealed(first).digest
    second = arena.report(b"[]", "second", sequence=2, previous=digest)
    arena.refused(second, BadSchema, signed=True)
    arena.refused(first, Replayed, match="number 2 came before it")
    arena.refused(second, BadSchema)  # the same again is judged again, and remembered once
    third = arena.report(REPORT, "third", sequence=3, previous=read_sealed(second).digest)
    assert arena.attempt(third).admission == "new"


@pytest.mark.parametrize("damaged", ["payload", "keys.json", "signatures.json"])
def test_row_12_what_anybody_on_the_way_can_have_refused_passes_no_sequence_number(arena, damaged):
    first = arena.report(REPORT, "first")
    second = arena.report(REPORT + b" ", "second", sequence=2, previous=read_sealed(first).digest)
    target = payloads(second)[0] if damaged == "payload" else second / damaged
    raw = target.read_bytes()
    target.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ArtefactError):
        arena.attempt(second)
    assert arena.attempt(first).admission == "new"
    shutil.rmtree(arena.folder / "out")
    target.write_bytes(raw)
    assert arena.attempt(second).admission == "new"


def test_row_12_a_ledger_restored_from_a_backup(arena, tmp_path):
    keys = arena.owner.keys
    arena.ledger[arena.owner].close()
    backup = {path: path.read_bytes() for path in keys.glob("ledger.*") if path.suffix in (".db", ".log")}
    arena.ledger[arena.owner] = Ledger(keys)
    arena.attempt(arena.seal())
    arena.ledger[arena.owner].close()
    for path, content in backup.items():
        path.write_bytes(content)
    with pytest.raises(Replayed, match="turned back"):
        Ledger(keys)


@pytest.mark.parametrize(
    ("created", "expires", "error"),
    [(-1000, -301, Expired), (301, 1000, Expired), (-1000, -300, None), (300, 1000, None)],
)
def test_row_13_expired_or_from_the_future(arena, created, expires, error):
    sealed = arena.report(b"{}", created=arena.now + created, expires=arena.now + expires)
    if error is None:
        assert arena.attempt(sealed).admission == "new"
    else:
        arena.refused(sealed, error)


def test_row_36_clocks_a_day_off_touch_only_the_dates(arena, monkeypatch):
    sealed = arena.report(b"{}", expires=arena.now + 3600)
    for zone in ("UTC", "Pacific/Kiritimati", "right/UTC"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        arena.refused(sealed, Expired, now=arena.now + 86_400)
        arena.refused(sealed, Untrusted, match="not yet valid", now=arena.now - 86_400)  # the key has a date as well
        assert arena.attempt(sealed).admission in ("new", "again")
        shutil.rmtree(arena.folder / "out")
    monkeypatch.delenv("TZ")
    time.tzset()


# Rows 14, 15 and 21: names, links, swaps, and code


HOSTILE_NAMES = [
    "../adapter.safetensors",
    "/etc/offsite.json",
    "offsite.json\0",
    "..\\offsite.json",
    "CON",
    "offsite.json.",
    "offsite.json ",
    "OFFSITE.JSON",
    "offsite.js\N{CYRILLIC SMALL LETTER O}n",
    "\N{RIGHT-TO-LEFT OVERRIDE}offsite.json",
    "o" * 256,
    "",
    ".",
    "payload/offsite.json",
    "offsite.json\n",
]


@pytest.fixture
def written():
    """Paths that Python itself is asked to create, change or remove while the test runs."""
    paths: list[str] = []
    _WATCHERS.append(paths)
    yield paths
    _WATCHERS.remove(paths)


_WATCHERS: list[list[str]] = []
_CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}


def _watch(event: str, arguments: tuple) -> None:
    if not _WATCHERS:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in _CHANGES) and isinstance(arguments[0], str | bytes | os.PathLike):
        for paths in _WATCHERS:
            paths.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_row_14_hostile_names_are_never_used(arena, written, name):
    sealed = arena.report(b"{}")
    arena.resign(sealed, lambda stated: stated["files"][0].update(name=name))
    written.clear()
    arena.refused(sealed, (WrongNames, BadSchema))
    ours = {str(arena.owner.keys), str(arena.folder)}
    assert [path for path in written if not any(path.startswith(mine) for mine in ours)] == []


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)
        listener.bind(path.name)
        os.chdir(here)


def make_device(path):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("devices are made by root alone")


@pytest.mark.parametrize("make", ["symlink", "hardlink", "fifo", "socket", "device", "folder"])
@pytest.mark.parametrize("where", ["manifest.json", "signatures.json", "keys.json", "payload"])
def test_row_14_links_pipes_and_devices_are_not_opened(arena, make, where):
    sealed = arena.seal()
    path = payloads(sealed)[0] if where == "payload" else sealed / where
    copy = arena.folder / "elsewhere"
    path.rename(copy)
    {
        "symlink": lambda: path.symlink_to(copy),
        "hardlink": lambda: path.hardlink_to(copy),
        "fifo": lambda: make_fifo(path),
        "socket": lambda: make_socket(path),
        "device": lambda: make_device(path),
        "folder": path.mkdir,
    }[make]()
    arena.refused(sealed, WrongNames)


def test_row_14_a_payload_folder_elsewhere(arena):
    sealed = arena.seal()
    (sealed / "payload").rename(arena.folder / "elsewhere")
    (sealed / "payload").symlink_to(arena.folder / "elsewhere")
    arena.refused(sealed, WrongNames, match="not a plain folder")


def test_row_14_a_folder_of_a_million_names_is_not_read_whole(arena):
    sealed = arena.seal()
    for number in range(1200):
        (sealed / "payload" / f"{number:064x}.enc").touch()
    arena.refused(sealed, WrongNames, match="more than 1024")


def swapping(monkeypatch, change):
    """Call `change` after the payload folder was looked at and before a file of it is opened."""
    listed = seal.check_listed

    def then_change(payload, manifest):
        listed(payload, manifest)
        change()

    monkeypatch.setattr(seal, "check_listed", then_change)


def test_row_15_a_file_swapped_before_it_is_opened(arena, monkeypatch):
    sealed = arena.seal()
    path = payloads(sealed)[0]
    swapping(monkeypatch, lambda: path.write_bytes(bytes(path.stat().st_size)))
    arena.refused(sealed, BadEncryption)


def test_row_15_a_file_swapped_for_a_link(arena, monkeypatch):
    sealed = arena.seal()
    path = payloads(sealed)[0]
    shutil.copyfile(path, arena.folder / "copy")

    def swap():
        path.unlink()
        path.symlink_to(arena.folder / "copy")

    swapping(monkeypatch, swap)
    arena.refused(sealed, WrongNames)


def test_row_15_what_was_opened_is_what_is_used(arena, monkeypatch):
    """Once open, a file put in its place is not seen; one changed in place is."""
    sealed = arena.report(REPORT)
    (path,) = payloads(sealed)
    pour, content = seal._pour, path.read_bytes()

    def replaced(*arguments):
        path.unlink()
        path.write_bytes(bytes(len(content)))
        return pour(*arguments)

    def edited(*arguments):
        with path.open("r+b") as handle:
            handle.seek(30_000)
            handle.write(b"\xff\x00")
        return pour(*arguments)

    monkeypatch.setattr(seal, "_pour", edited)
    arena.refused(sealed, BadEncryption)
    path.write_bytes(content)
    monkeypatch.setattr(seal, "_pour", replaced)
    arena.attempt(sealed)
    assert (arena.folder / "out" / "report.json").read_bytes() == REPORT


def plain_text_in(folder):
    return [path for path in folder.rglob("*") if path.is_file() and REPORT[:1000] in path.read_bytes()]


@pytest.mark.parametrize("when", ["before", "while", "after"])
@pytest.mark.parametrize("fake", [False, True])
def test_row_15_the_outputs_parent_moved_away_while_it_is_opened(arena, monkeypatch, tmp_path, when, fake):
    """The plain text is not written into another folder of that name, and none stays in the one that was moved."""
    sealed, out = arena.report(REPORT), tmp_path / "parent" / "out"
    (arena.folder / "report.json").unlink()
    out.parent.mkdir()

    def swap():
        if (tmp_path / "moved").exists():
            return
        (stage,) = out.parent.iterdir()
        out.parent.rename(tmp_path / "moved")
        out.parent.mkdir()
        if fake:
            stage.mkdir()

    def then(module, name, *, before=True):
        real = getattr(module, name)

        def wrapped(*arguments, **named):
            if before:
                swap()
            found = real(*arguments, **named)
            swap()
            return found

        monkeypatch.setattr(module, name, wrapped)

    points = {"before": (sealing, "decrypt_files"), "while": (seal, "check_listed"), "after": (sealing, "read_content")}
    then(*points[when], before=when != "after")
    with pytest.raises((ArtefactError, RunFailed)):
        open_sealed(
            sealed,
            out,
            identity=arena.owner.identity,
            trust=arena.trust[arena.owner],
            ledger=arena.ledger[arena.owner],
            now=arena.now,
        )
    assert plain_text_in(tmp_path) == []
    assert not out.exists()
    assert list((tmp_path / "moved").iterdir()) == []


KINDS_SEALED = ["job", "package", "round", "bundle", "report", "note"]


@pytest.mark.parametrize("kind", KINDS_SEALED)
def test_row_15_what_was_checked_is_what_is_sealed(kind, arena, plain_round, monkeypatch, tmp_path):
    """A file that is swapped between check and encryption is refused, of every kind; for a link or a pipe, too."""
    source = tmp_path / "input"
    source.mkdir()
    files = {
        "job": {JOB_NAME: arena.job.model_dump_json().encode()},
        "package": {path.name: path.read_bytes() for path in arena.package.path.iterdir()},
        "round": {name: path.read_bytes() for name, path in plain_round.items()},
        "bundle": {path.name: path.read_bytes() for path in arena.bundle.path.iterdir()},
        "report": {"report.json": b'{"figure": 1}'},
        "note": {"note.bin": b"masked"},
    }[kind]
    for name, content in files.items():
        (source / name).write_bytes(content)
    sender = arena.client if kind == "bundle" else arena.owner
    job_folder = tmp_path / "job"
    job_folder.mkdir()
    (job_folder / JOB_NAME).write_text(arena.job.model_dump_json())
    with monkeypatch.context() as patch:
        config = SealConfig(
            input=source,
            output=tmp_path / "sealed",
            job=None if kind == "job" else job_folder,
            keys=sender.keys,
            passphrase_file=sender.passphrase,
            accept_leakage=kind == "bundle",
        )
        for swap in ("content", "link", "pipe"):
            for name in files:
                kept, check = (source / name).read_bytes(), sealing.check_content

                def then_swap(content, job, name=name, kept=kept, check=check, swap=swap):
                    check(content, job)
                    (source / name).unlink()
                    if swap == "content":
                        (source / name).write_bytes(kept + b" ")
                    elif swap == "pipe":
                        os.mkfifo(source / name)
                    else:
                        (tmp_path / "elsewhere").write_bytes(kept)
                        (source / name).symlink_to(tmp_path / "elsewhere")

                patch.setattr(sealing, "check_content", then_swap)
                with pytest.raises(BadDigest if swap == "content" else WrongNames):
                    sealing.seal_run(config, identity=sender.identity)
                patch.setattr(sealing, "check_content", check)
                assert not (tmp_path / "sealed").exists()
                assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
                (source / name).unlink()
                (source / name).write_bytes(kept)
        assert sealing.seal_run(config, identity=sender.identity)["output"] == "sealed"


def test_row_15_a_manifest_swapped_after_it_was_verified(arena, monkeypatch):
    sealed = arena.report(REPORT)
    verify = sealing.verify_sealed

    def then_swap(*arguments, **named):
        found = verify(*arguments, **named)
        for name in ("manifest.json", "signatures.json", "keys.json"):
            (sealed / name).write_bytes(b"{}")
        return found

    monkeypatch.setattr(sealing, "verify_sealed", then_swap)
    arena.attempt(sealed)
    assert (arena.folder / "out" / "report.json").read_bytes() == REPORT


@pytest.fixture
def tripwires(monkeypatch):
    """Whatever could run code from a file fails the test."""
    import pickle
    import runpy
    import tarfile
    import zipfile

    import torch

    def tripped(*_, **__):
        pytest.fail("something that can run code, or unpack an archive, was called")

    for owner, names in (
        (pickle, ("load", "loads", "Unpickler")),
        (torch, ("load",)),
        (runpy, ("run_path",)),
        (zipfile, ("ZipFile",)),
        (tarfile, ("open",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, tripped)


CODE = ["adapter_model.bin", "model.pkl", "weights.pt", "array.npy", "modeling.py", "adapter_config.json", "a.zip"]


@pytest.mark.parametrize("name", CODE)
def test_row_21_what_could_run_code_is_never_opened(arena, tripwires, name):
    sealed = arena.seal()

    def edit(stated):
        stated["files"] = sorted([{**stated["files"][0], "name": name, "tensors_sha256": None}], key=lambda _: name)

    arena.resign(sealed, edit)
    for path in payloads(sealed):
        path.unlink()  # it is refused without a look at it
    arena.refused(sealed, WrongNames, match="a name that a bundle may not hold")


@pytest.mark.parametrize("name", CODE)
def test_row_21_nor_inside_a_bundle(arena, tripwires, tamper, name):
    def change(folder):
        (folder / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")

    other = tamper(
        arena.bundle.path,
        change=change,
        edit=lambda stated: stated["files"].update({name: stated["files"]["adapter.safetensors"]}),
    )
    with pytest.raises(WrongNames):
        sealing.read_content(other)


def test_row_21_a_whole_exchange_unpickles_nothing(arena, tripwires):
    arena.attempt(arena.seal())
    shutil.rmtree(arena.folder / "out")
    files = {path.name: path for path in arena.package.path.iterdir()}
    arena.attempt(arena.seal("down", sender=arena.owner, files=files, kind="package", round=0), receiver=arena.client)


# Content that is well sealed and is not what it says


def test_one_kind_sealed_as_another(arena):
    files = {path.name: path for path in arena.package.path.iterdir() if path.name == "offsite.json"}
    sealed = arena.seal(sender=arena.owner, files=files, kind="package", round=0)
    arena.refused(sealed, WrongNames, receiver=arena.client, signed=True)
    (arena.folder / "offsite.json").write_text("{}")
    files = {"offsite.json": arena.folder / "offsite.json"}
    arena.refused(arena.seal("empty", files=files), (WrongBinding, BadSchema), signed=True)


def test_tensors_that_the_manifest_does_not_declare(arena):
    sealed = arena.seal()
    arena.resign(sealed, lambda stated: stated["files"][0].update(tensors_sha256="sha256:" + "0" * 64))
    arena.refused(sealed, BadSchema, match="declares other tensors")


def test_the_owners_part_is_not_the_clients(arena):
    (arena.folder / JOB_NAME).write_text(arena.job.model_dump_json())
    files = {JOB_NAME: arena.folder / JOB_NAME}
    sealed = arena.seal(files=files, kind="job", round=0)
    arena.refused(sealed, WrongBinding, match="no such part", signed=True)


# The round of a federation: only the owner asks one


@pytest.fixture
def plain_round(tmp_path, arena):
    """The files of a round of the arena's job."""
    from offsite.artefacts.round import ROUND_FORMAT, RoundManifest, write_round

    stated = {"package_digest": arena.job.package_digest, "base_digest": arena.job.base_digest}
    manifest = RoundManifest(
        format=ROUND_FORMAT, federation_id="5" * 32, round=1, num_rounds=2, adapter=arena.job.adapter, steps=4, **stated
    )
    folder = write_round(tmp_path / "plain-round", manifest).path
    return {path.name: path for path in folder.iterdir()}


def test_a_round_that_is_not_attacked_opens(arena, plain_round):
    sealed = arena.seal(kind="round", sender=arena.owner, files=plain_round)
    assert arena.attempt(sealed, receiver=arena.client).admission == "new"


def test_a_client_cannot_ask_a_round(arena, plain_round):
    arena.refused(arena.seal(kind="round", files=plain_round), WrongBinding, match="no such part")


def test_a_round_has_a_number_of_the_job_s(arena, plain_round):
    beyond = arena.seal("beyond", kind="round", sender=arena.owner, files=plain_round, round=3)
    arena.refused(beyond, WrongBinding, receiver=arena.client, match="is for round 3, the job has 2")
    other = arena.seal("other", kind="round", sender=arena.owner, files=plain_round, round=2)
    arena.refused(
        other, WrongBinding, receiver=arena.client, match="sealed as round 2, what came out is round 1", signed=True
    )
    zero = arena.seal("zero", kind="round", sender=arena.owner, files=plain_round)
    arena.resign(zero, lambda stated: stated.update(round=0), signer=arena.owner, receiver=arena.client)
    arena.refused(zero, BadSchema, receiver=arena.client, match="from 1 on")


def test_a_bundle_sealed_as_a_round(arena):
    files = {"offsite.json": arena.bundle.path / "offsite.json"}
    sealed = arena.seal(kind="round", sender=arena.owner, files=files)
    arena.refused(sealed, WrongNames, receiver=arena.client, signed=True)


@pytest.mark.parametrize("name", ["adapter.safetensors", "round.py", "../offsite.json", "offsite.json/x", ""])
def test_a_round_holds_no_file_of_another_name(arena, plain_round, name):
    sealed = arena.seal(kind="round", sender=arena.owner, files=plain_round)

    def edit(stated):
        stated["files"][0]["name"] = name
        stated["files"][0]["tensors_sha256"] = "sha256:" + "0" * 64 if name.endswith(".safetensors") else None

    arena.resign(sealed, edit, signer=arena.owner, receiver=arena.client)
    arena.refused(sealed, WrongNames, receiver=arena.client, match="may not hold")
