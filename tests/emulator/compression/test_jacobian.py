import pytest
import torch
from tiny_architectures import tiny as tiny_of
from torch.nn.functional import gelu, relu, silu

from emulator.compression.compress import Recipe, compress
from emulator.compression.finished import FinishedBlocks
from emulator.compression.jacobian import backwards, directions
from emulator.compression.width import RIDGE, Activity, Unit, eliminate
from offsite.errors import UnsupportedModel
from offsite.modelling.blocks import block_list, hidden_of
from offsite.modelling.mlps import find_mlp, outgoing_weight
from offsite.modelling.split import make_plan

SHARE = 0.3
# Per architecture what turns the hidden state into activations, written out: module of what is read, and the rest.
CHANNELS = {
    "llama": (
        "post_attention_layernorm",
        lambda b, h: (
            silu(b.mlp.gate_proj(b.post_attention_layernorm(h))) * b.mlp.up_proj(b.post_attention_layernorm(h))
        ),
    ),
    "gpt2": ("ln_2", lambda b, h: gelu(b.mlp.c_fc(b.ln_2(h)), approximate="tanh")),
    "opt": ("final_layer_norm", lambda b, h: relu(b.fc1(b.final_layer_norm(h)))),
    "phi": ("input_layernorm", lambda b, h: gelu(b.mlp.fc1(b.input_layernorm(h)), approximate="tanh")),
    "olmo2": ("mlp", lambda b, h: silu(b.mlp.gate_proj(h)) * b.mlp.up_proj(h)),
}


def two_texts(batch):
    ids = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(4))
    return [batch, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def by_hand(architecture, model, block, text, direction):
    """For every token of a text, (N, ...): activations, derivatives, gradients, hidden state after, and as read."""
    place, channels = CHANNELS[architecture]
    seen = {}

    def output(_module, _args, found):
        seen["pushed"] = torch.zeros_like(found, requires_grad=True)
        return found + seen["pushed"]

    handles = [
        block.get_submodule(place).register_forward_hook(lambda _m, args, _o: seen.update(read=args[0].detach())),
        block.get_submodule(find_mlp(block).output).register_forward_hook(output),
        block.register_forward_hook(lambda _m, _a, found: seen.update(after=hidden_of(found).detach())),
    ]
    logits = model(**text).logits
    for handle in handles:
        handle.remove()
    ids, real = text["input_ids"], text["attention_mask"].bool()
    loss = -sum(
        logits[row, t].log_softmax(-1)[ids[row, t + 1]]
        for row in range(len(ids))
        for t in range(ids.shape[1] - 1)
        if real[row, t + 1]
    )
    [gradient] = torch.autograd.grad(loss, seen["pushed"])
    read = seen["read"].reshape(*ids.shape, -1)
    active, derivative = torch.func.jvp(lambda h: channels(block, h), (read,), (direction.reshape(read.shape),))
    shaped = (active, derivative, gradient.reshape(read.shape), seen["after"], read)
    return [one.detach()[real].double() for one in shaped]


def gathered(architecture, model, block, texts, seed):
    parts = []
    for number, text in enumerate(texts):
        shape = (*text["input_ids"].shape, 32)
        parts.append(by_hand(architecture, model, block, text, directions(seed, number, shape)))
    return [torch.cat(one) for one in zip(*parts, strict=True)]


@pytest.mark.parametrize("architecture", CHANNELS)
def test_moments_are_those_of_the_derivatives_and_gradients(tiny, batch, architecture: str, monkeypatch) -> None:
    monkeypatch.setattr("emulator.compression.gradients.TOKENS_TOGETHER", 60)  # a batch is pushed back in parts
    model = tiny(architecture).requires_grad_(True)
    block = block_list(model, make_plan(model).stack)[2]
    texts = two_texts(batch)
    _, d_nc, g_nd, after_nd, _ = gathered(architecture, model, block, texts, seed=5)
    [found] = backwards(model, [block], texts, seed=5)
    squares_n = g_nd.square().sum(-1)
    mean_weight = (1 / after_nd.square().sum(-1)).mean()
    wanted = (d_nc * (squares_n / squares_n.sum())[:, None]).T @ d_nc / g_nd.shape[1] / mean_weight
    torch.testing.assert_close(found.moment.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    metric = g_nd.T @ g_nd / squares_n.sum() * g_nd.shape[1]
    torch.testing.assert_close(found.metric.double(), metric, rtol=1e-3, atol=1e-4 * float(metric.abs().max()))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", CHANNELS)
def test_refitted_weights_solve_the_least_squares_of_output_and_gradient(tiny, batch, architecture: str) -> None:
    """Against torch's own solver on tall matrices: the activations, the derivatives, and the pull, in their scales."""
    full = tiny(architecture)
    plan, texts = make_plan(full), two_texts(batch)
    emulator = compress(full, plan, "width", Recipe(width=0.4, calibration=texts, refit_jacobian=SHARE, seed=7))
    block = block_list(full, plan.stack)[plan.num_bottom]
    a_nc, d_nc, g_nd, after_nd, _ = gathered(architecture, full, block, texts, seed=7)
    weight_n = 1 / after_nd.square().sum(-1)
    share_n, square_n = weight_n / weight_n.sum(), g_nd.square().sum(-1)
    kept, weight_dc = list(emulator.channels["middle.0"]), outgoing_weight(block, find_mlp(block)).double()
    bias = block.get_submodule(find_mlp(block).output).bias
    mean_c = share_n @ a_nc if bias is not None else torch.zeros(a_nc.shape[1], dtype=torch.float64)
    forward_nc = (a_nc - mean_c) * share_n.sqrt()[:, None]
    scale = SHARE / g_nd.shape[1] / weight_n.mean()
    backward_nc = d_nc * (scale * square_n / square_n.sum()).sqrt()[:, None]
    both_nc = torch.cat([forward_nc, backward_nc])
    pull = (RIDGE * both_nc[:, kept].square().sum(0).median()).sqrt()
    rows = torch.cat([both_nc[:, kept], pull * torch.eye(len(kept))])
    wanted = torch.linalg.lstsq(rows, torch.cat([both_nc @ weight_dc.T, pull * weight_dc.T[kept]])).solution.T
    small = emulator.model.get_submodule(f"{plan.stack.name}.{plan.num_bottom}")
    found = outgoing_weight(small, find_mlp(small)).double()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-4)
    without = torch.linalg.lstsq(forward_nc[:, kept], forward_nc @ weight_dc.T).solution.T
    assert (found - without).abs().max() > 10 * (found - wanted).abs().max()  # the term did something
    if bias is not None:
        missed = weight_dc @ mean_c - wanted @ mean_c[kept]
        found_bias = small.get_submodule(find_mlp(small).output).bias.double()
        torch.testing.assert_close(found_bias, bias.double() + missed, rtol=1e-3, atol=1e-3)


def test_under_a_metric_that_channel_goes_whose_loss_it_counts_least(tiny) -> None:
    """Against solving anew for every channel that could go next; without the metric others stay."""
    model = tiny("llama")
    block = block_list(model, make_plan(model).stack)[2]
    mlp = find_mlp(block)
    generator = torch.Generator().manual_seed(5)
    found_nc = torch.randn(90, mlp.num_channels, generator=generator) + 0.5
    root_dd = torch.randn(3, 32, generator=generator)  # only three directions of the output count
    metric_dd = root_dd.T @ root_dd
    moment_cc = found_nc.T @ found_nc / len(found_nc)
    activity = Activity(found_nc.mean(0), moment_cc, metric_dd)
    weight_dc = outgoing_weight(block, mlp).double()
    gram_cc = moment_cc.double() + RIDGE * float(moment_cc.diagonal().median()) * torch.eye(len(moment_cc))

    def loss(kept):
        change_dc = weight_dc.clone()
        change_dc[:, kept] -= torch.linalg.solve(gram_cc[kept][:, kept], gram_cc[kept] @ weight_dc.T).T
        return float(torch.einsum("dc,ce,fe,df->", change_dc, gram_cc, change_dc, metric_dd.double()))

    left = list(range(mlp.num_channels))
    while len(left) > mlp.num_channels - 6:
        losses = [loss([c for c in left if c != gone]) for gone in left]
        left.pop(losses.index(min(losses)))
    assert eliminate(Unit(block, mlp), activity, len(left)) == left
    assert eliminate(Unit(block, mlp), Activity(activity.mean, moment_cc), len(left)) != left


def test_a_gradient_goes_back_more_truly(tiny, batch) -> None:
    """What the fit is for: the gradient that the middle hands on is nearer to the full model's."""
    full = tiny("llama")
    plan, texts = make_plan(full), two_texts(batch)
    errors = []
    for share in (0.0, 0.1):
        emulator = compress(full, plan, "width", Recipe(width=0.4, calibration=texts, refit_jacobian=share))
        error = 0.0
        for number in plan.middle:
            block = block_list(full, plan.stack)[number]
            small = emulator.model.get_submodule(f"{plan.stack.name}.{number}")
            _, _, g_nd, _, read_nd = by_hand("llama", full, block, texts[1], directions(0, 0, (16, 12, 32)))
            handed = []
            for one in (block, small):
                h_nd = read_nd.float().requires_grad_()
                one.mlp(block.post_attention_layernorm(h_nd)).backward(g_nd.float())
                handed.append(h_nd.grad)
            error += float((handed[0] - handed[1]).square().sum() / handed[0].square().sum())
        errors.append(error)
    assert errors[1] < 0.95 * errors[0]


def test_zero_is_the_refit_of_before(tiny, batch) -> None:
    full = tiny("llama")
    plan = make_plan(full)
    usual, zero, some = (
        compress(full, plan, "width", Recipe(width=0.4, calibration=[batch], **more))
        for more in ({}, {"refit_jacobian": 0.0, "seed": 3}, {"refit_jacobian": 0.1})
    )
    pairs = zip(usual.model.state_dict().values(), zero.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert some.settings == usual.settings == {"width": 0.4}


def test_blocks_measured_in_parts_or_after_a_break_come_out_the_same(tiny, batch, tmp_path, monkeypatch) -> None:
    full = tiny("llama")
    plan = make_plan(full)

    def made(folder):
        recipe = Recipe(
            width=0.4, calibration=two_texts(batch), refit_jacobian=0.1, finished=FinishedBlocks(folder, "b")
        )
        return compress(full, plan, "width", recipe).model.state_dict()

    at_once = made(tmp_path / "work")
    assert (tmp_path / "work" / "block-0000.safetensors").is_file()
    (tmp_path / "work" / "block-0001.safetensors").unlink()
    monkeypatch.setattr("emulator.compression.jacobian.MOMENTS_LIMIT_BYTES", 1)
    resumed, in_parts = made(tmp_path / "work"), made(None)
    assert all(torch.equal(at_once[name], resumed[name]) for name in at_once)
    assert all(torch.equal(at_once[name], in_parts[name]) for name in at_once)


@pytest.mark.parametrize("name", "stablelm cohere2 glm4 olmo3 bamba lfm2 nemotron apertus mpt".split())
def test_every_block_with_one_mlp_can_be_fitted(name, batch) -> None:
    full = tiny_of(name)
    plan = make_plan(full, num_bottom=1, num_top=1)
    emulator = compress(full, plan, "width", Recipe(width=0.5, calibration=[batch], refit_jacobian=0.1))
    assert len(emulator.channels) == plan.num_middle
    assert bool(torch.isfinite(emulator.model(**batch).logits).all())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral", "with one MLP: the MLP of MixtralDecoderLayer is a mixture of experts"),
        ("bloom", "activation has no forward derivative"),
        ("bitnet", "ffn_sub_norm"),
    ],
)
def test_what_cannot_be_derived_is_refused(tiny, batch, name: str, message: str) -> None:
    full = tiny(name)
    with pytest.raises(UnsupportedModel, match=message):
        compress(full, make_plan(full), "width", Recipe(width=0.5, calibration=[batch], refit_jacobian=0.1))
