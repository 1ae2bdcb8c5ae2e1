import pytest
import torch

from emulator.compression.compress import Recipe, compress
from emulator.compression.width import RIDGE, Activity, Unit, activities, best, eliminate, num_kept, score
from emulator.distillation.objective import Pair
from offsite.errors import ConfigError
from offsite.modelling.blocks import block_list, hidden_of
from offsite.modelling.mlps import find_mlp, outgoing_weight, zero_mlp_channels
from offsite.modelling.split import make_plan

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
    emulator = compress(full, plan, "width", Recipe(width=0.4, channels="activation", refit=False, calibration=[batch]))
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


def seen_in(model: torch.nn.Module, block: torch.nn.Module, text: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The MLP's activations (N, C) when `model` reads `text`, padding apart, and the weights (N,) of the tokens."""
    seen: dict[str, torch.Tensor] = {}
    inner = block.get_submodule(find_mlp(block).output)
    handles = [
        inner.register_forward_hook(lambda _module, args, _output: seen.update(inside=args[0].clone())),
        block.register_forward_hook(lambda _module, _args, output: seen.update(after=hidden_of(output).clone())),
    ]
    with torch.no_grad():
        model(**text)
    for handle in handles:
        handle.remove()
    real = text["attention_mask"].bool()
    return seen["inside"].reshape(*real.shape, -1)[real], 1 / seen["after"][real].square().sum(-1)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "opt"])
def test_scores_are_activation_times_outgoing_norm(tiny, batch, architecture: str) -> None:
    model = tiny(architecture)
    block = block_list(model, make_plan(model).stack)[2]
    found_nc, weight_n = seen_in(model, block, batch)
    columns = outgoing_weight(block, find_mlp(block))
    share_n = weight_n / weight_n.sum()
    wanted = (share_n @ found_nc.square()).sqrt() * columns.norm(dim=0)
    for products in (False, True):
        [activity] = activities(model, [block], [batch], products=products)
        torch.testing.assert_close(score(Unit(block, find_mlp(block)), activity), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(activity.mean, share_n @ found_nc, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(activity.moment, (found_nc * share_n[:, None]).T @ found_nc, rtol=1e-4, atol=1e-6)


def test_blocks_are_measured_alike_in_one_pass_and_in_many(tiny, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    blocks = list(model.model.layers)
    together = list(activities(model, blocks, [batch], products=True))
    monkeypatch.setattr("emulator.compression.width.MOMENTS_LIMIT_BYTES", 2 * 4 * 64 * 64)
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
    x_nc, weight_n = (
        torch.cat(parts).double() for parts in zip(*(seen_in(full, block, text) for text in texts), strict=True)
    )
    share_n = weight_n / weight_n.sum()
    mean_c = share_n @ x_nc if module.bias is not None else torch.zeros(x_nc.shape[1], dtype=torch.float64)
    centred = (x_nc - mean_c) * share_n.sqrt()[:, None]
    pull = (RIDGE * centred[:, kept].square().sum(0).median()).sqrt()
    rows = torch.cat([centred[:, kept], pull * torch.eye(len(kept))])
    targets = torch.cat([centred @ weight_dc.T, pull * weight_dc.T[kept]])
    wanted = torch.linalg.lstsq(rows, targets).solution.T
    found = outgoing_weight(small, find_mlp(small)).double()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    if module.bias is not None:
        missed = weight_dc @ mean_c - wanted @ mean_c[kept]
        found_bias = small.get_submodule(find_mlp(small).output).bias.double()
        torch.testing.assert_close(found_bias, module.bias.double() + missed, rtol=1e-3, atol=1e-4)


def least_loss(moment_cc: torch.Tensor, weight_dc: torch.Tensor, kept: list[int], pull: float) -> float:
    """What is lost when only `kept` channels stay, their weights at their best: with the ridge on every channel."""
    gram_cc = moment_cc + pull * torch.eye(len(moment_cc), dtype=moment_cc.dtype)
    fitted_dk = torch.linalg.solve(gram_cc[kept][:, kept], gram_cc[kept] @ weight_dc.T).T
    change_dc = weight_dc.clone()
    change_dc[:, kept] -= fitted_dk
    return float(torch.einsum("dc,ce,de->", change_dc, gram_cc, change_dc))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_each_channel_eliminated_is_the_one_that_costs_least(
    tiny, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against solving the least squares anew for every channel that could go next, one after the other."""
    model = tiny(architecture)
    block = block_list(model, make_plan(model).stack)[2]
    mlp = find_mlp(block)
    generator = torch.Generator().manual_seed(5)
    mixed_nc = torch.randn(90, 12, generator=generator) @ torch.randn(12, mlp.num_channels, generator=generator)
    found_nc = mixed_nc + 0.3 * torch.randn(mixed_nc.shape, generator=generator) + 0.5
    activity = Activity(found_nc.mean(0), found_nc.T @ found_nc / len(found_nc))
    moment_cc, weight_dc = activity.moment.double(), outgoing_weight(block, mlp).double()
    if block.get_submodule(mlp.output).bias is not None:
        moment_cc = moment_cc - activity.mean.double()[:, None] * activity.mean.double()
    pull = RIDGE * float(moment_cc.diagonal().median())
    left = list(range(mlp.num_channels))
    while len(left) > mlp.num_channels - 11:
        losses = [least_loss(moment_cc, weight_dc, [c for c in left if c != gone], pull) for gone in left]
        left.pop(losses.index(min(losses)))
        for together in (1, 5, 32):
            monkeypatch.setattr("emulator.compression.width.ELIMINATED_TOGETHER", together)
            assert eliminate(Unit(block, mlp), activity, len(left)) == left, together


def test_of_channels_that_say_the_same_one_stays_and_nothing_is_lost(tiny) -> None:
    full = tiny("llama")
    plan = make_plan(full)
    with torch.no_grad():
        for block in full.model.layers:
            block.mlp.gate_proj.weight[32:] = block.mlp.gate_proj.weight[:32]
            block.mlp.up_proj.weight[32:] = block.mlp.up_proj.weight[:32]
    ids = torch.randint(3, 128, (32, 12), generator=torch.Generator().manual_seed(4))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    errors = {}
    for choice in ("activation", "obs"):
        emulator = compress(full, plan, "width", Recipe(width=0.5, channels=choice, calibration=[text]))
        with torch.no_grad():
            errors[choice] = float(Pair(full, emulator.model, plan, emulator.kept)(text, 0).hidden) / ids.numel()
    assert {channel % 32 for channel in emulator.channels["middle.0"]} == set(range(32))
    assert errors["obs"] < 1e-3 < errors["activation"]


def test_refitting_brings_the_blocks_output_nearer(tiny, batch) -> None:
    full = tiny("llama")
    plan = make_plan(full)
    errors = []
    for refit in (False, True):
        recipe = Recipe(width=0.25, channels="activation", refit=refit, calibration=[batch])
        emulator = compress(full, plan, "width", recipe)
        with torch.no_grad():
            errors.append(float(Pair(full, emulator.model, plan, emulator.kept)(batch, 0).hidden))
    assert errors[1] < 0.8 * errors[0]


def test_an_unknown_choice_of_channels_is_refused(tiny, batch) -> None:
    full = tiny("llama")
    with pytest.raises(ConfigError, match="unknown choice 'best' of channels, expected obs, activation, gradot"):
        compress(full, make_plan(full), "width", Recipe(width=0.5, channels="best", calibration=[batch]))


def test_dead_channels_go_first(tiny, batch) -> None:
    full = tiny("llama")
    with torch.no_grad():
        full.model.layers[3].mlp.down_proj.weight[:, 1::2] = 0
    emulator = compress(full, make_plan(full), "width", Recipe(width=0.5, calibration=[batch]))
    assert emulator.channels["middle.1"] == tuple(range(0, 64, 2))


def test_width_needs_text(tiny, batch) -> None:
    full = tiny("llama")
    with pytest.raises(ConfigError, match="public text"):
        compress(full, make_plan(full), "width", Recipe(width=0.5))
