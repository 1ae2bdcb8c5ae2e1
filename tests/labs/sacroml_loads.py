"""Whether SACRO-ML itself loads the file set of ``offsite report privacy --format sacro``; run by hand.

    python tests/labs/sacroml_loads.py FOLDER

FOLDER is what the verb wrote. In a temporary environment of its own (not in the project's: it brings its own torch; two
to three minutes) the pinned sacroml loads ``target.yaml`` with both columns of scores, works its figures out from them,
which must be those of ``attack_results.json``, writes its text report and its PDF, and runs its worst-case attack. It
also writes the figures of ``tests/vectors/sacro/scores.json`` anew, which must be those committed there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PINNED = "sacroml==2.0.1"
VECTOR = Path(__file__).parent.parent / "vectors" / "sacro"

INSIDE = """
import json, os, sys
import numpy as np
from sacroml import metrics
from sacroml.attacks import report
from sacroml.attacks.attack_report_formatter import GenerateTextReport
from sacroml.attacks.factory import attack
from sacroml.attacks.target import Target

folder, vector, work = sys.argv[1:]


def figures(members, others):
    scores, labels = np.concatenate([members, others]), np.r_[np.ones(len(members)), np.zeros(len(others))]
    found = metrics.get_metrics(np.c_[1 - scores, scores], labels)
    return {name: float(value) for name, value in found.items() if np.ndim(value) == 0}


def require_same(stated, found, what):
    for name, value in found.items():
        assert abs(stated[name] - value) <= 1e-4 * max(1, abs(value)), (what, name, stated[name], value)
    print("ok ", what, len(found), "figures")


target = Target()
target.load(folder)
assert target.has_probas() and not target.has_model()
results = json.load(open(os.path.join(folder, "attack_results.json")))
name, strongest = next(iter(results.items()))
instance = strongest["attack_experiment_logger"]["attack_instance_logger"]["instance_0"]
found = figures(target.proba_train[:, 0], target.proba_test[:, 0])
exact = {key: value for key, value in found.items() if not key.startswith(("TPR@", "PDIF"))}
require_same(instance, exact, "target.yaml and attack_results.json:")
text = GenerateTextReport()
text.process_attack_target_json(os.path.join(folder, "attack_results.json"), os.path.join(folder, "target.yaml"))
os.chdir(work)
text.export_to_file("summary.txt")
print(open("summary.txt").read())
report.write_pdf("mia", report.create_mia_report(strongest))
print("ok  PDF of", os.path.getsize("mia.pdf"), "bytes")
done = attack(target, "worstcase", output_dir=os.path.join(work, "worstcase"), n_reps=3)
print("ok  worst-case attack:", done["metadata"]["global_metrics"]["null_auc_3sd_range"])
scores = json.load(open(os.path.join(vector, "scores.json")))
again = figures(np.array(scores["members"]), np.array(scores["nonmembers"]))
path = os.path.join(vector, "figures.json")
if not os.path.exists(path):
    json.dump(again, open(path, "w"), indent=1, sort_keys=True)
require_same(json.load(open(path)), again, "tests/vectors/sacro:")
"""


def main(folder: Path) -> int:
    """Return the exit status: 0 when sacroml took everything."""
    with tempfile.TemporaryDirectory() as work:
        venv.create(Path(work) / "venv", with_pip=True)
        python = str(Path(work) / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", PINNED], check=True)
        words = [python, "-W", "ignore", "-c", INSIDE, str(folder.resolve()), str(VECTOR.resolve()), work]
        return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
