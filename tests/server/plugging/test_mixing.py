"""Mixing probabilities: the formula, over every kind of adapter, with and without a cache, and nothing left behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.digests import model_digest
from offsite.errors import ConfigError
from offsite.evaluation.measure import perplexity
from offsite.generation.generate import next_tokens
from offsite.generation.sampling import Settings
from offsite.modelling.load import load_model
from offsite.modelling.steps import Steps, cache_is_right
from offsite.text.batches import Example
from server.evaluation.candidates import read_own
from server.plugging.fit import fit, plug_mixed, plugged
from server.plugging.mixing import mixture, stay_mixed

IDS = [5, 30, 7, 200, 11, 90, 42, 17]
KINDS = ["lora", "dora", "blocks", "bitfit"]


@pytest.fixture
def fitted_of(dropped_package, make_bundle, full_llama, tmp_path):
    def make(kind):
        bundle = make_bundle(tmp_path / f"bundle-{kind}", dropped_package, kind=kind, shake=0.3)
        record = read_owner_record(owner_record_path(dropped_package.path))
        return fit(full_llama, read_own(bundle, record), record)

    return make


def probabilities(model, ids=IDS):
    with torch.no_grad():
        return torch.softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double(), dim=-1)


def by_hand(model, adapter, mix, ids=IDS):
    without = probabilities(model, ids)
    with plugged(model, adapter) as adapted:
        return (1 - mix) * without + mix * probabilities(adapted, ids)


def test_the_formula():
    one, other = torch.tensor([[1.0, 2.0, -30.0]]), torch.tensor([[0.0, 9.0, 40.0]])
    expected = 0.3 * torch.softmax(one, -1) + 0.7 * torch.softmax(other, -1)
    torch.testing.assert_close(mixture(one, other, 0.7).exp(), expected)
    assert mixture(one, one + 5, 0.5).exp().sum() == pytest.approx(1, abs=1e-6)
    forbidden = torch.tensor([[-math.inf, 0.0]])
    assert mixture(forbidden, forbidden, 0.5)[0, 0] == -math.inf
    assert mixture(one.bfloat16(), other, 0.5).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_model_gives_the_mixtures_probabilities_and_is_itself_afterwards(kind, full_llama, fitted_of):
    model, adapter = copy.deepcopy(full_llama), fitted_of(kind)
    before, expected = model_digest(model), by_hand(model, adapter, 0.7)
    assert not torch.allclose(expected, probabilities(model), atol=1e-3)
    with plugged(model, adapter, mix=0.7) as both:
        torch.testing.assert_close(probabilities(both), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(probabilities(both), expected, rtol=0, atol=1e-6)  # and again
    assert model_digest(model) == before
    assert "forward" not in vars(model)
    torch.testing.assert_close(probabilities(model), probabilities(full_llama), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_is_that_of_the_mixture(kind, full_llama, fitted_of, capsys):
    model, adapter = copy.deepcopy(full_llama), fitted_of(kind)
    with plugged(model, adapter, mix=0.4) as both:
        assert cache_is_right(both)
        steps = Steps(both, torch.tensor([IDS[:3]]), cached=True)
        found = [torch.softmax(steps.logits()[0].double(), -1)]
        for token in IDS[3:]:
            steps.add(torch.tensor([token]))
            found.append(torch.softmax(steps.logits()[0].double(), -1))
    torch.testing.assert_close(torch.stack(found), by_hand(model, adapter, 0.4)[2:], rtol=0, atol=1e-5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_and_sampled_tokens_are_the_mixtures(cached, full_llama, fitted_of):
    model, adapter = copy.deepcopy(full_llama), fitted_of("lora")
    greedy, drawn = Settings(limit_tokens=5, temperature=0), Settings(limit_tokens=5, seed=3, temperature=0.7)
    with plugged(model, adapter, mix=0.5) as both:
        found = [
            [token for token, _ in zip(next_tokens(both, IDS, settings, cached=cached), range(5), strict=False)]
            for settings in (greedy, drawn)
        ]
    ids, expected = list(IDS), []
    for _ in range(5):
        expected.append(int(by_hand(model, adapter, 0.5, ids)[-1].argmax()))
        ids.append(expected[-1])
    assert found[0] == expected
    ids, expected, generator = list(IDS), [], torch.Generator().manual_seed(3)
    for _ in range(5):
        sharper = torch.softmax(by_hand(model, adapter, 0.5, ids)[-1].log().float() / 0.7, -1)
        expected.append(int(torch.multinomial(sharper, 1, generator=generator)))
        ids.append(expected[-1])
    assert found[1] == expected


def test_perplexity_is_of_the_mixture(full_llama, fitted_of):
    model, adapter = copy.deepcopy(full_llama), fitted_of("lora")
    chosen = by_hand(model, adapter, 0.7)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])
    with plugged(model, adapter, mix=0.7) as both:
        found = perplexity(both, [Example(IDS, IDS)], batch_size=1, pad_id=0)
    assert found.loss == pytest.approx(-float(chosen.log().mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "blocks"])
def test_a_model_that_stays_mixed_may_be_cast(kind, llama_folder, full_llama, fitted_of):
    adapter = fitted_of(kind)
    expected = by_hand(copy.deepcopy(full_llama), adapter, 0.5)
    both = plug_mixed(load_model(str(llama_folder), dtype="float32"), adapter, 0.5).double()
    torch.testing.assert_close(probabilities(both), expected, rtol=0, atol=1e-6)
    assert {parameter.dtype for parameter in both.model.layers[0].mlp.parameters()} == {torch.float64}


@pytest.mark.parametrize("mix", [0.0, -0.5, 1.5, float("nan")])
def test_what_is_no_mixture_is_refused(mix, full_llama, fitted_of):
    with pytest.raises(ConfigError, match="--mix"), plugged(copy.deepcopy(full_llama), fitted_of("lora"), mix=mix):
        pass


def test_a_model_without_an_adapter_labels_and_a_strange_past_are_refused(full_llama, fitted_of):
    with pytest.raises(ConfigError, match="carries no adapter"):
        stay_mixed(copy.deepcopy(full_llama), [], 0.5)
    model, ids = copy.deepcopy(full_llama), torch.tensor([IDS])
    with torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
    with plugged(model, fitted_of("lora"), mix=0.5) as both:
        with pytest.raises(ConfigError, match="no loss"):
            both(input_ids=ids, labels=ids)
        with pytest.raises(ValueError, match="has not seen"):
            both(input_ids=ids, past_key_values=past)
