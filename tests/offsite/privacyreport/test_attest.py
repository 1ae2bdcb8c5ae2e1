"""Evidence in a privacy report: a signed "none", or a quote that fits one report and is believed by policy alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tpm_lab import Quoted, attestation_key, policy, signed

from offsite import cli
from offsite.attestation.evidence import quoted
from offsite.audits.record import write_audit
from offsite.privacyreport.record import SIGN_PURPOSE, nonce_of, parse_report, report_raw, with_quote
from offsite.sealed.manifest import write_signatures


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


s = _loaded("privacy_samples")
KEY = attestation_key("ec")


@pytest.fixture
def desk(parties, tmp_path, capsys):
    """A client's report in the folder, a policy, and commands on them."""
    owner, client = parties

    def run(group, verb, *words, flags=(), code=0):
        given = [str(tmp_path / word) if "." in word or word in NAMES else word for word in words]
        found = cli.run([group, verb, *given, *flags])
        told = capsys.readouterr()
        assert found == code, told.err
        return json.loads(told.out.splitlines()[-1]) if code == 0 else told.err

    run.said = capsys.readouterr
    run.owner, run.client = owner, client
    write_audit(tmp_path / "audit", s.bundle_audit(membership=s.bundle_audit().membership[:1], canaries=None))
    run("report", "privacy", "--audit", "audit", "-o", "report", flags=client.flags)
    (tmp_path / "policy.json").write_text(json.dumps(policy(KEY)))
    return run


NAMES = {"audit", "report", "attested", "other"}
VERIFY = ("report", "verify")


def quote_for(desk, tmp_path, name="report", key=KEY, nonce=None):
    told = desk("report", "attest", name, flags=desk.client.flags)
    raw = Quoted(bytes.fromhex(nonce or told["nonce"])).raw()
    (tmp_path / "quote.msg").write_bytes(raw)
    (tmp_path / "quote.sig").write_bytes(signed(key, raw))
    return ("--quote", "quote.msg", "--quote-signature", "quote.sig", "-o", "attested")


def keys(party):
    return ["--keys", str(party.keys)]


def test_a_report_says_none_and_that_is_signed(desk, tmp_path):
    stated = json.loads((tmp_path / "report" / "report.json").read_bytes())
    assert stated["attestation"] == {"kind": "none"}
    assert any(sentence.startswith("No trusted hardware and no attestation") for sentence in stated["non_claims"])
    told = desk(*VERIFY, "report", flags=keys(desk.owner))
    assert (told["attestation"], told["attestation_verified"]) == ("none", False)
    flags = [*keys(desk.owner), "--attestation-policy", str(tmp_path / "policy.json")]
    assert "the report states no attestation" in desk(*VERIFY, "report", flags=flags, code=3)
    assert "none: whose keys signed is known" in (tmp_path / "report" / "report.html").read_text()


def test_a_report_of_an_earlier_version_verifies_as_ever(desk, tmp_path):
    report = parse_report((tmp_path / "report" / "report.json").read_bytes())
    raw = report_raw(report.model_copy(update={"attestation": None}))
    assert b'attestation":' not in raw
    sign(tmp_path / "report", raw, desk.client)
    assert desk(*VERIFY, "report", flags=keys(desk.owner))["attestation"] is None


def sign(folder, raw, party):
    (folder / "report.json").write_bytes(raw)
    signatures = party.identity.sign(SIGN_PURPOSE, raw)
    (folder / "report.signatures.json").write_bytes(write_signatures(party.fingerprint, signatures))
    (folder / "report.html").unlink(missing_ok=True)


def test_a_quote_is_bound_to_the_report_and_believed_by_policy_alone(desk, tmp_path):
    words = quote_for(desk, tmp_path)
    assert desk("report", "attest", "report", *words, flags=desk.client.flags)["attestation"] == "tpm2-quote"
    before, after = (json.loads((tmp_path / name / "report.json").read_bytes()) for name in ("report", "attested"))
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"attestation", "non_claims"}
    told = desk(*VERIFY, "attested", flags=keys(desk.owner))
    assert (told["verified"], told["attestation_verified"]) == (True, False)
    flags = [*keys(desk.owner), "--attestation-policy", str(tmp_path / "policy.json")]
    assert desk(*VERIFY, "attested", flags=flags)["attestation_verified"] is True
    assert (
        desk("report", "attest", "attested", flags=desk.client.flags)["nonce"]
        == nonce_of(parse_report((tmp_path / "report" / "report.json").read_bytes())).hex()
    )


def test_row_39_a_quote_of_another_report_or_another_tpm_is_refused(desk, tmp_path):
    words = quote_for(desk, tmp_path, nonce="00" * 32)
    assert "was made for" in desk("report", "attest", "report", *words, flags=desk.client.flags, code=3)
    assert not (tmp_path / "attested").exists()
    report = parse_report((tmp_path / "report" / "report.json").read_bytes())
    raw = Quoted(nonce_of(report)).raw()
    good = with_quote(report, quoted(raw, signed(KEY, raw)))
    later = good.model_copy(
        update={"created": report.created - 1}
    )  # the quote, moved to another report of the issuer's
    sign(tmp_path / "report", report_raw(later), desk.client)
    assert "was made for" in desk(*VERIFY, "report", flags=keys(desk.owner), code=3)
    foreign = with_quote(report, quoted(raw, signed(attestation_key("ec"), raw)))
    sign(tmp_path / "report", report_raw(foreign), desk.client)
    flags = [*keys(desk.owner), "--attestation-policy", str(tmp_path / "policy.json")]
    assert "was not signed by the attestation key" in desk(*VERIFY, "report", flags=flags, code=3)


def test_a_report_with_a_quote_does_not_say_that_there_is_none(desk, tmp_path):
    report = parse_report((tmp_path / "report" / "report.json").read_bytes())
    raw = Quoted(nonce_of(report)).raw()
    quiet = report.model_copy(update={"attestation": quoted(raw, signed(KEY, raw))})
    sign(tmp_path / "report", report_raw(quiet), desk.client)
    assert "non_claims is not what follows" in desk(*VERIFY, "report", flags=keys(desk.owner), code=3)


def test_a_quote_and_its_signature_that_were_swapped_are_told_apart(desk, tmp_path):
    quote_for(desk, tmp_path)
    swapped = ("--quote", "quote.sig", "--quote-signature", "quote.msg", "-o", "attested")
    err = desk("report", "attest", "report", *swapped, flags=desk.client.flags, code=3)
    assert "does not begin as what a TPM made itself" in err
    assert "are --quote and --quote-signature swapped?" in err
    (tmp_path / "quote.msg").write_bytes(b"{}")
    err = desk("report", "attest", "report", *swapped, flags=desk.client.flags, code=3)
    assert "swapped" not in err
    assert not (tmp_path / "attested").exists()


def test_only_the_issuer_adds_to_its_report_and_all_parts_are_given(desk, tmp_path):
    words = quote_for(desk, tmp_path)
    assert "not the keys that signed" in desk("report", "attest", "report", *words, flags=desk.owner.flags, code=3)
    assert "given together" in desk("report", "attest", "report", *words[:2], flags=desk.client.flags, code=2)
    (tmp_path / "quote.sig").write_bytes(b"\0" * 5000)
    desk("report", "attest", "report", *words, flags=desk.client.flags, code=3)
    assert not (tmp_path / "attested").exists()
