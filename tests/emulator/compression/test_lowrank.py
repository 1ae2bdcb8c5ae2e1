"""Factors against EMLoC's formula as it is written, and a middle that is made of them."""

from __future__ import annotations

import pytest
import torch

from emulator.compression.compress import Recipe, compress, middle_blocks
from emulator.compression.finished import FinishedBlocks
from emulator.compression.lowrank import LEAST_EIGENVALUE, factors, rank_for
from emulator.compression.matrices import matrices, moments, require_known
from offsite.artefacts.encodings import decode
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.split import make_plan
from offsite.tensors import spec_of

ARCHITECTURES = ["llama", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "mixtral"]


def as_written(weight: torch.Tensor, moment: torch.Tensor, rank: int) -> torch.Tensor:
    """arXiv:2506.12015: C = Q L Q^T, L clamped; S = Q L^(1/2); W S = U Sigma V^T cut at the rank, times S^-1."""
    eigenvalues, vectors = torch.linalg.eigh(moment.double())
    root = vectors * eigenvalues.clamp(min=LEAST_EIGENVALUE * float(eigenvalues.mean())).sqrt()
    u, sigma, vt = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("num_tokens", [200, 7])
def test_factors_are_the_papers(shape, num_tokens):
    """Also with fewer tokens than inputs, where the least eigenvalues decide."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(num_tokens, shape[1], generator=generator, dtype=torch.float64)
    inputs *= torch.linspace(0.1, 3, shape[1])
    moment = inputs.T @ inputs
    left, right = factors(weight, moment, 5)
    torch.testing.assert_close(left @ right, as_written(weight, moment, 5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.T @ left, torch.eye(5, dtype=torch.float64))


def test_what_nothing_reached_gets_the_plain_svd():
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = factors(weight, torch.zeros(6, 6), 3)
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :3] * sigma[:3]) @ vt[:3])


@pytest.mark.parametrize(
    ("outputs", "inputs", "share", "rank"),
    [
        (576, 1536, 0.33, 138),
        (1536, 576, 0.33, 138),
        (576, 576, 0.5, 144),
        (8, 8, 0.01, 1),
        (8, 8, 1.0, None),
        (1, 8, 0.5, None),
        (2, 2, 0.9, 1),
    ],
)
def test_ranks(outputs, inputs, share, rank):
    assert rank_for(outputs, inputs, share) == rank
    if rank is not None and rank > 1:
        assert rank * (outputs + inputs) <= share * outputs * inputs < (rank + 1) * (outputs + inputs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_share_of_one_is_the_full_model_bit_for_bit(tiny, batch, architecture):
    full = tiny(architecture)
    emulator = compress(full, make_plan(full), "low-rank", Recipe(rank_share=1.0, calibration=[batch]))
    assert emulator.middle_whole
    assert not emulator.encoded
    with torch.no_grad():
        assert torch.equal(emulator.model(**batch).logits, full(**batch).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_of_the_middle_is_the_best_of_its_rank(tiny, batch, architecture):
    """Its inputs, in the full model, are read off here by hooks of the test's own."""
    full = tiny(architecture)
    plan = make_plan(full, num_bottom=1, num_top=1)
    before = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    found = compress(full, plan, "low-rank", Recipe(rank_share=0.5, calibration=[batch]))
    assert all(torch.equal(before[name], tensor) for name, tensor in full.state_dict().items())
    assert set(found.adaptable_middle) == set(found.adaptable_middle) & {
        name for name, _ in middle_blocks(found.model, plan)[0].named_modules()
    }
    seen: dict[str, torch.Tensor] = {}
    real = batch["attention_mask"].bool()
    names = [f"{plan.stack.name}.{n}" for n in plan.middle]
    handles = [
        module.register_forward_hook(lambda _m, args, _o, name=name: seen.update({name: args[0].detach().clone()}))
        for name, module in full.named_modules()
        if name.startswith(tuple(f"{one}." for one in names)) and f"{name}.weight" in found.encoded
    ]
    with torch.no_grad():
        full(**batch)
    for handle in handles:
        handle.remove()
    for name, one in found.encoded.items():
        weight = full.get_parameter(name).detach()
        decoded = decode(name, spec_of(weight), one.encoding, one.parts)
        assert torch.equal(decoded, found.model.get_parameter(name))
        assert not torch.equal(decoded, weight)
        module = name.removesuffix(".weight")
        if weight.dim() == 3 or module not in seen:
            continue
        inputs = seen[module].reshape(-1, seen[module].shape[-1])
        inputs = inputs[real.reshape(-1)] if len(inputs) == real.numel() else inputs
        matrix, mine = (w.T if one.encoding.turned else w for w in (weight, decoded))
        wanted = as_written(matrix, inputs.T @ inputs, one.encoding.rank)
        size = (matrix.double() @ inputs.T.double()).norm()
        error, least = ((matrix.double() - w) @ inputs.T.double() for w in (mine.double(), wanted))
        assert float(error.norm()) <= float(least.norm()) + 0.01 * float(size)  # the factors are bfloat16
    assert len(found.encoded) == sum(len(matrices(block)) for block in middle_blocks(full, plan))


def test_experts_in_one_tensor_are_factored_by_the_tokens_sent_to_each(tiny, batch):
    full = tiny("mixtral")
    plan = make_plan(full, num_bottom=1, num_top=1)
    block = middle_blocks(full, plan)[0]
    experts = next(one for one in matrices(block) if one.experts is not None)
    given: dict[str, tuple] = {}
    handle = block.get_submodule(experts.experts.place).register_forward_hook(
        lambda _m, args, _o: given.update(args=args)
    )
    with torch.no_grad():
        full(**batch)
    handle.remove()
    hidden, chosen, _ = given["args"]
    [sums] = moments(full, [block], [batch])
    real = batch["attention_mask"].reshape(-1).bool()
    for number in range(4):
        mine = hidden[(chosen == number).any(1) & real].float()
        torch.testing.assert_close(sums[experts.name][number], mine.T @ mine, rtol=1e-4, atol=1e-5)


def test_matrices_that_read_the_same_share_their_sums(tiny, batch):
    full = tiny("llama")
    [sums] = moments(full, [middle_blocks(full, make_plan(full))[0]], [batch, batch])
    assert sums["self_attn.q_proj.weight"] is sums["self_attn.k_proj.weight"] is sums["self_attn.v_proj.weight"]
    assert sums["mlp.gate_proj.weight"] is sums["mlp.up_proj.weight"]
    assert sums["mlp.down_proj.weight"].shape == (1, 64, 64)
    [once] = moments(full, [middle_blocks(full, make_plan(full))[0]], [batch])
    for name, one in sums.items():
        torch.testing.assert_close(one, 2 * once[name])


def test_blocks_are_read_alike_in_one_passage_and_in_many(tiny, batch):
    full = tiny("llama")
    blocks = list(full.model.layers)
    together = list(moments(full, blocks, [batch]))
    apart = [next(moments(full, [block], [batch])) for block in blocks]
    for one, other in zip(together, apart, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_broken_run_goes_on(tiny, batch, tmp_path, monkeypatch):
    full = tiny("llama")
    plan = make_plan(full)
    whole = compress(full, plan, "low-rank", Recipe(rank_share=0.5, calibration=[batch]))
    kept = FinishedBlocks(tmp_path / "work", "the same")
    done = {"blocks": 0}

    def stopping(number, tensors, keep=kept.keep_tensors):
        keep(number, tensors)
        done["blocks"] += 1
        if done["blocks"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(kept, "keep_tensors", stopping)
    with pytest.raises(KeyboardInterrupt):
        compress(full, plan, "low-rank", Recipe(rank_share=0.5, calibration=[batch], finished=kept))
    monkeypatch.undo()
    read: list[int] = []
    monkeypatch.setattr(
        "emulator.compression.lowrank.moments",
        lambda model, blocks, batches, **more: (read.append(len(blocks)), moments(model, blocks, batches, **more))[1],
    )
    again = compress(full, plan, "low-rank", Recipe(rank_share=0.5, calibration=[batch], finished=kept))
    assert read == [plan.num_middle - 1]
    theirs = dict(whole.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, theirs[name])
    for name, one in again.encoded.items():
        assert all(torch.equal(part, whole.encoded[name].parts[key]) for key, part in one.parts.items())


def test_refusals(tiny, batch):
    full = tiny("llama")
    plan = make_plan(full)
    with pytest.raises(ConfigError, match="rank share"):
        compress(full, plan, "low-rank", Recipe(rank_share=1.5, calibration=[batch]))
    with pytest.raises(ConfigError, match="public text"):
        compress(full, plan, "low-rank", Recipe(rank_share=0.5))
    mixture = tiny("mixtral")
    for block in mixture.model.layers:
        block.mlp.experts.register_parameter("other", torch.nn.Parameter(torch.ones(4, 3, 3)))
    with pytest.raises(UnsupportedModel, match=r"low-rank: the MLP of .* has a weight"):
        require_known(list(mixture.model.layers), "low-rank")
