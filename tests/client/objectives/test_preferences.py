"""Preferences: the loss and its gradient by formulas written out in float64, what is measured before, what is kept."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

import client.objectives.preferences as module
from client.objectives.preferences import PairBatches, Rule, Validation, measured_pairs, pair_loss
from client.tuning.data import prepare
from offsite.errors import BadSchema, RunFailed
from offsite.text.records import read_records

RULES = {
    "sigmoid": Rule(0.3),
    "smoothed": Rule(0.3, "sigmoid", 0.2),
    "ipo": Rule(0.3, "ipo"),
}


@pytest.fixture
def text(pairs_file, letters_tokenizer):
    records = read_records(pairs_file, pairs=True)
    return prepare(records, letters_tokenizer, block_tokens=64, batch_size=4, packed=False)


@pytest.fixture
def moved(full_llama):
    """The same model, a little further on."""
    model = copy.deepcopy(full_llama)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def log_probability(model, row):
    """The log-probability of what counts in a row, in nats, in float64 and without padding; and how many tokens do."""
    logs = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
    counted = [place for place, label in enumerate(row.labels) if label != -100]
    return sum(logs[place - 1, row.labels[place]] for place in counted), len(counted)


def by_hand(name, policy, before, pairs):
    """The mean loss of pairs as the papers write it, with beta 0.3 and a smoothing of 0.2."""
    losses = []
    for pair in pairs:
        (chosen, num_chosen), (rejected, num_rejected) = (log_probability(policy, side) for side in pair.sides)
        with torch.no_grad():
            (chosen_before, _), (rejected_before, _) = (log_probability(before, side) for side in pair.sides)
        if name == "ipo":
            gain = (chosen - chosen_before) / num_chosen - (rejected - rejected_before) / num_rejected
            losses.append((gain - 1 / (2 * 0.3)) ** 2)
            continue
        gain = 0.3 * ((chosen - chosen_before) - (rejected - rejected_before))
        right, wrong = (-torch.log(1 / (1 + torch.exp(-sign * gain))) for sign in (1, -1))
        losses.append(right if name == "sigmoid" else 0.8 * right + 0.2 * wrong)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", list(RULES))
def test_the_loss_and_its_gradient_are_those_of_the_papers(name, text, full_llama, moved):
    chosen = text.batches.chosen(0)
    pairs = measured_pairs(full_llama, chosen, pad_id=0, precision="fp32")
    total, count = pair_loss(moved, PairBatches(text, pairs).batch(0), rule=RULES[name])
    tensors = list(moved.parameters())
    found = torch.autograd.grad(total / count, tensors)
    double = copy.deepcopy(moved).double()
    expected = by_hand(name, double, copy.deepcopy(full_llama).double(), chosen)
    assert int(count) == len(chosen) == 4
    assert float((total / count).detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for one, wanted in zip(found, torch.autograd.grad(expected, list(double.parameters())), strict=True):
        torch.testing.assert_close(one, wanted.float(), rtol=1e-3, atol=1e-5)
    loss, accuracy = Validation(list(pairs.values()), RULES[name], pad_id=0, precision="fp32").measure(moved)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    assert accuracy in (0, 0.25, 0.5, 0.75, 1)


def test_untuned_nothing_is_preferred(text, full_llama):
    pairs = measured_pairs(full_llama, text.validation, pad_id=0, precision="fp32")
    validation = Validation(list(pairs.values()), Rule(0.1), pad_id=0, precision="fp32")
    assert validation.measure(full_llama) == (pytest.approx(math.log(2)), 0.5)


def test_accuracy_is_of_what_has_been_gained_not_of_what_is_likely(text, full_llama, moved):
    pairs = list(measured_pairs(full_llama, text.validation, pad_id=0, precision="fp32").values())
    gains = []
    for pair in pairs:
        logs = [float(log_probability(moved, side)[0].detach()) for side in (pair.chosen, pair.rejected)]
        gains.append(logs[0] - pair.log_chosen - logs[1] + pair.log_rejected)
    expected = sum(gain > 0 for gain in gains) / len(gains)
    assert Validation(pairs, Rule(0.1), pad_id=0, precision="fp32").measure(moved)[1] == expected


def test_what_was_measured_is_kept_for_the_same_rows_of_the_same_run(text, full_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)

    def measured(rows=text.examples[:8], **binding):
        kept = {"work": tmp_path / "work", "binding": {"data": "x", **binding}}
        return measured_pairs(full_llama, rows, pad_id=0, precision="fp32", **kept)

    first = measured()
    kept = sorted((tmp_path / "work").iterdir())
    assert len(kept) == 3
    assert set(json.loads(kept[0].read_text())) == {"log_chosen", "log_rejected"}
    kept[1].unlink()
    calls = []
    original = module.log_probabilities

    def counting(model, rows, **given):
        calls.append(len(rows))
        return original(model, rows, **given)

    monkeypatch.setattr(module, "log_probabilities", counting)
    assert measured() == first
    assert calls in ([6], [4])  # of 3 pairs, or of the last 2
    measured(hidden_states="bfloat16 before block 3")
    measured(rows=text.examples[8:16])
    assert len(calls) == 1 + 3 + 3
    kept[0].write_bytes(kept[0].read_bytes()[:-9])
    with pytest.raises(BadSchema, match="is not JSON"):
        measured()


def test_a_model_that_is_no_number_is_found(text, full_llama):
    broken = copy.deepcopy(full_llama)
    with torch.no_grad():
        next(broken.parameters())[5] = math.nan
    with pytest.raises(RunFailed, match="log-probability is not finite"):
        measured_pairs(broken, text.examples, pad_id=0, precision="fp32")
