"""Audits with plausible figures, for the tests of the privacy report; loaded by path, as there is no package here."""

from __future__ import annotations

import math
from functools import cache

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Method
from offsite.audits.accounting import Mechanism, account, accountant, pld_epsilon
from offsite.audits.lowerbound import guessed_epsilon, one_run_ceiling
from offsite.audits.membership import membership_of
from offsite.audits.record import (
    BlockAlignment,
    BundleAudit,
    CanaryAudit,
    Capability,
    EpsilonBound,
    Estimate,
    Exposure,
    Guesses,
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
from offsite.audits.runs import Claim, Run, TextSettings
from offsite.privacyreport.recompute import Recomputed, SpentPoint
from offsite.privacyreport.record import Audits, Limits, conclude

BUNDLE, PACKAGE, BASE, OTHER = ("sha256:" + letter * 64 for letter in "b0f9")
JOB = "ab" * 16
ISSUER = "-".join(["abcd"] * 13)
DELTA = 1e-3
MECHANISM = Mechanism(1.5, 0.064, 6)


@cache
def claim(num_runs=1):
    """A true claim of a small run; the accountants are asked once."""
    spent = account(MECHANISM, DELTA)
    total = pld_epsilon([MECHANISM] * num_runs, DELTA)
    return Claim(
        mechanism="Poisson-subsampled Gaussian",
        neighbours="one unit added or removed",
        unit="example",
        number_of_units_public=False,
        epsilon=spent.epsilon,
        epsilon_prv=spent.epsilon_prv,
        epsilon_rdp=spent.epsilon_rdp,
        delta=DELTA,
        noise_multiplier=MECHANISM.sigma,
        clip=0.5,
        sample_rate=MECHANISM.rate,
        divisor=64,
        steps=MECHANISM.steps,
        accountant=accountant(),
        sampler="poisson",
        noise="ChaCha20, key of the operating system",
        released="the adapter's tensors, once",
        epsilon_total=total,
        delta_total=DELTA,
        budget=2.0,
        num_runs=num_runs,
        num_resumes=0,
        num_releases=1,
    )


def made_up_claim(**changes):
    """A claim nobody worked out, for pages: epsilon 3 over 47 steps."""
    given = {
        **{"mechanism": "Poisson-subsampled Gaussian", "neighbours": "one unit added or removed", "unit": "example"},
        **{"number_of_units_public": False, "epsilon": 2.9991, "epsilon_prv": 3.011, "epsilon_rdp": 3.741},
        **{"delta": 5.01e-4, "noise_multiplier": 0.865, "clip": 0.5, "sample_rate": 0.064, "divisor": 64, "steps": 47},
        **{"accountant": "PLD, dp-accounting 0.6.0", "sampler": "poisson"},
        **{"noise": "ChaCha20 of the operating system's key", "released": "the adapter's tensors, once"},
        **{"engine": "hooks", "epsilon_total": 4.512, "delta_total": 5.01e-4, "budget": 6.0, "num_runs": 2},
        **{"num_resumes": 1, "num_releases": 1},
    }
    return Claim(**{**given, **changes})


def recomputed_of(claim):
    """What a made-up claim comes to, made up as well."""
    steps = sorted({max(1, round(claim.steps * part / 12)) for part in range(1, 13)})
    points = tuple(
        SpentPoint(steps=n, epsilon=claim.epsilon * (0.3 + 0.7 * math.sqrt((n - 1) / max(claim.steps - 1, 1))))
        for n in steps
    )
    return Recomputed(
        accountant=claim.accountant,
        epsilon=claim.epsilon,
        epsilon_prv=claim.epsilon_prv,
        epsilon_rdp=claim.epsilon_rdp,
        epsilon_at_delta_total=claim.epsilon,
        over_steps=points,
    )


@cache
def membership(signal, power, members=1200, others=1100):
    """An attack whose hits are its false alarms to that power; 1 is chance. Its figures are those of such scores."""
    inside = [1 - ((place + 0.5) / members) ** (1 / power) for place in range(members)]
    return membership_of(signal, inside, [1 - (place + 0.5) / others for place in range(others)])


@cache
def bound(num=500, correct=75, delta=5.01e-4, guesses=100):
    """The bound that so many correct ones of so many guesses prove."""
    given = {"delta": delta, "confidence": 0.95}
    declared = tuple(round(num * share) for share in (0.5, 0.2, 0.1))
    return EpsilonBound(
        signal="reference",
        epsilon=guessed_epsilon(num, guesses, correct, **given, declared=declared),
        num_canaries=num,
        num_guesses=guesses,
        num_correct=correct,
        declared=declared,
        rule=f"bonferroni: {', '.join(map(str, declared))} guesses, in and out",
        ceiling=one_run_ceiling(num, **given, num_guesses=declared),
        **given,
    )


def canaries(power=0.9, correct=75, secrets=10, exposed=2.0, extracted=0, delta=5.01e-4):
    """500 canaries of which an attack knows that much."""
    bits = tuple(round(exposed + 3 * abs(math.sin(7.3 * n)), 2) for n in range(secrets))
    before = tuple(round(1.5 * abs(math.sin(3.1 * n)), 2) for n in range(secrets))
    return CanaryAudit(
        commitment="sha256:" + "c" * 64,
        num=500,
        num_included=247,
        membership=(membership("loss", power * 1.03, 247, 253), membership("reference", power, 247, 253)),
        bound=bound(correct=correct, delta=delta),
        exposure=Exposure(
            num_secrets=secrets,
            num_candidates=1000,
            repeats=1,
            bits=bits,
            bits_before=before,
            most_bits=math.log2(1000),
            num_extracted_greedy=extracted,
            num_extracted_top_k=extracted,
            num_samples=100,
        ),
    )


def run_record(claim=None, **changes):
    """A client's record of its run."""
    given = {
        "bundle_digest": BUNDLE,
        "package_digest": PACKAGE,
        "base_digest": BASE,
        "job_id": JOB,
        "adapter": AdapterSpec(kind="lora", placement="all"),
        "data_sha256": None,
        "text": TextSettings(packed=False, block_tokens=256, validation=0.1, audit_share=0.3, seed=0),
        "num_records": 1200,
        "num_drawn": 1200,
        "num_tokens": 181_034,
        "steps": claim.steps if claim else 200,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "canaries": "sha256:" + "c" * 64,
        "num_canaries": 247,
        "claim": claim,
        "versions": {"offsite": "0.1.0", "torch": "2.13.0"},
    }
    return Run(**{**given, **changes})


def bundle_audit(claim=None, power=0.8, **changes):
    """A client's audit; `power` is how well its attacks do, 1 is chance."""
    given = {
        "run": run_record(claim),
        "tokens_per_row": 128,
        "membership": (
            membership("loss", power * 1.06),
            membership("reference", power),
            membership("min-k", power * 1.05),
            membership("min-k++", power * 1.02),
        ),
        "canaries": canaries(delta=claim.delta) if claim else canaries(),
        "verbatim": Verbatim(
            num_rows=200, prefix_tokens=32, continuation_tokens=32, num_extracted=1, num_extracted_before=1, num_new=0
        ),
        "nonmembers": "set aside",
        "auc_before": Estimate(value=0.503, low=0.479, high=0.527),
        "scan": ScanFigures(
            num_bytes=3_612_004, num_ngrams_compared=181_034, found={"text": 0, "paths": 0, "names": 0}
        ),
        "versions": {"offsite": "0.1.0", "torch": "2.13.0", "transformers": "5.10.0"},
    }
    return BundleAudit(**{**given, **changes})


def retuned(**changes):
    """Twelve retunings on halves of 270 rows, told of by one attack about as well as by coins."""
    guessed = Guesses(
        signal="reference", num_pairs=12 * 130, num_right=800, num_tied=3, num_guesses=60, num_correct=33
    )  # fmt: skip
    given = {"num_rows": 270, "num_asked": 12, "num_in": (130, 140) * 6, "steps": (20,) * 12, "attacks": (guessed,)}
    return Retuned(**{**given, **changes})


def plugged_audit(delta=5.01e-4, **changes):
    """The owner's audit of the adapter in the full model."""
    given = {
        "bundle_digest": BUNDLE,
        "package_digest": PACKAGE,
        "base_digest": BASE,
        "canaries": canaries(power=0.94, correct=55, delta=delta),
        "versions": {"offsite": "0.1.0"},
    }
    return PluggedAudit(**{**given, **changes})


def package_audit(**changes):
    """The owner's audit of its package."""
    tokens = (0, 3000, 10_000, 30_000, 100_000, 300_000)
    attacks = {"heal_whole": (0.0, 0.05, 0.14, 0.26, 0.38, 0.44), "heal_middle": (0.02, 0.04, 0.09, 0.17, 0.22, 0.24)}
    given = {
        "package_digest": PACKAGE,
        "base_digest": BASE,
        "method": Method(name="width", settings={"width": 0.33, "steps": 300}),
        "middle_parameters": 92_042_496,
        "emulator_parameters": 45_700_000,
        "capabilities": (
            Capability(
                name="perplexity",
                metric="nats_per_token",
                num_rows=160,
                chance=math.log(1240.0),
                full=math.log(12.97),
                emulator=math.log(61.79),
                emulator_tuned=math.log(25.61),
                plugged_in=math.log(11.02),
                kept=math.log(1240 / 61.79) / math.log(1240 / 12.97),
            ),
            Capability(name="arc_easy", metric="acc", num_rows=500, chance=0.25, full=0.58, emulator=0.31, kept=2 / 11),
        ),
        "similarity": Similarity(
            num_parameters=88_200_000,
            num_verbatim=42_500_000,
            num_verbatim_by_row=61_000_000,
            blocks=(
                BlockAlignment(block="bottom.0", cosine=1.0, cka=1.0),
                BlockAlignment(block="middle.0", cosine=0.71, cka=0.93),
                BlockAlignment(block="top.0", cosine=1.0, cka=0.88),
            ),
        ),
        "recovery": tuple(
            Recovery(
                attack=name,
                trained_parameters=45_700_000,
                points=tuple(
                    RecoveryPoint(num_tokens=n, perplexity=61.79 - 48.8 * share, regained=share)
                    for n, share in zip(tokens, shares, strict=True)
                ),
            )
            for name, shares in attacks.items()
        ),
        "recovery_text": "wikitext-2, first 300k tokens",
        "union": Union(num_packages=2, share_single=0.33, share_union=0.54),
        "versions": {"offsite": "0.1.0"},
    }
    return PackageAudit(**{**given, **changes})


def ways(**changes):
    """What is withheld after tuning, as the figures of `package_audit` give it; `changes` are of the first."""
    perplexities = {"rehearsed client": 27.5, "client": 25.61, "recovery attack": 61.79 - 48.8 * 0.44}
    tokens = {"rehearsed client": 40_960, "client": None, "recovery attack": 300_000}
    found = [
        Withheld(way=way, nats=math.log(one / 12.97), perplexity=one, num_tokens=tokens[way], told=f"{way}, 40 steps")
        for way, one in perplexities.items()
    ]
    return (found[0].model_copy(update=changes), *found[1:])


def report(bundle=None, plugged=None, package=None, **changes):
    """A report of these audits; a claim's recomputation is made up."""
    claim = bundle.run.claim if bundle else None
    given = {
        "issuer": ISSUER,
        "created": 1_790_000_000,
        "audits": Audits(bundle=bundle, plugged_in=plugged, package=package),
        "release": None,
        "job": None,
        "limits": Limits(),
        "recomputed": recomputed_of(claim) if claim else None,
        "versions": {"offsite": "0.1.0"},
    }
    return conclude(**{**given, **changes})
