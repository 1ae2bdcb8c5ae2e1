"""What differential privacy costs in quality, time and memory, and what the client's audit finds with and without it.

Run as: ``python benchmarks/privacy/run.py --config benchmarks/privacy/medquad.yaml --data DIR --work DIR --out JSON``.
Every step is a verb of the command line in a process of its own; what ended well is not run again. ``--only inf-0,8-0``
works on some arms (EPSILON-SEED); the JSON holds all that are done.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from benchmarks.record import ROOT, arguments, environment, files, write


def main() -> None:
    """Run what is not done and write the results."""
    given, plan, wanted = arguments(__doc__, only="arms to work on, by comma, as EPSILON-SEED")
    paths = {key: _path(plan[key], given.data) for key in ("public", "client", "heldout")}
    work = given.work
    rows = _choose_rows(paths["client"], work / "rows.jsonl.gz", plan["model"], **plan["rows"])
    package = ["distill", plan["model"], "--public", str(paths["public"]), *plan["distill"], "-o", "package"]
    _verb(work, "distill", package, work / "package")
    for seed in plan["seeds"]:
        for epsilon in plan["epsilons"]:
            arm = f"{epsilon:g}-{seed}"
            if not wanted or arm in wanted:
                _run_arm(plan, work, arm, epsilon, seed)
    arms = {path.parent.name: path.parent for path in work.glob("*/audit.outcome.json")}
    result = {
        "benchmark": "privacy",
        **environment(),
        "config": {key: value for key, value in plan.items() if key not in paths},
        "data": files(**paths),
        "rows": rows,
        "evaluation": _evaluate(plan, work, paths["heldout"], sorted(arms)),
        "arms": {name: _arm(folder) for name, folder in sorted(arms.items())},
    }
    write(given.out, result)


def _run_arm(plan: dict[str, Any], work: Path, arm: str, epsilon: float, seed: int) -> None:
    folder = work / arm
    folder.mkdir(exist_ok=True)
    package, data, seeded = "../package", "../rows.jsonl.gz", ["--seed", str(seed)]
    _verb(folder, "canaries", ["canaries", package, *plan["canaries"], "-o", "canaries"], folder / "canaries")
    private = [] if math.isinf(epsilon) else ["--dp", f"epsilon={epsilon:g},ledger=ledger,budget={4 * epsilon:g}"]
    tune = [word for word in plan["tune"] if not (private and word == "--no-pack")]
    words = ["tune", package, "--data", data, "--canaries", "canaries", *tune, *private, *seeded, "-o", "bundle"]
    _verb(folder, "tune", words, folder / "bundle")
    words = ["audit", "bundle", package, "bundle", "--data", data, "--canaries", "canaries", *plan["audit"]]
    _verb(folder, "audit", [*words, "-o", "audit"], folder / "audit")


def _evaluate(plan: dict[str, Any], work: Path, heldout: Path, arms: list[str]) -> dict[str, Any]:
    """Return perplexities of every arm, all measured in one process."""
    out = "evaluation-" + hashlib.sha256(",".join(arms).encode()).hexdigest()[:8]
    words = ["evaluate", plan["model"], "--package", "package", "--data", str(heldout), *plan["evaluate"]]
    words += [word for arm in arms for word in ("--bundle", f"{arm}={arm}/bundle")]
    _verb(work, out, [*words, "-o", out], work / out)
    found = json.loads((work / out / "results.json").read_text(encoding="utf-8"))
    return {name: row["perplexity"] for name, row in found["rows"].items()} | {
        "num_tokens": found["data"]["num_tokens"]
    }


def _arm(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "audit" / "audit.json").read_text(encoding="utf-8"))
    for one in [*found["membership"], *(found["canaries"] or {}).get("membership", [])]:
        del one["roc"]
    steps = {name: json.loads((folder / f"{name}.outcome.json").read_text()) for name in ("canaries", "tune", "audit")}
    return {
        "audit": found,
        "tune": steps["tune"]["outcome"],
        "cost": {name: {key: step[key] for key in ("cpu_seconds", "peak_bytes")} for name, step in steps.items()},
        "gates": steps["audit"]["outcome"].get("gates"),
    }


def _verb(folder: Path, name: str, words: list[str], leaves: Path) -> None:
    """The verb has ended well in `folder`, and what it printed and cost is in ``NAME.outcome.json``."""
    note = folder / f"{name}.outcome.json"
    if note.is_file() and leaves.exists():
        return
    environment_ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, "-P", "-m", "offsite", *words]
    print(f"{time.strftime('%H:%M:%S')} {folder.name}: offsite {' '.join(words)}", flush=True)
    with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.err").open("wb") as err:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env=environment_)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit((folder / f"{name}.err").read_text(encoding="utf-8")[-2000:])
    printed = (folder / f"{name}.out").read_text(encoding="utf-8").splitlines()
    cost = {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_bytes": used.ru_maxrss * 1024}
    note.write_text(json.dumps({"outcome": json.loads(printed[-1]), **cost}), encoding="utf-8")


def _choose_rows(source: Path, out: Path, model: str, *, num: int, max_tokens: int) -> dict[str, Any]:
    """Write about `num` rows of at most so many tokens, whole documents in the order of their hash."""
    from offsite.modelling.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    lengths = [len(ids) for ids in tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]]
    short = [row for row, length in zip(rows, lengths, strict=True) if length < max_tokens]
    short.sort(key=lambda row: (hashlib.sha256(f"privacy/{row['document']}".encode()).digest(), row["prompt"]))
    kept = short[:num]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    out.write_bytes(gzip.compress(data.encode(), mtime=0))
    return {"num": len(kept), "sha256": "sha256:" + hashlib.sha256(out.read_bytes()).hexdigest()}


def _path(name: str, data: Path) -> Path:
    return (data / name if (data / name).exists() else ROOT / name).resolve()


if __name__ == "__main__":
    main()
