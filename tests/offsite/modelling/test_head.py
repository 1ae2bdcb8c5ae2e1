"""Values at chosen positions: as from the whole tensor of scores, with their gradients, and without that tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import offsite.modelling.head as module
from offsite.modelling.head import Before, CrossEntropy, Divergence, before_head, scores_at, values_at

LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
MADE: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "tie_word_embeddings": True},
    "gemma2": {**LLAMA, "head_dim": 8, "final_logit_softcapping": 2.0},
    "granite": {**LLAMA, "logits_scaling": 3.0},
    "cohere": {**LLAMA, "logit_scale": 0.3, "eos_token_id": 1},
    "opt": {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 8},
    "bert": {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "is_decoder": True},
}
VOCABULARY, ROWS, TOKENS = 61, 3, 9


def made(architecture: str, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, hidden_size=16, vocab_size=VOCABULARY, **MADE[architecture])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).double().eval()
    return model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch, chosen positions and their targets; chunks are of three positions."""
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 3 * VOCABULARY)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 1)
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator)
    chosen_BT = torch.rand((ROWS, TOKENS), generator=generator) < 0.6
    chosen_BT[:, -1] = False
    batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    return batch, chosen_BT, ids_BT.roll(-1, 1)[chosen_BT]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("trained", ["last block", "everything"])
@pytest.mark.parametrize("architecture", MADE)
def test_loss_and_gradients_are_those_of_the_whole_tensor(asked, architecture: str, trained: str) -> None:
    batch, chosen_BT, targets_N = asked
    model = made(architecture)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "everything" or ".1." in name)
    weights_N = torch.rand(len(targets_N), dtype=torch.double, generator=torch.Generator().manual_seed(2))
    plain_N = cross_entropy(model(**batch, use_cache=False).logits[chosen_BT], targets_N, reduction="none")
    (plain_N * weights_N).sum().backward()
    expected = gradients(model)
    found = before_head(model, batch, chosen_BT)
    assert isinstance(found, Before)
    assert found.learns == (trained == "everything")
    values_N = values_at(model, batch, chosen_BT, CrossEntropy(targets_N))
    (values_N * weights_N).sum().backward()
    torch.testing.assert_close(values_N, plain_N, rtol=1e-12, atol=1e-12)
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_divergence_and_its_gradient_are_those_of_the_whole_tensors(asked, architecture: str) -> None:
    batch, chosen_BT, _ = asked
    model, other = made(architecture), made(architecture, seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".1." in name)
    with torch.no_grad():
        wanted_NV = other(**batch, use_cache=False).logits[chosen_BT].log_softmax(-1)
        before = before_head(other, batch, chosen_BT)
    plain_NV = model(**batch, use_cache=False).logits[chosen_BT].log_softmax(-1)
    plain_N = kl_div(plain_NV, wanted_NV, reduction="none", log_target=True).sum(-1)
    plain_N.sum().backward()
    expected = gradients(model)
    values_N = values_at(model, batch, chosen_BT, Divergence(before))
    values_N.sum().backward()
    torch.testing.assert_close(values_N, plain_N, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected.pop(name), rtol=1e-10, atol=1e-12, msg=name)
    assert not expected
    with torch.no_grad():
        itself = values_at(other, batch, chosen_BT, Divergence(before))
    assert itself.abs().max() == 0
    assert values_N.min() > 0


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor with a vocabulary's axis that was made while it was on."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.ndim and one.shape[-1] == VOCABULARY:
                self.num = max(self.num, one.numel())
        return out


@pytest.mark.parametrize("trained", ["last block", "everything"])
def test_no_tensor_of_all_positions_and_the_vocabulary_is_made(asked, trained: str) -> None:
    batch, chosen_BT, targets_N = asked
    model = made("opt")  # whose weights have no axis as long as the vocabulary that comes last
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "everything" or ".1." in name)
    with Largest() as largest:
        values_at(model, batch, chosen_BT, CrossEntropy(targets_N)).sum().backward()
    assert len(targets_N) > 10
    assert 0 < largest.num <= 8 * VOCABULARY  # three positions, or the transposed weight (8, V)


def test_a_forward_of_someone_elses_is_taken_as_it_is(asked) -> None:
    """A mixture of two passes, for one, says nothing of a hidden state."""
    batch, chosen_BT, targets_N = asked
    model = made("llama")
    own = model.forward

    def doubled(*args: Any, **given: Any) -> Any:
        found = own(*args, **given)
        found.logits = 2 * found.logits + own(*args, **given).logits
        return found

    model.forward = doubled  # type: ignore[method-assign]
    plain_N = cross_entropy(model(**batch, use_cache=False).logits[chosen_BT], targets_N, reduction="none")
    assert isinstance(before_head(model, batch, chosen_BT), Tensor)
    values_N = values_at(model, batch, chosen_BT, CrossEntropy(targets_N))
    torch.testing.assert_close(values_N, plain_N, rtol=1e-12, atol=1e-12)


def test_a_model_that_scores_by_more_than_the_hidden_state_is_seen(asked) -> None:
    batch, chosen_BT, _ = asked
    model = made("llama")

    def by_length(_module: object, _args: object, given: dict[str, Any], found: Any) -> Any:
        found.logits = found.logits * given["input_ids"].shape[0]  # the rows that it was handed
        return found

    handle = model.register_forward_hook(by_length, with_kwargs=True)
    with torch.no_grad():
        scores = torch.cat([scores_nV for _, scores_nV in scores_at(model, batch, chosen_BT)])
        plain_NV = model(**batch, use_cache=False).logits[chosen_BT]
    handle.remove()
    torch.testing.assert_close(scores, plain_NV, rtol=1e-12, atol=1e-12)


def test_no_position_is_no_value(asked) -> None:
    batch, chosen_BT, _ = asked
    nothing = CrossEntropy(torch.empty(0, dtype=torch.long))
    values_N = values_at(made("llama"), batch, torch.zeros_like(chosen_BT), nothing)
    assert values_N.shape == (0,)
    values_N.sum().backward()
