"""Perplexity against the plainest loop there is, on models whose heads differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedModel

from offsite.errors import ConfigError, DataError, RunFailed
from offsite.evaluation.measure import perplexity
from offsite.text.batches import IGNORED, Example

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "gemma2": Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, final_logit_softcapping=0.5),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # a model of initial size is uniform, whatever it is asked
    return model


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (2, 30, 7, 19, 3, 11):
        ids = torch.randint(97, (length,), generator=generator).tolist()
        labels = [token if number % 3 else IGNORED for number, token in enumerate(ids)]
        made.append(Example(ids, labels))
    return [*made, Example([5, 6, 7], [5, IGNORED, IGNORED])]  # nothing counts: the first has no past


def by_hand(model: PreTrainedModel, examples: list[Example]) -> tuple[float, int]:
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        for position, label in list(enumerate(example.labels))[1:]:
            if label != IGNORED:
                total -= logits[position - 1].double().log_softmax(-1)[label].item()
                count += 1
    return total / count, count


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_perplexity_is_the_plain_mean_whatever_the_batch(name: str, batch_size: int, examples: list[Example]) -> None:
    model = tiny(name)
    expected, num_tokens = by_hand(model, examples)
    found = perplexity(model, examples, batch_size=batch_size, pad_id=0)
    other_padding = perplexity(model, examples[::-1], batch_size=batch_size, pad_id=96)
    assert found.num_tokens == num_tokens
    assert abs(found.loss - expected) < 1e-6
    assert abs(found.loss - other_padding.loss) < 1e-6
    assert found.perplexity == math.exp(found.loss)
    assert abs(expected - math.log(97)) > 0.01


def test_a_model_whose_head_is_out_of_reach_is_measured_alike(examples: list[Example], monkeypatch) -> None:
    model = tiny("llama")
    expected = perplexity(model, examples, batch_size=3, pad_id=0)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert perplexity(model, examples, batch_size=3, pad_id=0).loss == pytest.approx(expected.loss, abs=1e-6)


def test_logits_are_made_only_where_they_count(examples: list[Example]) -> None:
    model = tiny("llama")
    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, output: rows.append(output.shape[:-1].numel()))
    found = perplexity(model, examples, batch_size=2, pad_id=0)
    handle.remove()
    looked_at = 2 * math.ceil(len(examples) / 2)  # one position of a batch twice, to see that both ways are one
    assert sum(rows) == found.num_tokens + looked_at


def test_the_model_is_left_as_it_was(examples: list[Example]) -> None:
    model = tiny("gpt2")
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps: list[tuple[int, int]] = []
    perplexity(model, examples, batch_size=3, pad_id=0, progress=lambda done, total: steps.append((done, total)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.lm_head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert steps == [(3, 7), (6, 7), (7, 7)]


def test_bfloat16_is_near_and_its_loss_still_float32(examples: list[Example]) -> None:
    model = tiny("llama")
    exact = perplexity(model, examples, batch_size=3, pad_id=0)
    rough = perplexity(model, examples, batch_size=3, pad_id=0, precision="bf16")
    assert rough.loss == pytest.approx(exact.loss, rel=0.05)
    assert rough.loss != exact.loss


def test_nothing_to_measure_is_refused(examples: list[Example]) -> None:
    for nothing in ([], [Example([5], [5])], [Example([5, 6], [5, IGNORED])]):
        with pytest.raises(DataError, match="nothing to measure"):
            perplexity(tiny("llama"), nothing, batch_size=2, pad_id=0)
    with pytest.raises(ConfigError):
        perplexity(tiny("llama"), examples, batch_size=0, pad_id=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_a_broken_model_stops_the_run(value: float, examples: list[Example]) -> None:
    model = tiny("llama")
    with torch.no_grad():
        nn.init.constant_(model.lm_head.weight, 0.0)
        model.lm_head.weight[::2] = value
    with pytest.raises(RunFailed, match=r"not finite|beyond any use"):
        perplexity(model, examples, batch_size=2, pad_id=0)
