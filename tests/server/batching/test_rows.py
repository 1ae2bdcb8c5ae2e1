"""Rows of one batch with adapters of their own, against each adapter plugged in alone."""

from __future__ import annotations

import copy

import pytest
import torch
from row_adapters import adapters_of, fitted
from transformers import GPT2Config, GPT2LMHeadModel

from adapters.lowrank import quiet_peft
from offsite.errors import UnsupportedModel, WrongNames, WrongShape
from server.batching.rows import Rows
from server.plugging.fit import Fitted, plug, plugged


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def alone(model, adapter, ids):
    if adapter is None:
        return logits(model, ids)
    with plugged(model, adapter) as found:
        return logits(found, ids)


@pytest.fixture
def biased_gpt2():
    """GPT-2's linears are stored the other way round, and have biases."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_every_row_is_computed_with_its_own_adapter(full_llama, biased_gpt2, which):
    model = copy.deepcopy(full_llama) if which == "llama" else biased_gpt2
    ids = torch.randint(3, 250, (12, 5), generator=torch.Generator().manual_seed(0))
    known = adapters_of(model)
    names = [*known, "lora", "dora", "lora"]  # some twice, and not side by side
    expected = [alone(model, known[name], row[None])[0] for name, row in zip(names, ids, strict=True)]
    rows = Rows(model)
    put = {name: None if adapter is None else rows.put_on(adapter) for name, adapter in known.items()}
    with rows.of([put[name] for name in names]):
        found = logits(model, ids)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    distances = torch.pdist(torch.stack([alone(model, one, ids[:1])[0].flatten() for one in known.values()]))
    assert distances.min() > 0.5  # the adapters differ by far more than is tolerated
    for name in known:  # all rows with one and the same
        with rows.of([put[name]] * 2):
            both = logits(model, ids[:2])
        torch.testing.assert_close(both, alone(model, known[name], ids[:2]), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids[:1]), alone(model, None, ids[:1]))


def test_rows_of_lora_equal_peft_with_adapter_names(full_llama):
    from peft import LoraConfig, PeftModel

    model = copy.deepcopy(full_llama)
    one, two = (fitted(model, "lora", seed, alpha=alpha) for seed, alpha in ((1, 4.0), (2, 16.0)))
    ids = torch.randint(3, 250, (3, 6), generator=torch.Generator().manual_seed(1))
    rows = Rows(copy.deepcopy(model))
    put = [rows.put_on(one), rows.put_on(two), None]
    with rows.of(put):
        found = logits(rows._model, ids)
    with quiet_peft():
        theirs: PeftModel = plug(model, one).model
        modules = [name.removesuffix(".lora_A.default") for name, _ in theirs.named_modules() if "lora_A." in name]
        targets = [name.removeprefix("base_model.model.") for name in modules]
        theirs.add_adapter("two", LoraConfig(r=4, lora_alpha=16, target_modules=targets))
        for name, parameter in theirs.named_parameters():
            if ".two." in name:
                path, _, part = name.removesuffix(".two.weight").rpartition(".")
                site = path.removeprefix("base_model.model.")
                role = next(role for role, place in two.sites.items() if site.startswith(f"{place}."))
                parameter.data = two.tensors[f"{role}{site.removeprefix(two.sites[role])}.{part}"]
        with torch.no_grad():
            expected = theirs(input_ids=ids, adapter_names=["default", "two", "__base__"], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_was_taken_off_leaves_its_place_to_another(full_llama):
    model = copy.deepcopy(full_llama)
    ids = torch.randint(3, 250, (2, 5), generator=torch.Generator().manual_seed(2))
    first, second, third = (fitted(model, "lora", seed) for seed in (1, 2, 3))
    expected = torch.cat([alone(model, third, ids[:1]), alone(model, second, ids[1:])])
    rows = Rows(model)
    gone, stays = rows.put_on(first), rows.put_on(second)
    assert gone.num_bytes == sum(4 * tensor.numel() for tensor in first.tensors.values())
    place = gone.slot
    rows.take_off(gone)
    new = rows.put_on(third)
    assert new.slot == place
    with rows.of([new, stays]):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    for adapter in (new, stays):
        rows.take_off(adapter)
    assert rows._pools == {}


def test_what_does_not_fit_is_refused_and_changes_nothing(full_llama):
    model = copy.deepcopy(full_llama)
    rows, good = Rows(model), fitted(model, "lora", 1)
    lost = Fitted(good.spec, good.tensors, {**good.sites, "top.0": "model.layers.99"})
    name = next(iter(good.tensors))
    long = Fitted(good.spec, {**good.tensors, name: torch.zeros(4, 33)}, good.sites)
    vector = fitted(model, "bitfit", 2)
    other = Fitted(vector.spec, {"top.0.input_layernorm.weight": torch.ones(31)}, vector.sites)
    for adapter, error in ((lost, WrongNames), (long, WrongShape), (other, WrongShape)):
        with pytest.raises(error):
            rows.put_on(adapter)
    assert rows._pools == {}
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_adapter_of_experts_does_not_mix():
    from tiny_architectures import tiny

    model = tiny("mixtral")
    rows = Rows(model)
    whole, lora = fitted(model, "blocks", 1, at=(0, 5)), fitted(model, "lora", 2, at=(0, 5))
    ids = torch.randint(3, 250, (2, 5), generator=torch.Generator().manual_seed(4))
    expected = alone(model, whole, ids)
    put = [rows.put_on(whole), rows.put_on(lora)]
    assert [one.mixes for one in put] == [False, True]
    with pytest.raises(UnsupportedModel, match="experts"), rows.of(put):
        raise AssertionError("not reached")
    with rows.of([put[0], put[0]]):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
