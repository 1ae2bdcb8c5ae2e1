import pytest
import torch
from tiny_architectures import tiny as tiny_of

from emulator.compression.compress import Recipe, compress
from emulator.compression.gradot import gradient_keeping, sensitivities
from emulator.compression.width import Activity, Unit
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import block_list
from offsite.modelling.mlps import find_mlp
from offsite.modelling.split import make_plan

# Per architecture the linears of the first middle block's MLP: up and down, of gate and up in one, its second half.
LINEARS = {"llama": ("mlp.up_proj", "mlp.down_proj"), "phi3": ("mlp.gate_up_proj", "mlp.down_proj")}
LINEARS |= {
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
    "bloom": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}


def two_texts(batch):
    ids = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(4))
    return [batch, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def matrix(linear):
    """The weight (outputs, inputs), whichever way it is stored."""
    return linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight


def seen(model, linear, texts):
    """What a linear read, and the gradients at its output, (N, ...) for tokens that foretell one, and dl/dw."""
    reads, gradients, of_weight = [], [], 0.0
    for text in texts:
        found = {}

        def hook(_module, args, output, found=found):
            found["read"] = args[0].detach()
            found["pushed"] = torch.zeros_like(output, requires_grad=True)
            return output + found["pushed"]

        handle = linear.register_forward_hook(hook)
        linear.weight.requires_grad_(True)
        logits = model(**text).logits
        handle.remove()
        ids, counts = text["input_ids"], text["attention_mask"].bool()
        counts = counts[:, 1:] & counts[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][counts], ids[:, 1:][counts], reduction="sum")
        pushed, weight = torch.autograd.grad(loss, [found["pushed"], linear.weight])
        linear.weight.requires_grad_(False)
        reads.append(found["read"].reshape(*ids.shape, -1)[:, :-1][counts].double())
        gradients.append(pushed.reshape(*ids.shape, -1)[:, :-1][counts].double())
        of_weight = of_weight + (weight.T if type(linear).__name__ == "Conv1D" else weight).double()
    return torch.cat(reads), torch.cat(gradients), of_weight


@pytest.mark.parametrize("architecture", LINEARS)
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_scores_are_the_formula_with_the_hessian_written_out(tiny, batch, architecture: str, share: float) -> None:
    """Against the Kronecker product itself times the change that leaving out one channel is."""
    model = tiny(architecture)
    block, texts = block_list(model, make_plan(model).stack)[2], two_texts(batch)
    up, down = (block.get_submodule(name) for name in LINEARS[architecture])
    num = find_mlp(block).num_channels
    x_nd, g_nc, of_up = seen(model, up, texts)
    a_nc, g_nd, of_down = seen(model, down, texts)
    g_nc, of_up, up_cd = g_nc[:, -num:], of_up[-num:], matrix(up)[-num:].double()
    down_dc = matrix(down).double()
    hessian = [(g_nc.T @ g_nc, x_nd.T @ x_nd), (g_nd.T @ g_nd, a_nc.T @ a_nc)]
    changes, added = [], []
    for channel in range(num):
        gone_up, gone_down = torch.zeros_like(up_cd), torch.zeros_like(down_dc)
        gone_up[channel], gone_down[:, channel] = -up_cd[channel], -down_dc[:, channel]
        moved = [(g @ gone @ x).abs().sum() for (g, x), gone in zip(hessian, (gone_up, gone_down), strict=True)]
        changes.append(sum(moved))
        added.append((of_up * gone_up).sum() + (of_down * gone_down).sum())
    changes, added = torch.stack(changes), torch.stack(added)
    wanted = changes / changes.mean() - share * added / added.abs().mean()
    [found] = sensitivities(model, [block], texts, share)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


def test_one_row_of_the_hessian_times_a_change_is_a_matrix_product() -> None:
    """(E[g g'] x E[x x']) d, the matrix of the change as one long vector, is E[g g'] d E[x x']."""
    generator = torch.Generator().manual_seed(1)
    left, right, change = (torch.randn(shape, generator=generator) for shape in ((3, 3), (4, 4), (3, 4)))
    left, right = left @ left.T, right @ right.T
    torch.testing.assert_close(torch.kron(left, right) @ change.reshape(-1), (left @ change @ right).reshape(-1))


def test_the_channels_kept_are_those_that_cost_most(tiny, batch) -> None:
    full = tiny("llama")
    plan, texts = make_plan(full), two_texts(batch)
    recipe = Recipe(width=0.5, channels="gradot", gradot_lambda=0.3, refit=False, calibration=texts)
    emulator = compress(full, plan, "width", recipe)
    blocks = [block_list(full, plan.stack)[number] for number in plan.middle]
    scores = sensitivities(full, blocks, texts, 0.3)
    wanted = {f"middle.{i}": tuple(sorted(one.topk(32).indices.tolist())) for i, one in enumerate(scores)}
    assert emulator.channels == wanted
    small, whole = emulator.model.model.layers[2].mlp, blocks[0].mlp
    assert torch.equal(small.down_proj.weight, whole.down_proj.weight[:, list(wanted["middle.0"])])  # not refitted
    refitted = compress(full, plan, "width", Recipe(width=0.5, channels="gradot", gradot_lambda=0.3, calibration=texts))
    assert refitted.channels == wanted
    assert not torch.equal(refitted.model.model.layers[2].mlp.down_proj.weight, small.down_proj.weight)


def test_a_variant_favours_here_too(tiny, batch) -> None:
    full = tiny("llama")
    usual, other = (
        compress(full, make_plan(full), "width", Recipe(width=0.5, channels="gradot", variant=v, calibration=[batch]))
        for v in (0, 1)
    )
    assert usual.channels != other.channels


@pytest.mark.parametrize("name", "stablelm cohere2 glm4 olmo3 bamba lfm2 nemotron apertus mpt".split())
def test_every_block_with_one_mlp_is_measured(name, batch) -> None:
    full = tiny_of(name)
    plan = make_plan(full, num_bottom=1, num_top=1)
    emulator = compress(full, plan, "width", Recipe(width=0.5, channels="gradot", calibration=[batch]))
    assert len(emulator.channels) == plan.num_middle


def test_mixtures_are_refused(tiny, batch) -> None:
    full = tiny("mixtral")
    with pytest.raises(UnsupportedModel, match="blocks with one MLP: the MLP of MixtralDecoderLayer is a mixture"):
        compress(full, make_plan(full), "width", Recipe(width=0.5, channels="gradot", calibration=[batch]))


def test_nothing_is_chosen_by_what_was_not_measured(tiny) -> None:
    block = tiny("llama").model.layers[2]
    activity = Activity(torch.zeros(64), torch.eye(64))
    with pytest.raises(ConfigError, match="needs what gradients say"):
        gradient_keeping(Unit(block, find_mlp(block)), activity, 8)
