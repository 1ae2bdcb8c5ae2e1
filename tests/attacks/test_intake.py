"""Attempts on the owner's intake: by strangers, by clients who sign what they should not, by repetition and by crashes.

Rows are those of the attack table in ``docs/security.md``. What a client sends here is properly signed and encrypted
unless the attack is on that: it is refused for what it says.
"""

from __future__ import annotations

import base64
import errno
import itertools
import json
import math
import os
import shutil
import threading

import pytest
import torch
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from safetensors.torch import load_file, save_file

from offsite import cli
from offsite.artefacts import known
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import Policy
from offsite.errors import (
    BadDigest,
    BadSchema,
    BadSignature,
    Expired,
    NormTooLarge,
    NotFinite,
    PolicyError,
    Replayed,
    RunFailed,
    TooLarge,
    Untrusted,
    WrongBinding,
    WrongNames,
    WrongRecipient,
    WrongShape,
)
from offsite.sealed import encryption as seal
from offsite.state.chain import verify_log
from server.registry.registry import Registry

DAY = 86400
A = "top.1.mlp.up_proj.lora_A"
B = "top.1.mlp.up_proj.lora_B"


@pytest.fixture
def sealed(exchange, small_bundle, tmp_path):
    """Seal the sound bundle for a job, in a folder of its own each time."""
    numbers = itertools.count()

    def make(job, **changes):
        return exchange.seal(small_bundle.path, job, tmp_path / f"sealed-{next(numbers)}", **changes)

    return make


def refused(verdict, expected):
    """The verdict is a refusal by that check, told in one line without a path."""
    assert (verdict.state, verdict.reason_class) == ("refused", expected.__name__), verdict
    assert type(verdict.error) is expected
    assert "\n" not in str(verdict.error)
    assert "/tmp" not in str(verdict.error)


def left(exchange):
    """What the registry holds besides its own files."""
    folder = exchange.registry_folder
    return sorted(path.name for part in ("bundles", "incoming") for path in (folder / part).iterdir())


def log_of(exchange):
    return [json.loads(line) for line in (exchange.registry_folder / "registry.log").read_bytes().splitlines()]


# --- 7: who signed


def test_row_07_a_stranger(exchange, sealed, identities):
    job = exchange.job()
    refused(exchange.take_in(sealed(job, identity=identities["stranger"])), Untrusted)
    assert log_of(exchange)[-1]["fields"]["check"] == "Untrusted"


def test_row_07_a_trusted_party_with_another_clients_job(exchange, sealed, identities):
    stranger = identities["stranger"]
    exchange.trust.add(stranger.public.card, stranger.public.fingerprint, now=exchange.now)
    refused(exchange.take_in(sealed(exchange.job(), identity=stranger)), WrongBinding)


def test_row_07_a_client_who_was_revoked(exchange, sealed):
    folder = sealed(exchange.job())
    exchange.trust.revoke(exchange.client.public.fingerprint)
    refused(exchange.take_in(folder), Untrusted)


def test_row_07_a_client_whose_card_is_past_its_date(exchange, sealed):
    late = exchange.now + 31 * DAY
    job = exchange.job(expires=late + DAY)
    refused(exchange.take_in(sealed(job, created=late, expires=late + 60), now=late), Untrusted)


def test_row_07_nothing_of_a_refused_bundle_stays_and_its_round_is_free(exchange, sealed, identities):
    job = exchange.job()
    exchange.take_in(sealed(job, identity=identities["stranger"]))
    assert left(exchange) == []
    assert exchange.registry.entries() == []
    assert exchange.take_in(sealed(job)).state == "verified"


# --- 11: again


def test_row_11_the_same_bytes_again_change_nothing(exchange, sealed):
    folder = sealed(exchange.job())
    first = exchange.take_in(folder)
    lines = len(log_of(exchange))
    for _ in range(2):
        again = exchange.take_in(folder)
        assert (again.id, again.state, again.is_again) == (first.id, "verified", True)
    assert len(log_of(exchange)) == lines


def test_row_11_again_after_a_restart_and_in_every_state(exchange, sealed):
    folder = sealed(exchange.job())
    bundle_id = exchange.take_in(folder).id
    for state in ("accepted", "plugged-in", "served"):
        registry = exchange.opened()
        registry.advance(bundle_id, state)
        registry.advance(bundle_id, state)
        again = exchange.take_in(folder, registry=exchange.opened())
        assert (again.state, again.is_again) == (state, True)
    events = [line["event"] for line in log_of(exchange)]
    assert [events.count(state) for state in ("received", "verified", "accepted", "plugged-in", "served")] == [1] * 5


def test_row_11_another_bundle_for_a_round_that_is_taken(exchange, sealed):
    job = exchange.job()
    first = exchange.take_in(sealed(job))
    second = exchange.take_in(sealed(job, sequence=2))
    refused(second, Replayed)
    assert first.digest[:19] in str(second.error)
    assert [entry.id for entry in exchange.registry.entries()] == [first.id]


def test_row_11_an_older_round_after_a_newer(exchange, sealed):
    job = exchange.job()
    early = sealed(job, round=1, sequence=1)
    assert exchange.take_in(sealed(job, round=2, sequence=2)).state == "verified"
    refused(exchange.take_in(early), Replayed)


def test_row_11_a_bundle_of_another_registrys_job(exchange, sealed):
    refused(exchange.take_in(sealed(exchange.job(register=False))), WrongBinding)


def test_row_11_a_sealed_bundle_rewritten_for_another_job(exchange, sealed):
    one, two = exchange.job(), exchange.job()
    folder = sealed(one)
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(one.job_id.encode(), two.job_id.encode()))
    refused(exchange.take_in(folder), BadSignature)


def test_row_11_a_round_beyond_the_last(exchange, sealed):
    refused(exchange.take_in(sealed(exchange.job(rounds=1), round=2)), WrongBinding)


def test_row_11_what_the_owner_refused_stays_refused_and_the_round_is_free(exchange, sealed):
    job = exchange.job()
    folder = sealed(job)
    bundle_id = exchange.take_in(folder).id
    exchange.registry.refuse(bundle_id)
    again = exchange.take_in(folder)
    assert (again.state, again.is_again) == ("refused", True)
    with pytest.raises(Exception, match="refused by the owner"):
        exchange.registry.advance(bundle_id, "accepted")
    assert exchange.take_in(sealed(job, sequence=2)).state == "verified"


def test_row_11_a_damaged_copy_does_not_burn_the_sound_one(exchange, sealed, tmp_path):
    """Whoever carries the bundle can spoil this copy, and nothing more."""
    folder = sealed(exchange.job())
    copy = shutil.copytree(folder, tmp_path / "copy")
    payload = next((copy / "payload").iterdir())
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(raw)
    for _ in range(2):
        verdict = exchange.take_in(copy)
        assert (verdict.state, verdict.is_final) == ("refused", False)
    assert exchange.take_in(folder).state == "verified"


# --- 12 and 13: turned back, out of date


def test_row_12_a_sequence_number_that_was_passed(exchange, sealed):
    job = exchange.job()
    assert exchange.take_in(sealed(job, round=1, sequence=5)).state == "verified"
    refused(exchange.take_in(sealed(job, round=2, sequence=5)), Replayed)
    refused(exchange.take_in(sealed(job, round=2, sequence=4)), Replayed)
    assert exchange.take_in(sealed(job, round=2, sequence=6)).state == "verified"


def too_loud(folder):
    scaled(B, 1000.0)(folder)


@pytest.mark.parametrize("by", ["its content", "its sizes", "the owner"])
def test_row_12_what_was_held_back_is_no_news_after_a_newer_one_was_refused(
    by, exchange, sealed, small_bundle, tamper, tmp_path
):
    """Sequence 1 does not come, 2 comes and is refused for good, then 1 comes."""
    job = exchange.job()
    held_back = sealed(job, sequence=1)
    if by == "its content":
        bad = tamper(small_bundle.path, change=too_loud, redeclare=True)
        refused(exchange.take_in(exchange.seal(bad, job, tmp_path / "loud", sequence=2)), NormTooLarge)
    elif by == "its sizes":
        save_file({"x": torch.zeros(600_000)}, tmp_path / "large")
        files = {"offsite.json": small_bundle.path / "offsite.json", "adapter.safetensors": tmp_path / "large"}
        refused(exchange.take_in(sealed(job, files=files, sequence=2)), TooLarge)
    else:
        exchange.registry.refuse(exchange.take_in(sealed(job, sequence=2)).id)
    found = exchange.take_in(held_back)
    refused(found, Replayed)
    assert "not newer than 2" in str(found.error)
    assert exchange.take_in(sealed(job, sequence=3)).state == "verified"


@pytest.mark.parametrize("damaged", ["payload", "keys.json", "signatures.json"])
def test_row_12_what_anybody_on_the_way_can_have_refused_passes_no_sequence_number(damaged, exchange, sealed, tmp_path):
    """Otherwise a carrier could spoil a copy of the second, and the first would never be taken."""
    job = exchange.job()
    first, second = sealed(job, sequence=1), sealed(job, sequence=2, round=2)
    copy = shutil.copytree(second, tmp_path / "copy")
    target = next((copy / "payload").iterdir()) if damaged == "payload" else copy / damaged
    raw = bytearray(target.read_bytes())
    raw[len(raw) // 2] ^= 1
    target.write_bytes(raw)
    assert exchange.take_in(copy).state == "refused"
    assert exchange.take_in(first).state == "verified"
    assert exchange.take_in(second).state == "verified"


@pytest.mark.parametrize("part", ["registry.db", "registry.log", "everything", "head"])
def test_row_12_a_registry_restored_from_a_backup(part, exchange, sealed, tmp_path):
    """A bundle that was taken in must not be unknown again because an old copy was put back."""
    job = exchange.job()
    exchange.close()
    backup = shutil.copytree(exchange.registry_folder, tmp_path / "backup")
    (head,) = exchange.keys.glob("registry-*.head")
    old_head = head.read_bytes()
    registry = exchange.opened()
    exchange.take_in(sealed(job), registry=registry)
    registry.close()
    if part == "everything":
        shutil.rmtree(exchange.registry_folder)
        shutil.copytree(backup, exchange.registry_folder)
    elif part == "head":
        head.write_bytes(old_head)
    else:
        shutil.copy(backup / part, exchange.registry_folder / part)
    with pytest.raises(Replayed, match="turned back or edited"):
        exchange.opened()


def test_row_12_a_registry_that_lost_its_name(exchange):
    exchange.job()
    exchange.close()
    (exchange.registry_folder / "registry.id").unlink()
    with pytest.raises(Replayed, match=r"lost its registry\.id"):
        exchange.opened(create=True)


def test_row_13_expired_and_from_the_future(exchange, sealed):
    job = exchange.job()
    folder = sealed(job)
    refused(exchange.take_in(folder, now=exchange.now + 3600 + 301), Expired)
    refused(exchange.take_in(folder, now=exchange.now - 301), Expired)
    assert exchange.take_in(folder, now=exchange.now + 3600).state == "verified"


# --- what else the envelope says


def test_other_kinds_and_bindings_are_refused(exchange, sealed, small_bundle, identities, tmp_path):
    job = exchange.job()
    other = "sha256:" + "0" * 64
    owner = identities["owner"]
    exchange.trust.add(owner.public.card, owner.public.fingerprint, now=exchange.now)
    report = tmp_path / "report.json"
    report.write_text("{}")
    alone = {"offsite.json": small_bundle.path / "offsite.json"}
    for changes, expected in (
        ({"package_digest": other}, WrongBinding),
        ({"base_digest": other}, WrongBinding),
        ({"expires": job.expires + 1}, WrongBinding),
        ({"recipients": [identities["stranger"].public]}, WrongRecipient),
        ({"recipients": [owner.public, identities["stranger"].public]}, WrongRecipient),
        ({"identity": owner, "recipients": [exchange.client.public]}, WrongRecipient),
        ({"kind": "report", "files": {"report.json": report}}, WrongBinding),
        ({"files": alone}, WrongNames),
    ):
        refused(exchange.take_in(sealed(job, **changes)), expected)
    assert left(exchange) == []


def test_row_16_more_bytes_than_the_jobs_adapter_has_are_not_even_decrypted(exchange, sealed, small_bundle, tmp_path):
    large = {"offsite.json": small_bundle.path / "offsite.json", "adapter.safetensors": tmp_path / "large"}
    save_file({"x": torch.zeros(600_000)}, tmp_path / "large")
    refused(exchange.take_in(sealed(exchange.job(), files=large)), TooLarge)


# --- 16 to 19: what is inside, signed by the client


def rewrite(**changes):
    def change(folder):
        path = folder / "adapter.safetensors"
        tensors = load_file(path)
        for name, value in changes.items():
            tensors.pop(name.replace("__", "."), None)
            if value is not None:
                tensors[name.replace("__", ".")] = value
        save_file(tensors, path)

    return change


def scaled(name, factor):
    def change(folder):
        path = folder / "adapter.safetensors"
        tensors = load_file(path)
        tensors[name] = tensors[name] * factor
        save_file(tensors, path)

    return change


def stated(*path, value):
    def edit(manifest):
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


A_, B_ = A.replace(".", "__"), B.replace(".", "__")
CONTENT = {
    "row 17: a tensor is missing": (rewrite(**{A_: None}), None, WrongNames),
    "row 17: a tensor too many": (rewrite(lm_head__weight=torch.zeros(2)), None, WrongNames),
    "row 17: a tensor of the base": (rewrite(middle__0__mlp__up_proj__weight=torch.zeros(48, 32)), None, WrongNames),
    "row 17: a shape that broadcasts": (rewrite(**{A_: torch.zeros(1)}), None, WrongShape),
    "row 17: another rank": (rewrite(**{A_: torch.zeros(4, 32)}), None, WrongShape),
    "row 17: another dtype": (rewrite(**{A_: torch.zeros(2, 32, dtype=torch.float64)}), None, WrongShape),
    "row 18: nan": (rewrite(**{A_: torch.full((2, 32), math.nan)}), None, NotFinite),
    "row 18: infinity": (rewrite(**{A_: torch.full((2, 32), math.inf)}), None, NotFinite),
    "row 18: minus infinity": (rewrite(**{B_: torch.full((48, 2), -math.inf)}), None, NotFinite),
    "row 18: subnormal flood": (rewrite(**{A_: torch.full((2, 32), 1e-44)}), None, BadSchema),
    "row 18: a product beyond floats": (
        rewrite(**{A_: torch.full((2, 32), 3e38), B_: torch.full((48, 2), 3e38)}),
        None,
        NormTooLarge,
    ),
    "row 19: norm bomb": (scaled(B, 1000.0), None, NormTooLarge),
    "row 19: rank-one spike": (
        rewrite(**{A_: torch.eye(2, 32) * 30, B_: torch.eye(48, 2)}),
        None,
        NormTooLarge,
    ),
    "another package": (None, stated("package_digest", value="sha256:" + "0" * 64), WrongBinding),
    "another base model": (None, stated("base_digest", value="sha256:" + "0" * 64), WrongBinding),
    "another format": (None, stated("format", value="offsite/bundle/9"), WrongBinding),
    "another adapter than the job's": (None, stated("adapter", "alpha", value=64.0), WrongBinding),
    "an unknown kind": (None, stated("adapter", "kind", value="evil"), WrongBinding),
    "an unknown key": (None, stated("auto_map", value="x"), BadSchema),
    "an infinite scale": (None, stated("adapter", "alpha", value=math.inf), BadSchema),
    "files and manifest disagree": (
        None,
        stated("files", "adapter.safetensors", "sha256", value="sha256:" + "0" * 64),
        BadDigest,
    ),
}


@pytest.mark.parametrize("case", CONTENT)
def test_rows_17_18_19_what_a_client_signs_and_should_not(case, exchange, small_bundle, tamper, tmp_path):
    change, edit, expected = CONTENT[case]
    bad = tamper(small_bundle.path, change=change, edit=edit, redeclare=change is not None)
    job = exchange.job()
    folder = exchange.seal(bad, job, tmp_path / "sealed")
    verdict = exchange.take_in(folder)
    refused(verdict, expected)
    assert left(exchange) == []
    with pytest.raises(expected):
        exchange.registry.advance(verdict.id, "accepted")
    lines = len(log_of(exchange))
    again = exchange.take_in(folder)  # the same answer, without work
    assert (again.state, again.reason_class, again.is_again) == ("refused", expected.__name__, True)
    assert len(log_of(exchange)) == lines
    good = exchange.seal(small_bundle.path, job, tmp_path / "good", sequence=2)
    assert exchange.take_in(good).state == "verified"  # a refused digest does not take the round


def test_row_16_a_file_that_is_no_tensor_file(exchange, small_bundle, tamper, monkeypatch, tmp_path):
    monkeypatch.setattr(seal, "_tensors_digest", lambda path, name: "sha256:" + "1" * 64 if "safe" in name else None)
    bad = tamper(
        small_bundle.path, change=lambda folder: (folder / "adapter.safetensors").write_bytes(b"\x80\x02" * 50)
    )
    refused(exchange.take_in(exchange.seal(bad, exchange.job(), tmp_path / "sealed")), BadSchema)


@pytest.mark.parametrize(("factor", "state"), [(1.0, "verified"), (400.0, "refused")])
def test_row_19_the_verdict_does_not_depend_on_how_the_update_is_factored(
    factor, state, exchange, small_bundle, tamper, tmp_path
):
    verdicts, figures = [], []
    for number, k in enumerate((1e-6, 1.0, 1e6)):
        folder = tmp_path / str(number)
        shutil.copytree(small_bundle.path, folder)
        tensors = load_file(folder / "adapter.safetensors")
        for name in tensors:
            tensors[name] = tensors[name] * (k if name.endswith("lora_A") else factor / k)
        save_file(tensors, folder / "adapter.safetensors")
        bad = tamper(folder)
        sealed = exchange.seal(bad, exchange.job(), tmp_path / f"sealed-{number}")
        shutil.rmtree(bad)
        verdict = exchange.take_in(sealed)
        verdicts.append((verdict.state, verdict.reason_class))
        if state == "verified":
            figures.append(json.loads(exchange.registry.entry(verdict.id).figures)["max_relative_frobenius"])
        else:
            assert "times the base weight's" in str(verdict.error)
    assert verdicts == [(state, None if state == "verified" else "NormTooLarge")] * 3
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-4) if figures else True


def test_row_19_the_cap_is_the_jobs(exchange, sealed):
    job = exchange.job(policy=Policy(max_relative_frobenius=1e-6))
    refused(exchange.take_in(sealed(job)), NormTooLarge)
    other = exchange.job(adapter=AdapterSpec(kind="lora", dtype="float32", rank=3, placement="1+1"))
    refused(exchange.take_in(sealed(other)), WrongBinding)


# --- 23: at once


def at_once(calls):
    """Run the calls in threads that start together; return what they returned."""
    barrier, found = threading.Barrier(len(calls)), []

    def work(call):
        barrier.wait()
        found.append(call())

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_row_23_thirty_two_times_the_same_at_once(exchange, sealed):
    folder = sealed(exchange.job())
    registries = [exchange.registry, exchange.opened(), exchange.opened()]
    calls = [lambda number=number: exchange.take_in(folder, registry=registries[number % 3]) for number in range(32)]
    found = at_once(calls)
    assert sorted(verdict.is_again for verdict in found) == [False] + [True] * 31
    assert {verdict.state for verdict in found} == {"verified"}
    events = [line["event"] for line in log_of(exchange)]
    assert events.count("verified") == 1
    assert exchange.registry.verify_log().number == len(events)


def test_row_23_thirty_two_different_ones_for_one_round_at_once(exchange, sealed):
    job = exchange.job()
    folders = [sealed(job, sequence=1 + number) for number in range(32)]
    found = at_once([lambda folder=folder: exchange.take_in(folder) for folder in folders])
    accepted = [verdict for verdict in found if verdict.state == "verified"]
    assert len(accepted) == 1
    others = [verdict for verdict in found if verdict.state == "refused"]
    assert len(others) == 31
    assert {verdict.reason_class for verdict in others} == {"Replayed"}
    assert all(accepted[0].digest[:19] in str(verdict.error) for verdict in others)
    assert left(exchange) == [accepted[0].id]


# --- 25: the disk fails at every write


CALLS = ("write", "fsync", "rename", "replace", "mkdir", "ftruncate")


class FailingDisk:
    """Lets so many of the calls that change the disk through, then fails one of them, or cuts writes short."""

    def __init__(self, monkeypatch, *, fail_at=None, number=errno.ENOSPC):
        self.count = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name), fail_at, number))

    def _wrapped(self, name, real, fail_at, number):
        def call(*arguments, **named):
            self.count += 1
            if self.count == fail_at:
                if name == "write" and len(arguments[1]) > 1:
                    real(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]))  # half of it is on disk
                raise OSError(number, os.strerror(number))
            return real(*arguments, **named)

        return call


def test_row_25_every_write_of_an_intake_may_fail(exchange, sealed, monkeypatch):
    """Each time: one clean error, nothing half, and the same bundle is taken in afterwards."""
    monkeypatch.setattr(known, "SETTLED_NANOSECONDS", 0)  # the package's files are remembered at once
    job = exchange.job(rounds=200)
    first = sealed(job, round=1, sequence=1)
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch)
        assert exchange.take_in(first).state == "verified"
    in_all, failed = disk.count, 0
    assert in_all > 15
    numbers = itertools.cycle((errno.ENOSPC, errno.EIO))
    for fail_at in range(1, in_all + 1):
        folder = sealed(job, round=1 + fail_at, sequence=1 + fail_at)
        for listed in exchange.keys.glob("*.hashed"):  # it is written anew each time
            listed.unlink()
        with monkeypatch.context() as patch:
            FailingDisk(patch, fail_at=fail_at, number=next(numbers))
            try:
                exchange.take_in(folder)
            except RunFailed:
                failed += 1
        assert exchange.take_in(folder).state == "verified"
    assert failed >= in_all - 3  # a failure while something is merely tidied up is none
    assert len(exchange.registry.entries()) == in_all + 1
    assert exchange.registry.verify_log().number == len(log_of(exchange))
    assert len(left(exchange)) == in_all + 1


def test_row_25_short_writes_are_gone_on_with(exchange, sealed, monkeypatch):
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:97])))
        assert exchange.take_in(sealed(exchange.job())).state == "verified"


# --- 38: nothing secret is told


def test_row_38_no_refusal_tells_a_secret(parties, small_bundle, dropped_package, tmp_path, capsys, monkeypatch):
    """Keys, passphrases, paths and weights stay out of errors, log and database, through every verb of the intake."""
    owner, client = parties
    registry = tmp_path / "registry"
    where = ["--registry", str(registry), "--keys", str(owner.keys)]
    told = []

    def offsite(*words, code=0):
        assert cli.run([str(word) for word in words]) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        told.append(err + out)
        return json.loads(out.splitlines()[-1]) if out else {}

    adapter = ["--adapter", "lora", "--rank", "2", "--placement", "1+1", "--adapter-dtype", "float32"]
    made = offsite("job", "create", dropped_package.path, "--client", client.fingerprint, *where, *adapter,
                   "--rounds", "2", "-o", tmp_path / "job")  # fmt: skip
    offsite("seal", tmp_path / "job", "-o", tmp_path / "job.sealed", *owner.flags)
    offsite("open", tmp_path / "job.sealed", "-o", tmp_path / "client-job", *client.flags)
    sealing = ["--job", tmp_path / "client-job", "--accept-leakage", *client.flags]
    offsite("seal", small_bundle.path, "-o", tmp_path / "good", *sealing)
    offsite("seal", small_bundle.path, "-o", tmp_path / "other", *sealing, "--round", "1", code=0)
    for name in ("flipped", "unsigned"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
    payload = next((tmp_path / "flipped" / "payload").iterdir())
    payload.write_bytes(payload.read_bytes()[:-1] + b"x")
    (tmp_path / "unsigned" / "manifest.json").write_bytes((tmp_path / "good" / "manifest.json").read_bytes() + b" ")
    wrong = tmp_path / "wrong"
    wrong.write_text("not the passphrase of this test")
    wrong.chmod(0o600)
    flags = ["--registry", registry, *owner.flags]
    offsite("intake", tmp_path / "flipped", *flags, code=3)
    offsite("intake", tmp_path / "unsigned", *flags, code=3)
    offsite(
        "intake", tmp_path / "good", "--registry", registry, "--keys", owner.keys, "--passphrase-file", wrong, code=3
    )
    offsite("intake", tmp_path / "job", *flags, code=3)
    verdict = offsite("intake", tmp_path / "good", *flags)
    assert verdict["state"] == "verified"
    assert verdict["job_id"] == made["job_id"]
    assert offsite("intake", tmp_path / "good", *flags)["again"]
    offsite("intake", tmp_path / "other", *flags, code=3)
    offsite("plug-in", "nowhere", verdict["id"], *where, "-o", tmp_path / "adapted", code=4)
    offsite("registry", "list", *where)
    offsite("registry", "show", verdict["id"], *where)
    assert offsite("registry", "accept", verdict["id"], *where)["state"] == "accepted"
    assert offsite("log", "verify", *where)["lines"] == verify_log(registry / "registry.log")

    everything = "\n".join(told).encode() + b"".join(
        path.read_bytes() for path in [*registry.glob("registry.*"), *owner.keys.glob("registry-*")]
    )
    for secret in secrets_of(owner, client, wrong):
        for form in (secret, secret.hex().encode(), base64.b64encode(secret)):
            assert form not in everything
    log = (registry / "registry.log").read_bytes() + b"".join(path.read_bytes() for path in owner.keys.glob("*.head"))
    errors = "\n".join(line for text in told for line in text.splitlines() if "error:" in line)
    assert str(tmp_path) not in errors
    assert str(tmp_path).encode() not in log


def secrets_of(owner, client, wrong):
    for party in (owner, client):
        yield party.passphrase.read_bytes()
        for name in ("_ed25519", "_mldsa65", "_mlkem768", "_x25519"):
            key = getattr(party.identity, name)
            yield key.private_bytes_raw()
            yield key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())[-32:]
    yield wrong.read_bytes()


def test_a_step_that_was_left_out_is_a_matter_of_policy(exchange, sealed):
    bundle_id = exchange.take_in(sealed(exchange.job())).id
    with pytest.raises(PolicyError, match="accepted comes first"):
        exchange.registry.advance(bundle_id, "plugged-in")
    exchange.registry.advance(bundle_id, "accepted")
    exchange.registry.advance(bundle_id, "plugged-in")
    with pytest.raises(PolicyError, match="is plugged-in"):
        exchange.registry.refuse(bundle_id)
    assert isinstance(exchange.registry, Registry)
