"""Encoders with a language-modelling head, such as ELECTRA, that say they can generate.

People tuned them on next-token text and wondered at losses near zero: every position sees the token that it is asked
for. The same classes are sound decoders once their configuration says so.
"""

from __future__ import annotations

import pytest
import torch
from checkpoints_lab import distill, random_model, save

from offsite.errors import BadSchema, UnsupportedModel
from offsite.modelling.causal import reads_ahead, refuse_uncausal

ENCODERS = [
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roformer",
    "roberta-prelayernorm",
    "bert-generation",
    "big_bird",
]
DECODERS = ["llama", "gpt2", "bloom", "opt", "gemma2", "mixtral", "qwen3_moe", "glm4_moe", "mamba", "rwkv", "jamba"]


def later_matters(model):
    """The definition, by another route: is any earlier score another when the text goes on otherwise?"""
    one = torch.randint(5, 200, (1, 12), generator=torch.Generator().manual_seed(3))
    other = one.clone()
    other[0, 6:] = (other[0, 6:] + 17) % 200
    with torch.no_grad():
        scores = [model(input_ids=ids, use_cache=False).logits[:, :6] for ids in (one, other)]
    return not torch.allclose(*scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_form_is_refused_exactly_when_it_reads_ahead(name, is_decoder):
    model = random_model(name, is_decoder=is_decoder)
    assert later_matters(model) == (not is_decoder)
    assert reads_ahead(model) == (not is_decoder)
    assert reads_ahead(model.to(torch.bfloat16)) == (not is_decoder)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_pass(name, dtype):
    refuse_uncausal(random_model(name).to(dtype))


def test_rounding_alone_is_no_reading_ahead(full_llama, monkeypatch):
    """Scores that differ in the last bit, as those of experts do, are told from scores that depend on the token."""
    from offsite.modelling import causal

    honest = causal._scores
    monkeypatch.setattr(causal, "_scores", lambda *given: honest(*given) + 1e-6 * torch.rand(1))
    monkeypatch.setattr(causal, "_same", lambda *_: False)
    assert not reads_ahead(full_llama)
    encoder = random_model("roberta")
    assert reads_ahead(encoder)
    assert not encoder.training
    with pytest.raises(UnsupportedModel, match="RobertaForCausalLM is not causal"):
        refuse_uncausal(encoder)


def test_distill_refuses_and_leaves_nothing(tmp_path, letters_tokenizer, capsys):
    checkpoint = save(tmp_path / "electra", random_model("electra"), letters_tokenizer)
    assert distill(checkpoint, tmp_path / "package") == 2
    told = capsys.readouterr().err
    assert "ElectraForCausalLM is not causal" in told
    assert "is_decoder=true" in told
    assert "as encoders bert, roberta, " in told
    assert not (tmp_path / "package").exists()
    decoder = save(tmp_path / "decoder", random_model("roberta", is_decoder=True), letters_tokenizer)
    assert distill(decoder, tmp_path / "package") == 0


def test_a_client_does_not_open_one_either(tmp_path, make_package):
    """An owner's offsite may be older, or not offsite: what arrives is tried as well."""
    encoder = random_model("electra")
    package = make_package(tmp_path / "package", model=encoder, kept=tuple(range(6)))
    with pytest.raises(BadSchema, match="holds a model that is not causal"):
        package.load_model()


def test_a_model_that_does_not_run_says_so(full_llama):
    """Sizes that do not fit each other show only in a forward pass."""
    import copy

    model = copy.deepcopy(full_llama)
    model.model.layers[3].mlp.down_proj = torch.nn.Linear(47, 32)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM does not run on a short text: "):
        refuse_uncausal(model)
