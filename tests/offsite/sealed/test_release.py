"""What `offsite seal` lets go: a bundle on its audit's gates, a package within its owner's limits."""

from __future__ import annotations

import json

import pytest

from offsite.artefacts.layout import Method
from offsite.audits.gates import Release
from offsite.audits.record import (
    BundleAudit,
    CanaryAudit,
    Capability,
    EpsilonBound,
    Estimate,
    Exposure,
    Membership,
    PackageAudit,
    Recovery,
    RecoveryPoint,
    ScanFigures,
    Similarity,
    Union,
    Verbatim,
    Withheld,
    write_audit,
)
from offsite.audits.runs import Run, TextSettings
from offsite.errors import BadSchema, ConfigError, PolicyError, TooLarge, WrongBinding
from offsite.sealed.config import SealConfig
from offsite.sealed.release import RELEASE_LIMIT_BYTES, read_release, release_path, require_gates, write_release

BUNDLE, OTHER = "sha256:" + "b" * 64, "sha256:" + "c" * 64


def run(bundle=BUNDLE, **changes):
    given = {
        "bundle_digest": bundle, "package_digest": OTHER, "base_digest": OTHER, "adapter": {}, "data_sha256": OTHER,
        "text": TextSettings(packed=True, block_tokens=64, validation=0.1, audit_share=0.3, seed=0),
        "num_records": 2000, "num_drawn": 160, "num_tokens": 9000, "steps": 40, "batch_size": 4, "learning_rate": 1e-3,
    }  # fmt: skip
    return Run.model_validate_json(json.dumps({**given, "text": given["text"].model_dump(), **changes}))


def membership(auc=0.51, hits=0.012, others=1500):
    return Membership(
        signal="reference", num_members=2000, num_nonmembers=others, balanced_accuracy=0.5, tpr_at_01=None,
        auc=Estimate(value=auc, low=auc - 0.02, high=auc + 0.02), roc=((0.0, 0.0), (1.0, 1.0)),
        tpr_at_1=None if others < 1000 else Estimate(value=hits, low=0.0, high=0.05),
    )  # fmt: skip


def canaries(epsilon=0.4, extracted=0):
    bound = EpsilonBound(
        signal="reference", epsilon=epsilon, delta=1e-5, confidence=0.95, num_canaries=1000, num_guesses=100,
        num_correct=60, declared=(100,), rule="the 50 highest and the 50 lowest", ceiling=3.5,
    )  # fmt: skip
    exposure = Exposure(
        num_secrets=8, num_candidates=256, repeats=1, bits=(1.0,) * 8, bits_before=(1.0,) * 8, most_bits=8.0,
        num_extracted_greedy=extracted, num_extracted_top_k=extracted, num_samples=16,
    )  # fmt: skip
    return CanaryAudit(commitment=OTHER, num=1000, num_included=500, bound=bound, exposure=exposure)


def audit(**changes):
    given = {
        "run": run(), "tokens_per_row": 64, "membership": (membership(),), "canaries": canaries(),
        "verbatim": Verbatim(num_rows=100, prefix_tokens=32, continuation_tokens=32, num_extracted=1,
                             num_extracted_before=1),
        "scan": ScanFigures(num_bytes=1000, num_ngrams_compared=5000, found={"paths": 0}),
    }  # fmt: skip
    return BundleAudit(**{**given, **changes})


def package_audit(kept=0.3, regained=0.2, union=None, withheld=(0.3,)):
    found = () if regained is None else (RecoveryPoint(num_tokens=1000, perplexity=50.0, regained=regained),)
    return PackageAudit(
        package_digest=BUNDLE, base_digest=OTHER, method=Method(name="width"), middle_parameters=100,
        emulator_parameters=50,
        similarity=Similarity(num_parameters=10, num_verbatim=1, num_verbatim_by_row=1, blocks=()),
        capabilities=(Capability(name="perplexity", metric="nats", num_rows=9, chance=7.0, full=3.0, emulator=5.0,
                                 kept=kept),),
        recovery=(Recovery(attack="as_is_all", trained_parameters=9, points=found),) if found else (),
        union=None if union is None else Union(num_packages=2, share_single=0.5, share_union=union),
        withheld=tuple(
            Withheld(way="client", nats=nats, perplexity=27.0, num_tokens=None, told="") for nats in withheld
        ),
    )  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    def make(found=None, **changes):
        if found is not None:
            write_audit(tmp_path / "audit", found)
            changes["audit"] = tmp_path / "audit"
        return SealConfig(input=tmp_path / "bundle", output=tmp_path / "out", keys=tmp_path / "keys", **changes)

    return make


def test_a_bundle_with_a_good_audit_goes(settings):
    grounds = require_gates(settings(audit()), "bundle", BUNDLE)
    assert {gate.verdict for gate in grounds.gates} == {"passed"}
    assert not grounds.accepted_leakage
    assert grounds.audit.startswith("sha256:")


LEAKS = {
    "none": (None, "audit not measurable: no audit of this bundle was given"),
    "auc": (audit(membership=(membership(auc=0.7),)), r"auc failed: the best attack \(reference\) .*0.700, limit 0.6"),
    "hits": (audit(membership=(membership(hits=0.04),)), "tpr_at_1 failed: .* hits 4.0% at 1%, limit 0.03"),
    "too few": (audit(membership=(membership(others=300),)), "not measurable: 300 rows that were not trained on"),
    "secret": (audit(canaries=canaries(extracted=1)), "secrets failed: 1 of 8 made-up secrets"),
    "no secret": (audit(canaries=None), "secrets not measurable: no made-up secret was planted"),
    "verbatim": (
        audit(verbatim=Verbatim(num_rows=100, prefix_tokens=32, continuation_tokens=32, num_extracted=3,
                                num_extracted_before=1)),
        "verbatim failed: 2 of 100 rows",
    ),
    "scan": (audit(scan=ScanFigures(num_bytes=9, num_ngrams_compared=9, found={"paths": 1})), "scan failed: 1 piece"),
    "one step": (audit(run=run(steps=1)), "inversion failed: 1 steps on 160 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_a_bundle_that_leaks_goes_only_when_that_is_accepted(settings, tmp_path, name, capsys):
    found, message = LEAKS[name]
    config = settings(found)
    with pytest.raises(PolicyError, match=message) as caught:
        require_gates(config, "bundle", BUNDLE)
    assert caught.value.exit_code == 4
    assert "--accept-leakage" in caught.value.hint
    grounds = require_gates(config.model_copy(update={"accept_leakage": True}), "bundle", BUNDLE)
    assert grounds.accepted_leakage
    write_release(config.output, grounds, sealed_digest=OTHER, round=1)
    assert "leakage accepted" in capsys.readouterr().err
    release = read_release(release_path(config.output))
    assert release == Release(
        bundle_digest=BUNDLE,
        sealed_digest=OTHER,
        audit=grounds.audit,
        gates=grounds.gates,
        accepted_leakage=True,
        round=1,
    )


def test_acceptance_is_not_recorded_where_it_was_not_needed(settings):
    assert not require_gates(settings(audit(), accept_leakage=True), "bundle", BUNDLE).accepted_leakage


WITHIN = {"max_capability": (0.3, 0.2), "max_recovery": (0.2, 0.1), "max_union": (0.6, 0.5), "min_withheld": (0.3, 0.4)}


@pytest.mark.parametrize("name", WITHIN)
def test_a_package_goes_only_within_its_limits(settings, name):
    enough, too_small = WITHIN[name]
    config = settings(package_audit(union=0.6), **{name: enough})
    assert require_gates(config, "package", BUNDLE) is None
    with pytest.raises(PolicyError, match=f"failed: .* limit {too_small:g}"):
        require_gates(config.model_copy(update={name: too_small}), "package", BUNDLE)


def test_a_limit_on_what_was_not_measured_refuses(settings):
    with pytest.raises(PolicyError, match="recovery not measurable: no recovery attack was run"):
        require_gates(settings(package_audit(regained=None), max_recovery=0.9), "package", BUNDLE)


def test_a_limit_on_what_is_withheld_refuses_where_no_tuning_was_measured(settings):
    with pytest.raises(PolicyError, match="withheld not measurable: no tuning of the emulator was measured"):
        require_gates(settings(package_audit(withheld=()), min_withheld=-9.0), "package", BUNDLE)


def test_without_limits_a_package_goes(settings):
    assert require_gates(settings(), "package", BUNDLE) is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bundle", {"max_recovery": 0.5}, "--max-recovery: not for a bundle"),
        ("package", {"accept_leakage": True}, "--accept-leakage: not for a package"),
        ("package", {"max_union": 0.5}, "--max-union: --audit is missing"),
        ("package", {"min_withheld": 0.0}, "--min-withheld: --audit is missing"),
        ("bundle", {"min_withheld": 0.0}, "--min-withheld: not for a bundle"),
    ],
)
def test_settings_that_do_not_belong_are_refused(settings, kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        require_gates(settings(**changes), kind, BUNDLE)


def test_an_audit_does_not_vouch_for_something_else(settings, tmp_path):
    config = settings(audit(run=run(bundle=OTHER)))
    with pytest.raises(WrongBinding, match="is of bundle"):
        require_gates(config.model_copy(update={"accept_leakage": True}), "bundle", BUNDLE)
    with pytest.raises(WrongBinding, match="audit of a bundle, not of a package"):
        require_gates(config.model_copy(update={"max_union": 0.5}), "package", BUNDLE)
    write_audit(tmp_path / "other", package_audit())
    other = config.model_copy(update={"audit": tmp_path / "other"})
    with pytest.raises(WrongBinding, match="audit of a package, not of a bundle"):
        require_gates(other, "bundle", BUNDLE)
    with pytest.raises(WrongBinding, match="of another package"):
        require_gates(other.model_copy(update={"max_union": 0.5}), "package", OTHER)


def test_a_release_record_is_read_strictly(tmp_path):
    path = tmp_path / "x.release.json"
    with pytest.raises(ConfigError, match="no release record"):
        read_release(path)
    for raw, error in (
        (b"{}", WrongBinding),
        (b'{"format": "offsite/release/1", "round": 1}', BadSchema),
        (b" " * (RELEASE_LIMIT_BYTES + 1), TooLarge),
    ):
        path.write_bytes(raw)
        with pytest.raises(error):
            read_release(path)
