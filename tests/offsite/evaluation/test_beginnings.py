"""Answers that share a prompt have the scores that they have behind it; models with another cache are asked plainly."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import pytest
import torch
from recurrent import tiny as recurrent
from tiny_architectures import tiny

import offsite.evaluation.beginnings as module
from offsite.errors import RunFailed
from offsite.evaluation.beginnings import log_probabilities_behind, shares_beginnings
from offsite.evaluation.preferences import log_probabilities
from offsite.text.batches import IGNORED, Example


def rows_of(num_prompts: int = 3, seed: int = 0) -> list[list[Example]]:
    """Prompts of 9 to 30 tokens with two to five answers of 1 to 6 tokens; one prompt is too short to be shared."""
    generator = torch.Generator().manual_seed(seed)

    def draw(num: int) -> list[int]:
        return torch.randint(3, 259, (num,), generator=generator).tolist()

    found = []
    for number in range(num_prompts):
        prompt = draw(9 + 10 * number if number else 4)
        answers = [draw(1 + (number + one) % 6) for one in range(2 + number)]
        found.append([Example(prompt + one, [IGNORED] * len(prompt) + one) for one in answers])
    return found


def plainly(model, rows) -> list[list[float]]:
    logs = iter(log_probabilities(model, [row for several in rows for row in several], batch_size=4, pad_id=0))
    return [[next(logs) for _ in several] for several in rows]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_shared_answers_have_the_scores_of_the_plain_way(full_llama, batch_size, monkeypatch):
    rows = rows_of()
    expected = plainly(full_llama, rows)
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 0 if batch_size < 8 else 2048)
    assert shares_beginnings(full_llama)
    read = []
    plain = module.Beginning.read.__func__
    monkeypatch.setattr(
        module.Beginning, "read", classmethod(lambda cls, lm, ids: read.append(len(ids)) or plain(cls, lm, ids))
    )
    found = log_probabilities_behind(full_llama, rows, batch_size=batch_size, pad_id=0)
    assert read == [19, 29]  # the trial is done; the short one is not shared
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_border_inside_the_first_token_of_an_answer(full_llama):
    """Answers whose text changes the last tokens of the prompt share what stands before those."""
    rows = [[Example([*range(20, 36), *own], [IGNORED] * 15 + [35, *own]) for own in ([7, 8], [9], [7, 9, 3])]]
    rows[0][1] = Example([*range(20, 34), 99, 9], [IGNORED] * 15 + [9])
    found = log_probabilities_behind(full_llama, rows, batch_size=2, pad_id=0)
    assert found[0] == pytest.approx(plainly(full_llama, rows)[0], abs=1e-4)


@pytest.mark.parametrize("name", ["starcoder2", "lfm2", "mamba"])
def test_a_window_or_a_state_is_asked_plainly(name, monkeypatch):
    model = tiny(name) if name == "starcoder2" else recurrent(name)
    assert not shares_beginnings(model)
    monkeypatch.setattr(module.Beginning, "read", None)  # never called
    rows = rows_of()
    assert log_probabilities_behind(model, rows, batch_size=4, pad_id=0) == [
        pytest.approx(one, abs=1e-4) for one in plainly(model, rows)
    ]


def test_a_cache_that_changes_scores_is_not_used(full_llama, monkeypatch):
    """A model that forgets its past is found out by the trial."""
    attention = type(full_llama.model.layers[0].self_attn)
    plain = attention.forward

    def forgets(self, *args, past_key_values=None, **given):
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            if layer.is_initialized:
                layer.values = torch.zeros_like(layer.values)
        return plain(self, *args, past_key_values=past_key_values, **given)

    monkeypatch.setattr(module, "_TRIED", WeakKeyDictionary())
    assert shares_beginnings(full_llama)
    monkeypatch.setattr(module, "_TRIED", WeakKeyDictionary())
    monkeypatch.setattr(attention, "forward", forgets)
    assert not shares_beginnings(full_llama)


def test_what_is_not_finite_stops_the_run(full_llama, monkeypatch):
    broken = full_llama.model.norm.weight
    with torch.no_grad():
        before = broken.clone()
        broken.fill_(torch.nan)
    try:
        with pytest.raises(RunFailed, match="not finite"):
            log_probabilities_behind(full_llama, rows_of()[1:], batch_size=4, pad_id=0)
    finally:
        with torch.no_grad():
            broken.copy_(before)
