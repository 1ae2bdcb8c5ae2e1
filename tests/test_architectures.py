"""The whole loop on tiny random models of many architectures, and what is refused, with the true reason.

Cut, packed (narrowed where that is known, with blocks left out where not), opened again by the other side, two steps
of tuning, plugged in, merged, and opened by vanilla peft on a vanilla model.
"""

from __future__ import annotations

import pytest
import torch
from small_loop import logits, pack, plug_in, tune
from tiny_architectures import tiny

from adapters.kinds import attach, declared
from emulator.compression.compress import Recipe, compress
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import UnsupportedModel
from offsite.modelling.mlps import find_mlps, zero_mlp_channels
from offsite.modelling.split import join, make_plan, split
from server.evaluation.candidates import read_own
from server.plugging.fit import fit, plugged

DENSE = """stablelm starcoder2 cohere2 glm4 ernie4_5 hunyuan_v1_dense exaone4 helium olmo3 bamba lfm2 nemotron apertus
    seed_oss mpt""".split()
MIXTURES = """gpt_oss olmoe qwen2_moe phimoe llama4_text granitemoehybrid qwen3_next mixtral glm4_moe deepseek_v2
    deepseek_v3 dots1 hunyuan_v1_moe ernie4_5_moe""".split()
DROPPED = {  # architecture: what width says of it
    "bitnet": r"has a weight that is not a linear's: mlp\.ffn_sub_norm\.weight",
}
KEPT_BLOCKS = ["stablelm", "glm4", "bitnet", "lfm2", "qwen2_moe", "gpt_oss", "bamba", "mpt"]
WHOLE_BLOCKS = ["helium", "gpt_oss", "qwen3_next", "lfm2", "nemotron", "bamba", "llama4_text"]


def low_rank(packed, **settings):
    placement = "all" if packed.layout.adaptable_middle else "1+1"
    return AdapterSpec(**{"kind": "lora", "rank": 2, "dtype": "float32", "placement": placement, **settings})


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES, *DROPPED])
def test_cut_and_joined_again_is_the_full_model(name):
    model = tiny(name)
    plan = make_plan(model, num_bottom=1, num_top=1)
    blocks = list(model.get_submodule(plan.stack.name))
    assert all(one is other for one, other in zip(join(split(model, plan)), blocks, strict=True))
    whole = compress(model, plan, "keep-all").model
    assert torch.equal(logits(whole), logits(model))
    halved = compress(model, plan, "drop", Recipe(blocks=2)).model
    assert not torch.equal(logits(halved), logits(model))


@pytest.mark.proves("models", "causal language models")
@pytest.mark.parametrize("name", [*DENSE, *MIXTURES, *DROPPED])
def test_lora_goes_the_whole_way(name, letters_tokenizer, tmp_path):
    method = {"method": "drop", "blocks": 2} if name in DROPPED else {"method": "width", "width": 0.5}
    packed = pack(tiny(name), letters_tokenizer, tmp_path / "package", **method)
    assert torch.equal(logits(packed.package.load_model()), logits(packed.emulator))
    bundle = tune(packed.package, tmp_path / "bundle", low_rank(packed.package))
    found = plug_in(packed, bundle, tmp_path)
    size = found.before.abs().max()
    assert (found.own - found.before).abs().max() > 1e-2 * size  # it does something
    assert (found.merged - found.own).abs().max() < 1e-4 * size
    assert (found.vanilla - found.own).abs().max() < 1e-4 * size
    assert found.reached == found.wanted
    assert torch.equal(logits(packed.full), found.before)


@pytest.mark.parametrize("name", KEPT_BLOCKS)
def test_lora_on_every_kept_block_is_added_to_the_full_models_own(name, letters_tokenizer, tmp_path):
    """Against adding B A to the weights of blocks 0, 1, 3, 4 and 5 by hand; the block left out stays as it is."""
    packed = pack(tiny(name), letters_tokenizer, tmp_path / "package", "drop", blocks=3, choice="influence")
    assert packed.package.layout.adaptable_middle
    bundle = tune(packed.package, tmp_path / "bundle", low_rank(packed.package))
    found = plug_in(packed, bundle, tmp_path)
    [left_out] = set(range(6)) - set(packed.record.kept)
    by_hand, tensors = tiny(name), bundle.load_tensors(bundle.manifest.tensors)
    blocks = by_hand.get_submodule(packed.package.layout.stack)
    reached = set()
    for canonical, a in tensors.items():
        module, _, part = canonical.rpartition(".")
        role, number, inner = module.split(".", 2)
        if part != "lora_A":
            continue
        place = {"bottom": 0, "middle": 1, "top": 4}[role] + int(number)
        reached.add(packed.record.kept[place])
        linear = blocks[packed.record.kept[place]].get_submodule(inner)
        change = bundle.manifest.adapter.alpha / 2 * tensors[f"{module}.lora_B"] @ a
        with torch.no_grad():
            linear.weight += change.T if type(linear).__name__ == "Conv1D" else change
    assert reached == set(range(6)) - {left_out}
    size = (found.own - found.before).abs().max()
    assert size > 1e-2 * found.before.abs().max()
    for one in (found.own, found.merged, found.vanilla):
        assert (one - logits(by_hand)).abs().max() < 1e-3 * size
    assert not any(f".{left_out}." in name for name in found.reached)


@pytest.mark.parametrize("name", WHOLE_BLOCKS)
def test_whole_blocks_go_the_whole_way(name, letters_tokenizer, tmp_path):
    full = tiny(name)
    packed = pack(full, letters_tokenizer, tmp_path / "package", "drop", blocks=2)
    spec = AdapterSpec(kind="blocks", dtype="float32", placement="1+1")
    bundle = tune(packed.package, tmp_path / "bundle", spec)
    found = plug_in(packed, bundle, tmp_path)
    assert (found.own - found.before).abs().max() > 1e-2 * found.before.abs().max()
    by_hand, stack = tiny(name), packed.package.layout.stack
    with torch.no_grad():
        for canonical, tensor in bundle.load_tensors(bundle.manifest.tensors).items():
            role, _, inner = canonical.split(".", 2)
            by_hand.get_parameter(f"{stack}.{0 if role == 'bottom' else 5}.{inner}").copy_(tensor)
    assert torch.equal(logits(by_hand), found.own)


@pytest.mark.parametrize("name", DROPPED)
def test_what_width_cannot_treat_is_refused_with_the_reason(name, letters_tokenizer, tmp_path):
    with pytest.raises(UnsupportedModel, match=DROPPED[name]):
        pack(tiny(name), letters_tokenizer, tmp_path / "package", "width", width=0.5)
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    "name", ["nemotron", "apertus", "lfm2", "mpt", "glm4_moe", "granitemoehybrid", "hunyuan_v1_moe"]
)
def test_an_adapter_of_a_narrowed_package_does_in_the_full_model_what_it_did(name, letters_tokenizer, tmp_path):
    """Where the full model's other channels say nothing, the lifted adapter gives the tuned package's own logits."""
    full = tiny(name)
    recipe = {"width": 0.5, "refit": False, "channels": "activation"}
    packed = pack(full, letters_tokenizer, tmp_path / "package", "width", **recipe)
    package, record = packed.package, packed.record
    spec = low_rank(package)
    bundle = tune(package, tmp_path / "bundle", spec)
    adapter = fit(full, read_own(bundle, record), record)
    names = declared(spec, package.layout, package.block_tensors())
    tuned = attach(package.load_model(), spec, package.layout.blocks, names)
    tuned.load(bundle.load_tensors(names))
    for number, block in enumerate(list(full.get_submodule(package.layout.stack))[1:5]):
        for part in find_mlps(block):
            lists = record.experts.get(f"middle.{number}.{part.place}") or (record.channels[f"middle.{number}"],)
            dropped = [sorted(set(range(part.num_channels)) - set(kept)) for kept in lists]
            zero_mlp_channels(block, part, torch.tensor(dropped))
    with plugged(full, adapter) as model:
        expected = logits(tuned.model.eval())
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
