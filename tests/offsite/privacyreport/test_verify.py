"""What a verifier of privacy reports accepts, and tables of what it does not: changed, re-signed, stripped, swapped."""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from offsite import cli
from offsite.audits.gates import Release, bundle_gates
from offsite.digests import sha256_bytes
from offsite.errors import (
    ArtefactError,
    BadDigest,
    BadKey,
    BadSchema,
    BadSignature,
    ConfigError,
    Expired,
    Untrusted,
    WrongBinding,
    WrongNames,
)
from offsite.keys.trust import TrustStore
from offsite.privacyreport import verify as privacyverify
from offsite.privacyreport.config import ReportVerifyConfig
from offsite.privacyreport.page import page
from offsite.privacyreport.recompute import recompute
from offsite.privacyreport.record import (
    SIGN_PURPOSE,
    Audits,
    JobFacts,
    Limits,
    audit_digest,
    conclude,
    parse_report,
    report_raw,
)
from offsite.privacyreport.verify import verify
from offsite.sealed.manifest import write_signatures


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


s = _loaded("privacy_samples")


def signed(folder, raw, identity, *, purpose=SIGN_PURPOSE, issuer=None):
    """The folder holds these bytes, signed."""
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_bytes(raw)
    named = issuer or identity.public.fingerprint
    (folder / "report.signatures.json").write_bytes(write_signatures(named, identity.sign(purpose, raw)))


class Bench:
    """A client's report on a private run of a real bundle, what an owner needs to check it, and ways to change it."""

    def __init__(self, folder, parties, package, bundle):
        self.folder, (self.owner, self.client) = folder, parties
        self.package, self.bundle = package, bundle
        self.now = int(time.time())
        about = {"package_digest": package.digest, "base_digest": package.manifest.base_digest}
        run = s.run_record(s.claim(), bundle_digest=bundle.digest, **about)
        audit = s.bundle_audit(s.claim(), power=1.0, run=run)
        release = Release(
            bundle_digest=bundle.digest,
            sealed_digest=s.OTHER,
            audit=audit_digest(audit),
            gates=bundle_gates(audit),
            accepted_leakage=False,
            round=1,
        )
        job = JobFacts(job_id=s.JOB, digest=s.OTHER, owner=self.owner.fingerprint, client=self.client.fingerprint)
        self.made = conclude(
            issuer=self.client.fingerprint,
            created=self.now,
            audits=Audits(bundle=audit, plugged_in=None, package=None),
            release=release,
            job=job,
            limits=Limits(),
            recomputed=recompute(s.claim()),
            versions={"offsite": "0.1.0"},
        )
        self.report = folder / "report"
        signed(self.report, report_raw(self.made), self.client.identity)
        (self.report / "report.html").write_text(page(self.made), encoding="utf-8")

    def verify(self, report=None, **settings):
        given = {"report": report or self.report, "keys": self.owner.keys, **settings}
        return verify(ReportVerifyConfig(**given), now=self.now)

    def refused(self, error, match=None, **settings):
        with pytest.raises(error, match=match) as caught:
            self.verify(**settings)
        assert type(caught.value) is error, caught.value
        assert "\n" not in str(caught.value)
        assert str(self.folder) not in str(caught.value)

    def edit(self, change, *, sign=True, keep_page=False):
        stated = json.loads((self.report / "report.json").read_bytes())
        change(stated)
        raw = json.dumps(stated, indent=1).encode() + b"\n"
        if sign:
            signed(self.report, raw, self.client.identity)
        else:
            (self.report / "report.json").write_bytes(raw)
        if not keep_page:
            (self.report / "report.html").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory, key_ring, dropped_package, tiny_bundle):
    """One report for the whole module; tests change copies of it."""
    folder = tmp_path_factory.mktemp("bench")
    parties = []
    for name in ("owner", "client"):
        source, identity = key_ring(name)
        shutil.copytree(source, folder / f"{name}-keys")
        (folder / f"{name}-keys").chmod(0o700)
        keys, fingerprint = folder / f"{name}-keys", identity.public.fingerprint
        parties.append(SimpleNamespace(keys=keys, identity=identity, fingerprint=fingerprint))
    TrustStore(parties[0].keys).add(parties[1].identity.public.card, parties[1].fingerprint)
    return Bench(folder, tuple(parties), dropped_package, tiny_bundle)


@pytest.fixture
def bench(made, tmp_path):
    found = copy.copy(made)
    found.folder, found.report = tmp_path, tmp_path / "report"
    shutil.copytree(made.report, found.report)
    return found


def at(*keys, value=None, change=None):
    """Return a change of one field, deep inside."""

    def edit(stated):
        for key in keys[:-1]:
            stated = stated[key]
        stated[keys[-1]] = value if change is None else change(stated[keys[-1]])

    return edit


def both(*changes):
    def edit(stated):
        for change in changes:
            change(stated)

    return edit


def claims(**values):
    """Both places that state the claim are changed alike."""
    changes = [at("privacy", "claim", name, value=value) for name, value in values.items()]
    return both(*changes, *(at("audits", "bundle", "run", "claim", name, value=v) for name, v in values.items()))


def consistently(**values):
    """A liar's report: the claim is changed, and all that follows from it but the recomputed figures is made anew."""

    def edit(stated):
        claims(**values)(stated)
        report = parse_report(json.dumps(stated).encode())
        audits = report.audits
        gates = bundle_gates(audits.bundle)
        accepted = any(gate.verdict != "passed" for gate in gates)
        release = report.release.model_copy(
            update={"audit": audit_digest(audits.bundle), "gates": gates, "accepted_leakage": accepted}
        )
        again = conclude(
            issuer=report.issuer,
            created=report.created,
            audits=audits,
            release=release,
            job=report.job,
            limits=report.limits,
            recomputed=report.privacy.recomputed.model_copy(
                update={name: values[name] for name in ("epsilon", "epsilon_rdp", "epsilon_prv") if name in values}
            ),
            versions=report.versions,
        )
        stated.clear()
        stated.update(again.model_dump(mode="json"))

    return edit


# --- what is accepted


def test_a_sound_report_passes_every_check(bench, capsys):
    found, digest = bench.verify(bundle=bench.bundle.path, package=bench.package.path)
    assert found == bench.made
    assert digest == sha256_bytes((bench.report / "report.json").read_bytes())
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("ok  ") for line in lines)
    assert [line.split()[1] for line in lines] == (
        "folder issuer signatures schema about conclusions attestation epsilon page bundle package".split()
    )


def test_the_verb_prints_checks_and_one_json_line(bench, capsys):
    out = bench.folder / "out.html"
    words = ["report", "verify", str(bench.report), "--keys", str(bench.owner.keys), "--page", str(out)]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told["verified"] is True
    assert told["issuer"] == bench.client.fingerprint
    assert told["claim"]["epsilon"] == s.claim().epsilon
    assert told["headline"] in captured.err
    assert out.read_bytes() == (bench.report / "report.html").read_bytes()
    assert cli.run(words) == 2  # the page is not written over
    assert "output 'out.html' already exists" in capsys.readouterr().err


def test_a_rejection_is_one_line_exit_3_and_no_page(bench, capsys):
    bench.edit(at("headline", value="Perfectly private"), sign=False)
    words = ["report", "verify", str(bench.report), "--keys", str(bench.owner.keys), "--page", str(bench.folder / "o")]
    assert cli.run(words) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line for line in captured.err.splitlines() if line.startswith("offsite: error: ")] == [
        "offsite: error: the ed25519 signature over the privacy-report does not verify"
    ]
    assert not (bench.folder / "o").exists()


def test_without_a_page_it_is_said_and_not_missed(bench, capsys):
    (bench.report / "report.html").unlink()
    bench.verify()
    assert "no report.html here" in capsys.readouterr().err


def test_a_partys_own_report_verifies_with_its_own_keys(bench, capsys):
    bench.verify(keys=bench.client.keys)
    assert "the keys folder's own" in capsys.readouterr().err


def test_a_run_without_a_claim_asks_for_no_accountant(bench, monkeypatch, capsys):
    audit = s.bundle_audit()
    report = s.report(bundle=audit, issuer=bench.client.fingerprint, created=bench.now)
    shutil.rmtree(bench.report)
    signed(bench.report, report_raw(report), bench.client.identity)
    monkeypatch.setattr(privacyverify, "recompute", None)
    assert bench.verify()[0].headline.startswith("NOT DIFFERENTIALLY PRIVATE")
    assert "none is claimed" in capsys.readouterr().err


def test_the_owners_report_on_plugged_in_and_package_verifies_with_its_limits(bench):
    report = s.report(
        plugged=s.plugged_audit(),
        package=s.package_audit(),
        limits=Limits(max_recovery=0.4),
        issuer=bench.client.fingerprint,
        created=bench.now,
    )
    shutil.rmtree(bench.report)
    signed(bench.report, report_raw(report), bench.client.identity)
    assert bench.verify()[0].gates.package[0].verdict == "failed"
    bench.edit(at("limits", "max_recovery", value=0.9))
    bench.refused(ArtefactError, "gates is not what follows")


# --- what is not


BROKEN = {
    "no folder": (lambda b: shutil.rmtree(b.report), ArtefactError, "no report folder"),
    "no report": (lambda b: (b.report / "report.json").unlink(), ArtefactError, "holds no report.json"),
    "no signatures": (
        lambda b: (b.report / "report.signatures.json").unlink(),
        ArtefactError,
        "report.signatures.json",
    ),
    "a file more": (
        lambda b: (b.report / "notes.txt").write_text("x"),
        WrongNames,
        "no signature of the report covers ",
    ),
    "a hidden file": (lambda b: (b.report / ".x").write_text("x"), WrongNames, "no signature of the report covers "),
    "results beside it": (
        lambda b: (b.report / "results.json").write_text("{}"),
        WrongNames,
        "no signature of the report covers ",
    ),
    "a link": (
        lambda b: (
            (b.report / "report.json").rename(b.folder / "x") and (b.report / "report.json").symlink_to(b.folder / "x")
        ),
        ArtefactError,
        "holds no report.json",
    ),
    "a folder for a page": (
        lambda b: ((b.report / "report.html").unlink(), (b.report / "report.html").mkdir()),
        ArtefactError,
        "holds no report.html",
    ),
    "the page edited": (
        lambda b: (b.report / "report.html").write_text(page(b.made).replace("0 of 10", "9 of 10")),
        BadDigest,
        "report.html is not the page",
    ),
    "a blank more in the page": (
        lambda b: (b.report / "report.html").write_bytes(page(b.made).encode() + b" "),
        BadDigest,
        "report.html is not the page",
    ),
    "no page at all in it": (lambda b: (b.report / "report.html").write_bytes(b""), BadDigest, "report.html"),
    "a byte more": (
        lambda b: (b.report / "report.json").write_bytes((b.report / "report.json").read_bytes() + b"\n"),
        BadSignature,
        "ed25519",
    ),
    "not JSON, signed": (lambda b: signed(b.report, b"{", b.client.identity), BadSchema, "not JSON"),
    "a key twice, signed": (
        lambda b: signed(b.report, b'{"format": "a", "format": "a"}', b.client.identity),
        BadSchema,
        "distinct keys",
    ),
    "signed for another purpose": (
        lambda b: signed(b.report, (b.report / "report.json").read_bytes(), b.client.identity, purpose="sealed"),
        BadSignature,
        "ed25519",
    ),
    "signed by somebody else in its name": (
        lambda b: signed(
            b.report, (b.report / "report.json").read_bytes(), b.owner.identity, issuer=b.client.fingerprint
        ),
        BadSignature,
        "ed25519",
    ),
    "signed by another trusted key": (
        lambda b: signed(b.report, (b.report / "report.json").read_bytes(), b.owner.identity),
        WrongBinding,
        "another issuer",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused(case, bench):
    change, error, match = BROKEN[case]
    change(bench)
    bench.refused(error, match)


def strip(name):
    def change(stated):
        del stated[name]

    return change


SIGNATURES = {
    "ed25519 stripped": (strip("ed25519"), BadSignature),
    "mldsa65 stripped": (strip("mldsa65"), BadSignature),
    "mldsa65 of zeros": (at("mldsa65", value=base64.b64encode(bytes(3309)).decode()), BadSignature),
    "ed25519 of zeros": (at("ed25519", value=base64.b64encode(bytes(64)).decode()), BadSignature),
    "mldsa65 cut": (at("mldsa65", value=base64.b64encode(bytes(64)).decode()), BadSignature),
    "another format": (at("format", value="offsite/signatures/2"), WrongBinding),
    "a stranger": (at("issuer", value=s.ISSUER), Untrusted),
    "a key more": (at("more", value="x"), BadSchema),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_signatures_that_were_touched_are_refused(case, bench):
    change, error = SIGNATURES[case]
    path = bench.report / "report.signatures.json"
    stated = json.loads(path.read_bytes())
    change(stated)
    path.write_bytes(json.dumps(stated, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    bench.refused(error)


def test_one_character_anywhere_in_the_report_breaks_the_signature(bench):
    raw = (bench.report / "report.json").read_bytes()
    for place in range(0, len(raw), max(1, len(raw) // 40)):
        changed = bytearray(raw)
        changed[place] ^= 1
        (bench.report / "report.json").write_bytes(bytes(changed))
        bench.refused(BadSignature)


OTHER_KEY = "-".join(["ffff"] * 13)
FIELDS = {
    "headline": (at("headline", value="Perfectly private"), ArtefactError, "headline is not what follows"),
    "format": (at("format", value="offsite/privacy-report/2"), WrongBinding, "privacy-report/2"),
    "issuer": (at("issuer", value=OTHER_KEY), WrongBinding, "another issuer"),
    "role": (at("role", value="owner"), ArtefactError, "role is not what follows"),
    "created, later": (at("created", value=2**39), Expired, "in the future"),
    "job's client": (at("job", "client", value=OTHER_KEY), WrongBinding, "is not the client"),
    "job's id": (at("job", "job_id", value="cd" * 16), WrongBinding, "the audited run was of job"),
    "digest of the bundle": (at("digests", "bundle", value=s.OTHER), ArtefactError, "digests is not"),
    "digest of the package": (at("digests", "package", value=s.OTHER), ArtefactError, "digests is not"),
    "digest of the audit": (at("digests", "audits", "bundle", value=s.OTHER), ArtefactError, "digests is not"),
    "accepted": (at("accepted_leakage", value=True), ArtefactError, "accepted_leakage is not"),
    "accepted, never asked": (at("accepted_leakage", value=None), ArtefactError, "accepted_leakage is not"),
    "a verdict": (at("gates", "bundle", 0, "verdict", value="failed"), ArtefactError, "gates is not"),
    "a gate's words": (at("gates", "bundle", 0, "told", value="nothing at all"), ArtefactError, "gates is not"),
    "a gate's limit": (at("gates", "bundle", 1, "limit", value=9.0), ArtefactError, "gates is not"),
    "a gate removed": (at("gates", "bundle", change=lambda found: found[1:]), ArtefactError, "gates is not"),
    "no gates": (at("gates", "bundle", value=[]), ArtefactError, "gates is not"),
    "limits": (at("limits", "max_union", value=0.5), BadSchema, "limits of a package"),
    "the release's bundle": (at("release", "bundle_digest", value=s.OTHER), WrongBinding, "different bundles"),
    "the release's audit": (at("release", "audit", value=s.OTHER), WrongBinding, "another audit"),
    "the release's gates": (at("release", "gates", value=[]), WrongBinding, "not those of the audit"),
    "the release's acceptance": (at("release", "accepted_leakage", value=True), WrongBinding, "of its own gates"),
    "a non-claim": (at("non_claims", 1, value="It is all safe."), ArtefactError, "non_claims is not"),
    "a non-claim removed": (at("non_claims", change=lambda found: found[:-1]), ArtefactError, "non_claims is not"),
    "what is not accounted for": (at("privacy", "not_accounted", value="Nothing."), ArtefactError, "privacy is not"),
    "epsilon of the claim shown": (at("privacy", "claim", "epsilon", value=0.1), ArtefactError, "privacy is not"),
    "no privacy": (at("privacy", value=None), WrongBinding, "quotes a claim that it does not state"),
    "no claim": (at("audits", "bundle", "run", "claim", value=None), WrongBinding, "states one it does not quote"),
    "an area": (
        at(
            "audits",
            "bundle",
            "membership",
            0,
            "auc",
            value={"value": 0.5, "low": 0.5, "high": 0.5, "confidence": 0.95},
        ),
        ArtefactError,
        "the area of 'loss' is stated as 0.5",
    ),
    "an interval out of order": (
        at("audits", "bundle", "membership", 0, "auc", "low", value=0.9),
        BadSchema,
        "outside of its interval",
    ),
    "a curve": (
        at("audits", "bundle", "membership", 0, "roc", change=lambda points: [[0.0, 0.0], [0.5, 0.5]]),
        ArtefactError,
        "does not go from",
    ),
    "the bound": (at("audits", "bundle", "canaries", "bound", "epsilon", value=0.3), ArtefactError, "bound on epsilon"),
    "the ceiling": (at("audits", "bundle", "canaries", "bound", "ceiling", value=9.0), ArtefactError, "the ceiling"),
    "other canaries": (at("audits", "bundle", "run", "canaries", value=s.OTHER), WrongBinding, "different canaries"),
    "secrets read out": (
        at("audits", "bundle", "canaries", "exposure", "num_extracted_greedy", value=5),
        WrongBinding,
        "another audit than the one quoted",
    ),
    "retunings added": (
        at("audits", "bundle", "retuned", value=s.retuned().model_dump(mode="json")),
        WrongBinding,
        "another audit than the one quoted",
    ),
    "retunings with other guesses": (
        at("audits", "bundle", "retuned", value={**s.retuned().model_dump(mode="json"), "num_rows": 400}),
        ArtefactError,
        "fair coins do not fall so|the coins give",
    ),
    "another audit's bundle": (
        at("audits", "bundle", "run", "bundle_digest", value=s.OTHER),
        WrongBinding,
        "different bundles",
    ),
    "an audit of something else": (
        at("audits", "plugged_in", value=s.plugged_audit().model_dump(mode="json")),
        WrongBinding,
        "different bundles",
    ),
    "an audit of no kind": (at("audits", "bundle", "kind", value="plugged-in"), BadSchema, "kind"),
    "no audit": (at("audits", "bundle", value=None), BadSchema, "no audit"),
    "a key that nobody knows": (at("approved", value=True), BadSchema, "approved"),
    "a figure that is text": (at("created", value="today"), BadSchema, "created"),
    "a figure that is none": (at("privacy", "claim", "epsilon", value=float("nan")), BadSchema, "not JSON"),
    "epsilon": (consistently(epsilon=0.1), ArtefactError, "epsilon is stated as 0.1"),
    "epsilon by PRV": (consistently(epsilon_prv=0.1), ArtefactError, "epsilon_prv is stated"),
    "epsilon by RDP": (consistently(epsilon_rdp=0.1), ArtefactError, "epsilon_rdp is stated"),
    "delta": (consistently(delta=1e-5, delta_total=1e-5), ArtefactError, "is stated as"),
    "noise": (consistently(noise_multiplier=1.6), ArtefactError, "epsilon is stated"),
    "hardly any noise": (consistently(noise_multiplier=0.01), ArtefactError, "no meaningful guarantee"),
    "rate": (consistently(sample_rate=0.05), ArtefactError, "epsilon is stated"),
    "more steps than are accounted for": (claims(steps=10**6 + 1), BadSchema, "steps"),
    "steps": (consistently(steps=5), ArtefactError, "epsilon is stated"),
    "the total": (consistently(epsilon_total=0.2), ArtefactError, "is below .* of this one"),
    "the total of several": (consistently(epsilon_total=0.2, num_runs=2), ArtefactError, "is below .* of this one"),
    "the number of runs": (consistently(epsilon_total=1.0), ArtefactError, "of the only run"),
    "the total's delta": (consistently(delta_total=0.5), ArtefactError, "is above this run's"),
    "a point of the curve": (
        at("privacy", "recomputed", "over_steps", 2, "epsilon", value=0.01),
        ArtefactError,
        "over_steps at step 3",
    ),
    "points left out": (
        at("privacy", "recomputed", "over_steps", change=lambda points: points[-1:]),
        ArtefactError,
        "at other steps",
    ),
    "what was recomputed": (at("privacy", "recomputed", "epsilon_rdp", value=0.1), ArtefactError, "recomputed.epsilon"),
    "what was recomputed at the total's delta": (
        at("privacy", "recomputed", "epsilon_at_delta_total", value=0.1),
        ArtefactError,
        "recomputed.epsilon_at",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_every_field_that_was_changed_is_refused_with_and_without_new_signatures(case, bench):
    change, error, match = FIELDS[case]
    before = (bench.report / "report.json").read_bytes()
    bench.edit(change, sign=False)
    assert (bench.report / "report.json").read_bytes() != before
    bench.refused(BadSignature)
    (bench.report / "report.json").write_bytes(before)
    bench.edit(change)
    bench.refused(error, match)


def test_what_is_only_stated_can_be_signed_anew_but_the_page_shows_it(bench):
    """The issuer's own date and versions bind nobody but the issuer; a page from before does not fit them."""
    bench.edit(at("created", value=bench.now - 60), keep_page=True)
    bench.refused(BadDigest, "report.html is not the page")
    (bench.report / "report.html").unlink()
    bench.verify()


def test_another_version_is_named_where_its_words_differ(bench):
    bench.edit(both(at("versions", "offsite", value="0.0.9"), at("non_claims", 0, value="other words")))
    with pytest.raises(ArtefactError) as caught:
        bench.verify()
    assert caught.value.hint.startswith("made by offsite 0.0.9, this is ")


def test_without_the_accountants_nothing_is_verified(bench, monkeypatch):
    def missing():
        raise ConfigError("--dp needs the library 'opacus', which is not installed", hint="pip install it")

    monkeypatch.setattr("offsite.privacyreport.recompute.require_extra", missing)
    bench.refused(ConfigError, "epsilon cannot be recomputed here")


# --- whose it is


def test_an_issuer_that_is_not_pinned_or_no_longer_is_refused(bench, make_party):
    stranger = make_party("auditor")
    bench.refused(Untrusted, "is not pinned here", keys=stranger.keys)
    store = TrustStore(stranger.keys)
    store.add(bench.client.identity.public.card, bench.client.fingerprint)
    bench.verify(keys=stranger.keys)
    store.revoke(bench.client.fingerprint)
    bench.refused(Untrusted, "is revoked", keys=stranger.keys)
    bench.refused(ConfigError, "no keys folder", keys=bench.folder / "nowhere")


def test_an_auditor_without_keys_gives_a_card_and_its_fingerprint(bench, make_party, capsys):
    card, nowhere = bench.folder / "client.card.json", bench.folder / "nowhere"
    card.write_bytes(bench.client.identity.public.card)
    given = {"card": card, "fingerprint": bench.client.fingerprint.upper(), "keys": nowhere}
    bench.verify(**given)
    assert "the card that was given" in capsys.readouterr().err
    bench.refused(Untrusted, "not the one given", **{**given, "fingerprint": s.ISSUER})
    owners = bench.folder / "owner.card.json"
    owners.write_bytes(bench.owner.identity.public.card)
    bench.refused(Untrusted, "the card is another's", card=owners, fingerprint=bench.owner.fingerprint, keys=nowhere)
    bench.refused(BadKey, None, **{**given, "card": bench.folder / "none.json"})
    keys = make_party("auditor").keys
    TrustStore(keys).add(bench.client.identity.public.card, bench.client.fingerprint)
    TrustStore(keys).revoke(bench.client.fingerprint)
    bench.refused(Untrusted, "is revoked", **{**given, "keys": keys})  # a card is no way around it


def test_a_card_past_its_date_is_refused(bench):
    card = bench.folder / "client.card.json"
    card.write_bytes(bench.client.identity.public.card)
    given = {"card": card, "fingerprint": bench.client.fingerprint, "keys": bench.folder / "nowhere"}
    bench.now += 40 * 86400
    bench.refused(Untrusted, "is expired", **given)
    bench.refused(Untrusted, "is expired", keys=bench.client.keys)
    bench.refused(Untrusted, "is expired")


@pytest.mark.parametrize("words", [["--card", "x.json"], ["--fingerprint", s.ISSUER]])
def test_a_card_without_a_fingerprint_is_a_wrong_call(bench, words, capsys):
    assert cli.run(["report", "verify", str(bench.report), *words]) == 2
    assert "--card and --fingerprint are given together" in capsys.readouterr().err


# --- what it is about


def test_another_bundle_or_package_is_refused(bench, narrow_package, tamper):
    bench.refused(WrongBinding, "the report is about package", package=narrow_package.path)
    other = tamper(bench.bundle.path, edit=lambda stated: stated["adapter"].update(alpha=4.0))
    bench.refused(WrongBinding, "the report is about bundle", bundle=other)
    bench.refused(WrongBinding, "is no bundle", bundle=bench.package.path)
    bench.refused(WrongBinding, "is no package", package=bench.bundle.path)
    changed = bench.folder / "changed"
    shutil.copytree(bench.bundle.path, changed)
    with (changed / "adapter.safetensors").open("ab") as handle:
        handle.write(b" ")
    bench.refused(BadDigest, "adapter.safetensors", bundle=changed)
