"""A TPM's quote against a policy: what is accepted, and a table of what is not; each row is one change, signed anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from tpm_lab import VALUES, Quoted, attestation_key, pem, policy, selection, signed

from offsite.attestation.evidence import NoAttestation, TpmQuote, nonce_for, quoted
from offsite.attestation.policy import read_policy, require_bound, require_trusted
from offsite.errors import BadSchema, BadSignature, ConfigError, TooLarge, WrongBinding

VECTOR = Path(__file__).parents[2] / "vectors" / "attestation"
NONCE = nonce_for(b"the body of a report")


@pytest.fixture(scope="module")
def keys():
    return {kind: attestation_key(kind) for kind in ("rsa", "ec")}


@pytest.fixture
def read(tmp_path):
    def read(stated):
        (tmp_path / "policy.json").write_text(stated if isinstance(stated, str) else json.dumps(stated))
        return read_policy(tmp_path / "policy.json")

    return read


@pytest.mark.parametrize("kind", ["rsa", "ec"])
def test_a_quote_of_the_policys_tpm_about_this_report_is_taken(kind, keys, read):
    raw = Quoted(NONCE).raw()
    quote = require_trusted(quoted(raw, signed(keys[kind], raw)), NONCE, read(policy(keys[kind])))
    assert (quote.pcrs, quote.reset_count, quote.safe) == (tuple(VALUES), 17, True)


@pytest.mark.parametrize("number", [0, 1])
def test_the_quotes_of_the_vector_are_taken_for_ever(number, read):
    stated = json.loads((VECTOR / "quotes.json").read_text())[number]
    quote = TpmQuote(attest=stated["attest"], signature=stated["signature"])
    assert bytes.fromhex(stated["nonce"]) == nonce_for(b"vector")
    found = require_trusted(quote, nonce_for(b"vector"), read(stated["policy"]))
    assert found.pcrs == (0, 2, 7, 11)


QUOTES = {
    "another nonce": ({"nonce": nonce_for(b"another report")}, WrongBinding, "was made for"),
    "the nonce cut short": ({"nonce": NONCE[:31]}, WrongBinding, "was made for"),
    "no nonce": ({"nonce": b""}, WrongBinding, "was made for nothing"),
    "a nonce beyond the limit": ({"nonce": bytes(67)}, BadSchema, "at most 66"),
    "not made by a TPM itself": ({"magic": 0xFF544346}, BadSchema, "does not begin"),
    "a certificate of a key, no quote": ({"kind": 0x8017}, BadSchema, "of type 0x8017"),
    "a name beyond the limit": ({"signer": bytes(69)}, BadSchema, "at most 68"),
    "other values": ({"values": {**VALUES, 7: "c8" * 32}}, WrongBinding, "other values than the policy"),
    "another digest": ({"digest": bytes(32)}, WrongBinding, "other values than the policy"),
    "a digest of another hash": ({"digest": bytes(48)}, BadSchema, "a digest of 48 bytes"),
    "a PCR less": ({"pcrs": (0, 2, 7)}, WrongBinding, "of PCRs 0,2,7, the policy asks for 0,2,7,11"),
    "a PCR more": (
        {"pcrs": (0, 2, 7, 11, 14), "values": {**VALUES, 14: "00" * 32}},
        WrongBinding,
        "of PCRs 0,2,7,11,14",
    ),
    "no PCR": ({"banks": [selection(())]}, BadSchema, "no PCR is selected"),
    "PCRs of sha1": ({"banks": [selection(VALUES, bank=0x0004)]}, BadSchema, "of bank 0x0004"),
    "PCRs of two banks": ({"banks": [selection(VALUES)] * 2}, BadSchema, "of 2 banks"),
    "a selection of another size": ({"banks": [selection(VALUES, num=4)]}, BadSchema, "4 bytes of selected"),
    "a clock neither safe nor not": ({"safe": 2}, BadSchema, "neither yes nor no"),
    "bytes after its end": ({"after": b"\0"}, BadSchema, "1 byte.s. after its end"),
}


@pytest.mark.parametrize("change", QUOTES)
def test_row_39_a_quote_that_is_signed_and_says_something_else_is_refused(change, keys, read):
    fields, error, message = QUOTES[change]
    raw = replace(Quoted(NONCE), **fields).raw()
    with pytest.raises(error, match=message) as caught:
        require_trusted(quoted(raw, signed(keys["ec"], raw)), NONCE, read(policy(keys["ec"])))
    assert type(caught.value) is error


def test_row_39_a_quote_cut_short_anywhere_is_refused(keys, read):
    raw, policy_ = Quoted(NONCE).raw(), read(policy(keys["ec"]))
    for end in range(1, len(raw)):
        with pytest.raises(BadSchema, match=r"too early|does not begin|expected"):
            require_trusted(quoted(raw[:end], signed(keys["ec"], raw[:end])), NONCE, policy_)


def test_row_39_a_quote_with_any_bit_changed_is_refused(keys, read):
    raw, policy_ = Quoted(NONCE).raw(), read(policy(keys["ec"]))
    signature = signed(keys["ec"], raw)
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        with pytest.raises((BadSchema, BadSignature, WrongBinding)):
            require_trusted(quoted(changed, signature), NONCE, policy_)


SIGNATURES = {
    "of other bytes": (lambda keys, raw: signed(keys["rsa"], raw + b"\0"), BadSignature, "was not signed by"),
    "by another key": (lambda keys, raw: signed(attestation_key("rsa"), raw), BadSignature, "was not signed by"),
    "by a key of another kind": (lambda keys, raw: signed(keys["ec"], raw), BadSignature, "another kind of key"),
    "of another scheme": (lambda keys, raw: signed(keys["rsa"], raw, scheme=0x0016), BadSignature, "scheme 0x0016"),
    "said to be HMAC": (lambda keys, raw: signed(keys["rsa"], raw, scheme=0x0005), BadSignature, "scheme 0x0005"),
    "with SHA-1": (lambda keys, raw: signed(keys["rsa"], raw, digest=0x0004), BadSignature, "hash 0x0004"),
    "cut short": (lambda keys, raw: signed(keys["rsa"], raw)[:-1], BadSchema, "too early"),
    "with a byte more": (lambda keys, raw: signed(keys["rsa"], raw) + b"\0", BadSchema, "after its end"),
    "empty": (lambda keys, raw: b"\0" * 3, BadSchema, "too early"),
}


@pytest.mark.parametrize("change", SIGNATURES)
def test_row_39_a_signature_that_is_not_the_pinned_keys_is_refused(change, keys, read):
    make, error, message = SIGNATURES[change]
    raw = Quoted(NONCE).raw()
    with pytest.raises(error, match=message) as caught:
        require_trusted(quoted(raw, make(keys, raw)), NONCE, read(policy(keys["rsa"])))
    assert type(caught.value) is error


def test_without_evidence_a_policy_is_not_met_and_nothing_is_bound(keys, read):
    for nothing in (None, NoAttestation()):
        assert require_bound(nothing, NONCE) is None
        with pytest.raises(WrongBinding, match="states no attestation"):
            require_trusted(nothing, NONCE, read(policy(keys["ec"])))


def test_base64_has_one_form():
    raw = Quoted(NONCE).raw()
    text = quoted(raw, b"0000").attest
    other = TpmQuote(
        attest=text.rstrip("=") + "=" if not text.endswith("=") else text[:-2] + "B=", signature="MDAwMA=="
    )
    with pytest.raises(BadSchema, match="one form"):
        require_bound(other, NONCE)


POLICIES = {
    "another format": ({"format": "offsite/attestation-policy/2"}, WrongBinding),
    "another kind": ({"kind": "sev-snp"}, BadSchema),
    "an unknown key": ({"debug": True}, BadSchema),
    "no PCR": ({"pcrs": {}}, BadSchema),
    "a PCR that there is not": ({"pcrs": {"24": "00" * 32}}, BadSchema),
    "a PCR written otherwise": ({"pcrs": {"07": "00" * 32}}, BadSchema),
    "a value of another hash": ({"pcrs": {"7": "00" * 20}}, BadSchema),
}


@pytest.mark.parametrize("change", POLICIES)
def test_a_policy_of_another_form_is_refused(change, keys, read):
    fields, error = POLICIES[change]
    with pytest.raises(error):
        read({**policy(keys["ec"]), **fields})


@pytest.mark.parametrize(
    "ak",
    [
        "not a key",
        pem(rsa.generate_private_key(65537, 1024)),
        pem(ec.generate_private_key(ec.SECP256K1())),
        pem(ec.generate_private_key(ec.SECP521R1())),
    ],
)
def test_a_key_too_weak_or_of_another_kind_pins_nothing(ak, keys, read):
    with pytest.raises(BadSchema, match="policy: ak is"):
        _ = read({**policy(keys["ec"]), "ak": ak}).key


def test_a_policy_that_is_missing_or_too_large_is_told(read, tmp_path):
    with pytest.raises(ConfigError, match="no policy named"):
        read_policy(tmp_path / "none.json")
    with pytest.raises(TooLarge):
        read(" " * (64 * 2**10 + 1))
