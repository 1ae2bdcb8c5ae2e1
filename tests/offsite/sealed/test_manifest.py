"""The signed manifest: every field, the order of checks, and what binds it to its job."""

from __future__ import annotations

import json

import pytest

from offsite.artefacts.job import Job
from offsite.errors import (
    BadSchema,
    BadSignature,
    Expired,
    TooLarge,
    Untrusted,
    WrongBinding,
    WrongNames,
    WrongRecipient,
)
from offsite.keys.trust import MAX_SKEW_SECONDS
from offsite.sealed.manifest import (
    KINDS,
    SEALED_MANIFEST_LIMIT_BYTES,
    SIGN_PURPOSE,
    SUITE,
    SealedManifest,
    bind,
    payload_context,
    sealed_size,
    verify_sealed,
    write_signatures,
)

NOW = 1_800_000_000
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture(scope="module")
def owner(key_ring):
    return key_ring("owner")[1]


@pytest.fixture(scope="module")
def client(key_ring):
    return key_ring("client")[1]


@pytest.fixture(scope="module")
def stated(owner, client):
    """A sound manifest of a package, as JSON; tests change it and sign it anew."""
    file = {"bytes": 5, "sealed_bytes": sealed_size(5), "sha256": DIGEST, "tensors_sha256": None}
    return {
        "format": "offsite/sealed/1",
        "suite": SUITE,
        "kind": "package",
        "job_id": "0" * 32,
        "issuer": owner.public.fingerprint,
        "recipients": [client.public.fingerprint],
        "created": NOW,
        "expires": NOW + 1000,
        "sequence": 1,
        "round": 0,
        "previous": None,
        "base_digest": DIGEST,
        "package_digest": DIGEST,
        "files": [
            {"name": name, "sealed_sha256": f"sha256:{number:064x}", **file}
            for number, name in enumerate(("config.json", "offsite.json"))
        ],
    }


def verify(raw, owner, *, now=NOW, signed=None):
    signatures = write_signatures(owner.public.fingerprint, owner.sign(SIGN_PURPOSE, signed or raw))
    return verify_sealed(raw, signatures, lambda _: owner.public, now=now)


def changed(stated, **changes):
    return json.dumps({**stated, **changes}).encode()


def test_a_sound_manifest_passes(stated, owner):
    manifest = verify(changed(stated), owner)
    assert manifest.model_dump(mode="json") == stated
    assert manifest.context(1) == b"offsite/v1/payload\0" + b"0" * 32 + b"\0package\0offsite.json\0\0\0\0\x01"
    assert payload_context("0" * 32, "package", "offsite.json", 1) == manifest.context(1)
    assert manifest.files[0].payload_name == "0" * 64 + ".enc"


def bad_file(stated, **changes):
    return {"files": [{**stated["files"][0], **changes}]}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": "offsite/sealed/2"}, WrongBinding),
        ({"format": None}, WrongBinding),
        ({"suite": "ed25519/x25519/cobblestone128"}, WrongBinding),
        ({"kind": "archive"}, BadSchema),
        ({"job_id": "0" * 31}, BadSchema),
        ({"recipients": []}, BadSchema),
        ({"recipients": ["x"]}, BadSchema),
        ({"expires": NOW}, BadSchema),
        ({"created": 1.5}, BadSchema),
        ({"created": True}, BadSchema),
        ({"sequence": 0}, BadSchema),
        ({"sequence": 2}, BadSchema),
        ({"previous": DIGEST}, BadSchema),
        ({"round": 1}, BadSchema),
        ({"round": -1}, BadSchema),
        ({"kind": "bundle"}, BadSchema),
        ({"base_digest": "md5:0"}, BadSchema),
        ({"files": []}, BadSchema),
        ({"extra": 1}, BadSchema),
    ],
)
def test_one_change_and_it_is_refused_although_signed(stated, owner, changes, error):
    with pytest.raises(error):
        verify(changed(stated, **changes), owner)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sealed_bytes": 5}, BadSchema),
        ({"bytes": -1}, BadSchema),
        ({"bytes": 2**60, "sealed_bytes": sealed_size(2**60)}, BadSchema),
        ({"tensors_sha256": DIGEST}, BadSchema),
        ({"name": "model.safetensors"}, BadSchema),
        ({"name": "adapter.safetensors", "tensors_sha256": DIGEST}, WrongNames),
        ({"name": "model.py"}, WrongNames),
        ({"name": "offsite.json", "bytes": 2**26, "sealed_bytes": sealed_size(2**26)}, TooLarge),
    ],
)
def test_one_change_of_a_file_and_it_is_refused_although_signed(stated, owner, change, error):
    with pytest.raises(error):
        verify(changed(stated, **bad_file(stated, **change)), owner)


def test_files_are_listed_once_and_in_order(stated, owner):
    first, second = stated["files"]
    for files in ([second, first], [first, first], [first, {**second, "sealed_sha256": first["sealed_sha256"]}]):
        with pytest.raises(BadSchema, match="distinct and in the order"):
            verify(changed(stated, files=files), owner)


def test_size_comes_first_then_signature_then_schema(stated, owner):
    with pytest.raises(TooLarge):
        verify(b"x" * (SEALED_MANIFEST_LIMIT_BYTES + 1), owner)
    with pytest.raises(BadSignature):
        verify(b"not even JSON", owner, signed=b"something else")
    with pytest.raises(BadSchema):
        verify(b"not even JSON", owner)


def test_who_signed_is_who_the_manifest_names(stated, owner, client):
    raw = changed(stated)
    with pytest.raises(BadSignature, match="another issuer"):
        verify(raw, client)

    def nobody(fingerprint):
        raise Untrusted(fingerprint)

    with pytest.raises(Untrusted):
        verify_sealed(raw, write_signatures(owner.public.fingerprint, owner.sign("sealed", raw)), nobody, now=NOW)


def test_a_signature_for_another_purpose_is_none(stated, owner):
    raw = changed(stated)
    signatures = write_signatures(owner.public.fingerprint, owner.sign("rotation", raw))
    with pytest.raises(BadSignature):
        verify_sealed(raw, signatures, lambda _: owner.public, now=NOW)


@pytest.mark.parametrize("now", [NOW - MAX_SKEW_SECONDS, NOW, NOW + 1000, NOW + 1000 + MAX_SKEW_SECONDS])
def test_dates_within_the_skew_pass(stated, owner, now):
    verify(changed(stated), owner, now=now)


@pytest.mark.parametrize("now", [NOW - MAX_SKEW_SECONDS - 1, NOW + 1000 + MAX_SKEW_SECONDS + 1])
def test_dates_beyond_the_skew_are_refused(stated, owner, now):
    with pytest.raises(Expired):
        verify(changed(stated), owner, now=now)


def test_no_kind_holds_code_pickles_or_archives():
    for pattern in KINDS.values():
        for name in (
            "a.py",
            "model.bin",
            "x.pkl",
            "x.pt",
            "x.npy",
            "x.zip",
            "x.tar",
            "x.html",
            "x.so",
            "a/offsite.json",
        ):
            assert not pattern.fullmatch(name)


def job_of(stated, **changes):
    settings = {
        "job_id": stated["job_id"],
        "owner": stated["issuer"],
        "client": stated["recipients"][0],
        "package_digest": DIGEST,
        "base_digest": DIGEST,
        "adapter": {"kind": "lora"},
        "rounds": 3,
        "created": NOW,
        "expires": NOW + 1000,
    }
    return Job.model_validate_json(json.dumps({**settings, **changes}))


@pytest.mark.parametrize(
    ("job", "manifest", "error", "message"),
    [
        ({}, {}, None, ""),
        ({"job_id": "1" * 32}, {}, WrongBinding, "belongs to job 000000000000, not 111111111111"),
        ({"package_digest": "sha256:" + "0" * 64}, {}, WrongBinding, "package_digest"),
        ({"base_digest": "sha256:" + "0" * 64}, {}, WrongBinding, "base_digest"),
        ({"expires": NOW + 999}, {}, WrongBinding, "beyond the end"),
        ({"rounds": 2}, {"kind": "report", "round": 3}, WrongBinding, "round 3, the job has 2"),
        ({}, {"kind": "bundle", "round": 1}, WrongBinding, "no such part"),
        ({"owner": "-".join(["aaaa"] * 13)}, {}, WrongBinding, "no such part"),
        ({"client": "-".join(["aaaa"] * 13)}, {}, WrongRecipient, "other party alone"),
        ({}, {"recipients": "both"}, WrongRecipient, "other party alone"),
    ],
)
def test_what_binds_it_to_its_job(stated, job, manifest, error, message):
    content = {**stated, **manifest}
    if manifest.get("recipients"):
        content["recipients"] = [stated["recipients"][0], stated["issuer"]]
    found = SealedManifest.model_validate_json(json.dumps(content))
    if error is None:
        bind(found, job_of(stated, **job))
        return
    with pytest.raises(error, match=message):
        bind(found, job_of(stated, **job))
