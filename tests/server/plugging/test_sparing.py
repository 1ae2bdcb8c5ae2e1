"""An update kept out of the directions that public text uses: against dense algebra written out here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.modelling.load import load_model
from offsite.text.batches import Example
from server.evaluation.candidates import read_own
from server.plugging import sparing
from server.plugging.fit import Fitted, fit, full_name, plug
from server.plugging.plug import merge
from server.plugging.sparing import second_moments, spare_adapters, spared

STRENGTHS = (0.01, 0.5, 20.0)


def texts(*lengths, vocabulary=259):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Example(row, row) for row in rows]


TEXTS = texts(24, 24, 24, 9)


def inputs_by_hand(model, path, examples):
    """Every input of one linear, row by row, as its own forward hook sees it."""
    rows = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, args, _o: rows.append(args[0][0].double()))
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.input_ids]))
    handle.remove()
    return torch.cat(rows)


def spared_by_hand(delta, inputs, strength):
    moment = inputs.T @ inputs / len(inputs)
    level = strength * torch.linalg.eigvalsh(moment).mean()
    return delta @ (level * torch.linalg.inv(moment + level * torch.eye(len(moment), dtype=torch.float64)))


@pytest.fixture
def fitted_of(dropped_package, make_bundle, full_llama, tmp_path):
    def make(kind, **spec):
        bundle = make_bundle(tmp_path / f"bundle-{kind}", dropped_package, kind=kind, **spec)
        record = read_owner_record(owner_record_path(dropped_package.path))
        return fit(full_llama, read_own(bundle, record), record)

    return make


@pytest.mark.parametrize("strength", STRENGTHS)
def test_what_is_kept_of_a_direction_is_lambda_over_its_use_and_lambda(strength):
    """In the eigenvectors of C the share is known by hand, for a random C of falling eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    uses = torch.logspace(3, -6, 12, dtype=torch.float64)
    delta = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    found = spared(delta, basis @ torch.diag(uses) @ basis.T, strength)
    level = strength * uses.mean()
    torch.testing.assert_close(found @ basis, (delta @ basis) * (level / (uses + level)), rtol=1e-9, atol=1e-9)
    assert torch.linalg.matrix_norm(found, 2) <= torch.linalg.matrix_norm(delta, 2)


def test_the_ends_of_the_scale():
    """Much strength keeps all of it; little keeps what the text does not use, here three of eight directions."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    moment = basis[:, :5] @ torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)) @ basis[:, :5].T
    delta = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(spared(delta, moment, 1e6), delta, rtol=1e-5, atol=1e-5)
    null = basis[:, 5:] @ basis[:, 5:].T
    torch.testing.assert_close(spared(delta, moment, 1e-6), delta @ null, rtol=1e-5, atol=1e-5)
    assert torch.equal(spared(delta, torch.zeros(8, 8), 0.5), delta)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1e9, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ConfigError, match="spare: expected"):
        spared(torch.ones(2, 2), torch.eye(2), strength)


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(RunFailed, match="not finite"):
        spared(torch.ones(2, 2), torch.full((2, 2), torch.inf), 1.0)


def test_of_lora_the_factor_a_alone_changes_and_the_effective_update_is_the_dense_formula(full_llama, fitted_of):
    adapter = fitted_of("lora", rank=3)
    (found,) = spare_adapters(full_llama, [adapter], TEXTS, STRENGTHS, batch_size=2)
    for strength in STRENGTHS:
        spare = found[strength]
        assert (spare.spec, spare.sites, spare.tensors.keys()) == (adapter.spec, adapter.sites, adapter.tensors.keys())
        for name, tensor in adapter.tensors.items():
            if name.endswith(".lora_B"):
                assert torch.equal(spare.tensors[name], tensor)
                continue
            path = full_name(name, adapter.sites).rpartition(".")[0]
            b_RK = adapter.tensors[name.replace("lora_A", "lora_B")].double()
            expected = spared_by_hand(b_RK @ tensor.double(), inputs_by_hand(full_llama, path, TEXTS), strength)
            assert spare.tensors[name].shape == tensor.shape
            torch.testing.assert_close(b_RK @ spare.tensors[name].double(), expected, rtol=1e-3, atol=1e-6)
            assert not torch.allclose(expected, b_RK @ tensor.double(), rtol=1e-3, atol=1e-6)


def test_of_whole_blocks_the_linears_change_and_nothing_else(full_llama, fitted_of):
    adapter = fitted_of("blocks")
    (found,) = spare_adapters(full_llama, [adapter], TEXTS, [0.5])
    state, changed = full_llama.state_dict(), 0
    for name, tensor in adapter.tensors.items():
        whole = full_name(name, adapter.sites)
        if tensor.dim() == 1:
            assert torch.equal(found[0.5].tensors[name], tensor)
            continue
        changed += 1
        delta = tensor.double() - state[whole].double()
        expected = spared_by_hand(delta, inputs_by_hand(full_llama, whole.rpartition(".")[0], TEXTS), 0.5)
        delta_found = found[0.5].tensors[name].double() - state[whole].double()
        torch.testing.assert_close(delta_found, expected, rtol=1e-3, atol=1e-5)
    assert changed == 7 * len(adapter.sites)


def test_on_public_text_the_spared_update_does_less_and_off_it_as_much(full_llama, fitted_of):
    """In one layer: what the update does to inputs of the public text falls, while its size falls less."""
    adapter = fitted_of("lora", rank=3)
    (found,) = spare_adapters(full_llama, [adapter], TEXTS, [0.05])
    name = next(name for name in adapter.tensors if name.endswith("o_proj.lora_A"))
    inputs = inputs_by_hand(full_llama, full_name(name, adapter.sites).rpartition(".")[0], TEXTS)
    before, after = adapter.tensors[name].double(), found[0.05].tensors[name].double()
    kept_on_text = (inputs @ after.T).norm() / (inputs @ before.T).norm()
    assert kept_on_text < 0.5 * after.norm() / before.norm()


def test_queries_keys_and_values_share_one_moment_and_gate_and_up_another(full_llama):
    inner = [
        "self_attn.v_proj",
        "mlp.up_proj",
        "self_attn.q_proj",
        "mlp.down_proj",
        "mlp.gate_proj",
        "self_attn.o_proj",
    ]
    found = list(second_moments(full_llama, [f"model.layers.1.{name}" for name in inner], TEXTS))
    groups = {tuple(sorted(path.rpartition(".")[2] for path in one.modules)) for one in found}
    assert groups == {("q_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",), ("o_proj",)}
    assert {one.num_rows for one in found} == {81}  # no padding among them
    for one in found:
        inputs = inputs_by_hand(full_llama, one.modules[0], TEXTS)
        torch.testing.assert_close(one.mean, inputs.T @ inputs / 81, rtol=1e-5, atol=1e-8)


def test_little_memory_reads_the_text_more_often_and_finds_the_same(full_llama, fitted_of, monkeypatch):
    adapter, passes = fitted_of("lora"), []
    forward = sparing._forward
    monkeypatch.setattr(sparing, "_forward", lambda model, ids: (passes.append(ids.shape), forward(model, ids)))
    (whole,) = spare_adapters(full_llama, [adapter], TEXTS, [1.0])
    num_passes = len(passes)
    (parts,) = spare_adapters(full_llama, [adapter], TEXTS, [1.0], limit_bytes=1)
    assert len(passes) - num_passes > 2 * num_passes
    for name, tensor in whole[1.0].tensors.items():
        assert torch.equal(parts[1.0].tensors[name], tensor)


def test_several_adapters_are_spared_by_one_reading(full_llama, fitted_of, monkeypatch):
    one, other = fitted_of("lora"), fitted_of("blocks")
    alone = [spare_adapters(full_llama, [each], TEXTS, [1.0])[0][1.0] for each in (one, other)]
    both = spare_adapters(full_llama, [one, other], TEXTS, [0.1, 1.0])
    for expected, found in zip(alone, both, strict=True):
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(found[1.0].tensors[name], tensor, rtol=1e-6, atol=1e-6)


def test_weights_in_bfloat16_are_read_in_float32_and_are_themselves_afterwards(llama_folder, fitted_of):
    adapter = fitted_of("lora")
    half = load_model(str(llama_folder), dtype="bfloat16")
    wide = load_model(str(llama_folder), dtype="bfloat16").float()
    (found,), (expected,) = (spare_adapters(model, [adapter], TEXTS, [0.5]) for model in (half, wide))
    for name, tensor in expected[0.5].tensors.items():
        torch.testing.assert_close(found[0.5].tensors[name], tensor, rtol=1e-4, atol=1e-6)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not any(module._forward_pre_hooks for module in half.modules())


def test_linears_that_store_their_weights_turned():
    """GPT-2's (in, out): inputs stay on the side of the inputs, although the weights are square."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_inner=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    spec = {"kind": "blocks", "placement": "1+0", "dtype": "float32"}
    from offsite.artefacts.bundle import AdapterSpec

    weight = model.transformer.h[0].mlp.c_fc.weight.detach()
    change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    name = "bottom.0.mlp.c_fc.weight"
    adapter = Fitted(AdapterSpec(**spec), {name: weight + change}, {"bottom.0": "transformer.h.0"})
    (found,) = spare_adapters(model, [adapter], texts(20, 20, vocabulary=64), [0.5])
    inputs = inputs_by_hand(model, "transformer.h.0.mlp.c_fc", texts(20, 20, vocabulary=64))
    expected = spared_by_hand(change.double().T, inputs, 0.5).T
    torch.testing.assert_close((found[0.5].tensors[name] - weight).double(), expected, rtol=1e-3, atol=1e-6)


def test_a_spared_and_lifted_lora_plugs_in_as_the_dense_weights_do(narrow_package, make_bundle, llama_folder, logits_of,
                                                                   tmp_path):  # fmt: skip
    bundle = make_bundle(tmp_path / "bundle", narrow_package, kind="lora", placement="all", rank=4)
    record = read_owner_record(owner_record_path(narrow_package.path))
    model = load_model(str(llama_folder), dtype="float32")
    adapter = fit(model, read_own(bundle, record), record)
    (found,) = spare_adapters(model, [adapter], TEXTS, [0.3])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = merge(plug(load_model(str(llama_folder), dtype="float32"), adapter)).state_dict()
    dense = load_model(str(llama_folder), dtype="float32")
    for name in adapter.tensors:
        if name.endswith(".lora_A"):
            path = full_name(name, adapter.sites).rpartition(".")[0]
            delta = (after[f"{path}.weight"] - before[f"{path}.weight"]).double()
            inputs = inputs_by_hand(model, path, TEXTS)
            dense.get_submodule(path).weight.data += spared_by_hand(delta, inputs, 0.3).float()
    spare = merge(plug(model, found[0.3]))
    torch.testing.assert_close(logits_of(spare), logits_of(dense.eval()), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("kind", "told"), [("dora", "whole or not"), ("bitfit", "changes no matrix")])
def test_kinds_without_a_matrix_of_their_own_are_refused(kind, told, full_llama, fitted_of):
    with pytest.raises(ConfigError, match=told):
        spare_adapters(full_llama, [fitted_of(kind)], TEXTS, [0.5])


def test_no_text_is_refused_and_long_text_is_read_in_pieces(full_llama, fitted_of):
    adapter = fitted_of("lora")
    with pytest.raises(DataError, match="no public text"):
        spare_adapters(full_llama, [adapter], [], [0.5])
    (long,) = texts(200)
    parts = [Example(long.input_ids[:128], []), Example(long.input_ids[128:], [])]
    found, expected = (spare_adapters(full_llama, [adapter], rows, [0.5])[0][0.5] for rows in ([long], parts))
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=0)


def test_inputs_that_are_not_finite_are_refused(llama_folder, fitted_of):
    adapter = fitted_of("lora")
    model = load_model(str(llama_folder), dtype="float32")
    model.model.layers[0].input_layernorm.weight.data[0] = torch.nan
    with pytest.raises(RunFailed, match="not finite on the public text"):
        spare_adapters(model, [adapter], TEXTS, [0.5])
    assert isinstance(model.model.layers[0].input_layernorm, nn.Module)
