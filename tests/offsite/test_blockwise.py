import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from offsite.blockwise import block_by_block, outside_blocks, widened

IDS = torch.arange(3, 15)[None]


@pytest.fixture(params=["llama", "gpt2"])
def model(request, full_llama):
    if request.param == "llama":
        return copy.deepcopy(full_llama).to(torch.bfloat16)
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)).eval().to(torch.bfloat16)


def held(model):
    return {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_it_computes_what_the_whole_model_in_that_dtype_does(model):
    before, expected = held(model), copy.deepcopy(model).float()(IDS).logits
    plain = model(IDS).logits
    widest = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda *_: widest.append(sum(p.dtype == torch.float32 for p in model.parameters()))
    )
    with block_by_block(model, torch.float32):
        assert torch.equal(model(IDS).logits, expected)
    hook.remove()
    outside = {id(p) for module in outside_blocks(model) for p in module.parameters(recurse=False)}
    assert widest == [len(outside)]  # no block is wide any more when the head runs
    with block_by_block(model):
        assert torch.equal(model(IDS).logits, plain)
    assert held(model) == before
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_fails_inside_leaves_it_as_it_was(model):
    before = held(model)
    hook = model.get_submodule(decoder(model))[1].register_forward_hook(failing)
    with pytest.raises(ValueError, match="broken"), block_by_block(model, torch.float32):
        model(IDS)
    hook.remove()
    assert held(model) == before
    with widened(model.modules(), None):
        assert held(model) == before


def decoder(model):
    return "model.layers" if hasattr(model, "model") else "transformer.h"


def failing(*_):
    raise ValueError("broken")
