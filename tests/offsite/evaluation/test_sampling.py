"""Continuations against a loop without a cache that takes one prompt at a time."""

from __future__ import annotations

import math

import pytest
import torch

from offsite.errors import ConfigError, RunFailed
from offsite.evaluation.sampling import continuations

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12], [13], [5, 6, 8], [20, 21, 22, 23, 24, 25]]


@torch.no_grad()
def one_by_one(model, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "bloom", "falcon", "qwen3_moe", "deepseek_v3"])
def test_greedy_is_what_a_plain_loop_says(tiny_model, name):
    model = tiny_model(name)
    found = continuations(model, PROMPTS, num_tokens=8, batch_size=2)
    assert found == [one_by_one(model, prompt, 8) for prompt in PROMPTS]


def test_a_model_whose_blocks_were_cut_goes_on_alike(dropped_package, narrow_package):
    for package in (dropped_package, narrow_package):
        model = package.load_model()
        assert continuations(model, PROMPTS, num_tokens=8, batch_size=8) == [
            one_by_one(model, prompt, 8) for prompt in PROMPTS
        ]


def test_draws_follow_the_distribution(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    num = 4000
    for temperature, top_k in ((1.0, 0), (2.0, 0), (0.7, 5)):
        drawn = continuations(
            model, [[5, 6, 7]] * num, num_tokens=1, batch_size=500, temperature=temperature, top_k=top_k, seed=3
        )
        counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(logits)).double()
        kept = logits.masked_fill(logits < logits.topk(top_k or len(logits)).values[-1], -math.inf)
        probs = (kept / temperature).softmax(-1)
        assert ((counts / num - probs).abs() <= 5 * (probs * (1 - probs) / num).sqrt() + 1e-12).all()


def test_draws_are_among_the_fewest_that_are_likely_enough(tiny_model):
    model, num = tiny_model("llama"), 2000
    with torch.no_grad():
        shares = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1)
    by_share = shares.sort(descending=True)
    for top_p in (0.1, 0.5, 0.9):
        num_kept = int((by_share.values.cumsum(0) < top_p).sum()) + 1
        kept = set(by_share.indices[:num_kept].tolist())
        made = continuations(
            model, [[5, 6, 7]] * num, num_tokens=1, batch_size=500, temperature=1.0, top_p=top_p, seed=4
        )
        drawn = [ids[0] for ids in made]
        assert set(drawn) <= kept
        likeliest = int(by_share.indices[0])
        share = float(shares[likeliest] / by_share.values[:num_kept].sum())
        assert drawn.count(likeliest) / num == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / num) + 1e-9)


def test_a_seed_repeats_draws_and_another_does_not(tiny_model):
    model = tiny_model("llama")
    settings = {"num_tokens": 12, "batch_size": 4, "temperature": 1.5}
    one, again, other = (continuations(model, PROMPTS, seed=seed, **settings) for seed in (1, 1, 2))
    assert one == again != other


def test_tokens_that_are_left_out_never_come(tiny_model):
    model = tiny_model("llama")
    (likeliest,) = continuations(model, [[5]], num_tokens=1, batch_size=1)[0]
    rest = continuations(model, [[5]] * 64, num_tokens=8, batch_size=64, temperature=3.0, without=[likeliest, 0])
    assert not {likeliest, 0} & {token for row in rest for token in row}


def test_the_mode_comes_back_and_progress_tells_prompts(tiny_model):
    model = tiny_model("llama").train()
    told: list[tuple[int, int]] = []
    continuations(model, PROMPTS, num_tokens=1, batch_size=2, progress=lambda *seen: told.append(seen))
    assert model.training
    assert [done for done, _ in told] == [2, 3, 4, 5, 6]


def test_what_cannot_be_is_refused(tiny_model):
    model = tiny_model("llama")
    for wrong in (
        {"num_tokens": 0},
        {"batch_size": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ):
        with pytest.raises(ConfigError):
            continuations(model, PROMPTS, **{"num_tokens": 1, "batch_size": 1, **wrong})
    with pytest.raises(ConfigError):
        continuations(model, [[]], num_tokens=1, batch_size=1)
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(RunFailed, match="not finite"):
        continuations(model, PROMPTS, num_tokens=1, batch_size=1)
    assert continuations(model, [], num_tokens=1, batch_size=1) == []
