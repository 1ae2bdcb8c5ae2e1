import pytest
import torch

from emulator.compression import compress as module
from emulator.compression.compress import Recipe, compress, keep_all, register_compressor
from emulator.compression.methods import METHODS
from offsite.errors import ConfigError
from offsite.modelling.blocks import attention_linears, linear_names
from offsite.modelling.split import make_plan


def test_keep_all_is_the_full_model_and_copies_nothing(tiny, batch) -> None:
    full = tiny("qwen2")
    emulator = compress(full, make_plan(full), "keep-all")
    assert emulator.kept == tuple(range(6))
    assert emulator.middle_whole
    with torch.no_grad():
        assert torch.equal(emulator.model(**batch).logits, full(**batch).logits)
    theirs = {tensor.data_ptr() for tensor in full.state_dict().values()}
    assert {tensor.data_ptr() for tensor in emulator.model.state_dict().values()} == theirs


def test_drop_keeps_whole_blocks_with_ends(tiny, batch) -> None:
    full = tiny("llama")
    emulator = compress(full, make_plan(full, num_bottom=1, num_top=1), "drop", Recipe(blocks=2))
    assert emulator.kept == (0, 1, 4, 5)
    assert emulator.adaptable_middle == linear_names(full.model.layers[0])
    assert emulator.channels == {}
    assert not emulator.middle_whole
    assert emulator.model.config.num_hidden_layers == 4
    for number, block in zip(emulator.kept, emulator.model.model.layers, strict=True):
        assert block.mlp.up_proj.weight.data_ptr() == full.model.layers[number].mlp.up_proj.weight.data_ptr()


def test_drop_by_influence_measures(tiny, batch) -> None:
    full = tiny("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        torch.nn.init.zeros_(full.model.layers[2].get_submodule(name).weight)
    plan = make_plan(full, num_bottom=1, num_top=1)
    emulator = compress(full, plan, "drop", Recipe(blocks=3, choice="influence", calibration=[batch]))
    assert emulator.kept == (0, 1, 3, 4, 5)


def test_drop_by_clusters_measures(tiny, batch) -> None:
    """Blocks 2 and 3 do nothing: with block 1 they are one cluster, and its centre stays."""
    full = tiny("llama")
    for number in (2, 3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            torch.nn.init.zeros_(full.model.layers[number].get_submodule(name).weight)
    plan = make_plan(full, num_bottom=1, num_top=1)
    emulator = compress(full, plan, "drop", Recipe(blocks=2, choice="crash", calibration=[batch]))
    assert emulator.kept == (0, 2, 4, 5)


def test_what_an_adapter_can_be_lifted_from(tiny, batch) -> None:
    full = tiny("llama")
    plan = make_plan(full)
    every = linear_names(full.model.layers[0])
    assert compress(full, plan, "keep-all").adaptable_middle == every
    narrow = compress(full, plan, "width", Recipe(width=0.5, calibration=[batch]))
    assert narrow.adaptable_middle == every
    assert not narrow.middle_whole
    assert set(attention_linears(narrow.model.model.layers[2])) < set(every)


def test_what_is_stated_holds_no_numbers_of_the_full_model(tiny, batch) -> None:
    full = tiny("llama")
    plan = make_plan(full)
    assert compress(full, plan, "drop", Recipe(blocks=2)).settings == {"blocks": 2}
    assert compress(full, plan, "width", Recipe(width=0.5, calibration=[batch])).settings == {"width": 0.5}
    assert compress(full, plan, "keep-all").settings == {}


@pytest.mark.parametrize(
    ("method", "recipe", "message"),
    [
        ("shrink", Recipe(), "unknown method 'shrink', expected one of drop, keep-all, "),
        ("drop", Recipe(), "needs the number"),
        ("drop", Recipe(blocks=3), "asked to keep 3 blocks of the middle, which has 2"),
        ("drop", Recipe(blocks=2, choice="random"), "unknown choice 'random'"),
        ("drop", Recipe(blocks=2, choice="influence"), "public text"),
        ("drop", Recipe(blocks=2, choice="crash"), "public text"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, method: str, recipe: Recipe, message: str) -> None:
    full = tiny("llama")
    with pytest.raises(ConfigError, match=message):
        compress(full, make_plan(full), method, recipe)


def test_a_method_registers_by_name(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMPRESSORS", dict(module._COMPRESSORS))
    try:
        register_compressor("mine")(keep_all)
        assert "mine" in METHODS
        full = tiny("llama")
        assert compress(full, make_plan(full), "mine").kept == tuple(range(6))
        with pytest.raises(ConfigError, match="registered already"):
            register_compressor("mine")(lambda *_: None)
    finally:
        METHODS.discard("mine")
