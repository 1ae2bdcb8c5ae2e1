"""Clipped sums: every engine against a loop written here, on every family, and what one unit can change."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.lowrank import quiet_peft
from client.privacy.clipping import Ghost, Hooks, OneByOne, choose, zeros
from offsite.modelling.blocks import block_list, decoder_stack, linear_names
from offsite.text.batches import Example

SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "opt": {
        "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": True,
    },
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2},
}  # fmt: skip
ENGINES = {"hooks": Hooks, "ghost": Ghost, "one-by-one": OneByOne}


def model_of(family: str, kind: str, **changes):
    """A tiny model whose outer blocks learn, whole or by LoRA that is not at its start."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family], **changes)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    stack = decoder_stack(model)
    blocks = block_list(model, stack)
    if kind == "blocks":
        for block in (blocks[0], blocks[-1]):
            block.requires_grad_(True)
    else:
        names = [f"{stack.name}.{place}.{name}" for place in (0, 2) for name in linear_names(blocks[place])]
        with quiet_peft():
            model = get_peft_model(model, LoraConfig(r=2, target_modules=names, fan_in_fan_out=family == "gpt2"))
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.data.normal_(0, 0.1)
    model.train()
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            module.p = 0.0
        for name in ("dropout", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model, {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def units(num: int, *, rows: int = 1, seed: int = 0):
    """Made-up units of different lengths; the first third of each row does not count in the loss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(num):
        unit = []
        for _ in range(rows):
            length = int(torch.randint(4, 11, (), generator=generator))
            ids = torch.randint(3, 64, (length,), generator=generator).tolist()
            unit.append(Example(ids, [-100] * (length // 3) + ids[length // 3 :]))
        made.append(tuple(unit))
    return made


def engine_of(name, model, trainable, *, clip=0.5, rows=3):
    return ENGINES[name](model, trainable, clip=clip, rows=rows, pad_id=0, autocast=nullcontext)


def sums_of(engine, chosen):
    sums = zeros(engine.trainable)
    engine.add(chosen, sums)
    return sums


def norm(sums):
    return float(torch.cat([tensor.flatten() for tensor in sums.values()]).norm())


def by_hand(model, trainable, chosen, clip):
    """The same with nothing but transformers' own loss and autograd, a row at a time, without padding."""
    total = zeros(trainable)
    for unit in chosen:
        losses = [
            model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss for row in unit
        ]
        grads = torch.autograd.grad(sum(losses) / len(unit), list(trainable.values()))
        length = torch.cat([grad.flatten() for grad in grads]).double().norm()
        for name, grad in zip(trainable, grads, strict=True):
            total[name] += grad.double() * min(1.0, clip / float(length))
    return total


@pytest.mark.parametrize("kind", ["blocks", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sums_are_those_of_a_loop(family, kind):
    model, trainable = model_of(family, kind)
    chosen = units(7)
    for clip in (0.05, 1.0, 1e6):  # all clipped, some, none
        expected = by_hand(model, trainable, chosen, clip)
        for wanted in ENGINES:
            engine = choose(
                model, trainable, clip=clip, rows=3, pad_id=0, autocast=nullcontext, wanted=wanted, is_bf16=False
            )
            assert engine.name == ("one-by-one" if family == "opt" else wanted)
            found = sums_of(engine, chosen)
            engine.close()
            difference = {name: found[name] - expected[name] for name in expected}
            assert norm(difference) < 3e-5 * norm(expected), (clip, wanted)
    assert all(tensor.grad is None for tensor in trainable.values())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weighed_tokens_are_clipped_by_every_engine_as_by_a_loop(family):
    """The oracle: with each token's weight held fixed, the gradient is that of minus its probability."""
    model, trainable = model_of(family, "lora")
    chosen = units(5)
    for clip in (0.01, 1e6):
        expected = zeros(trainable)
        for (row,) in chosen:
            shares = model(input_ids=torch.tensor([row.input_ids])).logits[0].softmax(-1)
            places = [place for place, label in enumerate(row.labels) if label != -100 and place]
            mean = -sum(shares[place - 1, row.input_ids[place]] for place in places) / len(places)
            grads = torch.autograd.grad(mean, list(trainable.values()))
            length = torch.cat([grad.flatten() for grad in grads]).double().norm()
            for name, grad in zip(trainable, grads, strict=True):
                expected[name] += grad.double() * min(1.0, clip / float(length))
        for wanted in ENGINES:
            engine = choose(
                model, trainable, clip=clip, rows=3, pad_id=0, autocast=nullcontext, wanted=wanted, is_bf16=False,
                weighs_tokens=True,
            )  # fmt: skip
            assert engine.name == ("one-by-one" if family == "opt" else wanted)
            found = sums_of(engine, chosen)
            engine.close()
            difference = {name: found[name] - expected[name] for name in expected}
            assert norm(difference) < 1e-4 * norm(expected), (clip, wanted)


def test_a_users_gradient_is_that_of_the_mean_over_the_rows():
    model, trainable = model_of("llama", "blocks")
    chosen = units(4, rows=3)
    expected = by_hand(model, trainable, chosen, 0.4)
    for rows in (1, 2, 8):
        found = sums_of(engine_of("one-by-one", model, trainable, clip=0.4, rows=rows), chosen)
        assert norm({name: found[name] - expected[name] for name in expected}) < 1e-5


@pytest.mark.parametrize("name", ENGINES)
def test_an_example_that_is_not_finite_contributes_zero_and_takes_nobody_with_it(name):
    model, trainable = model_of("llama", "blocks", tie_word_embeddings=False)
    chosen = units(5)
    engine = engine_of(name, model, trainable)
    expected = sums_of(engine, chosen)
    model.get_input_embeddings().weight.data[63] = float("nan")
    chosen = [unit for unit in chosen if 63 not in unit[0].input_ids]
    expected = sums_of(engine, chosen)
    poison = (Example([5, 63, 7, 8], [5, 63, 7, 8]),)
    found = sums_of(engine, [chosen[0], poison, *chosen[1:], poison])
    assert engine.num_zeroed == 2
    assert norm({name: found[name] - expected[name] for name in expected}) < 1e-5
    assert norm(sums_of(engine, [poison])) == 0
    engine.close()


@pytest.mark.parametrize("name", ENGINES)
def test_nobody_is_a_sum_of_zero(name):
    model, trainable = model_of("llama", "lora")
    engine = engine_of(name, model, trainable)
    assert norm(sums_of(engine, [])) == 0
    engine.close()


@pytest.mark.parametrize("name", ["hooks", "ghost"])
def test_closing_leaves_the_model_as_it_was(name):
    model, trainable = model_of("llama", "lora")
    before = {module: set(vars(module)) for module in model.modules()}
    values = {name: tensor.clone() for name, tensor in trainable.items()}
    engine = choose(model, trainable, clip=1.0, rows=2, pad_id=0, autocast=nullcontext, wanted=name, is_bf16=False)
    sums_of(engine, units(3))
    engine.close()
    assert {module: set(vars(module)) - {"autograd_grad_sample_hooks"} for module in model.modules()} == before
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(not vars(tensor).keys() & {"grad_sample", "_norm_sample"} for tensor in trainable.values())
    assert all(torch.equal(tensor, values[name]) for name, tensor in trainable.items())


def test_an_engine_that_is_wrong_in_silence_is_not_taken(monkeypatch):
    model, trainable = model_of("llama", "blocks")
    right = Hooks._samples

    def wrong(self, num_rows):
        found = right(self, num_rows)
        first = next(iter(found))
        return {**found, first: found[first].flip(0)}

    monkeypatch.setattr(Hooks, "_samples", wrong)
    engine = choose(model, trainable, clip=1.0, rows=3, pad_id=0, autocast=nullcontext, wanted="hooks", is_bf16=False)
    assert engine.name == "one-by-one"
