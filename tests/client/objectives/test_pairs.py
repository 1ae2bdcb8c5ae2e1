"""Pairs of answers: what is drawn, the loss and its gradient by hand, what is kept on disk, running text refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

import client.objectives.pairs as module
from client.objectives.pairs import make_pairs
from client.objectives.preferences import PairBatches, Rule, pair_loss
from client.tuning.data import prepare
from offsite.errors import BadSchema, DataError
from offsite.text.records import read_records

EOS = 2


@pytest.fixture
def text(answers_file, letters_tokenizer):
    return prepare(read_records(answers_file), letters_tokenizer, block_tokens=64, batch_size=4, packed=False)


@pytest.fixture
def drawing(dropped_package, text, tmp_path):
    """Draw the pairs of three steps; keywords change how."""
    settings = {"steps": 3, "eos": EOS, "context": 64, "seed": 1, "binding": {"data": "x"}, "precision": "fp32"}

    def draw(**changes):
        given = {**settings, "work": tmp_path / "work", **changes}
        return make_pairs(dropped_package.load_model(), given.pop("text", text), **given)

    return draw


def log_probability(model, row):
    """The log-probability of what counts in a row, in nats, a position at a time and without padding."""
    logs = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
    counted = [place for place, label in enumerate(row.labels) if label != -100]
    return sum(logs[place - 1, row.labels[place]] for place in counted)


def test_a_pair_is_the_clients_answer_and_the_emulators_to_one_prompt(drawing, text, dropped_package):
    pairs = drawing()
    examples = {id(one): one for step in range(3) for one in text.batches.chosen(step)}
    assert pairs.keys() == examples.keys()
    assert len(pairs) == 12
    model = dropped_package.load_model().eval()
    for key, pair in pairs.items():
        assert (pair.chosen.input_ids, pair.chosen.labels) == (examples[key].input_ids, examples[key].labels)
        prompt = pair.chosen.labels.count(-100)
        assert pair.rejected.input_ids[:prompt] == pair.chosen.input_ids[:prompt]
        assert pair.rejected.labels == [-100] * prompt + pair.rejected.input_ids[prompt:]
        answer = pair.rejected.input_ids[prompt:]
        assert 1 <= len(answer) <= min(2 * (len(pair.chosen.labels) - prompt), 64 - prompt)
        assert EOS not in answer[:-1]
        with torch.no_grad():
            expected = log_probability(model, pair.chosen) - log_probability(model, pair.rejected)
        assert pair.reference == pytest.approx(float(expected), abs=1e-3)
    assert len({tuple(pair.rejected.input_ids) for pair in pairs.values()}) == 12


def test_in_a_chat_the_last_turn_is_the_answer(letters_tokenizer, tmp_path):
    path = tmp_path / "talk.jsonl"
    turns = [("user", "hot?"), ("assistant", "yes"), ("user", "how hot?"), ("assistant", "very")]
    rows = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in turns]} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare(read_records(path), letters_tokenizer, block_tokens=100, batch_size=4, packed=False)
    for example in found.examples:
        prompt, answer = module._halves(example)
        said = letters_tokenizer.decode(prompt), letters_tokenizer.decode(answer)
        assert said[0].count("assistant") == 1
        assert said[0].split("how hot? ")[1].endswith("</s>")
        assert said[1].startswith("<s>assistant:very ")


def test_the_loss_and_its_gradient_by_hand(drawing, text, dropped_package):
    pairs = drawing()
    batch = PairBatches(text, pairs).batch(1)
    chosen = [pairs[id(example)] for example in text.batches.chosen(1)]
    model = dropped_package.load_model().eval()
    start, count = pair_loss(model, batch, rule=Rule(0.3))
    assert (float(start.detach() / count), int(count)) == (pytest.approx(math.log(2), abs=1e-3), 4)

    tensors = list(model.parameters())
    found = torch.autograd.grad(start, tensors)
    margin = sum(log_probability(model, pair.chosen) - log_probability(model, pair.rejected) for pair in chosen)
    for one, gradient in zip(found, torch.autograd.grad(-0.5 * 0.3 * margin, tensors), strict=True):
        torch.testing.assert_close(one, gradient.float(), rtol=2e-2, atol=2e-4)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tensors:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        expected = 0.0
        for pair in chosen:
            gain = float(log_probability(model, pair.chosen) - log_probability(model, pair.rejected)) - pair.reference
            expected -= math.log(1 / (1 + math.exp(-0.3 * gain)))
        assert float(pair_loss(model, batch, rule=Rule(0.3))[0]) == pytest.approx(expected, rel=1e-3)


def test_what_was_drawn_is_kept_and_taken_by_the_same_run_only(drawing, tmp_path, monkeypatch):
    first = drawing()
    [kept] = sorted((tmp_path / "work").iterdir())
    raw = kept.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(module, "continuations", None)
        again = drawing()
    assert again == first
    assert {key: pair.rejected.input_ids for key, pair in again.items()} == {
        key: pair.rejected.input_ids for key, pair in first.items()
    }
    assert {key: pair.rejected.input_ids for key, pair in drawing(seed=2).items()} != {
        key: pair.rejected.input_ids for key, pair in first.items()
    }
    drawing(binding={"data": "y"})
    assert len(list((tmp_path / "work").iterdir())) == 3
    kept.write_bytes(raw[:-20])
    with pytest.raises(BadSchema, match="is not JSON"):
        drawing()


def test_a_run_that_was_stopped_draws_only_what_is_missing(drawing, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 5)
    whole = drawing()
    kept = sorted((tmp_path / "work").iterdir())
    assert len(kept) == 3
    kept[1].unlink()
    drawn = []

    def counting(model, prompts, **settings):
        drawn.extend(prompts)
        return original(model, prompts, **settings)

    original = module.continuations
    monkeypatch.setattr(module, "continuations", counting)
    again = drawing()
    assert len(drawn) == 5
    assert {key: pair.rejected.input_ids for key, pair in again.items()} == {
        key: pair.rejected.input_ids for key, pair in whole.items()
    }


def test_running_text_is_refused_and_nothing_is_written(drawing, notes_file, letters_tokenizer, tmp_path):
    running = prepare(read_records(notes_file), letters_tokenizer, block_tokens=64, batch_size=4, packed=False)
    with pytest.raises(DataError, match="--objective spin: a row of running text holds no prompt") as caught:
        drawing(text=running)
    assert "\n" not in str(caught.value)
    assert "prompt and completion" in caught.value.hint
    assert not (tmp_path / "work").exists()
