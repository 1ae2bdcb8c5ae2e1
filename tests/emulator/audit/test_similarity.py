import math

import pytest
import torch

from emulator.audit.similarity import block_ckas, block_cosines, is_near, similarity, verbatim
from emulator.marking.mark import mark
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.blockwise import block_by_block
from offsite.modelling.load import load_model
from offsite.text.batches import collate, encode
from offsite.text.records import read_records


@pytest.fixture
def batches(heldout_speech, tokenizer):
    examples = encode(read_records(heldout_speech), tokenizer, context=64).examples[:6]
    return [collate(examples[:4], 0), collate(examples[4:], 0)]


def compare(full, package, batches, dtype=torch.float32):
    record = read_owner_record(owner_record_path(package.path))
    return similarity(full, package.load_model(), record, batches, dtype=dtype)


def size(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_a_package_that_keeps_all_is_the_model_verbatim(speaker, pack_speaker, batches):
    found = compare(speaker, pack_speaker("keep-all"), batches)
    assert found.num_parameters == found.num_verbatim == found.num_verbatim_by_row == size(speaker)
    assert [one.block for one in found.blocks] == ["bottom.0", *(f"middle.{i}" for i in range(4)), "top.0"]
    for one in found.blocks:
        assert one.cosine == pytest.approx(1, abs=1e-5)
        assert one.cka == pytest.approx(1, abs=1e-5)


def test_a_model_that_is_mapped_from_shards_is_read_block_by_block_to_the_same_figures(
    speaker, speaker_folder, pack_speaker, batches, monkeypatch, tmp_path
):
    monkeypatch.setattr("offsite.mapped.LEAST_BYTES", 4096)
    package = pack_speaker("width", width=0.5, dtype="bfloat16")
    load_model(str(speaker_folder)).to(torch.bfloat16).save_pretrained(tmp_path / "half", max_shard_size="100KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    whole, mapped = (load_model(str(tmp_path / "half")) for _ in range(2))
    expected = compare(whole.float(), package, batches, torch.bfloat16)
    with block_by_block(mapped, torch.float32):
        assert compare(mapped, package, batches, torch.bfloat16) == expected
    assert mapped.dtype == torch.bfloat16
    assert 0 < expected.num_verbatim < expected.num_verbatim_by_row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropping_leaves_kept_blocks_ends_and_embeddings_verbatim(speaker, pack_speaker, batches, dtype):
    found = compare(speaker, pack_speaker("drop", blocks=2, dtype=dtype), batches, getattr(torch, dtype))
    layers = speaker.model.layers
    assert found.num_verbatim == size(speaker) - size(layers[2], layers[3])
    assert found.num_verbatim_by_row == found.num_verbatim
    for one in found.blocks:
        assert one.cosine == pytest.approx(1, abs=1e-4)
    cka = {one.block: one.cka for one in found.blocks}
    assert cka["bottom.0"] == pytest.approx(1, abs=1e-3)
    assert cka["middle.1"] < 0.99  # the same weights on another hidden state


def test_channels_that_were_kept_are_found_by_row_and_column(speaker, pack_speaker, batches):
    found = compare(speaker, pack_speaker("width", width=0.25, refit=False), batches)
    mlps = [layer.mlp for layer in speaker.model.layers[1:5]]
    assert found.num_verbatim == size(speaker) - size(*mlps)
    assert found.num_verbatim_by_row - found.num_verbatim == size(*mlps) // 4
    for one in found.blocks:
        assert one.cosine == pytest.approx(1, abs=1e-5)  # of the owner's matrices narrowed alike


def test_refitted_columns_are_no_longer_the_owners(speaker, pack_speaker, batches):
    found = compare(speaker, pack_speaker("width", width=0.25), batches)
    inputs = sum(size(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in speaker.model.layers[1:5])
    assert found.num_verbatim_by_row - found.num_verbatim == inputs // 4
    cosines = {one.block: one.cosine for one in found.blocks}
    assert cosines["top.0"] == pytest.approx(1, abs=1e-5)
    assert 0.5 < cosines["middle.2"] < 0.9999


def test_weights_that_moved_are_not_verbatim_and_still_alike(speaker, pack_speaker, batches):
    package = pack_speaker("keep-all")
    record = read_owner_record(owner_record_path(package.path))
    emulator = package.load_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in emulator.model.layers[2].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    found = similarity(speaker, emulator, record, batches, dtype=torch.float32)
    assert found.num_verbatim_by_row == size(speaker) - size(speaker.model.layers[2])
    assert 0.9 < {one.block: one.cosine for one in found.blocks}["middle.1"] < 0.9999


def test_a_stranger_is_like_nothing(speaker, pack_speaker, batches, tiny):
    package = pack_speaker("drop", blocks=2)
    record = read_owner_record(owner_record_path(package.path))
    emulator = package.load_model()
    with torch.no_grad():
        for number, parameter in enumerate(emulator.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    assert max(block_cosines(speaker, emulator, record).values()) < 0.1
    assert max(block_ckas(speaker, emulator, record, batches).values()) < 0.9
    assert similarity(speaker, emulator, record, batches, dtype=torch.float32).num_verbatim_by_row == 0


def test_padding_is_not_compared(speaker, pack_speaker, batches):
    package = pack_speaker("drop", blocks=2)
    record = read_owner_record(owner_record_path(package.path))
    emulator = package.load_model()
    padded = [
        {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 7)),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 7)),
        }
        for batch in batches
    ]
    assert block_ckas(speaker, emulator, record, padded) == pytest.approx(
        block_ckas(speaker, emulator, record, batches), abs=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("method", "recipe"),
    [("keep-all", {}), ("drop", {"blocks": 2}), ("width", {"width": 0.5, "refit": False}), ("width", {"width": 0.25})],
)
def test_a_mark_leaves_parameters_within_rounding(speaker, pack_speaker, batches, tmp_path, method, recipe, dtype):
    package, kind = pack_speaker(method, dtype=dtype, **recipe), getattr(torch, dtype)
    plain = compare(speaker, package, batches, kind)
    assert plain.num_within_rounding == plain.num_verbatim_by_row
    (tmp_path / "keys").mkdir(mode=0o700)
    marked = mark(package, tmp_path / "marked", recipient="-".join(["aaaa"] * 13), keys=tmp_path / "keys")
    found = compare(speaker, marked, batches, kind)
    assert found.num_verbatim_by_row < plain.num_verbatim_by_row
    assert found.num_within_rounding == plain.num_within_rounding


def test_more_than_a_step_is_not_within_rounding():
    one = torch.tensor([1.0, 1.0, 1.0, 2.0, -1.0, 0.0, 0.0, 1e-30, math.nan])
    other = torch.tensor([1 + 2**-7, 1 + 2**-6, 1 - 2**-7, 2 - 2**-7, 1.0, 0.0, 1e-30, 1.01e-30, math.nan])
    assert is_near(one, other).tolist() == [True, False, True, True, False, True, False, False, False]
    assert torch.equal(is_near(one, other), is_near(other, one))
    assert bool(is_near(one[:8], one[:8].bfloat16()).all())


def test_each_tensor_that_was_sent_accounts_for_one_of_the_owners():
    ones = torch.ones(3)
    assert verbatim({"a": ones, "b": ones.clone(), "c": ones.clone()}, {"x": ones, "y": ones.clone()}) == (6, 0)
    matrix = torch.arange(12.0).view(4, 3)
    assert verbatim({"a": matrix}, {"x": matrix[[2, 0]]}) == (0, 6)
    assert verbatim({"a": matrix}, {"x": matrix[:, [2, 0]].contiguous()}) == (0, 8)
    assert verbatim({"a": matrix, "b": matrix + 1}, {"x": matrix.clone()}) == (12, 0)
    assert verbatim({"a": matrix}, {"x": -matrix}) == (0, 0)


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "opt", "gpt_neox"])
def test_narrowed_blocks_of_other_architectures_are_matched(make_package, tiny, tmp_path, architecture):
    full = tiny(architecture)
    channels = {f"middle.{n}": tuple(range(n, 60, 3)) for n in range(4)}
    make_package(tmp_path / "p", model=full, kept=tuple(range(6)), channels=channels, ends=(1, 1))
    record = read_owner_record(owner_record_path(tmp_path / "p"))
    emulator = open_package(tmp_path / "p").load_model()
    assert min(block_cosines(full, emulator, record).values()) == pytest.approx(1, abs=1e-5)
    _, by_row = verbatim(dict(full.named_parameters()), dict(emulator.named_parameters()))
    kept = sum(len(numbers) for numbers in channels.values())
    lines = {"gpt2": 2, "phi3": 3, "opt": 2, "gpt_neox": 2}[architecture]
    assert by_row == kept * lines * 32
