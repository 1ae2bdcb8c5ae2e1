"""Gates: each has an audit that passes it, one that fails it and one that cannot tell."""

from __future__ import annotations

import pytest

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Method
from offsite.audits.gates import WEAK_EPSILON, bundle_gates, package_gates, passed, plugged_gates, unmeasured
from offsite.audits.record import (
    BundleAudit,
    CanaryAudit,
    Capability,
    EpsilonBound,
    Estimate,
    Exposure,
    Guesses,
    Membership,
    PackageAudit,
    PluggedAudit,
    Recovery,
    RecoveryPoint,
    Retuned,
    ScanFigures,
    Similarity,
    Union,
    Verbatim,
    Withheld,
)
from offsite.audits.runs import (
    AveragedRun,
    Claim,
    Run,
    TextSettings,
)

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def run(**changes):
    given = {
        "bundle_digest": ONE, "package_digest": TWO, "base_digest": TWO, "adapter": AdapterSpec(), "data_sha256": TWO,
        "text": TextSettings(packed=True, block_tokens=64, validation=0.1, audit_share=0.3, seed=0),
        "num_records": 100, "num_drawn": 100, "num_tokens": 9000, "steps": 10, "batch_size": 4, "learning_rate": 1e-3,
    }  # fmt: skip
    return Run(**{**given, **changes})


def several(*steps):
    runs = tuple(AveragedRun(seed=seed, steps=num, steps_run=num) for seed, num in enumerate(steps))
    return run(averaged=runs, steps=sum(steps), steps_run=sum(steps))


def claim(**changes):
    given = {
        "mechanism": "Poisson-subsampled Gaussian", "neighbours": "one unit added or removed", "unit": "example",
        "number_of_units_public": True, "epsilon": 2.0, "epsilon_prv": 2.0, "epsilon_rdp": 2.2, "delta": 1e-5,
        "noise_multiplier": 1.0, "clip": 1.0, "sample_rate": 0.1, "divisor": 8, "steps": 10, "accountant": "PLD",
        "sampler": "poisson", "noise": "operating system", "released": "weights", "epsilon_total": 2.0,
        "delta_total": 1e-5, "budget": 2.0, "num_runs": 1, "num_resumes": 0, "num_releases": 1,
    }  # fmt: skip
    return Claim(**{**given, **changes})


def attack(signal="reference", auc=0.55, hits=0.02, inside=100, outside=1000):
    return Membership(
        signal=signal, num_members=inside, num_nonmembers=outside, balanced_accuracy=0.5, tpr_at_01=None,
        auc=Estimate(value=auc, low=auc - 0.02, high=min(1.0, auc + 0.02)), roc=((0.0, 0.0), (1.0, 1.0)),
        tpr_at_1=None if hits is None else Estimate(value=hits, low=0.0, high=0.1),
    )  # fmt: skip


def canaries(num=100, epsilon=1.5, ceiling=3.1, extracted=(0, 0), secrets=4, samples=10, area=0.6, **changes):
    bound = EpsilonBound(**{
        "signal": "reference", "epsilon": epsilon, "delta": 1e-5, "confidence": 0.95, "num_canaries": num,
        "num_guesses": num, "num_correct": num // 2, "declared": (num,), "rule": "fixed", "ceiling": ceiling, **changes,
    })  # fmt: skip
    exposure = Exposure(
        num_secrets=secrets, num_candidates=8, repeats=1, bits=(1.0,) * secrets, bits_before=(1.0,) * secrets,
        most_bits=3.0, num_extracted_greedy=extracted[0], num_extracted_top_k=extracted[1], num_samples=samples,
    ) if secrets else None  # fmt: skip
    halves = {"hits": None, "inside": num // 2, "outside": num - num // 2}
    areas = {"loss": 0.9} if area is None else {"loss": 0.9, "reference": area}
    known = tuple(attack(name, value, **halves) for name, value in areas.items())
    return CanaryAudit(
        commitment=TWO, num=num, num_included=num // 2, membership=known, bound=bound, exposure=exposure
    )  # fmt: skip


def back(num_rows=100, after=0, before=0, new=None):
    return Verbatim(
        num_rows=num_rows, prefix_tokens=32, continuation_tokens=32, num_extracted=after, num_extracted_before=before,
        num_new=new,
    )  # fmt: skip


def shift(value, reach):
    return Estimate(value=value, low=value - reach, high=value + reach)


def audit(private=None, **changes):
    given = {
        "run": run(claim=private), "tokens_per_row": 32, "membership": (attack(), attack("loss", auc=0.5, hits=0.01)),
        "canaries": canaries(), "verbatim": back(),
        "scan": ScanFigures(num_bytes=1000, num_ngrams_compared=5000, found={"path": 0}),
    }  # fmt: skip
    return BundleAudit(**{**given, **changes})


def of_other_files():
    """Return a run whose weights were chosen by rows of other files, which need not be like the data."""
    made = run()
    return made.model_copy(update={"text": made.text.model_copy(update={"validation": 0.0})})


def scan(num_bytes=10, **found):
    return ScanFigures(num_bytes=num_bytes, num_ngrams_compared=5, found=found)


def retuned(right=550, correct=30, runs=12, rows=270, tied=0, **own):
    """Retunings of so many rows, half of them in; the attack by loss finds nothing."""
    pairs, tried = runs * (rows // 2), runs * (rows // 50)
    given = {"num_pairs": pairs, "num_tied": tied, "num_guesses": tried}
    attacks = (
        Guesses(signal="reference", num_right=round(right * pairs / 1000), num_correct=correct, **given),
        Guesses(signal="loss", num_right=pairs // 2, num_correct=tried // 2, **given),
    )
    found = Retuned(num_rows=rows, num_asked=runs, num_in=(rows // 2,) * runs, steps=(9,) * runs, attacks=attacks)
    return {"retuned": found, "nonmembers": "validation", "membership": (attack(outside=30, hits=None),), **own}


PRIVATE = {"private": claim()}
HIDDEN = {"ceiling": 2.0}  # no attack on so few canaries could refute a claim of 2
BUNDLE = [
    ("scan", "passed", {}),
    ("scan", "failed", {"scan": scan(path=0, name=1)}),
    ("scan", "not measurable", {"scan": scan(num_bytes=0)}),
    ("auc", "passed", {"membership": (attack(auc=0.60),)}),
    ("auc", "failed", {"membership": (attack(auc=0.59), attack("min-k", auc=0.601))}),
    ("auc", "not measurable", {"membership": ()}),
    ("auc", "not measurable", {"membership": (attack(outside=999, auc=0.9),)}),
    ("auc", "not measurable", {"membership": (attack(inside=99),)}),
    ("auc", "not measurable", {"auc_before": shift(0.56, 0.02)}),
    ("auc", "not measurable", {"auc_before": shift(0.44, 0.02)}),
    ("auc", "not measurable", {"tokens_per_row": 31}),
    ("auc", "not measurable", {"nonmembers": "validation"}),
    ("auc", "passed", {"nonmembers": "set aside"}),
    ("auc", "passed", {"nonmembers": "file"}),
    ("auc", "passed", {"auc_before": shift(0.56, 0.08)}),
    ("auc", "passed", {"auc_before": shift(0.54, 0.01)}),
    ("auc", "passed", retuned()),
    ("auc", "failed", retuned(right=590)),  # the value is under the limit, the most that it leaves possible is not
    ("auc", "failed", retuned(right=700)),
    ("auc", "not measurable", retuned(tokens_per_row=31)),
    ("auc", "not measurable", retuned(rows=99, runs=24, correct=12)),
    ("auc", "passed", retuned(right=510, runs=1, correct=2)),
    ("auc", "failed", retuned(membership=(attack(auc=0.63, outside=30, hits=None),))),  # the bundle's own rows show it
    ("auc", "passed", {**retuned(right=900), "nonmembers": "file", "membership": (attack(),)}),  # rows enough: its own
    ("auc", "passed", retuned(membership=(attack(auc=0.63, outside=30, hits=None),), run=of_other_files())),
    ("tpr_at_1", "passed", retuned(correct=38)),
    ("tpr_at_1", "failed", retuned(correct=39)),
    ("tpr_at_1", "failed", retuned(correct=50)),
    ("tpr_at_1", "not measurable", retuned(runs=2, correct=5)),
    ("tpr_at_1", "passed", {"membership": (attack(hits=0.03),)}),
    ("tpr_at_1", "failed", {"membership": (attack(hits=0.02), attack("loss", hits=0.031))}),
    ("tpr_at_1", "not measurable", {"membership": (attack(hits=None),)}),
    ("secrets", "passed", {}),
    ("secrets", "failed", {"canaries": canaries(extracted=(1, 0))}),
    ("secrets", "failed", {"canaries": canaries(extracted=(0, 1))}),
    ("secrets", "failed", {"canaries": canaries(extracted=(1, 0), secrets=1, samples=0)}),
    ("secrets", "not measurable", {"canaries": canaries(secrets=3)}),
    ("secrets", "not measurable", {"canaries": canaries(samples=9)}),
    ("secrets", "not measurable", {"canaries": canaries(secrets=0)}),
    ("secrets", "not measurable", {"canaries": None}),
    ("verbatim", "passed", {"verbatim": back(after=3, before=3)}),
    ("verbatim", "passed", {"verbatim": back(after=3, before=4, new=0)}),
    ("verbatim", "failed", {"verbatim": back(after=4, before=3)}),
    ("verbatim", "failed", {"verbatim": back(after=3, before=3, new=1)}),  # one learnt, another forgotten
    ("verbatim", "failed", {"verbatim": back(num_rows=1, after=1)}),
    ("verbatim", "not measurable", {"verbatim": back(num_rows=99)}),
    ("verbatim", "not measurable", {"verbatim": back(num_rows=0)}),
    ("verbatim", "not measurable", {"verbatim": None}),
    ("inversion", "passed", {}),
    ("inversion", "failed", {"run": run(steps=9)}),
    ("inversion", "passed", {"run": several(10, 11)}),
    ("inversion", "failed", {"run": several(90, 9)}),  # each run's steps count, not their sum
    ("inversion", "failed", {"run": run(num_drawn=99)}),
    ("inversion", "not measurable", {"run": run(num_drawn=None)}),
    ("budget", "passed", PRIVATE),
    ("budget", "failed", {"private": claim(epsilon_total=2.1, num_runs=2)}),
    ("epsilon", "passed", PRIVATE),
    ("epsilon", "passed", {**PRIVATE, "canaries": canaries(epsilon=2.0)}),
    ("epsilon", "failed", {**PRIVATE, "canaries": canaries(epsilon=2.01)}),
    ("epsilon", "failed", {"private": claim(epsilon_total=9.0, budget=9.0), "canaries": canaries(epsilon=2.01)}),
    ("epsilon", "failed", {"private": claim(unit="user", rows_per_user=4), "canaries": canaries(epsilon=2.01)}),
    ("canaries", "passed", {**PRIVATE, "canaries": canaries(**HIDDEN)}),
    ("canaries", "failed", {**PRIVATE, "canaries": canaries(**HIDDEN, area=0.601)}),
    ("canaries", "not measurable", {**PRIVATE, "canaries": canaries(**HIDDEN, area=None)}),
    ("secrets", "passed", {**PRIVATE, "canaries": canaries(**HIDDEN, secrets=1, samples=0)}),
    ("secrets", "failed", {**PRIVATE, "canaries": canaries(**HIDDEN, extracted=(0, 1))}),
    ("secrets", "not measurable", {**PRIVATE, "canaries": canaries(**HIDDEN, secrets=0)}),
    ("epsilon", "not measurable", {**PRIVATE, "canaries": None}),
    ("epsilon", "not measurable", {**PRIVATE, "canaries": canaries(num=99, epsilon=9.0)}),
    ("epsilon", "not measurable", {**PRIVATE, "canaries": canaries(delta=1e-6)}),
    ("epsilon", "not measurable", {**PRIVATE, "canaries": canaries(delta=1e-4)}),
    ("epsilon", "not measurable", {**PRIVATE, "canaries": canaries(confidence=0.999)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "verdict", "changes"), BUNDLE)
def test_every_verdict_of_a_bundles_gates(name, verdict, changes):
    gates = {gate.name: gate for gate in bundle_gates(audit(**changes))}
    assert gates[name].verdict == verdict
    if verdict == "failed" and name != "inversion":
        assert gates[name].found > gates[name].limit
    assert passed(tuple(gates.values())) == all(gate.verdict == "passed" for gate in gates.values())


def test_a_change_moves_its_own_gate_only():
    """All others stay passed, so each row of the table is about what it says."""
    for name, _, changes in BUNDLE:
        others = [gate for gate in bundle_gates(audit(**changes)) if gate.name != name]
        open_ones = {gate.name for gate in others if gate.verdict != "passed"}
        assert open_ones <= ({"auc", "tpr_at_1"} if name in ("auc", "tpr_at_1") else {"secrets"}), (name, changes)


WEAK = claim(epsilon=WEAK_EPSILON + 0.1, epsilon_total=20.0, budget=20.0)


def test_a_retuned_gate_says_why_it_failed_in_a_line_that_fits():
    whys = {}
    for right, correct in ((550, 39), (700, 50)):
        whys[right] = [
            gate.told for gate in bundle_gates(audit(**retuned(right, correct))) if gate.limit in (0.60, 0.03)
        ]
    assert "do not rule more than it out" in whys[550][1]
    assert all("more than the limit was seen" in told for told in whys[700])
    longest = retuned(runs=9, rows=20_000, correct=1800, right=999)["retuned"]
    huge = longest.model_copy(update={"attacks": (longest.attacks[0].model_copy(update={"signal": "min-k++"}),)})
    assert all(len(gate.told) <= 200 for gate in bundle_gates(audit(**{**retuned(), "retuned": huge})))


def test_a_private_run_is_held_to_no_retuning():
    assert passed(bundle_gates(audit(**PRIVATE, **retuned(right=900))))


def test_too_few_canaries_for_a_weak_claim_cannot_tell():
    gates = {gate.name: gate for gate in bundle_gates(audit(private=WEAK, canaries=canaries(num=99)))}
    assert (gates["epsilon"].verdict, gates["canaries"].verdict) == ("not measurable", "not measurable")
    assert {gate.verdict for gate in bundle_gates(audit(private=WEAK, canaries=None))} > {"not measurable"}


def test_weights_chosen_by_the_rows_they_are_compared_on_are_told_with_what_to_do():
    gates = {gate.name: gate for gate in bundle_gates(audit(nonmembers="validation"))}
    assert "--audit-share" in gates["auc"].told
    assert "--nonmembers" in gates["auc"].told


def test_which_gates_there_are_depends_on_the_claim():
    plain = [gate.name for gate in bundle_gates(audit())]
    assert plain == ["scan", "auc", "tpr_at_1", "secrets", "verbatim", "inversion"]
    assert [gate.name for gate in bundle_gates(audit(**PRIVATE))] == ["scan", "budget", "epsilon"]
    hidden = audit(**PRIVATE, canaries=canaries(**HIDDEN))
    assert [gate.name for gate in bundle_gates(hidden)] == ["scan", "budget", "epsilon", "canaries", "secrets"]
    weak = [gate.name for gate in bundle_gates(audit(private=WEAK))]
    assert weak == ["scan", "budget", "epsilon", "canaries", "secrets", *(n for n in plain[1:] if n != "secrets")]


def test_a_private_run_may_know_more_than_the_attacks_limits_allow():
    found = audit(**PRIVATE, membership=(attack(auc=0.9),), canaries=canaries(extracted=(4, 4)), verbatim=back(after=9))
    assert passed(bundle_gates(found))


def test_a_claim_that_promises_next_to_nothing_is_held_against_the_attacks_too():
    assert passed(bundle_gates(audit(private=WEAK, nonmembers="validation")))  # no weights are chosen in a private run
    found = audit(private=WEAK, membership=(attack(auc=0.9),), canaries=canaries(area=0.9, secrets=3))
    verdicts = {gate.name: gate.verdict for gate in bundle_gates(found) if gate.verdict != "passed"}
    assert verdicts == {"auc": "failed", "canaries": "failed", "secrets": "not measurable"}
    enough = claim(epsilon=WEAK_EPSILON, epsilon_total=20.0, budget=20.0)
    assert passed(bundle_gates(audit(private=enough, membership=(attack(auc=0.9),))))


@pytest.mark.parametrize(("ceiling", "words"), [(3.1, "would have shown 3.10"), (1.9, "would refute it")])
def test_it_is_said_what_the_canaries_could_have_shown(ceiling, words):
    (gate,) = [one for one in bundle_gates(audit(**PRIVATE, canaries=canaries(ceiling=ceiling))) if one.limit == 2.0
               and one.name == "epsilon"]  # fmt: skip
    assert words in gate.told


def test_nothing_measured_passes_nothing():
    assert not passed(unmeasured())
    assert unmeasured()[0].verdict == "not measurable"


# The adapter in the full model


def plugged(found):
    return PluggedAudit(bundle_digest=ONE, package_digest=TWO, base_digest=TWO, canaries=found)


PLUGGED = [
    (2.0, 1e-5, canaries(), {"epsilon": "passed"}),
    (2.0, None, canaries(delta=1e-6), {"epsilon": "passed"}),
    (1.0, 1e-5, canaries(), {"epsilon": "failed"}),
    (2.0, 1e-5, canaries(**HIDDEN), {"epsilon": "passed", "canaries": "passed", "secrets": "passed"}),
    (
        2.0,
        1e-5,
        canaries(**HIDDEN, area=0.9, extracted=(1, 0)),
        {"epsilon": "passed", "canaries": "failed", "secrets": "failed"},
    ),
    (
        2.0,
        1e-5,
        canaries(**HIDDEN, secrets=0),
        {"epsilon": "passed", "canaries": "passed", "secrets": "not measurable"},
    ),
    (11.0, 1e-5, canaries(ceiling=12.0), {"epsilon": "passed", "canaries": "passed", "secrets": "passed"}),
    (
        11.0,
        1e-5,
        canaries(ceiling=12.0, samples=9),
        {"epsilon": "passed", "canaries": "passed", "secrets": "not measurable"},
    ),
    (2.0, 1e-6, canaries(), {"epsilon": "not measurable"}),
    (2.0, 1e-5, canaries(num=99), {"epsilon": "not measurable"}),
    (None, None, canaries(), {"secrets": "passed"}),
    (None, None, canaries(extracted=(0, 2)), {"secrets": "failed"}),
    (None, None, canaries(secrets=3), {"secrets": "not measurable"}),
    (None, None, canaries(secrets=0), {"secrets": "not measurable"}),
]


@pytest.mark.parametrize(("epsilon", "delta", "found", "verdicts"), PLUGGED)
def test_every_verdict_of_a_plugged_in_adapters_gates(epsilon, delta, found, verdicts):
    gates = plugged_gates(plugged(found), epsilon, claimed_delta=delta)
    assert {gate.name: gate.verdict for gate in gates} == verdicts


# The package


def package(kept=0.3, regained=(0.1, 0.2), union=0.6, step=500, withheld=(0.4, 0.3)):
    ways = zip(("client", "recovery attack"), withheld, (None, 9000), strict=False)
    points = tuple(RecoveryPoint(num_tokens=n * step, perplexity=50.0, regained=one) for n, one in enumerate(regained))
    return PackageAudit(
        package_digest=ONE, base_digest=TWO, method=Method(name="width"), middle_parameters=100,
        emulator_parameters=50,
        similarity=Similarity(num_parameters=9, num_verbatim=1, num_verbatim_by_row=1, blocks=()),
        capabilities=(Capability(name="perplexity", metric="nats", num_rows=9, chance=7.0, full=3.0, emulator=5.0,
                                 kept=kept),),
        recovery=(Recovery(attack="as_is_all", trained_parameters=9, points=points),) if points else (),
        withheld=tuple(
            Withheld(way=way, nats=nats, perplexity=9.0, num_tokens=num, told="") for way, nats, num in ways
        ),
        union=None if union is None else Union(num_packages=2, share_single=0.5, share_union=union),
    )  # fmt: skip


PACKAGE = [
    ("capability", {"max_capability": 0.3}, "passed", {}),
    ("capability", {"max_capability": 0.29}, "failed", {}),
    ("recovery", {"max_recovery": 0.2}, "passed", {}),
    ("recovery", {"max_recovery": 0.19}, "failed", {"regained": (0.2, 0.1)}),
    ("recovery", {"max_recovery": 0.9}, "not measurable", {"regained": ()}),
    ("recovery", {"max_recovery": 0.9}, "not measurable", {"step": 0}),
    ("recovery", {"max_recovery": 0.1}, "failed", {"step": 0}),
    ("union", {"max_union": 0.6}, "passed", {}),
    ("union", {"max_union": 0.5}, "failed", {}),
    ("union", {"max_union": 0.9}, "not measurable", {"union": None}),
    ("withheld", {"min_withheld": 0.3}, "passed", {}),
    ("withheld", {"min_withheld": 0.31}, "failed", {}),
    ("withheld", {"min_withheld": 0.31}, "failed", {"withheld": (0.3, 0.4)}),  # the least of them, whichever it is
    ("withheld", {"min_withheld": 0.0}, "passed", {"withheld": (0.0,)}),
    ("withheld", {"min_withheld": 0.0}, "failed", {"withheld": (-0.01,)}),
    ("withheld", {"min_withheld": -0.1}, "passed", {"withheld": (-0.01,)}),
    ("withheld", {"min_withheld": -9.0}, "not measurable", {"withheld": ()}),
]


@pytest.mark.parametrize(("name", "limits", "verdict", "changes"), PACKAGE)
def test_every_verdict_of_a_packages_gates(name, limits, verdict, changes):
    (gate,) = package_gates(package(**changes), **limits)
    assert (gate.name, gate.verdict) == (name, verdict)
    assert package_gates(package(**changes)) == ()


def test_by_which_way_least_is_withheld_is_told():
    (gate,) = package_gates(package(), min_withheld=0.1)
    assert gate.told == (
        "0.30 nats per token are withheld after tuning by a recovery attack on 9,000 tokens, the least of 2 ways"
    )
    assert (gate.found, gate.limit) == (0.3, 0.1)
    (alone,) = package_gates(package(withheld=(0.4,)), min_withheld=0.1)
    assert alone.told == "0.40 nats per token are withheld after tuning by a client, the one way measured"
    (none,) = package_gates(package(withheld=()), min_withheld=0.1)
    assert (none.found, none.told) == (None, "no tuning of the emulator was measured")


def test_how_long_the_longest_attack_was_is_told():
    (gate,) = package_gates(package(regained=(0.1, 0.2, 0.1)), max_recovery=0.2)
    assert gate.told == "an attack regained 0.20 of what was lost, the longest was on 1,000 tokens"
