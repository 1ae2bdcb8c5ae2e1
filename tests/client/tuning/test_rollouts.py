"""Whole runs on rewards: what they earn, resuming, collapse, the record, refusals."""

from __future__ import annotations

import json
import math

import pytest
from safetensors.torch import load_file, save_file

import client.tuning.learning as module
from client.audit.audit import run as audit
from client.audit.config import AuditBundleConfig
from client.objectives.rewardmodel import RewardModel
from client.objectives.rollouts import Rollouts
from client.tuning.ready import work_folder
from client.tuning.verb import run
from offsite.artefacts.bundle import open_bundle
from offsite.audits.record import read_audit
from offsite.audits.runs import (
    Objective,
    Rewarded,
    read_run,
    run_path,
)
from offsite.errors import ArtefactError, ConfigError, DataError, NotFinite, RunFailed, WrongBinding, WrongShape
from offsite.tasks.config import RuleSettings
from offsite.tasks.rules import Rules
from offsite.training.loop import EndOfRun

LORA = {"adapter": "lora", "rank": 2, "learning_rate": 0.02, "adapter_dtype": "float32"}
SMALL = {
    "steps": 3,
    "evaluate_every": 1,
    "checkpoint_every": 1,
    "batch_size": 2,
    "rloo_samples": 2,
    "max_new_tokens": 4,
}
STATED = {"beta": 0.05, "num_samples": 8, "max_new_tokens": 4, "temperature": 1.0, "kl_limit": 20.0}


@pytest.fixture
def rewarded(settings, answers_file):
    """Make settings of a run that is rewarded for answers of two words or more; keywords change them."""

    def make(package, **changes):
        rules = changes.pop("rules", {"min_words": 2})
        rules = None if rules is None else RuleSettings(**rules)
        given = {**LORA, "objective": "rloo", "rules": rules, "data": answers_file, "block_tokens": 64}
        return settings(package.path, **{**given, "max_new_tokens": 8, "validation": 0.05, **changes})

    return make


@pytest.fixture
def dense(monkeypatch):
    """The share of an answer's characters that are ASCII: a reward from which few samples teach something."""
    monkeypatch.setattr(Rules, "reward", lambda _, text, **__: sum(map(str.isascii, text)) / max(1, len(text)))


def steps_of(output):
    return [json.loads(line) for line in output.with_name(f"{output.name}.log.jsonl").read_text().splitlines()]


def test_a_run_that_patience_ends_is_no_collapse(dense, rewarded, narrow_package, monkeypatch, tmp_path):
    monkeypatch.setattr("client.objectives.rollouts.HeldOut.told", lambda self, model: 1.0)
    told = run(rewarded(narrow_package, steps=10, evaluate_every=1, patience=2, max_new_tokens=2))
    assert (told["steps"], told["ended"]) == (3, "patience")
    assert read_run(run_path(tmp_path / "bundle")).objective.rloo.ended is None


@pytest.mark.proves("rows", "prompts, for rewards by rules", "rloo")
def test_a_run_earns_more_and_tells_of_every_step(dense, rewarded, narrow_package, tmp_path, capsys):
    told = run(rewarded(narrow_package, steps=10, evaluate_every=5, rloo_samples=8, max_new_tokens=4))
    steps = steps_of(tmp_path / "bundle")
    assert steps[0]["kl"] == 0.0  # the untuned emulator is the model itself, to the last digit
    assert all(step["kl"] != 0 for step in steps[1:])
    assert sum(step["reward"] for step in steps[-4:]) / 4 > steps[0]["reward"] + 0.08
    for step in steps:
        assert step["loss"] == pytest.approx(0.05 * step["kl"] - step["reward"], abs=1e-6)
        assert 0 < step["entropy"] < math.log(259)
        assert 1 <= step["length"] <= 4
    assert told["reward"] == -told["best_loss"]
    err = capsys.readouterr().err
    assert "held-out prompts: mean reward" in err
    assert "reward 0.4" in err
    record = read_run(run_path(tmp_path / "bundle"))
    stated = Rewarded(**STATED, entropy_floor=0.01, rules=("words",))
    assert record.objective == Objective(loss="rloo", rloo=stated)
    assert not record.text.packed
    assert "rloo" not in (tmp_path / "bundle" / "offsite.json").read_text()


def test_a_run_goes_on_as_it_was_wherever_it_stopped(dense, rewarded, narrow_package, tmp_path, monkeypatch):
    unbroken = run(rewarded(narrow_package, output=tmp_path / "unbroken", **SMALL))
    wanted = [{**step, "seconds": None} for step in steps_of(tmp_path / "unbroken")]
    original, config = module.policy_loss, rewarded(narrow_package, **SMALL)
    for stopped in (1, 2, 3):
        calls = iter(range(max(1, stopped - 1), 10))  # the step before is the one that an earlier attempt came to

        def loss(model, batch, *, temperature, calls=calls, stopped=stopped):
            total, count = original(model, batch, temperature=temperature)
            return (total * math.nan if next(calls) == stopped else total), count

        with monkeypatch.context() as patched:
            patched.setattr(module, "policy_loss", loss)
            with pytest.raises(RunFailed, match=f"loss is nan at step {stopped}"):
                run(config.model_copy(update={"resume": stopped > 1}))
    with pytest.raises(ConfigError, match=r"rules\.min_words '2' \(now '3'\)"):
        run(config.model_copy(update={"resume": True, "rules": RuleSettings(min_words=3)}))
    assert run(config.model_copy(update={"resume": True}))["bundle_digest"] == unbroken["bundle_digest"]
    assert [{**step, "seconds": None} for step in steps_of(tmp_path / "bundle")] == wanted


def test_a_collapse_keeps_the_last_good_weights(dense, rewarded, narrow_package, tmp_path, monkeypatch, capsys):
    """Weights beyond the limit are never validated: those kept are of the last step before it that was."""
    found, original = [], Rollouts._require_policy

    def looking(self, figures):
        try:
            original(self, figures)
        except EndOfRun:
            found.append(figures["kl"])
            raise

    monkeypatch.setattr(Rollouts, "_require_policy", looking)
    told = run(rewarded(narrow_package, **{**SMALL, "steps": 9}, learning_rate=0.003, kl_limit=1.0))
    assert told["ended"] == "kl"
    assert told["steps"] < 9
    assert found
    assert found[0] > 1.0
    assert told["best_step"] < told["steps"]
    assert [step for step, _ in told["evaluations"]] == list(range(1, told["steps"]))
    assert all(step["kl"] <= 1.0 for step in steps_of(tmp_path / "bundle"))
    err = capsys.readouterr().err
    assert f"tune: ended after step {told['steps']}: answers are {found[0]:.1f} nats from the untuned emulator's" in err
    assert read_run(run_path(tmp_path / "bundle")).objective.rloo.ended == "kl"


@pytest.fixture
def reward_bundle(settings, pairs_file, tmp_path):
    """Tune a reward model for a few steps; keywords change its settings. Return its folder."""

    def make(package, out="zealot", **changes):  # a name that no tokenizer and no setting has
        given = {**LORA, "objective": "reward", "data": pairs_file, "block_tokens": 64, "steps": 12, "placement": "1+1"}
        run(settings(package.path, output=tmp_path / out, **{**given, **changes}))
        return tmp_path / out

    return make


@pytest.mark.proves("rows", "prompts, for rewards by a reward model", "rloo")
def test_a_run_earns_more_of_a_reward_model_and_goes_on_with_the_same(
    rewarded, reward_bundle, narrow_package, tmp_path, monkeypatch
):
    letters = tmp_path / "letters.jsonl"  # what the samples of a random model differ in: characters that are ASCII
    rows = [
        {"prompt": f"ward {number}?", "chosen": ill[:4], "rejected": "\u00e9\u0436\u20ac"[number % 3] * 2}
        for number, ill in enumerate(["fever", "cough", "ache", "rash", "chill", "pain"] * 8)
    ]
    letters.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = reward_bundle(narrow_package, data=letters, evaluate_every=12)
    changes = {"rules": None, "reward": folder, "steps": 10, "evaluate_every": 5, "max_new_tokens": 4}
    told = run(rewarded(narrow_package, **changes, rloo_samples=8, checkpoint_every=8))
    steps = steps_of(tmp_path / "bundle")
    assert steps[0]["kl"] == 0.0
    assert sum(step["reward"] for step in steps[-4:]) / 4 > steps[0]["reward"] + 0.1
    assert told["reward"] == -told["best_loss"] > 0.3 - told["before_loss"]
    kept = read_run(run_path(tmp_path / "bundle")).objective
    assert kept.rloo.reward_digest == open_bundle(folder).digest
    assert (kept.rloo.rules, kept.rloo.reward_weight) == ((), 1.0)
    assert kept.quoted().rloo.reward_digest is None
    for path in [tmp_path / "bundle" / "offsite.json", tmp_path / "bundle.log.jsonl", run_path(tmp_path / "bundle")]:
        assert "zealot" not in path.read_text()

    small = {**SMALL, "steps": 2, "rules": {"min_words": 2}, "reward": folder, "reward_weight": 0.5}
    unbroken = run(rewarded(narrow_package, output=tmp_path / "unbroken", **small))
    original, calls = module.policy_loss, iter(range(1, 10))

    def loss(model, batch, *, temperature):
        total, count = original(model, batch, temperature=temperature)
        return (total * math.nan if next(calls) == 2 else total), count

    config = rewarded(narrow_package, output=tmp_path / "broken", **small)
    with monkeypatch.context() as patched:
        patched.setattr(module, "policy_loss", loss)
        with pytest.raises(RunFailed, match="loss is nan at step 2"):
            run(config)
    other = reward_bundle(narrow_package, out="other", seed=1, steps=2)
    with pytest.raises(ConfigError, match=r"rloo\.reward_digest"):
        run(config.model_copy(update={"resume": True, "reward": other}))
    with pytest.raises(ConfigError, match=r"rloo\.reward_weight '0\.5' \(now '2\.0'\)"):
        run(config.model_copy(update={"resume": True, "reward_weight": 2.0}))
    assert run(config.model_copy(update={"resume": True}))["bundle_digest"] == unbroken["bundle_digest"]


def test_rewards_of_rules_and_model_add_up(rewarded, reward_bundle, narrow_package, monkeypatch):
    folder, seen = reward_bundle(narrow_package, steps=2), []
    original = RewardModel.rewards

    def rewards(self, questions, answers):
        found = original(self, questions, answers)
        seen.append([2.0 * one + 0.25 * (len(text.split()) >= 2) for one, text in zip(found, answers, strict=True)])
        return found

    monkeypatch.setattr(RewardModel, "rewards", rewards)
    config = rewarded(
        narrow_package,
        **{
            **SMALL,
            "steps": 1,
            "rules": {"min_words": 2, "words_weight": 0.25},
            "reward": folder,
            "reward_weight": 2.0,
        },
    )
    run(config)
    assert steps_of(config.output)[0]["reward"] == pytest.approx(sum(seen[0]) / len(seen[0]), abs=1e-6)


def test_a_bundle_that_cannot_reward_is_one_line(
    rewarded, reward_bundle, narrow_package, dropped_package, settings, tamper, tmp_path
):
    elsewhere = reward_bundle(dropped_package, out="elsewhere", steps=1)
    plain = settings(narrow_package.path, output=tmp_path / "plain", steps=1, learning_rate=0.02, adapter="lora")
    run(plain)
    sound = reward_bundle(narrow_package, out="sound", steps=1)

    def poison(folder):
        tensors = load_file(folder / "adapter.safetensors")
        tensors["head.weight"][0, 0] = math.inf
        save_file(tensors, folder / "adapter.safetensors")

    def narrow(folder):
        tensors = load_file(folder / "adapter.safetensors")
        save_file({**tensors, "head.weight": tensors["head.weight"].bfloat16()}, folder / "adapter.safetensors")

    def refused(folder, error, match):
        with pytest.raises(error, match=match) as caught:
            run(rewarded(narrow_package, rules=None, reward=folder, **SMALL))
        assert "\n" not in str(caught.value)
        assert not work_folder(tmp_path / "bundle").exists()

    refused(elsewhere, WrongBinding, "bundle 'elsewhere' was tuned on package sha256:")
    refused(plain.output, ConfigError, "--reward: bundle 'plain' is for causal-lm, not for reward")
    refused(tmp_path / "none", ArtefactError, "none")
    refused(tamper(sound, change=poison), NotFinite, "head.weight")
    (tmp_path / "tampered").rename(tmp_path / "first")
    refused(tamper(sound, change=narrow, redeclare=True), WrongShape, "head.weight")


def test_what_cannot_begin_is_refused(rewarded, narrow_package, tmp_path, notes_file):
    with pytest.raises(RunFailed, match=r"a token's entropy is .* the floor is 6 at step 0, before any") as caught:
        run(rewarded(narrow_package, **SMALL, entropy_floor=6.0))
    assert "lower --entropy-floor" in caught.value.hint
    assert not (tmp_path / "bundle").exists()
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"ward {number}?"}) + "\n" for number in range(20)))
    config = rewarded(narrow_package, data=asked, output=tmp_path / "other", rules={"exact": 1.0}, **SMALL)
    with pytest.raises(DataError, match="--rules exact: 20 of 20 rows have no answer") as caught:
        run(config)
    with pytest.raises(DataError, match=r"plain text, expected rows with a prompt"):
        run(config.model_copy(update={"data": (notes_file,)}))
    with pytest.raises(DataError, match=r"none\.json: no such file, expected a JSON schema"):
        run(config.model_copy(update={"rules": RuleSettings(json_schema=tmp_path / "none.json")}))
    with pytest.raises(ConfigError, match="64 new tokens leave no room for a prompt in a context of 64"):
        run(config.model_copy(update={"max_new_tokens": 64}))
    assert not work_folder(config.output).exists()


def test_an_audit_scores_the_rows_own_answers_and_refuses_rows_without(
    dense, rewarded, narrow_package, tmp_path, capsys
):
    config = rewarded(narrow_package, **SMALL, audit_share=0.3, precision="bf16")
    run(config)
    assert steps_of(config.output)[0]["kl"] == 0.0  # in bfloat16 too
    given = {"package": narrow_package.path, "bundle": config.output, "data": config.data, "rows": 20, "device": "cpu"}
    told = audit(AuditBundleConfig(**given, tokens_per_row=16, output=tmp_path / "audit"))
    assert told["num_members"] > 0
    assert told["num_nonmembers"] > 0
    assert "a row is its own answer after its prompt" in capsys.readouterr().err
    found = read_audit(tmp_path / "audit")[0]
    assert found.objective == read_run(run_path(config.output)).objective
    (tmp_path / "asked.jsonl").write_text('{"prompt": "ward?"}\n')
    with pytest.raises(DataError, match=r"asked\.jsonl: line 1: no answer; of a run with --objective rloo"):
        audit(AuditBundleConfig(**given, nonmembers=(tmp_path / "asked.jsonl",), output=tmp_path / "other"))
