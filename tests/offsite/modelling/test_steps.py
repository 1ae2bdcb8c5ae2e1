"""Steps against whole forwards: with a cache, without one, several prompts at once, with an adapter."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from seq2seq_lab import seq2seq

from offsite.modelling.steps import TOLERANCE, Steps, cache_is_right

PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 30, 11, 12], [1, 2, 3, 4]])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "opt"])
def test_every_step_scores_what_a_whole_forward_scores(tiny_model, name, cached):
    model = tiny_model(name)
    steps, ids = Steps(model, PROMPTS, cached=cached), PROMPTS
    for _ in range(6):
        found = steps.logits()
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)
        chosen = whole.argmax(-1)
        steps.add(chosen)
        ids = torch.cat([ids, chosen[:, None]], 1)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["t5", "gated-t5", "bart"])
def test_an_encoder_decoder_answers_what_a_whole_pass_does(name, cached, capsys):
    model = seq2seq(name)
    assert cache_is_right(model)
    assert capsys.readouterr().err == ""
    steps, ids = Steps(model, PROMPTS, cached=cached), torch.full((3, 1), model.config.decoder_start_token_id)
    for _ in range(5):
        found = steps.logits()
        with torch.no_grad():
            whole = model(input_ids=PROMPTS, decoder_input_ids=ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)
        chosen = whole.argmax(-1)
        steps.add(chosen)
        ids = torch.cat([ids, chosen[:, None]], 1)


def test_a_cached_step_forwards_one_token(tiny_model):
    model, widths = tiny_model("llama"), []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    try:
        steps = Steps(model, PROMPTS, cached=True)
        for _ in range(3):
            steps.add(steps.logits().argmax(-1))
    finally:
        handle.remove()
    assert widths == [4, 1, 1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_an_adapter_around_the_model_takes_part(full_llama):
    model = type(full_llama)(full_llama.config).eval()
    plain = Steps(model, PROMPTS, cached=True).logits()
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    found = Steps(wrapped, PROMPTS, cached=True).logits()
    with torch.no_grad():
        torch.testing.assert_close(found, wrapped(input_ids=PROMPTS, use_cache=False).logits[:, -1], rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2


def test_scores_that_are_no_numbers_are_not_blamed_on_the_cache(full_llama, capsys):
    model = type(full_llama)(full_llama.config).eval()
    model.model.norm.weight.data.fill_(float("nan"))
    assert cache_is_right(model)
    assert capsys.readouterr().err == ""


def test_a_cache_that_raises_is_said_to_fail(full_llama, capsys, monkeypatch):
    monkeypatch.setattr(full_llama, "prepare_inputs_for_generation", lambda *_, **__: {}["nothing"])
    assert not cache_is_right(full_llama)
    assert capsys.readouterr().err == "the cache of this llama model fails: going on without it, which is slower\n"


def test_a_little_noise_is_borne_and_much_is_not(full_llama, monkeypatch):
    real = Steps.logits
    for share, expected in ((TOLERANCE / 10, True), (TOLERANCE * 10, False)):

        def noisy(steps, share=share):
            found = real(steps)
            scale = (found - found.mean(-1, keepdim=True)).norm() / found.numel() ** 0.5
            return found + scale * share * torch.randn(found.shape) if steps._cached else found

        monkeypatch.setattr(Steps, "logits", noisy)
        assert cache_is_right(full_llama) is expected
