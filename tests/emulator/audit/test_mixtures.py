"""What the audits of a package say of a mixture of experts whose experts were narrowed."""

from __future__ import annotations

import pytest
import torch
from small_loop import IDS, logits, pack
from tiny_architectures import tiny

from emulator.audit.refill import missing, refilled
from emulator.audit.similarity import similarity
from emulator.audit.union import held, union_share
from offsite.modelling.mlps import find_mlps

MIXTURES = ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text"]
BATCH = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


@pytest.fixture(scope="module")
def packed(letters_tokenizer, tmp_path_factory):
    made = {}

    def get(name, **recipe):
        key = repr((name, sorted(recipe.items())))
        if key not in made:
            out = tmp_path_factory.mktemp(name) / "package"
            made[key] = pack(tiny(name), letters_tokenizer, out, "width", **recipe)
        return made[key]

    return get


def size(parameters):
    return sum(parameter.numel() for parameter in parameters)


def middle_mlps(model):
    """The middle's parameters that have a line for every channel, and so are narrowed."""
    for number, block in enumerate(model.model.layers):
        places = tuple(f"{part.place}." for part in find_mlps(block)) if 0 < number < 5 else ()
        for name, parameter in block.named_parameters():
            if places and name.startswith(places) and not name.endswith("down_proj_bias"):
                yield parameter


@pytest.mark.parametrize("name", MIXTURES)
def test_channels_of_experts_that_were_kept_are_found_by_row_and_column(name, packed):
    both = packed(name, width=0.5, refit=False, channels="activation")
    found = similarity(both.full, both.package.load_model(), both.record, BATCH, dtype=torch.float32)
    narrowed = list(middle_mlps(both.full))
    matrices = size(one for one in narrowed if one.dim() == 3 or not name.startswith("gpt"))
    assert found.num_parameters == size(both.full.parameters())
    assert found.num_verbatim == size(both.full.parameters()) - size(narrowed)
    by_chance = size(narrowed) - matrices  # experts' biases, a column of which may be one channel in every expert
    assert 0 <= found.num_verbatim_by_row - found.num_verbatim - matrices // 2 <= by_chance / 2
    assert found.num_within_rounding == found.num_verbatim_by_row
    for one in found.blocks:
        assert one.cosine == pytest.approx(1, abs=1e-5)  # of the owner's matrices narrowed alike


@pytest.mark.parametrize("name", MIXTURES)
def test_channels_of_experts_unite_by_number(name, packed, letters_tokenizer, tmp_path):
    one, other = packed(name, width=0.5), packed(name, width=0.25)
    narrowed = {number: size(middle) for number, middle in by_block(one.full).items()}
    for number, found in held(one.record).items():
        whole = size(one.full.model.layers[number].parameters())
        assert found.num_parameters == whole - narrowed.get(number, 0) // 2
        assert found.is_whole == (number in (0, 5))
    alone = union_share([one.record, one.record], sizes=sizes(one.full))
    total = sum(sizes(one.full)[number] for number in range(1, 5))
    wanted = 1 - sum(narrowed.values()) / 2 / total
    assert (alone.share_single, alone.share_union) == (pytest.approx(wanted), pytest.approx(wanted))
    assert wanted <= union_share([one.record, other.record], sizes=sizes(one.full)).share_union < 1
    # put together: every channel of both counts once
    per, numbers = {}, {}
    for record in (one.record, other.record):
        for place, lists in {**record.experts, **{k: (v,) for k, v in record.channels.items()}}.items():
            for expert, kept in enumerate(lists):
                numbers.setdefault((place, expert), set()).update(kept)
    for number in range(1, 5):
        for part in find_mlps(one.full.model.layers[number]):
            block, name_ = one.full.model.layers[number], f"middle.{number - 1}"
            key = f"{name_}.{part.place}" if f"{name_}.{part.place}" in one.record.experts else name_
            inside = [
                p
                for n, p in block.named_parameters()
                if n.startswith(f"{part.place}.") and not n.endswith("down_proj_bias")
            ]
            per.update({(key, e): size(inside) / part.num_experts / part.num_channels for e in range(part.num_experts)})
    apart = total - sum(narrowed.values())
    united = apart + sum(per[key] * len(kept) for key, kept in numbers.items())
    found = union_share([one.record, other.record], sizes=sizes(one.full))
    assert found.share_union == pytest.approx(united / total)


def by_block(model):
    found = {}
    for number, block in enumerate(model.model.layers):
        if 0 < number < 5:
            places = tuple(f"{part.place}." for part in find_mlps(block))
            found[number] = [
                p for n, p in block.named_parameters() if n.startswith(places) and not n.endswith("down_proj_bias")
            ]
    return found


def sizes(model):
    return {number: size(block.parameters()) for number, block in enumerate(model.model.layers)}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_regrown_experts_do_nothing_until_they_learn(name, packed):
    package = packed(name, width=0.25).package
    small = package.load_model()
    assert missing(small, package.layout, 6) == ("regrow", "split")
    wide = refilled("regrow", package.load_model(), package.layout, 6, seed=0)
    torch.testing.assert_close(logits(wide), logits(small), rtol=1e-4, atol=1e-4)
    split = refilled("split", package.load_model(), package.layout, 6, seed=0)
    for model in (wide, split):
        full = packed(name, width=0.25).full
        for block, whole in zip(model.model.layers, full.model.layers, strict=True):
            shapes = {key: tuple(one.shape) for key, one in block.named_parameters()}
            known = {key: tuple(one.shape) for key, one in whole.named_parameters()}
            mixed = {part.place for part in find_mlps(whole)} <= {
                part.place for end in (0, 5) for part in find_mlps(full.model.layers[end])
            }
            assert shapes == known or not mixed  # where no end shows how wide such an MLP was, it stays
