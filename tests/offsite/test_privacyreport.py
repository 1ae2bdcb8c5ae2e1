"""The privacy report: what follows from its audits, what it refuses to put together, and the verb that issues it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from offsite import cli, recompute
from offsite.audit import write_audit
from offsite.errors import ArtefactError, BadSchema, BadSignature, ConfigError, WrongBinding
from offsite.gates import Release, bundle_gates, unmeasured
from offsite.job import write_job
from offsite.keys import Signatures
from offsite.privacypage import page
from offsite.privacyreport import (
    Audits,
    JobFacts,
    Limits,
    audit_digest,
    parse_report,
    read_form,
    report_raw,
    schema,
)
from offsite.privacywords import NOT_PRIVATE, upper, upper_delta
from offsite.sealed import write_signatures
from offsite.strictjson import write_compact

ROOT = Path(__file__).parent.parent.parent


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


s = _loaded("privacy_samples")


def release(audit=None, /, **changes):
    gates = bundle_gates(audit) if audit else unmeasured()
    given = {
        "bundle_digest": s.BUNDLE,
        "sealed_digest": "sha256:" + "5" * 64,
        "audit": audit_digest(audit) if audit else None,
        "gates": gates,
        "accepted_leakage": any(gate.verdict != "passed" for gate in gates),
        "round": 1,
    }
    return Release(**{**given, **changes})


def facts(**changes):
    given = {"job_id": s.JOB, "digest": s.OTHER, "owner": "-".join(["eeee"] * 13), "client": s.ISSUER}
    return JobFacts(**{**given, **changes})


# --- the published schema


def test_the_published_schema_is_the_models():
    stated = (ROOT / "docs" / "schema" / "privacy-report-1.json").read_text(encoding="ascii")
    assert stated == json.dumps(schema(), indent=1, sort_keys=True) + "\n"


def test_what_is_written_is_what_is_read_and_the_first_line_comes_first():
    report = s.report(bundle=s.bundle_audit(s.made_up_claim()), package=s.package_audit())
    raw = report_raw(report)
    assert parse_report(raw) == report
    assert raw.decode("ascii").splitlines()[1].startswith(' "headline": "Differentially private per example')
    assert raw == report_raw(s.report(bundle=s.bundle_audit(s.made_up_claim()), package=s.package_audit()))


def test_the_digest_of_an_audit_is_that_of_its_file(tmp_path):
    for name, audit in (("a", s.bundle_audit()), ("b", s.plugged_audit()), ("c", s.package_audit())):
        assert write_audit(tmp_path / name, audit) == audit_digest(audit)


# --- what follows


def test_a_run_without_a_claim_is_called_what_it_is_first_of_all():
    report = s.report(bundle=s.bundle_audit())
    assert report.headline.startswith(NOT_PRIVATE + ":")
    assert report.privacy is None
    assert report.role == "client"
    assert any("no figure here is a bound" in sentence for sentence in report.non_claims)


def test_a_claim_is_told_with_delta_unit_and_all_runs_never_smaller_than_it_is():
    report = s.report(bundle=s.bundle_audit(s.made_up_claim(epsilon=2.99910001)))
    assert report.headline == (
        "Differentially private per example, as claimed: epsilon 3.000 at delta 0.00051; 4.512 in all of 2 runs"
    )
    assert "2 runs are on record" in report.privacy.not_accounted
    per_user = s.made_up_claim(unit="user", rows_per_user=3, num_runs=1)
    assert "per user of at most 3 rows" in s.report(bundle=s.bundle_audit(per_user)).headline
    assert [upper(value) for value in (1.0, 1.0001, 0.99901, 7.25)] == ["1.000", "1.001", "1.000", "7.250"]
    for delta in (1e-3, 5.01e-4, 1 / 3, 1e-9, 9.99e-6, 5e-324):
        assert float(upper_delta(delta)) >= delta * (1 - 1e-9)


@pytest.mark.parametrize(
    ("changes", "canary", "start"),
    [
        ({}, {"epsilon": 5.5}, "CLAIM OF DIFFERENTIAL PRIVACY REFUTED: an attack shows epsilon of at least 5.50"),
        ({"budget": 4.0}, {}, "PRIVACY BUDGET EXCEEDED: epsilon 4.512 spent of 4.000"),
        ({"epsilon": 12.0}, {}, "HARDLY DIFFERENTIALLY PRIVATE"),
    ],
)
def test_a_claim_that_does_not_stand_is_not_told_as_one(changes, canary, start):
    audit = s.bundle_audit(s.made_up_claim(**changes), canaries=s.canaries(**canary))
    assert s.report(bundle=audit).headline.startswith(start)


def test_an_attack_on_the_full_model_refutes_a_claim_too():
    plugged = s.plugged_audit(canaries=s.canaries(epsilon=5.5))
    report = s.report(bundle=s.bundle_audit(s.made_up_claim()), plugged=plugged)
    assert report.headline.startswith("CLAIM OF DIFFERENTIAL PRIVACY REFUTED")
    assert report.role == "owner"
    elsewhere = s.plugged_audit(delta=1e-9)
    assert s.report(bundle=s.bundle_audit(s.made_up_claim()), plugged=elsewhere).gates.plugged_in[0].verdict == (
        "not measurable"
    )


def test_without_the_clients_run_nothing_is_said_of_its_privacy():
    assert s.report(plugged=s.plugged_audit()).headline.startswith("DIFFERENTIAL PRIVACY NOT SHOWN")
    alone = s.report(package=s.package_audit())
    assert alone.headline == (
        "What a package gives away of its model: the emulator has 0.66 of the full model's skill on held-out text"
    )
    assert alone.gates.every == ()
    assert alone.digests.bundle is None


def test_gates_are_worked_out_for_each_audit():
    limits = Limits(max_capability=0.5, max_union=0.6)
    report = s.report(plugged=s.plugged_audit(), package=s.package_audit(), limits=limits)
    assert [gate.name for gate in report.gates.bundle] == ["audit"]
    assert [gate.name for gate in report.gates.plugged_in] == ["secrets"]
    assert [(gate.name, gate.verdict) for gate in report.gates.package] == [
        ("capability", "failed"),
        ("union", "passed"),
    ]


def test_a_release_is_told_with_its_grounds():
    audit = s.bundle_audit(power=0.4)
    assert s.report(bundle=audit).accepted_leakage is None
    assert s.report(bundle=audit, release=release(audit)).accepted_leakage is True
    assert s.report(bundle=audit, release=release()).accepted_leakage is True  # sealed without an audit, audited later
    sound = s.bundle_audit(s.made_up_claim(), power=1.0)
    assert s.report(bundle=sound, release=release(sound)).accepted_leakage is False
    package = s.report(package=s.package_audit(), release=release())
    assert (package.accepted_leakage, package.digests.bundle) == (True, s.BUNDLE)


AUDIT = s.bundle_audit()


def curve(*points):
    """An audit whose one attack has that curve."""
    return {"bundle": s.bundle_audit(membership=(s.membership("loss", 0.9).model_copy(update={"roc": points}),))}


CONTRADICTIONS = {
    "bundles": ({"plugged": s.plugged_audit(bundle_digest=s.OTHER)}, WrongBinding),
    "packages": ({"plugged": s.plugged_audit(package_digest=s.OTHER)}, WrongBinding),
    "base models": ({"package": s.package_audit(base_digest=s.OTHER)}, WrongBinding),
    "another bundle was let go": ({"release": release(AUDIT, bundle_digest=s.OTHER)}, WrongBinding),
    "let go on another audit": ({"release": release(AUDIT, audit=s.OTHER)}, WrongBinding),
    "acceptance denied": ({"release": release(accepted_leakage=False)}, WrongBinding),
    "acceptance of nothing": ({"release": release(AUDIT, gates=(), accepted_leakage=True)}, WrongBinding),
    "gates left out": ({"release": release(AUDIT, gates=(), accepted_leakage=False)}, WrongBinding),
    "gates without an audit": ({"release": release(gates=(), accepted_leakage=False)}, WrongBinding),
    "not the job's client": ({"job": facts(client="-".join(["ffff"] * 13))}, WrongBinding),
    "another job's run": ({"job": facts(job_id="cd" * 16)}, WrongBinding),
    "the owner's audit from the client": ({"job": facts(), "package": s.package_audit()}, WrongBinding),
    "limits of no package": ({"limits": Limits(max_union=0.5)}, BadSchema),
    "recomputed without a claim": ({"recomputed": s.recomputed_of(s.made_up_claim())}, BadSchema),
    "a limit and no such figure": (
        {
            "package": s.package_audit(capabilities=s.package_audit().capabilities[1:]),
            "limits": Limits(max_capability=1),
        },
        BadSchema,
    ),
    "a curve that falls": (curve((0, 0), (0.5, 0.9), (0.6, 0.8), (1, 1)), ArtefactError),
    "a curve that stops": (curve((0, 0), (0.5, 0.9)), ArtefactError),
    "a figure of no size": (
        {"package": s.package_audit(recovery=(), middle_parameters=10**16)},
        ArtefactError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_itself_is_not_put_together(case):
    changes, error = CONTRADICTIONS[case]
    with pytest.raises(error) as caught:
        s.report(**{"bundle": AUDIT, **changes})
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_no_audit_is_no_report():
    with pytest.raises(ValueError, match="no audit"):
        Audits(bundle=None, plugged_in=None, package=None)


def test_a_report_and_its_signatures_name_one_issuer():
    raw = report_raw(s.report(bundle=AUDIT))
    signatures = Signatures(bytes(64), bytes(3309))
    assert read_form(raw, write_signatures(s.ISSUER, signatures))[1] == signatures
    with pytest.raises(BadSignature, match="another issuer"):
        read_form(raw, write_signatures("-".join(["eeee"] * 13), signatures))


# --- epsilon from constants


def test_a_true_claim_follows_from_its_constants():
    claim = s.claim()
    found = recompute.recompute(claim)
    recompute.require_claim(claim, found)
    recompute.require_same(found, found)
    assert [point.steps for point in found.over_steps] == [1, 2, 3, 4, 5, 6]
    assert found.over_steps[-1].epsilon == found.epsilon == claim.epsilon
    assert all(a.epsilon < b.epsilon for a, b in zip(found.over_steps, found.over_steps[1:], strict=False))
    recompute.require_claim(s.claim(num_runs=2), found)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epsilon": 0.1}, "epsilon is stated as 0.1"),
        ({"epsilon_prv": 0.1}, "epsilon_prv is stated"),
        ({"epsilon_rdp": 0.1}, "epsilon_rdp is stated"),
        ({"epsilon_total": 0.1}, "is below .* of this one"),
        ({"epsilon_total": 0.1, "num_runs": 3}, "is below .* of this one"),
        ({"epsilon_total": 1.9}, "of the only run is stated"),
        ({"delta_total": 1e-2}, "is above this run's"),
        ({"steps": 60}, "epsilon is stated"),
        ({"noise_multiplier": 0.05}, "no meaningful guarantee"),
        ({"steps": 10**15, "noise_multiplier": 1.0}, "more than an accountant can hold"),
    ],
)
def test_a_claim_that_does_not_follow_is_named(changes, match):
    claim = s.claim().model_copy(update=changes)
    with pytest.raises(ArtefactError, match=match):
        recompute.require_claim(claim, recompute.recompute(claim))


def test_another_version_of_the_accountant_may_differ_by_a_percent_and_no_more():
    found = recompute.recompute(s.claim())
    other = {"accountant": "PLD, dp-accounting 9.9.9"}
    for share, holds in ((1.005, True), (1.02, False)):
        update = {**other, "epsilon": s.claim().epsilon * share, "epsilon_total": s.claim().epsilon * share}
        stated = s.claim().model_copy(update=update)
        if holds:
            recompute.require_claim(stated, found)
            with pytest.raises(ArtefactError):
                recompute.require_claim(stated.model_copy(update={"accountant": s.claim().accountant}), found)
        else:
            with pytest.raises(ArtefactError):
                recompute.require_claim(stated, found)


def test_without_the_extra_it_says_so_and_what_to_install(monkeypatch):
    def missing():
        raise ConfigError("--dp needs the library 'opacus', which is not installed", hint="pip install it")

    monkeypatch.setattr(recompute, "require_extra", missing)
    with pytest.raises(ConfigError, match="epsilon cannot be recomputed here: library 'opacus'") as caught:
        recompute.recompute(s.claim())
    assert caught.value.hint == "pip install it"


# --- the verb


class Desk:
    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *words, code=0):
        found = cli.run([str(word) for word in words])
        captured = self.capsys.readouterr()
        assert found == code, captured.err
        if code:
            lines = [line for line in captured.err.splitlines() if line.startswith("offsite: error: ")]
            assert len(lines) == 1
            assert "Traceback" not in captured.err
            return lines[0]
        return json.loads(captured.out)


@pytest.fixture
def desk(capsys):
    return Desk(capsys)


@pytest.fixture
def world(tmp_path, parties, make_job, dropped_package, tiny_bundle, monkeypatch):
    """A folder with audits of one real bundle and package, a job, a release record, and what is none of these."""
    job = make_job()
    write_job(tmp_path / "job", job)
    write_job(tmp_path / "other-job", make_job(package_digest=s.OTHER))
    about = {"package_digest": dropped_package.digest, "base_digest": dropped_package.manifest.base_digest}
    run = s.run_record(s.claim(), bundle_digest=tiny_bundle.digest, job_id=job.job_id, **about)
    private = s.bundle_audit(s.claim(), power=1.0, run=run)
    write_audit(tmp_path / "private", private)
    record = release(private, bundle_digest=tiny_bundle.digest)
    (tmp_path / "bundle.sealed.release.json").write_bytes(write_compact(record))
    plain = s.bundle_audit(power=0.4, run=run.model_copy(update={"claim": None}))
    write_audit(tmp_path / "plain", plain)
    (tmp_path / "plain.release.json").write_bytes(write_compact(release(plain, bundle_digest=tiny_bundle.digest)))
    write_audit(tmp_path / "plugged", s.plugged_audit(s.DELTA, bundle_digest=tiny_bundle.digest, **about))
    write_audit(tmp_path / "package-audit", s.package_audit(**about))
    write_audit(tmp_path / "elsewhere", s.bundle_audit())
    false = run.model_copy(update={"claim": s.claim().model_copy(update={"epsilon": 0.1, "epsilon_total": 0.1})})
    write_audit(tmp_path / "false", s.bundle_audit(s.claim(), run=false))
    (tmp_path / "rewritten").mkdir()
    stated = json.loads((tmp_path / "plain" / "audit.json").read_text())
    (tmp_path / "rewritten" / "audit.json").write_text(json.dumps(stated))
    shutil.copytree(tmp_path / "plain", tmp_path / "crowded")
    (tmp_path / "crowded" / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_client_reports_on_its_bundle(world, desk, parties):
    client = parties[1]
    words = ("--audit", "private", "--release", "bundle.sealed.release.json", "--job", "job", "-o", "report")
    told = desk("report", "privacy", *words, *client.flags)
    assert told["headline"].startswith("Differentially private")
    assert (told["role"], told["accepted_leakage"], told["report"]) == ("client", False, "report")
    assert told["claim"]["epsilon"] == s.claim().epsilon
    assert set(told["gates"]["bundle"].values()) == {"passed"}
    assert sorted(path.name for path in (world / "report").iterdir()) == [
        "report.html", "report.json", "report.signatures.json"
    ]  # fmt: skip
    report = parse_report((world / "report" / "report.json").read_bytes())
    assert report.issuer == client.fingerprint
    assert (world / "report" / "report.html").read_text(encoding="utf-8") == page(report)
    assert str(world) not in (world / "report" / "report.json").read_text()


def test_the_owner_reports_on_both_kinds_of_its_own(world, desk, parties):
    words = ("--audit", "plugged", "--audit", "package-audit", "--max-recovery", 0.4, "--job", "job", "-o", "report")
    told = desk("report", "privacy", *words, *parties[0].flags)
    assert (told["role"], told["claim"]) == ("owner", None)
    assert told["gates"]["package"] == {"recovery": "failed"}
    assert told["gates"]["bundle"] == {"audit": "not measurable"}


def test_a_sealed_report_leaves_its_page_behind_and_is_verified_at_the_other_end(world, desk, parties):
    owner, client = parties
    for party, words in ((owner, "seal job -o job.sealed"), (client, "open job.sealed -o client-job")):
        desk(*words.split(), *party.flags)
    desk("report", "privacy", "--audit", "plain", "-o", "report", *client.flags)
    told = desk("seal", "report", "--job", "job", "--round", 1, "-o", "report.sealed", *client.flags)
    assert told["kind"] == "report"
    names = [file["name"] for file in json.loads((world / "report.sealed" / "manifest.json").read_text())["files"]]
    assert names == ["report.json", "report.signatures.json"]
    desk("open", "report.sealed", "-o", "opened", *owner.flags)
    assert sorted(path.name for path in (world / "opened").iterdir()) == ["report.json", "report.signatures.json"]
    found = desk("report", "verify", "opened", "--keys", owner.keys, "--page", "page.html")
    assert found["verified"] is True
    assert found["headline"].startswith(NOT_PRIVATE)
    assert (world / "page.html").read_bytes() == (world / "report" / "report.html").read_bytes()


UNSEALABLE = {
    "page alone": lambda folder: (folder / "report.signatures.json").unlink(),
    "no report": lambda folder: (folder / "report.json").unlink(),
    "another page": lambda folder: (folder / "more.html").write_text("x"),
    "not a report": lambda folder: (folder / "report.json").write_text('{"format": "offsite/privacy-report/2"}'),
    "signatures cut": lambda folder: (folder / "report.signatures.json").write_text("{}"),
}


@pytest.mark.parametrize("case", UNSEALABLE)
def test_what_is_no_privacy_report_is_not_sealed_as_one(case, world, desk, parties):
    client = parties[1]
    desk("report", "privacy", "--audit", "plain", "-o", "report", *client.flags)
    UNSEALABLE[case](world / "report")
    desk("seal", "report", "--job", "job", "-o", "report.sealed", *client.flags, code=3)
    assert not (world / "report.sealed").exists()


REFUSALS = {
    "--audit nowhere": (3, "no audit folder named 'nowhere'"),
    "--audit job": (3, "holds no audit.json"),
    "--audit crowded": (3, "1 file(s) besides audit.json"),
    "--audit rewritten": (3, "not written in the one form"),
    "--audit plain --audit private": (2, "two audits are of kind 'bundle'"),
    "--audit plain --audit plugged --audit package-audit --audit elsewhere": (2, "at most 3"),
    "": (2, "--audit"),
    "--audit elsewhere --audit plugged": (3, "about different bundles"),
    "--audit private --job other-job": (3, "another package or base model than job"),
    "--audit private --audit plugged --job job": (3, "is not the owner of job"),
    "--audit private --release nowhere.json": (2, "no release record"),
    "--audit private --release job/job.json": (3, "offsite/release/1"),
    "--audit private --release plain.release.json": (3, "another audit than the one quoted"),
    "--audit private --max-union 0.5": (2, "no package audit is among --audit"),
    "--audit false": (3, "the claim's own constants give"),
    "--audit plain --passphrase-file job/job.json": (3, "passphrase"),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_wrong_inputs_are_one_line_and_leave_nothing(words, world, desk, parties):
    code, message = REFUSALS[words]
    before = sorted(str(path) for path in world.rglob("*"))
    flags = parties[1].flags if "passphrase" not in words else parties[1].flags[:2]
    assert message in desk("report", "privacy", *words.split(), "-o", "report", *flags, code=code)
    assert sorted(str(path) for path in world.rglob("*")) == before


def test_an_output_that_exists_is_kept(world, desk, parties):
    error = desk("report", "privacy", "--audit", "plain", "-o", "job", *parties[1].flags, code=2)
    assert "output 'job' already exists" in error


def test_a_page_that_fails_leaves_no_report(world, desk, parties, monkeypatch):
    def broken(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offsite.privacyissue.page", broken)
    desk("report", "privacy", "--audit", "plain", "-o", "report", *parties[1].flags, code=5)
    assert not [path for path in world.iterdir() if "report" in path.name]
