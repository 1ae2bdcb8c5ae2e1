"""The file set that output checkers of research environments work with (SACRO-ML's), beside a signed privacy report.

``target.yaml`` and ``attack_results.json`` are what SACRO-ML 2 reads; ``proba_train.csv`` and ``proba_test.csv`` are a
score for every row that was trained on and for others, placed between 0 and 1, in no order of the data. All four are
for the environment's own output checker and stay there; ``report`` is the signed report, which may leave. No text, no
path, no digest of the data is in any of them.
"""

from __future__ import annotations

import json
import math
import secrets
import time
import uuid
from collections.abc import Mapping
from typing import Any

import yaml

from offsite import __version__
from offsite.audits.keptscores import KeptScores
from offsite.audits.record import BundleAudit, SignalName
from offsite.digests import sha256_bytes
from offsite.privacyreport.record import PrivacyReport
from offsite.privacyreport.sacrofigures import HALF, Floats, Placed, figures, null_deviation, placed
from offsite.report.numbers import whole

TARGET_NAME = "target.yaml"
RESULTS_NAME = "attack_results.json"
TRAIN_NAME, TEST_NAME = "proba_train.csv", "proba_test.csv"
READ_NAME = "READ-FIRST.txt"

_SIGNIFICANT = 0.05
_NOT_GIVEN = ("X_train", "y_train", "X_test", "y_test", "X_train_orig", "y_train_orig", "X_test_orig", "y_test_orig")
_READ = """\
For the output checker of this research environment.

Stays here:
  target.yaml          what the model is, as SACRO-ML 2 reads it: Target().load(this folder)
  attack_results.json  what attacks on rows found: one experiment for each attack, the strongest first
  proba_train.csv      a score for each of {members} rows that were trained on, by the strongest attack ({strongest})
  proba_test.csv       a score for each of {nonmembers} rows that were not
May leave, if you agree:
  report/              the signed privacy report: figures and digests. The adapter itself is another folder.

What the scores are. They keep the order of the attack's own scores and nothing else, and are no probabilities. SACRO-ML
takes Advantage and ACC at a score of 0.5 alone, so 0.5 stands where one threshold tells the two sides apart best; that
threshold was chosen on these very rows, and both figures are a little too high. Rows are in no order of the data.
SACRO-ML's FDIF and PDIF depend on the order of rows where scores tie; in attack_results.json rows that tie count by
their share. TPR@ is the share of hits at no more than that many false alarms, without interpolation: it says little at
a rate that is less than 10 of {nonmembers} rows.

What to look at. report/report.html first: its first line, its gates, and what was not measured. SACRO-ML's text report
sums up one experiment after another and carries what was significant on to the next: read the first, the strongest. An
area near 0.5 says that these attacks found nothing, no more; a better one may find more. What was attacked is the
{kind} adapter with the emulator that this environment holds: the full model with the adapter in it may reveal more, or
less. Text that comes back word for word, planted secrets and a bound on epsilon are in the report and nowhere else.

First line of the report: {headline}
"""


def sacro_files(report: PrivacyReport, audit: BundleAudit, kept: KeptScores) -> dict[str, bytes]:
    """Return the files by their names; the signed report stands beside them in a folder of its own."""
    found = sorted(audit.membership, key=lambda one: one.auc.value, reverse=True)
    scores = {
        one.signal: placed(kept.signals[one.signal].members, kept.signals[one.signal].nonmembers) for one in found
    }
    strongest = found[0].signal
    best = scores[strongest]
    return {
        TARGET_NAME: yaml.safe_dump(_target(report, audit), sort_keys=False, allow_unicode=True).encode(),
        RESULTS_NAME: json.dumps(_results(report, audit, scores), indent=1, allow_nan=False).encode() + b"\n",
        TRAIN_NAME: _column(best.members),
        TEST_NAME: _column(best.nonmembers),
        READ_NAME: _READ.format(
            strongest=strongest,
            kind=audit.run.adapter.kind,
            members=whole(best.members.size),
            nonmembers=whole(best.nonmembers.size),
            headline=report.headline,
        ).encode(),
    }


def _target(report: PrivacyReport, audit: BundleAudit) -> dict[str, Any]:
    """What SACRO-ML's loader looks for; a model that it could run is not handed over."""
    run = audit.run
    params: dict[str, Any] = {
        **{
            name: value
            for name, value in run.adapter.model_dump(mode="json").items()
            if isinstance(value, str | int | float)
        },
        **{"steps": run.steps, "batch_size": run.batch_size, "learning_rate": run.learning_rate},
        "differentially_private": run.claim is not None,
        "bundle_digest": run.bundle_digest,
        "package_digest": run.package_digest,
        "report_headline": report.headline,
    }
    if run.claim is not None:
        params |= {"epsilon": run.claim.epsilon, "delta": run.claim.delta, "epsilon_total": run.claim.epsilon_total}
    found: dict[str, Any] = {"dataset_name": "not named", "dataset_module_path": "", "features": {}, "safemodel": []}
    found |= {"model_type": "offsite adapter", "model_name": f"{run.adapter.kind} adapter", "model_params": params}
    if run.num_records is not None:
        found["n_samples"] = run.num_records
    found |= {f"{name}_path": "" for name in _NOT_GIVEN}
    return found | {"proba_train_path": TRAIN_NAME, "proba_test_path": TEST_NAME}


def _results(report: PrivacyReport, audit: BundleAudit, scores: Mapping[SignalName, Placed]) -> dict[str, Any]:
    """One experiment for each attack, the strongest first.

    SACRO-ML 2.0.1 sums an experiment up by the mean of its significant areas, which a weak attack beside a strong one
    would lower, and carries those of one experiment on to the next: the first alone stands for itself.
    """
    found = {}
    for one in sorted(audit.membership, key=lambda one: list(scores).index(one.signal)):
        name = f"offsite membership {one.signal}"
        key = f"{report.digests.audits['bundle']} {one.signal}"
        log_id = str(uuid.UUID(hex=sha256_bytes(key.encode()).removeprefix("sha256:")[:32]))
        instance = figures(scores[one.signal], one.roc)
        reach = 3 * null_deviation(one.num_members, one.num_nonmembers)
        metadata = {
            "sacroml_version": f"none: figures by offsite {__version__}, under the names of sacroml 2.0.1",
            "attack_name": name,
            "attack_params": {
                "output_dir": ".",
                "signal": one.signal,
                "threshold": f"{HALF:g} is placed at the best threshold on these rows",
                "ties": "rows that tie count by their share",
                "nonmembers": audit.nonmembers or "",
                "tokens_per_row": audit.tokens_per_row,
            },
            "global_metrics": {
                "null_auc_3sd_range": f"{HALF - reach:.4f} -> {HALF + reach:.4f}",
                "n_sig_auc_p_vals": int(instance["P_HIGHER_AUC"] <= _SIGNIFICANT),
                "n_sig_pdif_vals": int(math.exp(-instance["PDIF01"]) <= _SIGNIFICANT),
            },
            "target_model": f"{audit.run.adapter.kind} adapter",
        }
        found[f"{name}_{log_id}"] = {
            "log_id": log_id,
            "log_time": time.strftime("%d/%m/%Y %H:%M:%S", time.gmtime(report.created)),
            "metadata": metadata,
            "attack_experiment_logger": {"attack_instance_logger": {"instance_0": instance}},
        }
    return found


def _column(scores: Floats) -> bytes:
    """Return the scores one a line, in an order that nothing leads to."""
    lines = [f"{score!r}" for score in scores.tolist()]
    secrets.SystemRandom().shuffle(lines)
    return "\n".join(lines).encode() + b"\n"
