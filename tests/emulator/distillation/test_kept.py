"""The full model's states, computed once: against runs that compute them, broken off, too large, and of no use."""

from __future__ import annotations

import pytest
import torch

from emulator.compression.compress import Recipe, compress
from emulator.distillation import kept as kept_states
from emulator.distillation.imitation import distill
from emulator.distillation.objective import Pair, Weights
from emulator.distillation.public import prepare
from offsite.errors import ConfigError, RunFailed
from offsite.modelling.split import make_plan
from offsite.text.records import read_records
from offsite.training.config import LoopConfig

LIMIT = 1 << 30


@pytest.fixture
def text(tiny, tokenizer, public_file):
    """A few batches of training text, one of held-out text."""
    records = read_records(public_file)[:6]
    found = prepare(
        records,
        tokenizer,
        tiny("llama"),
        block_tokens=16,
        batch_size=4,
        seed=0,
        holdout=0.2,
        evaluation_tokens=32,
        calibration_tokens=64,
    )
    assert 1 < found.train.num_steps_per_epoch < 100
    return found


def distilled(tiny, text, work, *, epochs=2.0, limit=LIMIT, watch=None, **changes):
    full = tiny("llama")
    plan = make_plan(full, num_bottom=1, num_top=1)
    compressed = compress(full, plan, "drop", Recipe(blocks=2))
    if watch is not None:
        next(full.get_submodule(plan.stack.name).children()).register_forward_pre_hook(lambda *_: watch.append(1))
    steps = max(1, int(epochs * text.train.num_steps_per_epoch))
    loop = LoopConfig(steps=steps, learning_rate=3e-3, precision="fp32", evaluate_every=max(1, steps // 2))
    loop = loop.model_copy(update={name: one for name, one in changes.items() if name in LoopConfig.model_fields})
    others = {name: one for name, one in changes.items() if name not in LoopConfig.model_fields}
    binding = {"full model": "tiny"}
    given = {"weights": Weights(), "work": work, "binding": binding, "cache_bytes": limit, **others}
    return distill(full, compressed, plan, text, loop, **given)


def figures(done):
    found = done.outcome
    return [found.first_loss, found.final_loss, *(loss for _, loss in found.evaluations), *done.fidelity]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_a_run_is_what_it_is_without_to_the_precision_of_what_is_kept(
    tiny, text, monkeypatch, tmp_path, dtype, tolerance
):
    monkeypatch.setattr(kept_states, "_KEPT", dtype)
    ran, ran_without = [], []
    mine = distilled(tiny, text, tmp_path / "kept", watch=ran)
    plain = distilled(tiny, text, tmp_path / "plain", limit=0, watch=ran_without)
    assert figures(mine) == pytest.approx(figures(plain), rel=tolerance)
    assert figures(mine) != figures(plain) or dtype == torch.float32
    assert len(ran) < 0.75 * len(ran_without)  # an epoch, the held-out text once, and what was tried at first
    assert list((tmp_path / "kept" / "hidden").iterdir())
    assert not (tmp_path / "plain" / "hidden").exists()


def test_a_run_that_was_broken_off_is_an_unbroken_one_and_computes_nothing_again(tiny, text, monkeypatch, tmp_path):
    unbroken = distilled(tiny, text, tmp_path / "unbroken", checkpoint_every=1)
    keep, calls = kept_states.KeptStates.keep, []

    def stop(self, batch, given):
        calls.append(1)
        found = keep(self, batch, given)
        if len(calls) == text.train.num_steps_per_epoch - 1:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(kept_states.KeptStates, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            distilled(tiny, text, tmp_path / "broken", checkpoint_every=1)
    resumed = distilled(tiny, text, tmp_path / "broken", checkpoint_every=1, resume=True)
    assert figures(resumed) == figures(unbroken)
    for name, tensor in unbroken.outcome.tensors.items():
        assert torch.equal(resumed.outcome.tensors[name], tensor), name
    again: list[int] = []
    monkeypatch.setattr(kept_states.KeptStates, "keep", lambda *_: again.append(1))
    distilled(tiny, text, tmp_path / "broken", checkpoint_every=1, resume=True)
    assert not again
    with pytest.raises(ConfigError):  # other arithmetic is another run
        distilled(tiny, text, tmp_path / "broken", checkpoint_every=1, resume=True, limit=0)


def test_text_that_comes_once_is_not_kept_and_what_does_not_fit_is_said(tiny, text, capsys, tmp_path):
    distilled(tiny, text, tmp_path / "once", epochs=1, evaluate_every=0)
    assert not (tmp_path / "once" / "hidden").exists()
    assert "hidden states" not in capsys.readouterr().err
    distilled(tiny, text, tmp_path / "large", limit=100)
    assert not (tmp_path / "large" / "hidden").exists()
    assert "bytes, --cache-bytes allows 100\n" in capsys.readouterr().err


def test_a_damaged_file_is_one_line_with_a_hint(tiny, text, tmp_path):
    distilled(tiny, text, tmp_path / "work", checkpoint_every=1, epochs=1.5)
    (tmp_path / "again").mkdir()
    (tmp_path / "work" / "hidden").rename(tmp_path / "again" / "hidden")
    for path in (tmp_path / "again" / "hidden").iterdir():
        path.write_bytes(b"no tensors")
    with pytest.raises(RunFailed, match="cannot be read") as caught:
        distilled(tiny, text, tmp_path / "again", epochs=1.5, resume=True)
    assert caught.value.hint


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "bloom"])
def test_a_bottom_that_is_handed_in_changes_nothing(tiny, batch, architecture):
    full = tiny(architecture)
    plan = make_plan(full, num_bottom=2, num_top=1)
    compressed = compress(full, plan, "drop", Recipe(blocks=2))
    pair = Pair(full, compressed.model.requires_grad_(False), plan, compressed.kept)
    torch.manual_seed(0)
    plain = pair(batch, 0.5)
    ran = []
    assert pair.share_bottom(plan, {name: tensor[:1] for name, tensor in batch.items()})
    block = next(compressed.model.get_submodule(plan.stack.name).children())
    for part in block.children():
        part.register_forward_pre_hook(lambda *_: ran.append(1))
    torch.manual_seed(0)
    shared = pair(batch, 0.5)
    assert not ran
    for one, other in zip(shared, plain, strict=True):
        assert torch.equal(one, other)


def test_an_emulator_with_a_bottom_of_its_own_keeps_it(tiny, batch):
    full = tiny("llama")
    plan = make_plan(full, num_bottom=1, num_top=1)
    compressed = compress(full, plan, "drop", Recipe(blocks=2))
    pair = Pair(full, compressed.model.requires_grad_(False), plan, compressed.kept)
    embeddings = compressed.model.get_input_embeddings()
    embeddings.weight = torch.nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
    assert pair.share_bottom(plan, batch)  # the same numbers in another place
    embeddings.weight.data[-1] += 1
    assert not pair.share_bottom(plan, batch)
