from collections.abc import Callable

import pytest
import torch

from emulator.compress import Recipe, compress
from emulator.objective import Pair
from emulator.width import RIDGE, activities, best, num_kept, score
from offsite.blocks import block_list, find_mlp, outgoing_weight, zero_mlp_channels
from offsite.errors import ConfigError, UnsupportedModel
from offsite.split import make_plan

WIDTH = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt"]
WIDTH += ["bloom", "olmo2"]


@pytest.mark.parametrize(
    ("channels", "share", "wanted"),
    [
        (1536, 0.33, 504),
        (1536, 0.5, 768),
        (1536, 1.0, 1536),
        (1000, 0.5, 496),
        (100, 1.0, 100),
        (100, 0.99, 96),
        (64, 0.12, 8),
        (64, 0.01, 1),
        (10, 0.3, 3),
        (4, 0.01, 1),
    ],
)
def test_kept_widths(channels: int, share: float, wanted: int) -> None:
    assert num_kept(channels, share) == wanted


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        num_kept(64, share)


def test_best_are_ascending_and_the_first_of_equals() -> None:
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3) == [1, 2, 3]


@pytest.mark.parametrize("architecture", WIDTH)
def test_all_channels_kept_is_the_full_model_bit_for_bit(tiny, batch, architecture: str) -> None:
    full = tiny(architecture)
    emulator = compress(full, make_plan(full), "width", Recipe(width=1.0, calibration=[batch]))
    assert emulator.channels == {}
    with torch.no_grad():
        assert torch.equal(emulator.model(**batch).logits, full(**batch).logits)


@pytest.mark.parametrize("architecture", WIDTH)
def test_compact_equals_full_with_the_other_channels_zeroed(tiny, batch, architecture: str) -> None:
    full = tiny(architecture)
    plan = make_plan(full)
    before = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    emulator = compress(full, plan, "width", Recipe(width=0.4, refit=False, calibration=[batch]))
    assert all(torch.equal(before[name], tensor) for name, tensor in full.state_dict().items())
    for number, kept in ((int(role.split(".")[1]), kept) for role, kept in emulator.channels.items()):
        block = block_list(full, plan.stack)[plan.num_bottom + number]
        mlp = find_mlp(block)
        assert list(kept) == sorted(set(kept))
        assert len(kept) == num_kept(mlp.num_channels, 0.4) < mlp.num_channels
        zero_mlp_channels(block, mlp, torch.tensor(sorted(set(range(mlp.num_channels)) - set(kept))))
    assert len(emulator.channels) == plan.num_middle
    with torch.no_grad():
        torch.testing.assert_close(emulator.model(**batch).logits, full(**batch).logits, rtol=1e-4, atol=1e-4)


def output_of(block: torch.nn.Module, compute: Callable[[], object]) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into the block's down projection while `compute` runs, and what comes out."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module = block.get_submodule(find_mlp(block).output)
    handle = module.register_forward_hook(lambda _module, args, output: seen.append((args[0].clone(), output.clone())))
    compute()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "opt"])
def test_scores_are_activation_times_outgoing_norm(tiny, batch, architecture: str) -> None:
    model = tiny(architecture)
    block = block_list(model, make_plan(model).stack)[2]
    activation, _output = output_of(block, lambda: model(**batch))
    columns = outgoing_weight(block, find_mlp(block))
    real = batch["attention_mask"].bool().reshape(-1)
    found_nc = activation.reshape(24, -1)[real]
    wanted = found_nc.square().mean(0).sqrt() * columns.norm(dim=0)
    for products in (False, True):
        [activity] = activities(model, [block], [batch], products=products)
        torch.testing.assert_close(score(block, activity), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(activity.mean, found_nc.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(activity.moment, found_nc.T @ found_nc / real.sum(), rtol=1e-4, atol=1e-6)


def test_blocks_are_measured_alike_in_one_pass_and_in_many(tiny, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    blocks = list(model.model.layers)
    together = list(activities(model, blocks, [batch], products=True))
    monkeypatch.setattr("emulator.width.MOMENTS_LIMIT_BYTES", 2 * 4 * 64 * 64)
    apart = list(activities(model, blocks, [batch], products=True))
    assert len(together) == len(apart) == 6
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.moment, other.moment)


@pytest.mark.parametrize("architecture", WIDTH)
def test_refitted_weights_are_the_least_squares_solution(tiny, batch, architecture: str) -> None:
    """Against torch's own solver on the activations themselves, for the first block of the middle."""
    full = tiny(architecture)
    plan = make_plan(full)
    ids = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(4))
    texts = [batch, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    emulator = compress(full, plan, "width", Recipe(width=0.4, calibration=texts))
    block = block_list(full, plan.stack)[plan.num_bottom]
    small = emulator.model.get_submodule(f"{plan.stack.name}.{plan.num_bottom}")
    module, kept = block.get_submodule(find_mlp(block).output), list(emulator.channels["middle.0"])
    weight_dc = outgoing_weight(block, find_mlp(block)).double()
    inputs = []
    for text in texts:
        real = text["attention_mask"].bool().reshape(-1)
        inputs.append(output_of(block, lambda text=text: full(**text))[0].reshape(len(real), -1)[real].double())
    x_nc = torch.cat(inputs)
    mean_c = x_nc.mean(0) if module.bias is not None else torch.zeros(x_nc.shape[1], dtype=torch.float64)
    centred = x_nc - mean_c
    pull = (RIDGE * centred[:, kept].square().mean(0).mean() * len(x_nc)).sqrt()
    rows = torch.cat([centred[:, kept], pull * torch.eye(len(kept))])
    targets = torch.cat([centred @ weight_dc.T, pull * weight_dc.T[kept]])
    wanted = torch.linalg.lstsq(rows, targets).solution.T
    found = outgoing_weight(small, find_mlp(small)).double()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    if module.bias is not None:
        missed = weight_dc @ mean_c - wanted @ mean_c[kept]
        found_bias = small.get_submodule(find_mlp(small).output).bias.double()
        torch.testing.assert_close(found_bias, module.bias.double() + missed, rtol=1e-3, atol=1e-4)


def test_refitting_brings_the_blocks_output_nearer(tiny, batch) -> None:
    full = tiny("llama")
    plan = make_plan(full)
    errors = []
    for refit in (False, True):
        emulator = compress(full, plan, "width", Recipe(width=0.25, refit=refit, calibration=[batch]))
        with torch.no_grad():
            errors.append(float(Pair(full, emulator.model, plan, emulator.kept)(batch, 0).hidden))
    assert errors[1] < 0.8 * errors[0]


def test_dead_channels_go_first(tiny, batch) -> None:
    full = tiny("llama")
    with torch.no_grad():
        full.model.layers[3].mlp.down_proj.weight[:, 1::2] = 0
    emulator = compress(full, make_plan(full), "width", Recipe(width=0.5, calibration=[batch]))
    assert emulator.channels["middle.1"] == tuple(range(0, 64, 2))


def test_width_needs_text_and_a_plain_mlp(tiny, batch) -> None:
    full = tiny("llama")
    with pytest.raises(ConfigError, match="public text"):
        compress(full, make_plan(full), "width", Recipe(width=0.5))
    experts = tiny("mixtral")
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        compress(experts, make_plan(experts), "width", Recipe(width=0.5, calibration=[batch]))
