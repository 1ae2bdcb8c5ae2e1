import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from seq2seq_lab import rows, seq2seq

from emulator.compression.activations import forward, hidden_after, seen_by
from emulator.compression.passage import Passage
from offsite.errors import ConfigError
from offsite.modelling.blocks import block_list, decoder_stack, hidden_of, text_stacks


@torch.no_grad()
def whole(model, batches):
    """What every block gives in passes through the whole model, by batch and block."""
    blocks = dict(enumerate(block_list(model, decoder_stack(model))))
    found = []
    for batch in batches:
        with hidden_after(blocks) as hidden:
            forward(model, batch)
        found.append(hidden)
    return found


def passed(passage, model, numbers):
    """What those blocks give on a passage, by block and batch."""
    blocks = block_list(model, decoder_stack(model))
    found = {}
    for number in numbers:
        found[number] = []

        def see(_which, _before, output, into=found[number]):
            into.append(hidden_of(output))

        passage.run(blocks[number], lambda _batch, number=number, see=see: seen_by([blocks[number]], see))
    return found


@pytest.fixture
def batches(batch):
    other = {"input_ids": batch["input_ids"].flip(1), "attention_mask": torch.ones_like(batch["attention_mask"])}
    return [batch, other]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "bloom", "mixtral"])
def test_every_block_is_given_what_the_whole_model_gives_it(tiny, batches, architecture):
    model = tiny(architecture)
    expected = whole(model, batches)
    passage = Passage(model, batches)
    found = passed(passage, model, [1, 2, 4, 5])
    assert passage.is_carried
    for number, states in found.items():
        assert len(states) == 2
        assert all(torch.equal(one, expected[i][number]) for i, one in enumerate(states))
    again = passed(passage, model, [0])[0]  # an earlier block: from the beginning
    assert all(torch.equal(one, expected[i][0]) for i, one in enumerate(again))
    for i, batch in enumerate(batches):  # and the model is as it was
        assert torch.equal(whole(model, [batch])[0][5], expected[i][5])


@pytest.mark.parametrize("name", ["t5", "gated-t5", "bart"])
@pytest.mark.parametrize("side", [0, 1])
def test_an_encoder_decoder_is_carried_too_and_its_encoder_runs_once(name, side, tmp_path):
    """T5's first block makes the positions of all others; a decoder's blocks read what the encoder gives."""
    model = seq2seq(name)
    stack = text_stacks(model)[side]
    blocks = list(block_list(model, stack))
    given = [{key.replace("decoder_", ""): tensor for key, tensor in rows(padded=one).items() if "decoder" in key} | {
        "source_ids": rows(padded=one)["input_ids"], "source_mask": rows(padded=one)["attention_mask"]
    } for one in (True, False)]  # fmt: skip
    expected = []
    for batch in given:
        with hidden_after(dict(enumerate(blocks))) as hidden, torch.no_grad():
            forward(model, batch)
        expected.append(hidden)
    passage, ran = Passage(model, given, stack=stack, folder=tmp_path / "carried", limit_bytes=1), []
    counted = [one.register_forward_hook(lambda module, *_: ran.append(module)) for one in model.get_encoder().modules()
               if isinstance(one, torch.nn.Linear)]  # fmt: skip
    for number in (1, 3, 2):
        found = []

        def see(_which, _before, output, into=found):
            into.append(hidden_of(output))

        passage.run(blocks[number], lambda _batch, number=number, see=see: seen_by([blocks[number]], see))
        assert all(torch.equal(one, expected[i][number]) for i, one in enumerate(found))
    assert passage.is_carried
    if side:
        num_probes = 2 if name == "bart" else 3
        assert len(ran) == (num_probes + 2) * len(counted)  # each batch once, though block 2 begins anew
    for one in counted:
        one.remove()
    passage.close()
    assert not list(tmp_path.iterdir())


def test_states_past_the_limit_are_on_disk_and_gone_at_the_end(tiny, batches, tmp_path):
    model = tiny("llama")
    expected = whole(model, batches)
    size = expected[0][0].nbytes
    passage = Passage(model, batches, folder=tmp_path / "carried", limit_bytes=size)
    found = passed(passage, model, [1, 3, 5])
    assert [path.name for path in (tmp_path / "carried").iterdir()] == ["carried-00001.safetensors"]
    for number, states in found.items():
        assert all(torch.equal(one, expected[i][number]) for i, one in enumerate(states))
    passage.close()
    assert not list(tmp_path.iterdir())


def turned(seen, args, kwargs):
    return args, {**kwargs, "position_embeddings": tuple(one + seen[-1] for one in kwargs["position_embeddings"])}


def added(seen, args, kwargs):
    return (args[0] + seen[-1], *args[1:]), kwargs


@pytest.mark.parametrize("change", [turned, added])
def test_a_model_whose_blocks_hand_on_more_is_read_from_its_beginning(tiny, batches, change):
    model = tiny("llama")
    blocks, seen = model.model.layers, []
    hooks = [
        blocks[1].register_forward_hook(lambda _m, _a, output: seen.append(output.mean())),
        blocks[3].register_forward_pre_hook(
            lambda _m, args, kwargs: change(seen, args, kwargs), with_kwargs=True, prepend=True
        ),
    ]
    try:
        expected = whole(model, batches)
        passage = Passage(model, batches)
        found = passed(passage, model, [2, 3, 4])
        assert not passage.is_carried
    finally:
        for hook in hooks:
            hook.remove()
    for number, states in found.items():
        assert len(states) == 2
        assert all(torch.equal(one, expected[i][number]) for i, one in enumerate(states))


def test_blocks_of_bfloat16_compute_in_float32(tiny, batches):
    model = tiny("llama").to(torch.bfloat16)
    expected = whole(copy.deepcopy(model).float(), batches)
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}
    found = passed(Passage(model, batches, compute=torch.float32), model, [0, 1, 4])
    for number, states in found.items():
        assert all(torch.equal(one, expected[i][number]) for i, one in enumerate(states))
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()} == before


def test_what_fails_inside_leaves_the_model_as_it_was(tiny, batches):
    model = tiny("llama").to(torch.bfloat16)
    expected = whole(model, batches)[0][5]

    @contextmanager
    def failing(_batch):
        yield
        raise KeyboardInterrupt

    passage = Passage(model, batches, compute=torch.float32)
    passage.run(model.model.layers[1], lambda _batch: nullcontext())
    with pytest.raises(KeyboardInterrupt):
        passage.run(model.model.layers[2], failing)
    assert torch.equal(whole(model, batches)[0][5], expected)


def test_refusals(tiny, batches):
    model = tiny("llama")
    with pytest.raises(ConfigError, match="no block of the model"):
        Passage(model, batches).run(tiny("llama").model.layers[0], lambda _batch: nullcontext())
    with pytest.raises(ConfigError, match="found none"):
        Passage(model, []).run(model.model.layers[0], lambda _batch: nullcontext())
