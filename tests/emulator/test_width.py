import pytest
import torch

from emulator.compress import Recipe, compress
from emulator.width import best, measure_channels, num_kept
from offsite.blocks import block_list, find_mlp, zero_mlp_channels
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
    emulator = compress(full, plan, "width", Recipe(width=0.4, calibration=[batch]))
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


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_scores_are_mean_activation_times_outgoing_norm(tiny, batch, architecture: str) -> None:
    model = tiny(architecture)
    block = block_list(model, make_plan(model).stack)[2]
    output = block.get_submodule(find_mlp(block).output)
    seen: list[torch.Tensor] = []
    handle = output.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach().clone()))
    model(**batch)
    handle.remove()
    columns = output.weight if architecture == "gpt2" else output.weight.T
    real = batch["attention_mask"].bool()
    wanted = seen[0].reshape(2, 12, -1)[real].abs().mean(0) * columns.detach().norm(dim=1)
    found = measure_channels(model, [block], [batch])[0]
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-6)


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
