import pytest
import torch
from torch.nn.functional import softmax

from emulator.compression.compress import Recipe, compress
from emulator.distillation.objective import (
    Pair,
    Weights,
    align,
    draw_positions,
    measure,
    relative_error,
    step_loss,
)
from offsite.modelling.split import make_plan
from offsite.training.processes import Processes

ONE = Processes(0, 1, torch.device("cpu"), True)


def make_pair(full, method="drop", **recipe) -> Pair:
    plan = make_plan(full, num_bottom=1, num_top=1)
    emulator = compress(full, plan, method, Recipe(**recipe))
    emulator.model.requires_grad_(False)
    return Pair(full, emulator.model, plan, emulator.kept)


def padded(batch: dict[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    return {name: torch.nn.functional.pad(tensor, (0, columns)) for name, tensor in batch.items()}


def test_alignment_is_to_the_block_before_the_next_kept_one(tiny) -> None:
    plan = make_plan(tiny("llama"), num_bottom=1, num_top=1)
    assert align((0, 1, 4, 5), plan) == {1: 3, 2: 4}
    assert align((0, 1, 2, 3, 4, 5), plan) == {1: 1, 2: 2, 3: 3, 4: 4}
    assert align((0, 1, 2, 4, 5), plan) == {1: 1, 2: 3, 3: 4}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "bloom", "opt"])
def test_keeping_all_blocks_costs_exactly_nothing(tiny, batch, architecture: str) -> None:
    terms = make_pair(tiny(architecture), "keep-all")(batch, 1.0)
    assert terms.hidden.item() == 0
    assert terms.kl.item() == 0
    assert terms.num_tokens.item() == 21


def test_terms_are_what_the_words_say(tiny, batch) -> None:
    """Against a plain computation from both models' hidden states and logits."""
    full = tiny("gemma2")  # it caps its logits, which must happen on both sides
    pair = make_pair(full, "drop", blocks=2)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = full(**batch, output_hidden_states=True, use_cache=False)
        mine = pair.emulator(**batch, output_hidden_states=True, use_cache=False)
    error = 0.0
    for block, target in ((1, 3), (2, 4)):  # hidden_states[i + 1] is after block i
        wanted = theirs.hidden_states[target + 1][real]
        error += ((mine.hidden_states[block + 1][real] - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().sum() / 2
    p, q = softmax(theirs.logits[real], -1), softmax(mine.logits[real], -1)
    terms = pair(batch, 1.0)
    assert terms.hidden.item() == pytest.approx(float(error), rel=1e-4)
    assert terms.kl.item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)


def test_padding_changes_nothing(tiny, batch) -> None:
    pair = make_pair(tiny("llama"), "drop", blocks=2)
    for share in (1.0, 0.3):
        found = []
        for extra in (0, 5):
            torch.manual_seed(3)
            found.append(pair(padded(batch, extra), share))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_a_share_of_positions_estimates_all_of_them(tiny, batch) -> None:
    pair = make_pair(tiny("llama"), "drop", blocks=2)
    torch.manual_seed(0)
    with torch.no_grad():
        found = torch.stack([pair(batch, 0.25).kl for _ in range(300)])
        wanted = pair(batch, 1.0).kl
    assert abs(float(found.mean() - wanted)) < 4 * float(found.std()) / 300**0.5 + 0.02 * float(wanted)


def test_drawn_positions_hold_text() -> None:
    real = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert draw_positions(real, 1.0).tolist() == [0, 1, 2, 3]
    for _ in range(20):
        drawn = draw_positions(real, 0.5).tolist()
        assert len(drawn) == 2
        assert drawn == sorted(set(drawn))
        assert max(drawn) < 4
    assert len(draw_positions(real, 0.01)) == 1


def test_each_token_counts_by_its_own_size() -> None:
    wanted = torch.randn(1, 5, 8)
    found = wanted + 0.1 * torch.randn(1, 5, 8)
    scale = torch.tensor([1.0, 1e3, 1.0, 1e-3, 7.0])[None, :, None]
    torch.testing.assert_close(relative_error(found * scale, wanted * scale), relative_error(found, wanted))
    assert relative_error(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)).item() == 0


def test_only_the_emulator_gets_gradients_and_nothing_drops_out(tiny, batch) -> None:
    full = tiny("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    pair = make_pair(full, "keep-all")
    pair.emulator.requires_grad_(True)
    pair.train()
    assert not any(module.training for module in pair.modules())
    total, count = step_loss(Weights(2.0, 3.0, 1.0))(pair, batch)
    assert total.item() == 0
    assert count.item() == 21
    total.backward()
    assert all(parameter.grad is None for parameter in full.parameters())


def test_weights_weigh(tiny, batch) -> None:
    pair = make_pair(tiny("llama"), "drop", blocks=2)
    terms = pair(batch, 1.0)
    total, _num = step_loss(Weights(2.0, 3.0, 1.0))(pair, batch)
    assert total.item() == pytest.approx(2 * terms.hidden.item() + 3 * terms.kl.item(), rel=1e-5)
    without, _num = step_loss(Weights(2.0, 0.0, 1.0))(pair, batch)
    assert without.item() == pytest.approx(2 * terms.hidden.item(), rel=1e-5)


def test_measure_averages_over_tokens_of_all_batches(tiny, batch) -> None:
    pair = make_pair(tiny("llama"), "drop", blocks=2)
    short = {name: tensor[:1, :4] for name, tensor in batch.items()}
    terms = [pair(one, 1.0) for one in (batch, short)]
    found = measure(pair, [batch, short], ONE)
    assert found.kl == pytest.approx(sum(float(term.kl) for term in terms) / 25, rel=1e-5)
    assert found.hidden == pytest.approx(sum(float(term.hidden) for term in terms) / 25, rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "phi", "gpt2", "gpt_neox", "opt", "bloom"])
def test_float32_middle_between_bfloat16_ends_runs_under_autocast(tiny, batch, architecture: str) -> None:
    full = tiny(architecture).to(torch.bfloat16)
    pair = make_pair(full, "width", width=0.5, calibration=[batch])
    for block in list(pair.emulator.get_submodule(make_plan(full).stack.name).children())[1:-1]:
        for parameter in block.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, count = step_loss(Weights())(pair, batch)
    (total / count).backward()
    assert torch.isfinite(total)
