#!/usr/bin/env bash
# sacroml: the module that sums up the p-values of FDIF sums up those of AUC instead.
#
# Seen with sacroml 2.0.1 on a CPU. `SummariseFDIFPvalsModule` says "Summary of FDIF p-values" and defines how they are taken
# from a file of attack results (exp(-PDIF01) of every instance), in a method that nothing calls: the summary that it
# inherits asks another method, which takes P_HIGHER_AUC. Of an attack that recognises a tenth of the rows (PDIF01 of 20, a
# p-value of 2e-9) while its area tells nothing (P_HIGHER_AUC 0.5), which is what FDIF is there to show, it counts no
# significant one; of one with the two the other way round it counts one. Nothing is raised.
#
# What one would have guessed: that the two modules count two things. Read PDIF01 itself; exp(-PDIF01) is its p-value.
#
# Output seen:
#   sacroml 2.0.1
#   FDIF significant, AUC not: Summary of FDIF p-values at p = (0.05): 0 of 1 significant
#   AUC significant, FDIF not: Summary of FDIF p-values at p = (0.05): 1 of 1 significant
#
# Installs the package in a temporary folder; fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check sacroml==2.0.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

from sacroml.attacks.attack_report_formatter import SummariseFDIFPvalsModule
from sacroml.version import __version__


def num_significant(told, **instance):
    """How many significant p-values of FDIF the module counts in a file with this one instance."""
    results = {"attack": {"attack_experiment_logger": {"attack_instance_logger": {"instance_0": instance}}}}
    module = SummariseFDIFPvalsModule(results)
    found = module.process_dict()
    print(f"{told}: {module}: {found['n_sig_uncorrected']} of {found['n_total']} significant")
    return found["n_sig_uncorrected"]


print("sacroml", __version__)
found = (
    num_significant("FDIF significant, AUC not", PDIF01=20.0, P_HIGHER_AUC=0.5),
    num_significant("AUC significant, FDIF not", PDIF01=0.1, P_HIGHER_AUC=1e-9),
)
sys.exit(0 if found == (0, 1) else "this has changed")
PY
