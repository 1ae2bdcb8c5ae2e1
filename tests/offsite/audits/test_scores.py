"""Scores of rows against a loop that takes one row, one token at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from offsite.audits.scores import RowScores, score_pairs, score_rows, signals
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.text.batches import IGNORED, Example


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Rows of other lengths, some with prompts that do not count, one with a single token that counts."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(11):
        ids = torch.randint(3, 250, (4 + 3 * number,), generator=generator).tolist()
        prompt = number % 3
        made.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    made.append(Example([5, 6, 7], [IGNORED, IGNORED, 7]))
    return made


@torch.no_grad()
def one_by_one(model, row: Example, limit: int) -> tuple[float, float, float, int]:
    """The definitions, word for word, in float64."""
    logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].double()
    plain, normalised = [], []
    for place in range(1, len(row.labels)):
        if row.labels[place] == IGNORED or len(plain) == limit:
            continue
        probs = torch.softmax(logits[place - 1], -1)
        mean = sum(float(p) * math.log(p) for p in probs)
        deviation = math.sqrt(sum(float(p) * (math.log(p) - mean) ** 2 for p in probs))
        plain.append(math.log(probs[row.labels[place]]))
        normalised.append((plain[-1] - mean) / deviation)
    lowest = max(1, int(0.2 * len(plain)))
    return (
        -sum(plain) / len(plain),
        sum(sorted(plain)[:lowest]) / lowest,
        sum(sorted(normalised)[:lowest]) / lowest,
        len(plain),
    )


@pytest.mark.parametrize(("batch_size", "limit"), [(1, 1000), (4, 1000), (32, 7), (3, 1)])
def test_scores_are_those_of_a_loop_over_rows(full_llama, rows, batch_size, limit):
    found = score_rows(full_llama, rows, batch_size=batch_size, pad_id=0, limit_tokens=limit)
    slow = np.array([one_by_one(full_llama, row, limit) for row in rows])
    for column, array in enumerate((found.loss, found.min_k, found.min_k_plus, found.num_tokens)):
        np.testing.assert_allclose(array, slow[:, column], rtol=2e-4, atol=2e-4)
    assert found.loss.dtype == np.float64


def test_logits_that_are_infinite_are_no_news(full_llama, rows):
    def forbid(_module, _args, output):
        output.logits[..., 0] = -math.inf

    handle = full_llama.register_forward_hook(forbid)
    try:
        found = score_rows(full_llama, rows, batch_size=4, pad_id=0, limit_tokens=16)
    finally:
        handle.remove()
    assert all(np.isfinite(array).all() for array in (found.loss, found.min_k, found.min_k_plus))


def test_bf16_is_near_and_the_mode_comes_back(full_llama, rows):
    full_llama.train()
    try:
        near = score_rows(full_llama, rows, batch_size=4, pad_id=0, limit_tokens=64, precision="bf16")
        assert full_llama.training
    finally:
        full_llama.eval()
    exact = score_rows(full_llama, rows, batch_size=4, pad_id=0, limit_tokens=64)
    np.testing.assert_allclose(near.loss, exact.loss, rtol=0.1)


def test_progress_tells_rows_done(full_llama, rows):
    told: list[tuple[int, int]] = []
    score_rows(full_llama, rows, batch_size=5, pad_id=0, limit_tokens=4, progress=lambda *seen: told.append(seen))
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_signals_are_higher_for_rows_that_were_learned():
    tuned = RowScores(np.array([1.0, 3.0]), np.array([-4.0, -6.0]), np.array([-1.0, -2.0]), np.array([5, 5]))
    untuned = RowScores(np.array([2.0, 3.5]), np.array([-5.0, -6.0]), np.array([-1.5, -2.0]), np.array([5, 5]))
    found = signals(tuned, untuned)
    assert {name: list(array) for name, array in found.items()} == {
        "loss": [-1.0, -3.0],
        "reference": [1.0, 0.5],
        "min-k": [-4.0, -6.0],
        "min-k++": [-1.0, -2.0],
    }
    assert "3.5" not in repr(untuned)


def test_signals_want_the_same_rows(full_llama, rows):
    whole = score_rows(full_llama, rows, batch_size=4, pad_id=0, limit_tokens=8)
    for other in (rows[:4], rows[::-1]):
        with pytest.raises(ConfigError, match="of other lengths"):
            signals(whole, score_rows(full_llama, other, batch_size=4, pad_id=0, limit_tokens=8))


def test_what_cannot_be_scored_is_refused(full_llama, rows, tiny_model):
    with pytest.raises(DataError, match="no rows"):
        score_rows(full_llama, [], batch_size=1, pad_id=0, limit_tokens=4)
    with pytest.raises(DataError, match="row 2 of 2 has no token that counts"):
        score_rows(full_llama, [rows[0], Example([4, 5], [4, IGNORED])], batch_size=1, pad_id=0, limit_tokens=4)
    for wrong in ({"batch_size": 0, "limit_tokens": 4}, {"batch_size": 1, "limit_tokens": 0}):
        with pytest.raises(ConfigError, match="at least 1 of both"):
            score_rows(full_llama, rows, pad_id=0, **wrong)
    broken = tiny_model("llama")
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(RunFailed, match="not finite"):
        score_rows(broken, [Example([4, 5], [4, 5])], batch_size=1, pad_id=0, limit_tokens=4)


def test_pairs_are_scored_by_how_far_the_chosen_answer_is_ahead(full_llama):
    """The oracle: log-probabilities of both answers, a row at a time; ahead by more after tuning is the reward."""
    generator = torch.Generator().manual_seed(3)

    def row(num, given):
        ids = torch.randint(3, 250, (num,), generator=generator).tolist()
        return Example(ids, [-100] * given + ids[given:])

    pairs = [replace(row(9, 3), rejected=row(6, 3)), replace(row(5, 2), rejected=row(12, 2))]
    found = score_pairs(full_llama, pairs, batch_size=2, pad_id=0, limit_tokens=5)
    for number, pair in enumerate(pairs):
        sums = []
        for side in pair.sides:
            with torch.no_grad():
                logs = full_llama(input_ids=torch.tensor([side.input_ids])).logits[0].double().log_softmax(-1)
            places = [place for place, label in enumerate(side.labels) if label != -100][:5]
            sums.append(sum(float(logs[place - 1, side.labels[place]]) for place in places))
        assert found.loss[number] == pytest.approx(sums[1] - sums[0], abs=1e-3)
    assert found.num_tokens.tolist() == [5, 3]
    with pytest.raises(DataError, match="is not a pair"):
        score_pairs(full_llama, [pairs[0], row(5, 2)], batch_size=2, pad_id=0, limit_tokens=5)
