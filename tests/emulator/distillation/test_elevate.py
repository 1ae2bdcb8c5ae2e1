from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emulator.compression.compress import Recipe, compress
from emulator.distillation import elevate as module
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run
from emulator.distillation.elevate import Both, elevate, margin_loss, measured_margin
from emulator.distillation.imitation import distill
from emulator.distillation.objective import Weights
from emulator.distillation.public import prepare
from offsite.artefacts.package import open_package
from offsite.config import build
from offsite.digests import model_digest
from offsite.errors import ConfigError
from offsite.modelling.split import make_plan
from offsite.text.records import read_records
from offsite.training.config import LoopConfig
from offsite.training.processes import Processes

ONE = Processes(0, 1, torch.device("cpu"), True)


@pytest.fixture
def text(tiny, tokenizer, public_file):
    stated = {"block_tokens": 16, "batch_size": 8, "seed": 0, "holdout": 0.2}
    stated |= {"evaluation_tokens": 512, "calibration_tokens": 512}
    return prepare(read_records(public_file), tokenizer, tiny("llama"), **stated)


def by_hand(model, batch):
    """The loss of every token that another foretells, padding apart, one by one."""
    logits = model(**batch).logits.log_softmax(-1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    losses = [
        -logits[row, t, ids[row, t + 1]] for row in range(len(ids)) for t in range(ids.shape[1] - 1) if mask[row, t + 1]
    ]
    return torch.stack(losses)


@pytest.mark.parametrize("margin", [0.0, 0.5, 40.0])
def test_the_loss_is_how_far_the_margin_is_from_what_is_wanted(tiny, batch, margin: float) -> None:
    full = tiny("llama")
    small = compress(full, make_plan(full), "drop", Recipe(blocks=2)).model
    torch.nn.init.zeros_(small.lm_head.weight)
    both = Both(full, small)
    difference = (by_hand(small, batch) - by_hand(full, batch)).detach()
    total, num = margin_loss(margin)(both, batch)
    assert int(num) == len(difference) == 11 + 8
    assert float(total.detach()) == pytest.approx(abs(float(difference.sum()) - margin * 19), rel=1e-4)
    assert measured_margin(both, [batch, batch], torch.device("cpu")) == pytest.approx(
        float(difference.mean()), rel=1e-4
    )


def distilled(full, plan, text, work):
    compressed = compress(full, plan, "width", Recipe(width=0.5, calibration=text.calibration))
    loop = LoopConfig(steps=20, learning_rate=3e-3, precision="fp32")
    return compressed, distill(full, compressed, plan, text, loop, weights=Weights(), work=work, processes=ONE)


def test_the_emulator_ends_worse_by_the_margin_and_only_its_middle_changed(tiny, text, tmp_path: Path) -> None:
    full = tiny("llama")
    plan, digest = make_plan(full, num_bottom=1, num_top=1), model_digest(full)
    compressed, done = distilled(full, plan, text, tmp_path / "work")
    before = measured_margin(Both(full, done.model), text.held_out, ONE.device)
    loop = LoopConfig(steps=30, learning_rate=3e-3, precision="fp32", evaluate_every=5)
    stated = {"work": tmp_path / "elevation", "binding": {}, "processes": ONE}
    raised, margin = elevate(full, compressed, plan, text, done, loop, margin_nats=before + 0.4, **stated)
    assert margin == pytest.approx(before + 0.4, abs=0.1)
    assert margin == pytest.approx(measured_margin(Both(full, raised.model), text.held_out, ONE.device), abs=1e-6)
    assert raised.fidelity.kl != done.fidelity.kl
    assert raised.outcome == done.outcome
    assert model_digest(full) == digest
    theirs = dict(full.named_parameters())
    for name, parameter in raised.model.named_parameters():
        if parameter.requires_grad:
            assert name.split(".")[2] in {"1", "2", "3", "4"}
        elif name.split(".")[1:2] != ["layers"] or name.split(".")[2] in {"0", "5"}:
            assert parameter.data_ptr() == theirs[name].data_ptr()


def test_several_processes_are_refused(tiny, text, tmp_path: Path) -> None:
    full = tiny("llama")
    plan = make_plan(full, num_bottom=1, num_top=1)
    compressed, done = distilled(full, plan, text, tmp_path / "work")
    stated = {"margin_nats": 1.0, "work": tmp_path / "elevation", "binding": {}}
    several = replace(ONE, size=2)
    with pytest.raises(ConfigError, match="one process, found several"):
        elevate(full, compressed, plan, text, done, LoopConfig(steps=1), processes=several, **stated)


def test_the_verb_tells_the_margin_and_goes_on_where_it_was_broken_off(
    model_folder, public_file, tmp_path: Path, monkeypatch
) -> None:
    def settings(output, **changes):
        flags = {"model": str(model_folder), "output": str(output), "public": str(public_file), "batch_size": "4"}
        flags |= {"block_tokens": "16", "bottom": "1", "top": "1", "precision": "fp32", "device": "cpu", "steps": "4"}
        flags |= {"warmup_steps": "1", "holdout": "0.2", "checkpoint_every": "2", "width": "0.5"}
        return build(DistillConfig, flags={**flags, "elevate": "0.3", "elevate_steps": "6", **changes})

    whole = run(settings(tmp_path / "whole"))
    assert isinstance(whole["elevated_nats"], float)
    figures = open_package(tmp_path / "whole").manifest.figures
    assert figures["distillation_steps"] == 4
    assert figures["held_out_kl"] == pytest.approx(whole["held_out_kl"], rel=1e-4)
    calls = []

    def broken(*words):
        calls.append(words)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return made(*words)

    made = margin_loss(0.3)
    with monkeypatch.context() as patched:
        patched.setattr(module, "margin_loss", lambda _margin: broken)
        with pytest.raises(KeyboardInterrupt):
            run(settings(tmp_path / "broken"))
    assert (tmp_path / "broken.work" / "elevation").is_dir()
    assert not (tmp_path / "broken").exists()
    with pytest.raises(ConfigError):
        run(settings(tmp_path / "broken", resume=True, elevate="0.5"))
    again = run(settings(tmp_path / "broken", resume=True))
    assert again["package_digest"] == whole["package_digest"]
    assert not (tmp_path / "broken.work").exists()
