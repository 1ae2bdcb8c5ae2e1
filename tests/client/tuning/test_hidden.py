"""States kept below an adapter: the same loss and gradients without those blocks, kept through a stop, and bounded."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

import client.tuning.tune as module
from adapters.held import hold_frozen
from adapters.kinds import attach, declared
from client.objectives.tokens import next_token_loss
from client.tuning.hidden import FOLDER, kept_states, lowest_trained
from client.tuning.ready import work_folder
from client.tuning.verb import run
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError, RunFailed
from offsite.text.batches import Example, collate
from offsite.training import precision
from offsite.training.checkpoints import read_state

ROWS = [Example(row, row) for row in ([5, 6, 7, 8, 9], [9, 8, 7], [5, 5, 6, 9, 4, 3, 8], [7, 7])]
TOP = {"adapter": "lora", "placement": "0+1", "rank": 2, "learning_rate": 0.02, "adapter_dtype": "float32"}


@pytest.fixture
def attached(dropped_package):
    spec = AdapterSpec(kind="blocks", placement="0+1")
    names = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    torch.manual_seed(0)
    return attach(dropped_package.load_model(dtype="float32"), spec, dropped_package.layout.blocks, names)


def keeping(attached, folder, **changes):
    given = {"pad_id": 0, "folder": folder, "limit_bytes": 1 << 20, "binding": {}, "autocast": nullcontext}
    return kept_states(attached, ROWS, **given | changes)


def loss_and_gradients(attached, rows=ROWS):
    attached.model.zero_grad()
    loss, _ = next_token_loss(attached.model, collate(rows, 0))
    loss.backward()
    return loss.detach(), {name: one.grad.clone() for name, one in attached.trainable.items()}


def rounding(attached):
    """The oracle: the model itself, with what enters its lowest trained block rounded to bfloat16 on the way."""

    def rounded(_module, args):
        return (args[0].bfloat16().float(), *args[1:])

    return attached.blocks[lowest_trained(attached)].register_forward_pre_hook(rounded)


def test_without_the_blocks_below_loss_and_gradients_are_those_of_the_rounded_states(attached, tmp_path) -> None:
    far, _ = loss_and_gradients(attached)
    handle = rounding(attached)
    expected, slopes = loss_and_gradients(attached)
    handle.remove()
    calls = []
    watch = attached.blocks[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with keeping(attached, tmp_path / FOLDER) as done:
        assert done == f"bfloat16 before block {lowest_trained(attached)}"
        calls.clear()
        found, got = loss_and_gradients(attached)
        assert not calls
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)  # other padding rounds otherwise, now and then
        for name, slope in slopes.items():
            torch.testing.assert_close(got[name], slope, rtol=0.02, atol=2e-3 * float(slope.abs().max()), msg=name)
        unknown, _ = loss_and_gradients(attached, [*ROWS[:2], Example([4, 4, 4], [4, 4, 4])])
        assert calls
        assert math.isfinite(unknown)
    watch.remove()
    after, _ = loss_and_gradients(attached)
    assert torch.equal(after, far), "the model is as it was"
    assert not torch.equal(found, far)
    torch.testing.assert_close(found, far, rtol=2e-2, atol=0)
    assert all("forward" not in vars(block) for block in attached.blocks)


def test_one_row_alone_is_exact(attached, tmp_path) -> None:
    """Nothing but the row is in the batch, then and now, so that not even the order of additions differs."""
    handle = rounding(attached)
    expected, slopes = loss_and_gradients(attached, ROWS[2:3])
    handle.remove()
    with kept_states(
        attached, ROWS[2:3], pad_id=0, folder=tmp_path / FOLDER, limit_bytes=1 << 20, binding={}, autocast=nullcontext
    ):
        found, got = loss_and_gradients(attached, ROWS[2:3])
    assert torch.equal(found, expected)
    assert all(torch.equal(got[name], slope) for name, slope in slopes.items())


def test_what_stands_is_taken_what_is_damaged_is_made_anew_and_other_bindings_share_nothing(attached, tmp_path) -> None:
    folder = tmp_path / FOLDER
    with keeping(attached, folder):
        first, _ = loss_and_gradients(attached)
    (path,) = folder.iterdir()
    before = path.stat().st_ino
    with keeping(attached, folder):
        assert path.stat().st_ino == before
    path.write_bytes(path.read_bytes()[:-8])
    with keeping(attached, folder):
        again, _ = loss_and_gradients(attached)
        assert path.stat().st_ino != before
    assert torch.equal(again, first)
    with keeping(attached, folder, binding={"package": "another"}):
        assert len(list(folder.iterdir())) == 2
        path.unlink()


def test_what_goes_missing_under_way_is_said(attached, tmp_path) -> None:
    with keeping(attached, tmp_path / FOLDER):
        for path in (tmp_path / FOLDER).iterdir():
            path.unlink()
        with pytest.raises(RunFailed, match="cannot be read") as caught:
            loss_and_gradients(attached)
    assert "--resume" in caught.value.hint


def test_what_does_not_fit_is_computed_and_said(attached, tmp_path, capsys) -> None:
    tokens = sum(len(row.input_ids) for row in ROWS)
    limit = tokens * attached.model.config.hidden_size * 2 - 1
    plain, _ = loss_and_gradients(attached)
    with keeping(attached, tmp_path / FOLDER, limit_bytes=limit) as done:
        assert done is None
        assert torch.equal(loss_and_gradients(attached)[0], plain)
    told = capsys.readouterr().err
    assert told == (
        "hidden states below the adapter are computed every time: "
        f"they would take {limit + 1:,} bytes, --cache-bytes allows {limit:,}\n"
    )
    assert not (tmp_path / FOLDER).exists()


def test_states_that_chance_has_a_part_in_are_not_kept(attached, tmp_path, capsys) -> None:
    attached.model.model.embed_tokens.register_forward_hook(
        lambda module, _args, found: torch.dropout(found, 0.5, module.training)
    )
    attached.model.train()
    modes = [each.training for each in attached.model.modules()]
    with keeping(attached, tmp_path / FOLDER) as done:
        assert done is None
    assert "they hang on more than the row" in capsys.readouterr().err
    assert [each.training for each in attached.model.modules()] == modes


def broken_off(config, monkeypatch) -> None:
    """The run has stopped at its fifth step, with a checkpoint of the fourth."""
    with monkeypatch.context() as patched:
        calls = iter(range(1, 100))

        def failing(model, batch):
            total, count = next_token_loss(model, batch)
            return (total * math.nan if next(calls) == 5 else total), count

        patched.setattr(module, "next_token_loss", failing)
        with pytest.raises(RunFailed, match="loss is nan at step 5"):
            run(config)


def test_a_run_that_stopped_goes_on_with_what_is_kept(settings, dropped_package, tmp_path, monkeypatch) -> None:
    unbroken = run(settings(dropped_package.path, output=tmp_path / "unbroken", **TOP))
    config = settings(dropped_package.path, **TOP)
    work = work_folder(config.output)
    broken_off(config, monkeypatch)
    kept = {path.name: path.stat().st_ino for path in (work / FOLDER).iterdir()}
    assert kept
    assert read_state(work / "checkpoint-4").settings["hidden_states"].startswith("bfloat16 before block")
    with pytest.raises(ConfigError, match="hidden_states"):  # what was begun with rounded states goes on with them
        run(config.model_copy(update={"resume": True, "cache_bytes": 0}))
    seen = {}

    def looking(*args, **given):
        seen.update({path.name: path.stat().st_ino for path in (work / FOLDER).iterdir()})
        return tune(*args, **given)

    tune = module.tune
    monkeypatch.setattr(module, "tune", looking)
    told = run(config.model_copy(update={"resume": True}))
    assert seen == kept
    assert told["bundle_digest"] == unbroken["bundle_digest"]
    assert told["evaluations"] == unbroken["evaluations"]
    assert not work.exists()


def test_a_run_ends_close_to_one_that_computes_everything(settings, dropped_package, tmp_path) -> None:
    kept = run(settings(dropped_package.path, output=tmp_path / "kept", **TOP))
    computed = run(settings(dropped_package.path, output=tmp_path / "computed", cache_bytes=0, **TOP))
    assert kept["bundle_digest"] != computed["bundle_digest"]
    assert kept["best_loss"] == pytest.approx(computed["best_loss"], rel=5e-3)
    assert kept["before_loss"] == pytest.approx(computed["before_loss"], rel=5e-3)


def test_resuming_with_other_data_is_refused_before_anything_is_written(
    settings, dropped_package, tmp_path, monkeypatch
) -> None:
    config = settings(dropped_package.path, **TOP)
    work = work_folder(config.output)
    broken_off(config, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    other = tmp_path / f"other{config.data[0].suffix}"
    other.write_text(config.data[0].read_text(encoding="utf-8").replace("case", "cases"), encoding="utf-8")
    with pytest.raises(ConfigError, match="data"):
        run(config.model_copy(update={"resume": True, "data": (other,)}))
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before


def test_in_bfloat16_frozen_weights_are_held_and_a_resumed_run_keeps_its_arithmetic(
    settings, dropped_package, tmp_path, monkeypatch, capsys
) -> None:
    held = []

    def answer(is_fast):
        monkeypatch.setattr(precision, "_measured", lambda: 5.0 if is_fast else 0.5)

    def counting(attached):
        held.append(hold_frozen(attached))
        return held[-1]

    monkeypatch.setattr(module, "hold_frozen", counting)
    answer(True)
    wanted = {**TOP, "precision": "auto"}
    unbroken = run(settings(dropped_package.path, output=tmp_path / "unbroken", **wanted))
    assert held[0] > 0
    config = settings(dropped_package.path, **wanted)
    broken_off(config, monkeypatch)
    assert read_state(work_folder(config.output) / "checkpoint-4").settings["precision"] == "bf16"
    answer(False)
    capsys.readouterr()
    told = run(config.model_copy(update={"resume": True}))
    assert "arithmetic: bf16; as before" in capsys.readouterr().err
    assert told["bundle_digest"] == unbroken["bundle_digest"]
    monkeypatch.setattr(module, "hold_frozen", lambda _: 0)
    cast = run(settings(dropped_package.path, output=tmp_path / "cast", **{**TOP, "precision": "bf16"}))
    assert cast["bundle_digest"] == unbroken["bundle_digest"], "bit for bit what autocast makes of float32 weights"
    assert cast["evaluations"] == unbroken["evaluations"]
    plain = run(settings(dropped_package.path, output=tmp_path / "plain", **wanted))
    assert plain["bundle_digest"] != unbroken["bundle_digest"]
