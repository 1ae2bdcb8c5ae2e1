"""The privacy report: what follows from its audits, what it refuses to put together, and the verb that issues it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
import shutil
import sys
from pathlib import Path

import pytest

from offsite import cli
from offsite.artefacts.job import write_job
from offsite.audits.gates import Release, bundle_gates, unmeasured
from offsite.audits.membership import membership_of
from offsite.audits.record import write_audit
from offsite.audits.runs import Objective, Rewarded
from offsite.digests import sha256_bytes
from offsite.errors import ArtefactError, BadSchema, BadSignature, ConfigError, WrongBinding
from offsite.keys.identity import Signatures
from offsite.privacyreport import recompute
from offsite.privacyreport.consistency import require_sound
from offsite.privacyreport.page import page
from offsite.privacyreport.record import (
    Audits,
    JobFacts,
    Limits,
    audit_digest,
    parse_report,
    read_form,
    report_raw,
    schema,
)
from offsite.privacyreport.words import NOT_PRIVATE, released, upper, upper_delta
from offsite.sealed.manifest import write_signatures
from offsite.strictjson import write_compact

ROOT = Path(__file__).parents[3]


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


def test_a_report_names_the_objective_of_a_run_on_preferences():
    audit = s.bundle_audit(objective=Objective(loss="dpo", dpo_beta=0.1, dpo_loss="sigmoid"))
    report = s.report(bundle=audit)
    assert any("learned from preferences (dpo)" in sentence for sentence in report.non_claims)
    assert parse_report(report_raw(report)) == report
    how = {
        "beta": 0.1,
        "num_samples": 4,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "kl_limit": 9.0,
        "entropy_floor": 0.0,
    }
    rewarded = Objective(loss="rloo", rloo=Rewarded(**how, rules=("exact",), ended="kl"))
    report = s.report(bundle=s.bundle_audit(objective=rewarded))
    assert any("learned from rewards of sampled answers (rloo)" in sentence for sentence in report.non_claims)
    assert parse_report(report_raw(report)) == report
    assert not any("reward model" in sentence for sentence in report.non_claims)
    by_model = Objective(loss="rloo", rloo=Rewarded(**how, reward_weight=2.0))
    report = s.report(bundle=s.bundle_audit(objective=by_model))
    assert any("Rewards were of a reward model" in sentence for sentence in report.non_claims)
    assert parse_report(report_raw(report)) == report
    with pytest.raises(ValueError, match="nothing is rewarded"):
        Rewarded(**how)
    plain = s.report(bundle=s.bundle_audit())
    assert not any("dpo" in sentence for sentence in plain.non_claims)
    assert b"objective" not in report_raw(plain)


def test_a_report_says_in_which_way_the_adapter_was_plugged_in_where_it_is_not_all_of_it():
    told = "In the full model the adapter was plugged in as mlp=0.5,mix=0.7; otherwise it may reveal more."
    report = s.report(plugged=s.plugged_audit(way="mlp=0.5,mix=0.7"))
    assert told in report.non_claims
    assert parse_report(report_raw(report)) == report
    plain = s.report(plugged=s.plugged_audit())
    assert not any("plugged in as" in sentence for sentence in plain.non_claims)
    assert not {b'"way"', b'"spare_text"'} & {word.strip(b":") for word in report_raw(plain).split()}


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
        (
            {"epsilon": 1.0},
            {"correct": 100},
            "CLAIM OF DIFFERENTIAL PRIVACY REFUTED: an attack shows epsilon of at least 1.25",
        ),
        ({"budget": 4.0}, {}, "PRIVACY BUDGET EXCEEDED: epsilon 4.512 spent of 4.000"),
        ({"epsilon": 12.0}, {}, "HARDLY DIFFERENTIALLY PRIVATE"),
    ],
)
def test_a_claim_that_does_not_stand_is_not_told_as_one(changes, canary, start):
    audit = s.bundle_audit(s.made_up_claim(**changes), canaries=s.canaries(**canary))
    assert s.report(bundle=audit).headline.startswith(start)


def test_an_attack_on_the_full_model_refutes_a_claim_too():
    plugged = s.plugged_audit(canaries=s.canaries(correct=100))
    report = s.report(bundle=s.bundle_audit(s.made_up_claim(epsilon=1.0)), plugged=plugged)
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


def test_a_package_audit_and_its_report_of_an_earlier_version_have_the_bytes_they_had():
    """Digests of what version 0.1.0 wrote of the same figures."""
    audit = s.package_audit()
    assert audit_digest(audit) == "sha256:24dfc1577c13400d2e1733052fa5a5fa61faccbbf752655081705d0a5b3b6a72"
    report = s.report(package=audit, limits=Limits(max_capability=0.7))
    assert sha256_bytes(report_raw(report)) == "sha256:83fc33641ad134dd586649e7a51df7b781fe7beac064bdab776be11499e6a4c2"


def test_what_is_withheld_after_tuning_is_in_the_first_line_and_under_its_limit():
    """ln(25.61 / 12.97) = 0.68 by the client, less than by the other ways."""
    report = s.report(package=s.package_audit(withheld=WAYS), limits=Limits(min_withheld=0.0))
    assert report.headline.endswith("; after tuning it falls 0.68 nats per token short of the full model")
    (gate,) = report.gates.package
    assert (gate.name, gate.verdict, gate.limit) == ("withheld", "passed", 0.0)
    assert gate.found == pytest.approx(math.log(25.61 / 12.97))
    assert any("may leave less" in one for one in report.non_claims)
    again = parse_report(report_raw(report))
    assert again == report
    assert again.limits.min_withheld == 0.0  # a zero that is not the default is written
    (failed,) = s.report(package=s.package_audit(withheld=WAYS), limits=Limits(min_withheld=0.7)).gates.package
    assert failed.verdict == "failed"
    (unknown,) = s.report(package=s.package_audit(), limits=Limits(min_withheld=0.0)).gates.package
    assert unknown.verdict == "not measurable"


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


def within(part, **changes):
    """The audit `AUDIT` with figures of one part of it changed, named by the way to it."""
    stated = AUDIT.model_dump(mode="json")
    found = stated
    for key in part:
        found = found[key]
    found.update(changes)
    return {"bundle": type(AUDIT).model_validate_json(json.dumps(stated))}


ATTACK, CANARIES = ("membership", 0), ("canaries",)
BOUND, EXPOSURE = ("canaries", "bound"), ("canaries", "exposure")
FIRST = AUDIT.membership[0]


def curve(*points):
    return within(ATTACK, roc=points)


def capability(**changes):
    first, *others = s.package_audit().capabilities
    return {"package": s.package_audit(capabilities=(first.model_copy(update=changes), *others))}


def similar(**changes):
    return {"package": s.package_audit(similarity=s.package_audit().similarity.model_copy(update=changes))}


def estimate(found, by=0.0, **changes):
    given = {"value": found.value + by, "low": found.low + by, "high": found.high + by, "confidence": 0.95}
    return {**given, **changes}


def left(*ways, **changes):
    return {"package": s.package_audit(withheld=ways, **changes)}


WAYS = s.ways()
UNTUNED = s.package_audit().capabilities[0].model_copy(update={"emulator_tuned": None})


def halves(guesses=None, **changes):
    """A report of few rows whose retunings were changed so."""
    found = s.retuned(**changes)
    if guesses:
        found = found.model_copy(update={"attacks": (found.attacks[0].model_copy(update=guesses),)})
    return {"bundle": s.bundle_audit(retuned=found)}


UNSOUND = {
    "guesses that coins do not give": (halves({"num_guesses": 61}), "about 1560 pairs and 61 rows, the coins give"),
    "pairs that coins do not give": (halves({"num_pairs": 1561}), "about 1561 pairs and 60 rows"),
    "more pairs told apart than there are": (halves({"num_right": 1558}), "pairs that 'reference' told apart is 1561"),
    "more right guesses than guesses": (halves({"num_correct": 61}), "right guesses by 'reference' is 61"),
    "coins that are not fair": (halves(num_in=(70,) * 12), "on 70 of 270 rows, fair coins do not fall so"),
    "retunings without steps": (halves(steps=(20,) * 11), "12 retunings have 11 numbers of steps"),
    "more retunings than were asked for": (halves(num_asked=11), "number of retunings is 12, above the 11"),
    "an attack on retunings twice": (halves(attacks=s.retuned().attacks * 2), "two attacks on retunings"),
    "two points": (curve((0, 0), (1, 1)), "the area of 'loss'"),
    "a point between rows": (curve((0, 0), (0.5, 0.87654321), (1, 1)), "no share of 1200 rows"),
    "an area above the curve": (within(ATTACK, auc=estimate(FIRST.auc, 0.01)), "the area of 'loss'"),
    "an area below the curve": (within(ATTACK, auc=estimate(FIRST.auc, -0.01)), "the area of 'loss'"),
    "accuracy above": (within(ATTACK, balanced_accuracy=FIRST.balanced_accuracy + 0.01), "the balanced accuracy"),
    "accuracy below": (within(ATTACK, balanced_accuracy=0.5), "the balanced accuracy"),
    "fewer hits": (within(ATTACK, tpr_at_1=estimate(FIRST.tpr_at_1, -1 / 120)), "the hit rate of 'loss' at 1.0%"),
    "more hits": (within(ATTACK, tpr_at_1=estimate(FIRST.tpr_at_1, 1 / 120)), "the hit rate of 'loss' at 1.0%"),
    "no hits told": (within(ATTACK, tpr_at_1=None), "at 1.0% is missing"),
    "hits told of too few": (within(ATTACK, tpr_at_01=estimate(FIRST.tpr_at_1)), "at 0.1% is told of 1100 others"),
    "a narrow interval": (within(ATTACK, tpr_at_1=estimate(FIRST.tpr_at_1, high=FIRST.tpr_at_1.value)), "upper end"),
    "another confidence": (within(ATTACK, tpr_at_1=estimate(FIRST.tpr_at_1, confidence=0.9)), "lower end"),
    "no confidence": (within(ATTACK, tpr_at_1=estimate(FIRST.tpr_at_1, confidence=0.1)), "confidence 0.1"),
    "a smaller bound": (within(BOUND, num_correct=100), "the bound on epsilon is stated as 0"),
    "a larger bound": (within(BOUND, epsilon=1e-3), "the bound on epsilon is stated as 0.001"),
    "a larger ceiling": (within(BOUND, ceiling=9.0), "the ceiling of the bound on epsilon is stated as 9"),
    "other guesses": (within(BOUND, num_guesses=99), "75 of 99 guesses"),
    "more correct than guesses": (within(BOUND, num_correct=101), "101 of 100 guesses"),
    "guesses declared for show": (within(BOUND, declared=[250, 200, 150, 100, 50]), "the bound on epsilon"),
    "guesses declared twice": (within(BOUND, declared=[250, 100, 100, 50]), "each once, falling"),
    "more guesses than canaries": (within(BOUND, declared=[501, 250, 100, 50]), "501 guesses about 500"),
    "a bound by another signal": (within(BOUND, signal="min-k++"), "goes by 'min-k\\+\\+'"),
    "a bound without confidence": (within(BOUND, confidence=0.01), "confidence 0.01"),
    "a bound on more canaries": (within(BOUND, num_canaries=501), "number of canaries guessed about is 501"),
    "more canaries in than there are": (within(CANARIES, num_included=501), "canaries trained on is 501"),
    "other canaries attacked": (within(CANARIES, num_included=246), "on other canaries"),
    "one signal twice": (within(("canaries", "membership", 0), signal="reference"), "have one signal"),
    "a canary's area": (
        within(("canaries", "membership", 1), auc={"value": 0.7, "low": 0.6, "high": 0.8}),
        "the area of 'reference'",
    ),
    "more read out than planted": (within(EXPOSURE, num_extracted_greedy=11), "read out greedily is 11"),
    "more drawn out than planted": (within(EXPOSURE, num_extracted_top_k=11), "read out by draws is 11"),
    "drawn out without draws": (within(EXPOSURE, num_extracted_top_k=1, num_samples=0), "none were made"),
    "most bits": (within(EXPOSURE, most_bits=20.0), "the most bits of exposure is stated as 20"),
    "no bits": (within(EXPOSURE, bits=[]), "exposures after tuning are 0, of 10"),
    "no bits before": (within(EXPOSURE, bits_before=[]), "exposures before tuning are 0, of 10"),
    "more bits than secrets": (within(EXPOSURE, bits=[1.0] * 11), "exposures after tuning are 11, of 10"),
    "more bits than there are": (within(EXPOSURE, bits=[10.0]), "not among the 9.96578428 bits"),
    "more rows back than asked": (within(("verbatim",), num_extracted=201), "came back after tuning is 201"),
    "more rows back before": (within(("verbatim",), num_extracted_before=201), "came back before tuning is 201"),
    "new rows that did not come back": (within(("verbatim",), num_new=2), "2 rows are new of those that came back, 1"),
    "fewer new rows than must be": (within(("verbatim",), num_extracted_before=0), "0 rows are new"),
    "a share kept": (capability(kept=0.1), "the share kept of 'perplexity' is stated as 0.1"),
    "a score under chance": (capability(full=99.0), "the share kept of 'perplexity'"),
    "more verbatim than there is": (similar(num_verbatim=10**10), "by tensors, is 1e"),
    "more rows verbatim": (similar(num_verbatim_by_row=10**10), "by rows, is 1e"),
    "a union below its part": (
        {"package": s.package_audit(union=s.package_audit().union.model_copy(update={"share_union": 0.2}))},
        "the share that one package holds",
    ),
    "more withheld than its perplexity gives": (left(*s.ways(nats=0.9)), "by a rehearsed client is stated as 0.9"),
    "less withheld than its perplexity gives": (left(*s.ways(nats=-0.9)), "by a rehearsed client is stated as -0.9"),
    "another client's figure": (
        left(WAYS[1].model_copy(update={"perplexity": 12.97 * math.e, "nats": 1.0})),
        "the loss after tuning by a client",
    ),
    "another attack's figure": (
        left(*WAYS[:2], WAYS[2].model_copy(update={"perplexity": 12.97 * math.e, "nats": 1.0})),
        "the loss after tuning by a recovery attack",
    ),
    "the attack left out": (left(*WAYS[:2]), "by a recovery attack and its figures do not go together"),
    "the client left out": (left(WAYS[0], WAYS[2]), "by a client and its figures do not go together"),
    "a client nobody measured": (
        left(*WAYS, capabilities=(UNTUNED,)),
        "by a client and its figures do not go together",
    ),
    "an attack nobody ran": (left(*WAYS, recovery=()), "by a recovery attack and its figures do not go together"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSOUND)
def test_a_figure_that_does_not_follow_from_the_others_is_named(case):
    changes, match = UNSOUND[case]
    with pytest.raises(ArtefactError, match=match) as caught:
        s.report(**changes)
    assert type(caught.value) is ArtefactError
    assert "\n" not in str(caught.value)


def test_attacks_of_every_size_and_shape_are_sound():
    """What `membership_of` makes of scores is never refused: ties, few rows, many, thinned curves or whole."""
    draw = random.Random(3)
    for members, others, digits, shift in itertools.product((1, 30, 3000), (1, 40, 1000, 12_000), (0, 1, 9), (0, 2.5)):
        inside = [round(draw.gauss(shift, 1), digits) for _ in range(members)]
        outside = [round(draw.gauss(0, 1), digits) for _ in range(others)]
        require_sound("bundle", s.bundle_audit(membership=(membership_of("loss", inside, outside),)))


def test_what_canaries_show_is_sound_whatever_they_show():
    for correct in (0, 50, 61, 99, 100):
        require_sound("plugged_in", s.plugged_audit(canaries=s.canaries(correct=correct)))
    require_sound("plugged_in", s.plugged_audit(canaries=s.canaries(secrets=1)))


def test_without_scipy_a_bound_is_neither_sound_nor_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ConfigError, match="scipy"):
        require_sound("bundle", AUDIT)
    require_sound("package", s.package_audit())


def test_canaries_are_of_one_commitment():
    other = "sha256:" + "7" * 64
    changed = s.canaries().model_copy(update={"commitment": other})
    claimless = s.run_record(canaries=None)
    for given in (
        {"bundle": s.bundle_audit(canaries=changed)},
        {"bundle": s.bundle_audit(run=s.run_record(canaries=other))},
        {"bundle": AUDIT, "plugged": s.plugged_audit(canaries=changed)},
        {"bundle": s.bundle_audit(canaries=None), "plugged": s.plugged_audit(canaries=changed)},
        {"bundle": s.bundle_audit(run=claimless), "plugged": s.plugged_audit(canaries=changed)},
    ):
        with pytest.raises(WrongBinding, match="different canaries"):
            s.report(**given)
    s.report(bundle=AUDIT, plugged=s.plugged_audit())
    s.report(bundle=s.bundle_audit(run=claimless, canaries=None), plugged=s.plugged_audit(canaries=changed))


def test_a_release_on_an_audit_elsewhere_says_no_more():
    sound = s.bundle_audit(power=1.0)
    assert released(release(sound), audit_digest(sound)) == "Released after every gate had passed."
    assert released(release(sound), None) == "Released on an audit that is not in this report."
    assert released(release(), None).startswith("Released although gates could not be measured: ")
    leaky = release(s.bundle_audit(power=0.4))
    told = "Released although gates failed, on an audit that is not in this report: --accept-leakage was given."
    assert released(leaky, None) == told
    report = s.report(plugged=s.plugged_audit(), release=release(sound))
    assert "Released on an audit that is not in this report." in page(report)
    assert "after every gate" not in page(report)


def test_what_only_the_client_can_see_of_canaries_is_said():
    seen = "Nobody but the client can see whether the canaries it committed to were trained on."
    for given, said in (({"bundle": AUDIT}, True), ({"plugged": s.plugged_audit()}, True),
                        ({"package": s.package_audit()}, False)):  # fmt: skip
        found = [one for one in s.report(**given).non_claims if one.startswith(seen)]
        assert bool(found) == said
        assert all("this report does not check it" in one for one in found)


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
        ({"steps": 10**6 + 1}, "more than the 1,000,000 that are accounted for"),
        ({"noise_multiplier": 0.05}, "no meaningful guarantee"),
    ],
)
def test_a_claim_that_does_not_follow_is_named(changes, match):
    claim = s.claim().model_copy(update=changes)
    with pytest.raises(ArtefactError, match=match):
        recompute.require_claim(claim, recompute.recompute(claim))


def test_a_claim_of_more_steps_than_are_accounted_for_is_no_claim():
    assert s.made_up_claim(steps=10**6).steps == 10**6
    with pytest.raises(ValueError, match="less than or equal to 1000000"):
        s.made_up_claim(steps=10**6 + 1)


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
    "--audit crowded": (3, "besides audit.json"),
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

    monkeypatch.setattr("offsite.privacyreport.issue.page", broken)
    desk("report", "privacy", "--audit", "plain", "-o", "report", *parties[1].flags, code=5)
    assert not [path for path in world.iterdir() if "report" in path.name]


def test_retunings_are_told_and_their_verdict_follows_from_their_counts():
    few = {"nonmembers": "validation", "run": s.run_record(num_records=270, num_drawn=270)}
    report = s.report(bundle=s.bundle_audit(retuned=s.retuned(), **few))
    verdicts = {gate.name: gate.verdict for gate in report.gates.bundle}
    assert (verdicts["auc"], verdicts["tpr_at_1"]) == ("passed", "passed")
    assert any("Retunings are other adapters than the bundle's" in line for line in report.non_claims)
    assert not any("Retunings" in line for line in s.report(bundle=s.bundle_audit(**few)).non_claims)
    assert parse_report(report_raw(report)) == report
    told = s.retuned().attacks[0].model_copy(update={"num_correct": 39})  # a gate cannot stay as it was
    other = s.report(bundle=s.bundle_audit(retuned=s.retuned(attacks=(told,)), **few))
    assert {gate.name for gate in other.gates.bundle if gate.verdict == "failed"} == {"tpr_at_1"}
    assert other.digests != report.digests
