import math
import shutil
from dataclasses import replace

import pytest
import torch

from emulator.audit import recovery as module
from emulator.audit.capability import held_out
from emulator.audit.heal import next_token_loss
from emulator.audit.recovery import Attacker, Knowledge, Losses, Setting
from emulator.distillation.public import prepare
from offsite.errors import ConfigError, RunFailed
from offsite.text.records import read_records

TOKENS = 41
STEP = 4 * TOKENS


@pytest.fixture(scope="module")
def measured(speaker, tokenizer, public_speech, heldout_speech):
    """The public text, what measures on the held-out text, and what the models' losses are there."""
    text = prepare(
        read_records(public_speech),
        tokenizer,
        speaker,
        block_tokens=TOKENS,
        batch_size=4,
        seed=0,
        holdout=0.1,
        evaluation_tokens=16 * TOKENS,
        calibration_tokens=1,
    )
    ruler = held_out(
        read_records(heldout_speech), tokenizer, packed=True, block_tokens=TOKENS, limit_tokens=0, batch_size=16
    )
    full, found = ruler.loss(speaker, "full"), {}

    def losses(package):
        if package.digest not in found:
            found[package.digest] = Losses(full, ruler.loss(package.load_model(), "emulator"))
        return found[package.digest]

    return text, ruler, losses


@pytest.fixture
def attacker(measured, tmp_path):
    """Make an attacker of a package of `speaker`."""
    text, ruler, losses = measured

    def make(package, *, marks=(8 * STEP,), work="work", rates=None, **changes):
        setting = Setting(
            marks=marks,
            rates=rates or {"lora": (1e-2,), "all": (3e-3,)},
            step_tokens=STEP,
            work=tmp_path / work,
            **{"precision": "fp32", **changes},
        )
        return Attacker(package, Knowledge(6), text, setting, ruler, losses(package))

    return make


def test_regained_is_a_share_of_what_was_lost():
    losses = Losses(full=2.0, emulator=4.0)
    assert [losses.regained(loss) for loss in (4.0, 3.0, 2.0, 5.0)] == [0, 0.5, 1, -0.5]
    same = Losses(full=2.0, emulator=2.005)
    assert same.regained(2.005) == same.regained(9.0) == 1  # nothing was lost: all of it is there
    assert not same.is_anything_lost


def test_nothing_is_to_be_regained_where_all_was_kept(attacker, pack_speaker, tmp_path):
    (found,) = attacker(pack_speaker("keep-all")).attack(["as_is_lora", "as_is_all", "refill_all"])
    assert (found.attack, found.trained_parameters, found.best) == ("as_is", 0, 1)
    assert [point.num_tokens for point in found.points] == [0]
    assert not (tmp_path / "work").exists()


def test_healing_regains_something(attacker, pack_speaker, speaker):
    broken = attacker(pack_speaker("drop", blocks=2), marks=(8 * STEP, 60 * STEP))
    found = {one.attack: one for one in broken.attack(["as_is_all", "as_is_lora", "refill_all"])}
    refill = next(name for name in ("duplicate_all", "interpolate_all") if name in found)
    other = {"duplicate_all": "interpolate", "interpolate_all": "duplicate"}[refill]
    assert list(found) == ["as_is_all", "as_is_lora", refill, other]
    assert found["as_is_all"].points[0].regained == 0
    for name in ("as_is_all", "as_is_lora", refill):
        assert [point.num_tokens for point in found[name].points] == [0, 8 * STEP, 60 * STEP]
    curve = [point.regained for point in found["as_is_all"].points]
    assert curve[0] < curve[1] < curve[2] < 1
    assert curve[2] > 0.1
    head = speaker.lm_head.weight.numel() + speaker.model.embed_tokens.weight.numel()
    whole = sum(parameter.numel() for parameter in speaker.parameters())
    assert found[refill].trained_parameters == whole - head
    assert [point.num_tokens for point in found[other].points] == [0]
    assert found["as_is_all"].points[1].perplexity == pytest.approx(
        math.exp(broken.losses.emulator - curve[1] * (broken.losses.emulator - broken.losses.full))
    )


def test_a_width_package_is_regrown(attacker, pack_speaker):
    narrow = attacker(pack_speaker("width", width=0.25))
    found = {one.attack: one for one in narrow.attack(["refill_all"])}
    assert set(found) in ({"regrow_all", "split"}, {"split_all", "regrow"})
    assert found.get("regrow", found.get("regrow_all")).points[0].regained == pytest.approx(0, abs=1e-4)
    (only,) = attacker(pack_speaker("width", width=0.25), work="other").attack(["regrow_all"])
    assert only.points[0].regained == pytest.approx(0, abs=1e-4)


def test_all_rates_are_tried_at_the_first_mark_and_then_those_near_the_best_by_public_text(
    attacker, pack_speaker, tmp_path
):
    rates = {"lora": (1e-2,), "all": (1e-6, 3e-3, 1e-5)}
    eager = attacker(pack_speaker("drop", blocks=2), marks=(0, 4 * STEP, 8 * STEP), rates=rates)
    (found,) = eager.attack(["as_is_all"])
    names = sorted(path.name for path in (tmp_path / "work").iterdir())
    first, second = 4 * STEP, 8 * STEP
    assert names == sorted(
        [f"as_is_all-{first}-{rate}.json" for rate in ("1e-06", "0.003", "1e-05")]
        + [f"as_is_all-{second}-{rate}.json" for rate in ("1e-05", "0.003")]
    )
    assert [point.num_tokens for point in found.points] == [0, first, second]


@pytest.mark.parametrize(
    ("best_by_mark", "tried_at"),
    [
        ((3, 3, 3), [{1, 2, 3, 4}, {2, 3, 4}, {2, 3, 4}]),
        ((3, 2, 1), [{1, 2, 3, 4}, {2, 3, 4}, {1, 2, 3}]),
        ((4, 4, 3), [{1, 2, 3, 4}, {3, 4}, {3, 4}]),
        ((1, 2, 3), [{1, 2, 3, 4}, {1, 2}, {1, 2, 3}]),
    ],
)
def test_the_rate_may_change_with_the_mark(attacker, pack_speaker, monkeypatch, best_by_mark, tried_at):
    marks, tried = (4 * STEP, 8 * STEP, 16 * STEP), []

    def run(self, start, heal, mark, rate):
        tried.append((mark, rate))
        off = abs(rate - best_by_mark[marks.index(mark)])
        return module.Run(off, 3.0 + off, mark, 1, rate, 0.0)

    monkeypatch.setattr(Attacker, "_run", run)
    found = attacker(pack_speaker("drop", blocks=2), marks=marks, rates={"all": (3, 1, 4, 2)}).heal("as_is", "all", 4.0)
    assert [{rate for at, rate in tried if at == mark} for mark in marks] == tried_at
    assert [point.perplexity for point in found.points[1:]] == pytest.approx([math.exp(3.0)] * 3)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("heal", ["all", "lora"])
def test_broken_off_and_resumed_is_an_unbroken_attack(attacker, pack_speaker, tmp_path, monkeypatch, heal):
    package, names = pack_speaker("drop", blocks=2), [f"as_is_{heal}", f"refill_{heal}"]
    given = {"marks": (4 * STEP, 11 * STEP), "checkpoint_every": 3}
    unbroken = attacker(package, work="unbroken", **given).attack(names)
    for breaks_at in (3, 14) if heal == "all" else (17,):  # in the first run; at the second mark; in the second attack
        count = iter(range(10**6))

        def dying(model, batch, count=count, breaks_at=breaks_at):
            if torch.is_grad_enabled() and next(count) == breaks_at:
                raise Killed
            return next_token_loss(model, batch)

        monkeypatch.setattr(module, "next_token_loss", dying)
        with pytest.raises(Killed):
            attacker(package, **given).attack(names)
        monkeypatch.undo()
        assert attacker(package, **given).attack(names) == unbroken
        shutil.rmtree(tmp_path / "work")


def test_what_was_done_is_not_done_again_and_not_taken_for_something_else(attacker, pack_speaker, monkeypatch):
    package = pack_speaker("drop", blocks=2)
    found = attacker(package).attack(["as_is_all"])
    monkeypatch.setattr(module, "train", None)
    assert attacker(package).attack(["as_is_all"]) == found
    with pytest.raises(ConfigError, match="is of an attack with other settings"):
        attacker(package, seed=1).attack(["as_is_all"])
    with pytest.raises(ConfigError, match="is of an attack with other settings"):
        attacker(pack_speaker("drop", blocks=3)).attack(["as_is_all"])
    other = attacker(package)
    other.ruler = replace(other.ruler, examples=[*other.ruler.examples[1:], other.ruler.examples[0]])
    with pytest.raises(ConfigError, match="is of an attack with other settings"):
        other.attack(["as_is_all"])


def test_a_start_that_has_nothing_to_do_is_refused_and_refill_left_out(attacker, pack_speaker, speaker):
    with pytest.raises(ConfigError, match="start 'regrow' has nothing to do") as caught:
        attacker(pack_speaker("drop", blocks=2)).attack(["regrow_all"])
    assert caught.value.hint == "it can start from: as_is, duplicate, interpolate"
    moved = attacker(pack_speaker("keep-all"))
    lossy = Attacker(
        moved.package, moved.knowledge, moved.text, moved.setting, moved.ruler, Losses(full=1.0, emulator=2.0)
    )
    assert [one.attack for one in lossy.attack(["as_is_all", "refill_all"])] == ["as_is_all"]


def test_a_rate_far_too_high_is_left_out(attacker, pack_speaker, capsys):
    package, too_high = pack_speaker("drop", blocks=2), {"lora": (1e-2,), "all": (1e3, 3e-3)}
    (found,) = attacker(package, rates=too_high).attack(["as_is_all"])
    assert found == attacker(package, work="sane").attack(["as_is_all"])[0]
    assert "as_is_all at rate 1000 failed: " in capsys.readouterr().err
    with pytest.raises(RunFailed, match="at step"):
        attacker(package, work="wild", rates={"all": (1e3,)}).attack(["as_is_all"])
