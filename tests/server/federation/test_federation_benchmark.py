"""Arms of ``benchmarks/federation`` on a tiny model: the program that the numbers come from runs."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "benchmarks" / "federation"


@pytest.fixture(autouse=True)
def cheap_keys(monkeypatch):
    monkeypatch.setattr("offsite.keys.files.SCRYPT_COST", 2**4)


@pytest.fixture
def bench(tmp_path, monkeypatch, llama_folder):
    """The benchmark's own plan and program, at a size of seconds."""
    monkeypatch.syspath_prepend(str(ROOT))
    plan = yaml.safe_load((FOLDER / "medquad.yaml").read_text())
    plan |= {
        "model": str(llama_folder), "rows": 30, "heldout_tokens": 64, "rounds": 2, "steps": 3,
        "distill": ["--method", "width", "--width", "0.5", "--steps", "0", "--calibration-tokens", "512",
                    "--block-tokens", "32"],
        "adapter": {**plan["adapter"], "lora_rank": 2, "adapter_dtype": "float32"},
    }  # fmt: skip
    plan["tune"] |= {"block_tokens": 32, "validation": 0.1}
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "work").mkdir()
    for part, num in (("train", 30), ("heldout", 6)):
        rows = [
            {"document": f"{part}/{source}/{n}", "source": source, "prompt": "ask", "completion": f" {source} {n % 5}"}
            for source in plan["sources"].values()
            for n in range(num)
        ]  # fmt: skip
        with gzip.open(data / f"medquad_{part}.jsonl.gz", "wt") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    with gzip.open(data / plan["public"], "wt") as out:
        out.writelines(json.dumps({"text": f"public line {n} of many"}) + "\n" for n in range(200))
    module = importlib.import_module("benchmarks.federation.run")
    yield module.Bench(plan, data, tmp_path / "work")
    for name in [name for name in sys.modules if name.startswith("benchmarks.federation")]:
        sys.modules.pop(name)


def figures(bench, arm):
    bench.run(arm)
    return json.loads(bench.path(arm).read_text())


def test_other_settings_go_on_with_nothing(bench):
    with pytest.raises(SystemExit, match="begun with other settings"):
        type(bench)({**bench.plan, "steps": 99}, bench.work.parent / "data", bench.work)


def test_the_tables(bench):
    """Adapters of their own are told apart by text and client: each client's figure is of its own on its own."""
    table = importlib.import_module("benchmarks.federation.table")
    names = sorted(bench.plan["sources"])
    arm = {
        "zero_shot": dict.fromkeys(names, 4.0), "plugged_in": dict.fromkeys(names, 3.0),
        "seconds": 10.0, "seconds_by_part": {"tuning": 8.0},
        "bytes": {"to_client": [1_000_000, 2_000_000], "from_client": [5_000, 5_000]},
        "rounds": [{"used": names, "left_out": {}, "flags": {}}],
    }  # fmt: skip
    apart = {f"{text} by {by}": 2.0 if text == by else 9.0 for text in names for by in names}
    sound = [name for name in names if name != "ghr"]
    bad = {**arm, "rounds": [{"used": sound, "left_out": {"ghr": "NotFinite: x"}, "flags": {}}]}
    arms = {"shared": arm, "personal": {**arm, "plugged_in": apart}, "clean-mean": arm, "nan-mean": bad}
    result = {"config": bench.plan, "arms": arms}
    assert "| personal adapters | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 |" in table.quality(result)
    assert "| one shared adapter | 3.00 |" in table.quality(result)
    assert "| one shared adapter: to a client | 1.00 | 2.00 |" in table.bytes_each_way(result)
    assert "| one shared adapter | 80.0% | 20.0% |" in table.time(result)
    assert "| none | 3.00 | used |  |  |" in table.poisoned(result)
    assert "| NaN | 3.00 | left out (NotFinite) |  |  |" in table.poisoned(result)


@pytest.mark.slow
def test_shared_and_pooled(bench):
    shared = figures(bench, "shared")
    assert [len(one["used"]) for one in shared["rounds"]] == [5, 5]
    assert all(shared["plugged_in"][name] < shared["zero_shot"][name] for name in bench.plan["sources"])
    sent, got = shared["bytes"]["to_client"], shared["bytes"]["from_client"]
    assert len(sent) == len(got) == 2
    assert sent[1] > 4 * sent[0]  # five clients' factors, side by side
    assert 0 < sum(shared["seconds_by_part"].values()) <= shared["seconds"]
    assert [len(one["used"]) for one in figures(bench, "pooled")["rounds"]] == [1]


@pytest.mark.slow
def test_a_scaled_update_moves_the_mean_and_not_the_robust_rule(bench):
    rounds = {rule: figures(bench, f"scaled-{rule}")["rounds"] for rule in ("mean", "robust")}
    for mean, robust in zip(*rounds.values(), strict=True):
        assert mean["figures"]["norm_update"] > 2 * robust["figures"]["norm_update"]
        assert "ghr" in mean["used"]


def test_nan_is_refused_by_the_verifier(bench):
    for one in figures(bench, "nan-mean")["rounds"]:
        assert one["left_out"].keys() == {"ghr"}
        assert one["left_out"]["ghr"].startswith("NotFinite: ")


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["personal", "local", "clean-mean", "clean-robust", "labels-mean", "labels-robust"])
def test_every_other_arm(bench, arm):
    found = figures(bench, arm)
    names = set(bench.plan["sources"])
    own = {f"{one} by {one}" for one in names} if arm in ("personal", "local") else names
    assert own <= set(found["plugged_in"])
