"""Attacks on differential privacy: a crash that resets the ledger, a budget that is overrun, a unit that shows."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from client.privacy.budget import BudgetLedger
from client.privacy.config import DPSettings
from client.privacy.dpsgd import Guarantee, PoissonBatches, PrivateStepper
from client.tuning.config import TuneConfig
from client.tuning.verb import run
from offsite import cli
from offsite.audits import noise
from offsite.audits.accounting import Mechanism, Spent
from offsite.errors import PolicyError
from offsite.text.batches import Example
from offsite.training.config import LoopConfig
from offsite.training.processes import world

NOTES = [f"case {n}: the {'fever cough ache rash chill'.split()[n % 5]} of ward {n % 7} went" for n in range(60)]


@pytest.fixture
def make(tmp_path, dropped_package):
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(NOTES), encoding="utf-8")

    def settings(name="bundle", dp=None, **changes):
        small = {"block_tokens": 32, "steps": 6, "precision": "fp32", "device": "cpu", "checkpoint_every": 2}
        given = {"noise_multiplier": 1.0, "ledger": tmp_path / "ledger", **(dp or {})}
        return TuneConfig(
            package=dropped_package.path, data=path, output=tmp_path / name, adapter="bitfit", learning_rate=0.01,
            dp=DPSettings(**given), **{**small, **changes},
        )  # fmt: skip

    return settings


def interrupted(config, monkeypatch, *, after):
    """Run it and break off in the step after so many."""
    real, count = PrivateStepper.step, itertools.count()

    def step(self, number, batch):
        if next(count) == after:
            raise KeyboardInterrupt
        return real(self, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(PrivateStepper, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(config)


@pytest.mark.parametrize("after", [0, 3, 5])
def test_row_26_resumed_it_spends_what_an_unbroken_run_does(make, monkeypatch, after):
    whole = run(make("whole", {"ledger": make().dp.ledger.with_name("other")}))["privacy"]
    interrupted(make(), monkeypatch, after=after)
    found = run(make(resume=True))["privacy"]
    for name in ("epsilon", "epsilon_total", "budget", "delta", "steps", "num_runs", "noise_multiplier"):
        assert found[name] == whole[name], name
    assert (found["num_runs"], found["num_resumes"], found["num_releases"]) == (1, 1, 1)


def test_row_26_deleting_the_checkpoints_does_not_reset_the_ledger(make, monkeypatch, tmp_path):
    interrupted(make(), monkeypatch, after=3)
    for path in sorted((tmp_path / "bundle.work").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "bundle.work").rmdir()
    with pytest.raises(PolicyError, match="with 1 earlier run"):
        run(make())


def test_row_26_a_run_cannot_be_resumed_beside_its_ledger(make, monkeypatch, tmp_path):
    interrupted(make(), monkeypatch, after=3)
    with pytest.raises(PolicyError, match="this ledger was not charged for"):
        run(make(resume=True, dp={"ledger": tmp_path / "fresh"}))
    assert not (tmp_path / "bundle").exists()


def test_row_28_a_spent_budget_trains_nothing(make, tmp_path, capsys, monkeypatch):
    first = run(make("first"))["privacy"]
    monkeypatch.setattr(PrivateStepper, "step", lambda *_: pytest.fail("trained"))
    config = make("second")
    words = ["tune", str(config.package), "--data", str(config.data[0]), "-o", str(config.output), "--steps", "6"]
    words += ["--block-tokens", "32", "--adapter", "bitfit", "--device", "cpu", "--dp", "noise_multiplier=1.0"]
    code = cli.run([*words, f"dp.ledger={config.dp.ledger}"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("offsite: error:")]
    assert (code, len(lines)) == (4, 1)
    assert "the budget of this data set is" in lines[0]
    assert not config.output.exists()
    with pytest.raises(PolicyError, match="an earlier run"):
        run(make("third", {"budget": 2 * first["budget"]}))


def test_row_28_a_budget_lowered_meanwhile_releases_nothing(make, tmp_path, monkeypatch):
    real = PrivateStepper.step

    def lowering(self, number, batch):
        if number == 6:
            with BudgetLedger(tmp_path / "ledger") as ledger, ledger._store.transaction() as transaction:
                transaction.execute("UPDATE runs SET budget = budget / 2")
                transaction.log("lowered")
        return real(self, number, batch)

    monkeypatch.setattr(PrivateStepper, "step", lowering)
    with pytest.raises(PolicyError, match="the budget of this data set is") as caught:
        run(make())
    assert "nothing is released" in caught.value.hint
    assert not (tmp_path / "bundle").exists()


def test_row_28_one_charge_releases_one_set_of_weights(make, monkeypatch, tmp_path):
    """The same run, resumed twice from a copy of its checkpoints, has other weights the second time."""
    interrupted(make(), monkeypatch, after=3)
    shutil.copytree(tmp_path / "bundle.work", tmp_path / "copy")
    run(make(resume=True))
    shutil.move(tmp_path / "bundle", tmp_path / "sent")
    shutil.move(tmp_path / "copy", tmp_path / "bundle.work")
    with pytest.raises(PolicyError, match="other weights of this run were released"):
        run(make(resume=True))
    assert not (tmp_path / "bundle").exists()


# Row 29: the same chance on neighbouring data sets


def examples(num):
    generator = torch.Generator().manual_seed(3)
    return [
        (Example(ids, ids),)
        for ids in (torch.randint(3, 60, (int(n),), generator=generator).tolist() for n in range(5, 5 + num))
    ]


def traced(monkeypatch, units, engine):
    """One step, its chance following from the order of the asking. Returns the sum, what was asked, who was drawn."""
    asked: list[int] = []

    def entropy(num_bytes):
        asked.append(num_bytes)
        return hashlib.shake_256(str(len(asked)).encode()).digest(num_bytes)

    monkeypatch.setattr(noise, "_entropy", entropy)
    torch.manual_seed(5)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, tie_word_embeddings=False, **small))
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    model.train()
    spent = Spent(1.0, 1.0, 1.0, 1e-3)
    guarantee = Guarantee(Mechanism(1.0, 0.6, 1), 0.3, 8, "example", None, False, spent)
    config = LoopConfig(steps=1, learning_rate=1e-9, schedule="constant", precision="fp32")
    stepper = PrivateStepper(
        model, trainable, lambda *_: None, config, world(), units=units, guarantee=guarantee, pad_id=0, engine=engine,
        rows_at_once=3,
    )  # fmt: skip
    batch = PoissonBatches(len(units), 0.6).batch(0)
    stepper.step(1, batch)
    grads = torch.cat([tensor.grad.double().flatten() for tensor in trainable.values()])
    stepper.clipper.close()
    return grads * 8, asked, batch["units"].tolist()


@pytest.mark.parametrize("engine", ["hooks", "ghost", "one-by-one"])
def test_row_29_neighbours_differ_by_at_most_the_clip_and_in_nothing_else(monkeypatch, engine):
    units = examples(14)
    whole, asked, drawn = traced(monkeypatch, units, engine)
    last = max(drawn)
    assert last > 3
    units = units[: last + 1]
    whole, asked, drawn = traced(monkeypatch, units, engine)
    without, asked_without, drawn_without = traced(monkeypatch, units[:-1], engine)
    assert drawn_without == drawn[:-1]
    difference = float((whole - without).norm())
    assert 0.05 < difference <= 0.3 * (1 + 1e-5)  # the normaliser, 8, is the same: it is a setting
    assert asked[0] - asked_without[0] == 8  # one coin fewer
    assert asked[1:] == asked_without[1:]  # the same noise, asked for in the same order


def test_row_29_no_seed_leads_to_the_noise(make, tmp_path):
    for name in ("a", "b"):
        run(make(name, {"budget": 1e6, "sample_rate": 1.0}, seed=7))
    a, b = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in "ab")
    assert a != b


def test_row_29_the_size_of_a_batch_is_not_in_the_bundle(make, tmp_path):
    run(make())
    manifest = (tmp_path / "bundle" / "offsite.json").read_text()
    assert json.loads(manifest)["disclosed"] == {}
    assert "tokens" not in manifest


@pytest.mark.slow
def test_row_26_killed_anywhere_it_is_charged_once(make, tmp_path):
    config = make(steps=60)
    command = [sys.executable, "-P", "-m", "offsite", "tune", str(config.package), "--data", str(config.data[0])]
    command += ["-o", str(config.output), "--steps", "60", "--block-tokens", "32", "--adapter", "bitfit"]
    command += ["--precision", "fp32", "--device", "cpu", "--learning-rate", "0.01", "--checkpoint-every", "4"]
    command += ["--dp", f"noise_multiplier=1.0,ledger={config.dp.ledger}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started, more = time.monotonic(), list[str]()
    chance = random.Random(11)
    waits = {"ledger": config.dp.ledger / "budget.db", "log": Path(f"{config.output}.work") / "log.jsonl"}
    for what in ("ledger", "log", "log"):
        process = subprocess.Popen(
            [*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        had = waits[what].stat().st_size if waits[what].exists() and what == "log" else 0
        while not (waits[what].exists() and (what == "ledger" or waits[what].stat().st_size > had)):
            assert process.poll() is None
            assert time.monotonic() - started < 300
            time.sleep(0.001)
        time.sleep(chance.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        more = ["--resume"]
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["privacy"]
    assert (found["num_runs"], found["num_releases"], found["steps"]) == (1, 1, 60)
    assert found["epsilon_total"] == found["epsilon"] == found["budget"]
    with BudgetLedger(config.dp.ledger) as ledger:
        assert ledger._store.verify_log() >= 4
