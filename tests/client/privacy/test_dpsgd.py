"""The private step and the verb with --dp: noise, sampling, units, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats

from client.privacy import dpsgd as privacy
from client.privacy.config import DPSettings
from client.privacy.dpsgd import Guarantee, PoissonBatches, PrivateStepper, by_memory, plan, units_of
from client.tuning.verb import run
from offsite import cli
from offsite.artefacts.bundle import open_bundle
from offsite.audits.accounting import Mechanism, Spent
from offsite.config import build
from offsite.errors import ConfigError, DataError
from offsite.text.batches import Example
from offsite.training.config import LoopConfig
from offsite.training.processes import world

SPENT = Spent(1.0, 1.0, 1.2, 1e-3)


@pytest.fixture
def private(settings, tmp_path):
    """Make settings of a private run, with a ledger of its own; keywords of --dp come as a mapping."""

    def make(package, dp=None, **changes):
        given = DPSettings(**{"noise_multiplier": 1.0, "ledger": tmp_path / "ledger", **(dp or {})})
        return settings(package.path, **{"learning_rate": 0.01, **changes}, dp=given)

    return make


class Linear(torch.nn.Module):
    """A model as the stepper sees one, whose gradient is known: the mean over a row's tokens of their vectors."""

    def __init__(self, width=50):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))


def stepper_of(num_units=10, *, sigma=2.0, clip=0.5, divisor=4, width=50):
    model = Linear(width)
    guarantee = Guarantee(Mechanism(sigma, 0.5, 5), clip, divisor, "example", None, True, SPENT)
    config = LoopConfig(steps=5, learning_rate=0.1, schedule="constant", precision="fp32")
    units = [(Example([1, 2], [1, 2]),)] * num_units
    return model, PrivateStepper(
        model, {"w": model.weight}, None, config, world(), units=units, guarantee=guarantee, pad_id=0,
        engine="one-by-one",
    )  # fmt: skip


# Chance


def test_a_step_that_drew_nobody_is_noise_of_the_stated_size_and_moves_the_weights():
    model, stepper = stepper_of(width=20_000)
    nobody = {"units": torch.zeros(0, dtype=torch.int64)}
    done = stepper.step(1, nobody)
    assert (done.loss, done.num_tokens) == (0.0, 0)
    noise = model.weight.grad.numpy() * 4 / (2.0 * 0.5)
    assert stats.kstest(noise, "norm").pvalue > 1e-6
    assert done.gradient_norm == pytest.approx(float(model.weight.grad.norm()), rel=1e-5)
    first = model.weight.grad.clone()
    stepper.step(2, nobody)
    assert bool((model.weight != 0).all())
    assert stats.pearsonr(first.numpy(), model.weight.grad.numpy()).statistic == pytest.approx(0, abs=0.05)


def test_everybody_is_drawn_by_a_coin_of_their_own():
    drawn = [PoissonBatches(400, 0.25).batch(step)["units"] for step in range(300)]
    sizes = [len(chosen) for chosen in drawn]
    assert stats.kstest(sizes, stats.binom(400, 0.25).cdf).pvalue > 1e-9
    assert min(sizes) != max(sizes)
    times = torch.bincount(torch.cat(drawn), minlength=400)
    assert stats.chisquare(times.numpy()).pvalue > 1e-6
    assert all(len(chosen) == len(chosen.unique()) for chosen in drawn)
    assert len(PoissonBatches(7, 1.0).batch(0)["units"]) == 7


def test_the_seed_of_dropout_is_the_operating_systems(monkeypatch):
    _, stepper = stepper_of()
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for _ in range(3):
        stepper.step(1, {"units": torch.zeros(0, dtype=torch.int64)})
    assert len(set(seeds)) == 3


# Units and the plan


def test_units_are_rows_or_the_first_rows_of_users():
    rows = [Example([place], [place], document) for place, document in enumerate("abacab")]
    assert units_of(rows, unit="example", rows_per_user=2) == [(row,) for row in rows]
    users = units_of(rows, unit="user", rows_per_user=2)
    assert [[row.input_ids[0] for row in user] for user in users] == [[0, 2], [1, 5], [3]]
    assert units_of(rows[:1] + rows[3:], unit="user", rows_per_user=2)[1:] == [(rows[3],), (rows[5],)]


def test_the_plan_uses_public_constants_alone_when_they_are_all_given():
    given = DPSettings(noise_multiplier=1.0, sample_rate=0.05, delta=1e-4)
    found = [plan(given, num_units=n, batch_size=8, steps=20, epochs=3.0) for n in (100, 101)]
    assert found[0] == found[1]
    assert not found[0].is_number_public
    left = plan(DPSettings(noise_multiplier=1.0), num_units=100, batch_size=8, steps=None, epochs=2.0)
    assert left.is_number_public
    assert left.mechanism == Mechanism(1.0, 0.08, 25)
    assert left.spent.delta == pytest.approx(100**-1.1)


@pytest.mark.parametrize(
    ("given", "batch_size", "message"),
    [
        ({"delta": 0.01}, 8, r"delta 0.01 is more than 0.0063"),
        ({}, 101, r"101 units are to be drawn at each step, there are 100"),
    ],
)
def test_a_plan_without_meaning_is_refused(given, batch_size, message):
    with pytest.raises(ConfigError, match=message):
        plan(DPSettings(noise_multiplier=1.0, **given), num_units=100, batch_size=batch_size, steps=2, epochs=1.0)


def test_clipping_is_by_hooks_unless_memory_is_short():
    example = Guarantee(Mechanism(1.0, 0.1, 1), 1.0, 64, "example", None, True, SPENT)
    user = Guarantee(Mechanism(1.0, 0.1, 1), 1.0, 64, "user", 4, True, SPENT)
    assert [by_memory(num, example) for num in (1, 3, 4, 900)] == ["ghost", "ghost", "hooks", "hooks"]
    assert by_memory(900, user) == "one-by-one"


# The verb


@pytest.mark.parametrize(("kind", "engine"), [("lora", "hooks"), ("blocks", "hooks"), ("dora", "one-by-one")])
def test_tuned_with_privacy(private, dropped_package, tmp_path, kind, engine):
    told = run(private(dropped_package, adapter=kind, adapter_dtype="float32"))
    found = told["privacy"]
    assert found["engine"] == engine
    assert (found["noise_multiplier"], found["clip"], found["steps"], found["unit"]) == (1.0, 1.0, 6, "example")
    assert found["sample_rate"] == pytest.approx(4 / told["num_records"])
    assert 0 < found["epsilon"] < found["epsilon_rdp"]
    assert found["epsilon_total"] == found["epsilon"] == found["budget"]
    assert (found["num_runs"], found["num_releases"], found["accountant"]) == (1, 1, "PLD, dp-accounting 0.6.0")
    assert (told["best_step"], len(told["evaluations"])) == (6, 1)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.disclosed == {}
    assert "privacy" not in (tmp_path / "bundle" / "offsite.json").read_text()


def test_the_same_seed_gives_other_noise(private, dropped_package, tmp_path):
    dp = {"sample_rate": 1.0, "noise_multiplier": 0.2, "budget": 1e6}
    for name in ("a", "b"):
        run(private(dropped_package, dp, output=tmp_path / name, adapter="bitfit", seed=3))
    assert open_bundle(tmp_path / "a").digest != open_bundle(tmp_path / "b").digest


def test_per_user_with_at_most_so_many_rows_each(private, dropped_package, tmp_path, notes):
    rows = [{"text": text, "who": f"user {place % 13}"} for place, text in enumerate(notes)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dp = {"unit": "user", "user_field": "who", "rows_per_user": 3}
    found = run(private(dropped_package, dp, data=path, adapter="lora", validation=0.3))["privacy"]
    assert (found["unit"], found["rows_per_user"], found["engine"]) == ("user", 3, "one-by-one")
    num_users = round(4 / found["sample_rate"])
    assert num_users < 13
    assert found["delta"] == pytest.approx(num_users**-1.1)


def test_a_run_that_draws_nobody_still_ends(private, dropped_package):
    told = run(private(dropped_package, {"sample_rate": 1e-9}, adapter="bitfit", adapter_dtype="float32"))
    assert (told["tokens"], told["first_loss"]) == (0, 0.0)


def test_text_that_makes_the_model_overflow_changes_nothing_else(private, dropped_package, monkeypatch):
    """Every unit is worthless: the run ends, and its weights are noise."""
    real = privacy.choose

    def broken(model, trainable, **given):
        clipper = real(model, trainable, **given)
        model.get_input_embeddings().weight.data.fill_(math.nan)
        return clipper

    monkeypatch.setattr(privacy, "choose", broken)
    told = run(private(dropped_package, adapter="bitfit", adapter_dtype="float32"))
    assert told["first_loss"] == 0.0
    assert told["best_loss"] is None


def test_too_few_documents_to_hold_out_are_refused(private, dropped_package, tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("\n\n".join(f"note {n} of the ward" for n in range(9)), encoding="utf-8")
    with pytest.raises(DataError, match="held out, expected at least 2"):
        run(private(dropped_package, data=path, validation=0.01))
    assert not (tmp_path / "ledger").exists()


WRONG = [
    ("epsilon=0", "--dp.epsilon: expected more than 0"),
    ("epsilon=nan", "--dp.epsilon"),
    ("noise_multiplier=0.1", "--dp.noise_multiplier: expected at least 0.2"),
    ("epsilon=8,noise_multiplier=1", "one of the two"),
    ("clip=1.0", "one of the two"),
    ("epsilon=8,eps=1", "unknown setting 'dp.eps'"),
    ("8", "did you mean --dp epsilon=8?"),
    ("epsilon=8,delta=1", "--dp.delta"),
    ("epsilon=8,clip=0", "--dp.clip"),
    ("epsilon=8,unit=user", "unit=user and user_field go together"),
    ("epsilon=8,unit=row", "--dp.unit"),
    ("epsilon=8,unit=user,user_field=who,engine=ghost", "needs one-by-one"),
    ("epsilon=8 --pack", "--pack"),
    ("epsilon=8 --accumulate 2", "--accumulate"),
    ("epsilon=8 --launch 2", "--launch"),
    ("epsilon=8 --evaluate-every 5", "--evaluate-every"),
    ("epsilon=8 --disclose num_records", "--disclose num_records"),
    ("epsilon=8,unit=user,user_field=who --document-field ward", "--document-field"),
    ("epsilon=8,delta=0.5", "delta 0.5 is more than"),
    ("epsilon=1e6", "no meaningful guarantee"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_wrong_inputs_are_one_line_each(dropped_package, notes_file, tmp_path, capsys, given, message):
    flag, *more = given.split(" ")
    words = ["tune", str(dropped_package.path), "--data", str(notes_file), "-o", str(tmp_path / "bundle")]
    words += ["--block-tokens", "32", "--steps", "3", "--device", "cpu", "--dp", flag, *more]
    code = cli.run([*words, f"dp.ledger={tmp_path / 'ledger'}"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("offsite: error:")]
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]
    assert not (tmp_path / "bundle").exists()


def test_flags_files_and_words_meet_in_one_model(tmp_path):
    flags = {"package": "p", "data": "d", "output": "o"}
    file = tmp_path / "settings.yaml"
    file.write_text("dp:\n  epsilon: 3\n  clip: 2.0\n")
    from client.tuning.config import TuneConfig

    found = build(TuneConfig, file=file, overrides=["dp.clip=0.5"], flags={**flags, "dp": "epsilon=8,budget=10"}).dp
    assert (found.epsilon, found.clip, found.budget) == (8.0, 0.5, 10.0)
    assert build(TuneConfig, flags=flags).dp is None


def test_dropout_is_allowed(private, dropped_package):
    assert run(private(dropped_package, adapter="lora", dropout=0.3))["privacy"]["engine"] == "hooks"
