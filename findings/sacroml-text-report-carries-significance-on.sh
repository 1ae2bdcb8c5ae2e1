#!/usr/bin/env bash
# sacroml: its text report calls an attack significant because another one before it was.
#
# Seen with sacroml 2.0.1 on a CPU. `GenerateTextReport.process_attack_target_json` sums up a file of attack results, one
# experiment after another. The list of significant areas that it keeps for that is made once and never emptied: after an
# experiment that found something, one whose area is 0.5 and whose P_HIGHER_AUC is 0.5 is listed as evidence for rejection
# too (">10% AUC are statistically significant"), and its mean area is that of the experiment before it. In the other order
# of the same two experiments it is evidence for release. Nothing is raised. An output checker reads another verdict of the
# same attack in the same file, by the order in which the attacks were run.
#
# What one would have guessed: that each experiment is summed up by its own instances, as the report names it. Put the
# strongest attack first, and read only its verdict; or give each attack a file of its own.
#
# Output seen:
#   sacroml 2.0.1
#   strong, then none
#     rejection: >10% AUC are statistically significant in experiment strong
#     rejection: Attack AUC > threshold of 0.65 in experiment strong
#     rejection: >10% AUC are statistically significant in experiment none
#     rejection: Attack AUC > threshold of 0.65 in experiment none
#   none, then strong
#     rejection: >10% AUC are statistically significant in experiment strong
#     rejection: Attack AUC > threshold of 0.65 in experiment strong
#     release: <10% AUC are statistically significant in experiment none
#
# Installs the package in a temporary folder; fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check sacroml==2.0.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import json
import sys

from sacroml.attacks.attack_report_formatter import GenerateTextReport
from sacroml.version import __version__

AREAS = {"strong": {"AUC": 0.9, "P_HIGHER_AUC": 1e-9}, "none": {"AUC": 0.5, "P_HIGHER_AUC": 0.5}}


def summed_up(order):
    """What the text report says of these experiments, in this order, in one file."""
    results = {
        name: {"attack_experiment_logger": {"attack_instance_logger": {"instance_0": AREAS[name]}}} for name in order
    }
    with open("attack_results.json", "w") as file:
        json.dump(results, file)
    report = GenerateTextReport()
    report.process_attack_target_json("attack_results.json")
    print(", then ".join(order))
    told = [("rejection", line) for line in report.support_rejection]
    told += [("release", line) for line in report.support_release]
    for side, line in told:
        print(f"  {side}: {line}")
    return {side for side, line in told if line.endswith("experiment none")}


print("sacroml", __version__)
found = summed_up(["strong", "none"]), summed_up(["none", "strong"])
sys.exit(0 if found == ({"rejection"}, {"release"}) else "this has changed")
PY
