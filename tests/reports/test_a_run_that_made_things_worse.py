"""A learning rate of 5 ended like a good run: exit 0, a best loss, and nothing that said it was above the first."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from two_parties import TwoParties

from adapters.rates import LEARNING_RATES


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    return TwoParties(tmp_path, monkeypatch, capsys)


TUNE = "tune package --data private.jsonl --block-tokens 64 --steps 4 --adapter lora -o out --learning-rate"


def test_it_is_said_loudly_with_both_losses(parties, monkeypatch):
    losses = iter([2.0, 3.5, 3.25, 3.75, 4.0])  # before tuning, and after each of four steps
    monkeypatch.setattr("client.tuning.tune.perplexity", lambda *_, **__: SimpleNamespace(loss=next(losses)))
    found = parties.run("client", f"{TUNE} 5 --evaluate-every 1")
    assert (found["before_loss"], found["best_loss"], found["best_step"]) == (2.0, 3.25, 2)
    assert found["best_loss"] > found["before_loss"]
    said = f"best validation loss {found['best_loss']:.4f} at step {found['best_step']}, "
    assert f"{said}before tuning {found['before_loss']:.4f}" in parties.told
    assert "WARNING: tuning made it worse" in parties.told


def test_a_run_that_helped_is_not_scolded(parties):
    found = parties.run("client", f"{TUNE} 1e-3")
    assert found["best_loss"] < found["before_loss"]
    assert "WARNING" not in parties.told
    assert f"before tuning {found['before_loss']:.4f}" in parties.told


def test_before_tuning_is_the_package_as_it_came(parties):
    """The oracle: the package's own perplexity on the same held-out rows, worked out here."""
    from client.tuning.config import TuneConfig
    from client.tuning.data import prepare
    from client.tuning.runrecord import read_as, text_settings
    from offsite.artefacts.package import open_package
    from offsite.config import build
    from offsite.evaluation.measure import perplexity

    found = parties.run("client", f"{TUNE} 1e-3 --precision fp32")
    flags = {"data": str(parties.client / "private.jsonl"), "block_tokens": "64", "adapter": "lora"}
    config = build(TuneConfig, flags={"package": str(parties.client / "package"), "output": "out", **flags})
    package = open_package(config.package)
    text = prepare(
        read_as(config.data, text_settings(config)), package.load_tokenizer(), block_tokens=64, batch_size=4,
        packed=True, on_long="truncate", validation=config.validation, seed=0,
    )  # fmt: skip
    loss = perplexity(package.load_model(), text.validation, batch_size=8, pad_id=text.pad_id, precision="fp32").loss
    assert math.isclose(found["before_loss"], loss, rel_tol=1e-6)


@pytest.mark.parametrize(("times", "is_warned"), [(4.9, False), (5.1, True)])
def test_a_rate_far_beyond_the_usual_is_warned_of_without_a_job_too(parties, times, is_warned):
    parties.run("client", f"{TUNE} {times * LEARNING_RATES['lora']}")
    assert ("times the usual" in parties.told) is is_warned


def test_a_private_run_says_both_losses(parties):
    words = f"{TUNE} 1e-3 --dp noise_multiplier=1.0,ledger=ledger"
    found = parties.run("client", words)
    assert f"before tuning {found['before_loss']:.4f}" in parties.told
