"""What a run minimises: the weighted loss by hand, whole runs of every setting, parts, resuming, and the record."""

from __future__ import annotations

import math

import pytest
import torch

import client.tuning.learning as module
from client.privacy.config import DPSettings
from client.tuning.learning import dft_loss
from client.tuning.ready import work_folder
from client.tuning.verb import run
from offsite.audits.runs import Objective, read_run, run_path
from offsite.digests import sha256_file
from offsite.errors import ConfigError, DataError, RunFailed

LORA = {"adapter": "lora", "rank": 2, "learning_rate": 0.02}


@pytest.fixture
def web(tmp_path):
    """A file of public text."""
    path = tmp_path / "web.txt"
    path.write_text("\n\n".join(f"the market of town {number} opens at {number % 12}" for number in range(30)))
    return path


def test_a_tokens_loss_counts_by_its_own_probability(full_llama):
    """The oracle: with the weight held fixed, the gradient of -p log p' is that of -p."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 250, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :5] = -100
    loss, count = dft_loss(full_llama, {"input_ids": ids, "labels": labels, "attention_mask": mask})
    expected, probabilities = 0.0, []
    for row in range(3):
        length = int(mask[row].sum())
        shares = full_llama(input_ids=ids[row : row + 1, :length]).logits[0].double().softmax(-1)
        for place in range(1, length):
            if labels[row, place] != -100:
                probabilities.append(shares[place - 1, ids[row, place]])
                expected -= float(probabilities[-1].detach() * probabilities[-1].detach().log())
    assert int(count) == len(probabilities) == 8 + 5 + 4
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    tensors = list(full_llama.parameters())
    wanted = torch.autograd.grad(-sum(probabilities), tensors)
    for found, gradient in zip(torch.autograd.grad(loss, tensors), wanted, strict=True):
        torch.testing.assert_close(found, gradient.float(), rtol=1e-3, atol=1e-5)


def changes_of(name, web, answers_file):
    return {
        "dft": {"objective": "dft"},
        "anchor": {"anchor": web, "anchor_weight": 0.5},
        "channels": {"channel_dropout": 0.3},
        "spin": {"objective": "spin", "data": answers_file, "block_tokens": 64},
        "all": {"objective": "dft", "anchor": web, "channel_dropout": 0.3},
    }[name]


STATED = {
    "dft": {"loss": "dft"},
    "anchor": {"loss": "next-token", "anchor_weight": 0.5},
    "channels": {"loss": "next-token", "channel_dropout": 0.3},
    "spin": {"loss": "spin", "spin_beta": 0.1},
    "all": {"loss": "dft", "anchor_weight": 1.0, "channel_dropout": 0.3},
}


def interrupted_at(step):
    """A loss that is not a number at a step, whatever it is otherwise."""
    calls = iter(range(1, 1000))
    begin = module._Loss.__call__

    def loss(self, model, batch):
        total, count = begin(self, model, batch)
        return (total * math.nan if next(calls) == step else total), count

    return loss


@pytest.mark.parametrize("name", list(STATED))
def test_a_run_goes_on_as_it_was_and_its_record_says_how_it_learnt(
    settings, narrow_package, tmp_path, web, answers_file, monkeypatch, name
):
    changes = {**LORA, "steps": 4, **changes_of(name, web, answers_file)}
    unbroken = run(settings(narrow_package.path, output=tmp_path / "unbroken", **changes))
    usual = {key: value for key, value in changes.items() if key in ("data", "block_tokens", "steps", *LORA)}
    plain = run(settings(narrow_package.path, output=tmp_path / "plain", **usual, pack=name != "spin"))
    assert unbroken["bundle_digest"] != plain["bundle_digest"]

    config = settings(narrow_package.path, **changes)
    with monkeypatch.context() as patched:
        patched.setattr(module._Loss, "__call__", interrupted_at(4))
        with pytest.raises(RunFailed, match="loss is nan at step 4"):
            run(config)
    other = config.model_copy(update={"resume": True, "objective": "next-token", "anchor": None, "channel_dropout": 0})
    with pytest.raises(ConfigError, match=r"objective\.\w+ '[^']+' \(now None\)"):
        run(other)
    assert run(config.model_copy(update={"resume": True}))["bundle_digest"] == unbroken["bundle_digest"]
    assert not work_folder(config.output).exists()

    stated = dict(STATED[name])
    if "anchor_weight" in stated:
        stated["anchor_sha256"] = sha256_file(web)
    assert read_run(run_path(config.output)).objective == Objective(**stated)
    assert read_run(run_path(tmp_path / "plain")).objective is None
    assert "objective" not in run_path(tmp_path / "plain").read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"secret-ward-notes.txt", "answers.jsonl", "web.txt"} | {
        f"{one}{more}" for one in ("bundle", "plain", "unbroken") for more in ("", ".run.json", ".log.jsonl")
    }


def test_parts_of_a_step_change_nothing(settings, narrow_package, tmp_path, web):
    changes = {**LORA, "steps": 3, "channel_dropout": 0.3, "anchor": web, "schedule": "constant"}
    told = [
        run(settings(narrow_package.path, output=tmp_path / f"parts-{parts}", accumulate=parts, **changes))
        for parts in (1, 4)
    ]
    for name in ("first_loss", "final_loss", "best_loss"):
        assert told[0][name] == pytest.approx(told[1][name], rel=1e-4), name


def test_activations_computed_twice_leave_out_the_same_channels(settings, narrow_package, tmp_path):
    changes = {**LORA, "steps": 3, "channel_dropout": 0.3}
    told = [
        run(settings(narrow_package.path, output=tmp_path / f"twice-{twice}", gradient_checkpointing=twice, **changes))
        for twice in (False, True)
    ]
    assert told[0]["final_loss"] == pytest.approx(told[1]["final_loss"], rel=1e-4)


def test_a_private_run_weighs_tokens_inside_of_its_clipping(settings, dropped_package, tmp_path):
    dp = DPSettings(noise_multiplier=1.0, ledger=tmp_path / "ledger")
    common = {"adapter": "bitfit", "learning_rate": 0.01, "dp": dp, "batch_size": 8, "steps": 2}
    told = run(settings(dropped_package.path, objective="dft", **common))
    assert 0 < told["first_loss"] <= 1 / math.e  # -p log p is never more
    assert read_run(run_path(tmp_path / "bundle")).objective == Objective(loss="dft")


def test_private_text_is_no_anchor(settings, dropped_package, notes_file, tmp_path):
    with pytest.raises(ConfigError, match="--anchor: this file is among --data") as caught:
        run(settings(dropped_package.path, anchor=notes_file))
    assert "public text" in caught.value.hint
    with pytest.raises(DataError, match=r"no file|no such|missing"):
        run(settings(dropped_package.path, anchor=tmp_path / "gone.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["secret-ward-notes.txt"]


def test_running_text_has_no_answers_to_compare(settings, dropped_package, tmp_path):
    with pytest.raises(DataError, match="--objective spin: a row of running text"):
        run(settings(dropped_package.path, objective="spin"))
    assert [path.name for path in tmp_path.iterdir()] == ["secret-ward-notes.txt"]
