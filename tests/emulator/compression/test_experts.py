"""Narrowing a mixture of experts: equally many channels out of every expert, the router untouched."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_architectures import tiny
from torch import nn

from emulator.compression.compress import Recipe, compress, middle_blocks
from emulator.compression.finished import FinishedBlocks
from emulator.compression.width import (
    RIDGE,
    Unit,
    activities,
    eliminate,
    narrow,
    num_kept,
    refit,
    strongest,
    units,
)
from offsite.errors import UnsupportedModel
from offsite.modelling.mlps import Experts, find_mlps, incoming, outgoing_weight, zero_mlp_channels
from offsite.modelling.split import make_plan

MIXTURES = ["mixtral", "gpt_oss", "llama4_text", "qwen2_moe", "qwen3_next", "granitemoehybrid", "deepseek_v3"]
IDS = torch.randint(3, 200, (6, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[2, 8:] = 0
TEXT = {"input_ids": IDS, "attention_mask": MASK}


@torch.no_grad()
def logits(model):
    return model(**TEXT, use_cache=False).logits


def mixture(block):
    return next(part for part in find_mlps(block) if isinstance(part, Experts))


def a_mixture(model):
    """The last block of the middle that is a mixture, with its number there, and its experts."""
    blocks = middle_blocks(model, make_plan(model, num_bottom=1, num_top=1))
    found = [
        (number, block, part)
        for number, block in enumerate(blocks)
        for part in find_mlps(block)
        if isinstance(part, Experts)
    ]
    return found[-1]


def narrowed(model, **recipe):
    plan = make_plan(model, num_bottom=1, num_top=1)
    return compress(model, plan, "width", Recipe(**{"width": 0.5, "calibration": [TEXT], **recipe}))


@torch.no_grad()
def chosen_experts(model, run=None):
    """Which experts every router chose for every token, by the experts' names, in a forward pass or in `run`."""
    found, handles = {}, []

    def see(name):
        def hook(_module, args, kwargs, _output):
            whole = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            found[name] = next((one for one in whole if not one.is_floating_point()), whole[0] != 0)

        return hook

    for name, module in model.named_modules():
        if name.endswith("experts") and hasattr(module, "gate_up_proj"):
            handles.append(module.register_forward_hook(see(name), with_kwargs=True))
    logits(model) if run is None else run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_all_channels_kept_is_the_full_model_bit_for_bit(name):
    full = tiny(name)
    emulator = narrowed(full, width=1.0)
    assert (emulator.channels, emulator.experts, emulator.middle_whole) == ({}, {}, True)
    assert torch.equal(logits(emulator.model), logits(full))


@pytest.mark.parametrize("name", MIXTURES)
def test_compact_equals_full_with_the_other_channels_zeroed(name):
    full = tiny(name)
    before = {key: tensor.clone() for key, tensor in full.state_dict().items()}
    emulator = narrowed(full, channels="activation", refit=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in full.state_dict().items())
    assert not emulator.middle_whole
    for number, block in enumerate(middle_blocks(full, make_plan(full, num_bottom=1, num_top=1))):
        for part in find_mlps(block):
            lists = emulator.experts.get(f"middle.{number}.{part.place}") or (emulator.channels[f"middle.{number}"],)
            assert len(lists) == part.num_experts
            assert len({len(kept) for kept in lists}) == 1
            every = set(range(part.num_channels))
            dropped = torch.tensor([sorted(every - set(kept)) for kept in lists])
            zero_mlp_channels(block, part, dropped)
    assert (logits(full) - logits(tiny(name))).abs().max() > 1e-2  # they did matter
    torch.testing.assert_close(logits(emulator.model), logits(full), rtol=1e-4, atol=1e-4)
    assert {key for key in emulator.model.state_dict() if "router" in key or key.endswith("mlp.gate.weight")} == {
        key
        for key, tensor in emulator.model.state_dict().items()
        if ("router" in key or key.endswith("mlp.gate.weight")) and torch.equal(tensor, before[key])
    }


@pytest.mark.parametrize("choice", ["obs", "activation"])
@pytest.mark.parametrize("name", MIXTURES)
def test_channels_that_say_nothing_go_first_and_nothing_is_lost(name, choice):
    """Half of every MLP's channels reach nothing, others in each expert: leaving those out changes no logit."""
    full = tiny(name)
    generator = torch.Generator().manual_seed(7)
    alive = {}
    with torch.no_grad():
        for number, block in enumerate(middle_blocks(full, make_plan(full, num_bottom=1, num_top=1))):
            for part in find_mlps(block):
                for expert in range(part.num_experts):
                    order = torch.randperm(part.num_channels, generator=generator)
                    kept = order[: num_kept(part.num_channels, 0.5)]
                    outgoing_weight(block, part, expert)[:, order[len(kept) :]] = 0
                    alive[f"middle.{number}.{part.place}", expert] = tuple(sorted(kept.tolist()))
    emulator = narrowed(full, channels=choice, refit=choice == "obs")
    for place, lists in emulator.experts.items():
        assert [*lists] == [alive[place, expert] for expert in range(len(lists))]
    torch.testing.assert_close(logits(emulator.model), logits(full), rtol=1e-3, atol=1e-3)
    before, after = chosen_experts(full), chosen_experts(emulator.model)
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", MIXTURES)
def test_tokens_go_to_the_same_experts_as_before_narrowing(name):
    """Every mixture of the emulator, given what the full model's is given, chooses the same experts."""
    full = tiny(name)
    emulator = narrowed(full, width=0.25)
    before = chosen_experts(full)
    given, handles = {}, []

    def note(place, _module, args):
        given[place] = args

    for key in before:
        place = key.rpartition(".")[0]
        handles.append(full.get_submodule(place).register_forward_pre_hook(partial(note, place)))
    logits(full)
    for handle in handles:
        handle.remove()
    assert given
    for place, args in given.items():
        after = chosen_experts(
            emulator.model, lambda place=place, args=args: emulator.model.get_submodule(place)(*args)
        )
        assert list(after.values())
        assert all(torch.equal(before[key], chosen) for key, chosen in after.items())
    narrower = [key for key in before if full.get_submodule(key).down_proj.shape
                != emulator.model.get_submodule(key).down_proj.shape]  # fmt: skip
    assert len(narrower) == sum("shared" not in place for place in emulator.experts) > 0


@pytest.mark.parametrize("name", MIXTURES)
def test_refitted_weights_are_the_least_squares_solution(name):
    """Against torch's own solver, on activations that hooks here gather token by token from the model's own code."""
    full = tiny(name)
    number, block, part = a_mixture(full)
    emulator = narrowed(full, width=0.5)
    small_block = middle_blocks(emulator.model, make_plan(full, num_bottom=1, num_top=1))[number]
    small = mixture(small_block)
    seen = {}
    handles = [
        block.get_submodule(part.place).register_forward_hook(
            lambda _m, args, kwargs, _o: seen.update(inputs=[*args, *kwargs.values()]), with_kwargs=True
        ),
        block.register_forward_hook(
            lambda _m, _a, out: seen.update(after=(out[0] if isinstance(out, tuple) else out).clone())
        ),
    ]
    logits(full)
    for handle in handles:
        handle.remove()
    tensors = [one for one in seen["inputs"] if isinstance(one, torch.Tensor)]
    real = MASK.reshape(-1).bool()
    weight_n = real / seen["after"].reshape(-1, 32).square().sum(-1)
    for expert in range(part.num_experts):
        if len(tensors) == 1:  # every expert reads every token, scaled beforehand
            x, rows, share = tensors[0].view(part.num_experts, -1, 32)[expert], torch.arange(len(real)), torch.ones(())
        else:
            index, shares = sorted(tensors[1:], key=lambda one: one.is_floating_point())
            rows, place = torch.where(index == expert)
            x, share = tensors[0].reshape(-1, 32)[rows], shares[rows, place]
        halves = [x @ weight.T + (0 if bias is None else bias) for weight, bias in incoming(block, part, expert)]
        module = block.get_submodule(part.place)
        if name == "gpt_oss":
            gate, up = halves[0].clamp(max=module.limit), halves[1].clamp(-module.limit, module.limit)
            active = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
        else:
            active = nn.functional.silu(halves[0]) * halves[1]
        text = weight_n[rows] > 0
        root = (weight_n[rows] * share**2)[text].double().sqrt()[:, None]
        active = active[text].double()
        old = outgoing_weight(block, part, expert).double()
        kept = list(emulator.experts[f"middle.{number}.{part.place}"][expert])
        if not len(root):
            assert torch.equal(outgoing_weight(small_block, small, expert), old[:, kept].float())
            continue
        mean = (root**2 * active).sum(0) / (root**2).sum() if name == "gpt_oss" else torch.zeros(active.shape[1])
        scaled = (active - mean) * root / (root**2).sum().sqrt()
        pull = (RIDGE * scaled[:, kept].square().sum(0).median() + 1e-12).sqrt()
        left = torch.cat([scaled[:, kept], pull * torch.eye(len(kept))])
        right = torch.cat([scaled @ old.T, pull * old[:, kept].T])
        wanted = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(
            outgoing_weight(small_block, small, expert).double(), wanted, rtol=2e-3, atol=2e-3, check_dtype=False
        )


def test_an_expert_that_no_text_reaches_keeps_its_own_weights():
    full = tiny("mixtral")
    with torch.no_grad():
        for block in full.model.layers:
            block.mlp.gate.weight[3] = 0
            block.mlp.gate.weight[:3] *= 50
            block.mlp.gate.weight[2] = -block.mlp.gate.weight[:2].sum(0)
    emulator = narrowed(full)
    for place, lists in emulator.experts.items():
        number = int(place.split(".")[1])
        block = middle_blocks(full, make_plan(full, num_bottom=1, num_top=1))[number]
        small = middle_blocks(emulator.model, make_plan(full, num_bottom=1, num_top=1))[number]
        for expert, kept in enumerate(lists):
            found = outgoing_weight(small, mixture(small), expert)
            assert torch.isfinite(found).all()
            reached = chosen_experts(full)[f"model.layers.{number + 1}.mlp.experts"] == expert
            if not reached[MASK.reshape(-1).bool()].any():
                torch.testing.assert_close(found, outgoing_weight(block, mixture(block), expert)[:, list(kept)])


class Listed(nn.Module):
    """Experts as a list of modules, as architectures of before transformers 5 and custom code have them."""

    def __init__(self, fused):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict() for _ in range(fused.num_experts))
        for number, one in enumerate(self.experts):
            gate, up = fused.gate_up_proj[number].chunk(2)
            for name, weight in (("w1", gate), ("w3", up), ("w2", fused.down_proj[number])):
                one[name] = nn.Linear(*weight.shape[::-1], bias=False)
                one[name].weight.data = weight.detach().clone()


class ListedMixture(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.gate, self.experts = fused.gate, Listed(fused.experts).experts

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, shares, index = self.gate(flat)
        out = torch.zeros_like(flat)
        for number, one in enumerate(self.experts):
            rows, places = torch.where(index == number)
            active = nn.functional.silu(one["w1"](flat[rows])) * one["w3"](flat[rows])
            out.index_add_(0, rows, one["w2"](active) * shares[rows, places, None])
        return out.reshape(hidden.shape)


def test_experts_in_a_list_are_narrowed_as_those_of_one_module():
    full = tiny("mixtral")
    before = logits(full)
    for block in full.model.layers:
        block.mlp = ListedMixture(block.mlp)
    torch.testing.assert_close(logits(full), before, rtol=1e-4, atol=1e-4)
    blocks = list(full.model.layers)[1:5]
    found = list(activities(full, blocks, [TEXT], products=True))
    assert len(found) == 16
    for block, several in zip(blocks, zip(*[iter(found)] * 4, strict=True), strict=True):
        part = mixture(block)
        assert (part.place, part.num_experts, part.num_channels, len(part.members)) == ("mlp.experts", 4, 48, 4)
        chosen = [eliminate(unit, one, 24) for unit, one in zip(units(block), several, strict=True)]
        assert chosen != [strongest(unit, one, 24) for unit, one in zip(units(block), several, strict=True)]
        narrowed_part = narrow(block, part, chosen)
        assert narrowed_part == mixture(block)
        assert {one["w2"].in_features for one in block.mlp.experts} == {24}
    assert torch.isfinite(logits(full)).all()


def test_experts_that_compute_something_else_are_refused():
    full = tiny("mixtral")
    for block in full.model.layers:
        block.mlp.experts._apply_gate = lambda gate_up: gate_up[..., ::2] * gate_up[..., 1::2]
    with pytest.raises(UnsupportedModel, match=r"experts mlp\.experts of MixtralDecoderLayer compute something"):
        narrowed(full)
    full = tiny("mixtral")
    for block in full.model.layers:
        block.mlp.experts.register_forward_hook(lambda _m, _a, out: out * 2)
    with pytest.raises(UnsupportedModel, match="compute something that no width method knows"):
        narrowed(full)


def test_a_unit_is_refitted_alone():
    """Writing to one expert leaves its neighbours as they were."""
    full = tiny("gpt_oss")
    emulator = narrowed(full, refit=False)
    number, block, part = a_mixture(full)
    small = middle_blocks(emulator.model, make_plan(full, num_bottom=1, num_top=1))[number]
    found = list(activities(full, [block], [TEXT], products=True))
    before = {name: tensor.clone() for name, tensor in small.named_parameters()}
    kept = emulator.experts[f"middle.{number}.{part.place}"][1]
    refit(Unit(small, mixture(small), 1), Unit(block, part, 1), kept, found[1])
    for name, tensor in small.named_parameters():
        if name.endswith(("experts.down_proj", "experts.down_proj_bias")):
            changed = [e for e in range(4) if not torch.equal(tensor[e], before[name][e])]
            assert changed == [1], name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_finished_blocks_of_a_broken_run_are_taken_up_as_they_were(name, tmp_path):
    full = tiny(name)
    whole = narrowed(full, finished=FinishedBlocks(tmp_path / "work", "run"))
    (tmp_path / "work" / "block-0002.safetensors").unlink()
    again = narrowed(full, finished=FinishedBlocks(tmp_path / "work", "run"))
    assert (again.channels, again.experts) == (whole.channels, whole.experts)
    once_more = narrowed(full, finished=FinishedBlocks(tmp_path / "work", "run"), calibration=())  # nothing is read
    for other in (again, once_more):
        states = whole.model.state_dict(), other.model.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())


@pytest.mark.parametrize(("width", "wanted"), [(0.01, 8), (0.3, 8), (0.5, 8), (0.8, 16), (1.0, 16)])
def test_experts_in_one_tensor_keep_a_tile_at_least(width, wanted):
    """Kernels that multiply all experts at once take no rows of other lengths; the model has to run."""
    full = tiny("qwen2_moe")
    emulator = narrowed(full, width=width)
    assert emulator.model.model.layers[1].mlp.experts.down_proj.shape == (4, 32, wanted)
    assert torch.isfinite(logits(emulator.model.to(torch.bfloat16))).all()
