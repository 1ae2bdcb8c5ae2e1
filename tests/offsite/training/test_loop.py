from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from offsite.errors import ConfigError, DataError, RunFailed
from offsite.training import checkpoints
from offsite.training.config import LoopConfig
from offsite.training.loop import EndOfRun, Outcome, peak_bytes, train


class Kill(Exception):
    """Stands for whatever ends a process in mid-step."""


class Tiny(nn.Module):
    """Frozen embedding, two trained layers with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6).requires_grad_(False)
        self.hidden, self.drop, self.out = nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.drop(torch.tanh(self.hidden(self.embed(input_ids)))))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"top.{name}": tensor for name, tensor in self.named_parameters() if tensor.requires_grad}


class Rows:
    """Sequences that can be learnt: every token decides the next."""

    def batch(self, step: int) -> dict[str, Tensor]:
        columns = [torch.randint(0, 11, (4,), generator=torch.Generator().manual_seed(step))]
        while len(columns) < 5:
            columns.append((columns[-1] * 3 + 1) % 11)
        return {"input_ids": torch.stack(columns, dim=1)}


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"]
    loss = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return loss, torch.tensor(ids[:, 1:].numel())


class KillAt:
    """The loss, until the call of this number."""

    def __init__(self, call: int, error: BaseException | None = None) -> None:
        self.left, self.error = call, error or Kill()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return next_token(model, batch)


class Scripted:
    """Evaluations that depend on the weights by a known list of losses, in order, repeatable by step."""

    def __init__(self, model: nn.Module, losses: list[float]) -> None:
        self.model, self.losses, self.calls = model, losses, 0

    def __call__(self) -> float:
        self.model.eval()
        self.calls += 1
        return self.losses[self.calls - 1]


def settings(**changes: object) -> LoopConfig:
    given = {"steps": 12, "learning_rate": 0.02, "warmup_steps": 2, "precision": "fp32", "weight_decay": 0.1}
    return LoopConfig(**{**given, "checkpoint_every": 3, "evaluate_every": 2, **changes})


def held_out(model: nn.Module):
    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            total, count = next_token(model, Rows().batch(999))
        return float(total / count)

    return evaluate


def run(work: Path, *, model: nn.Module | None = None, loss=next_token, resume=False, **given) -> Outcome:
    model = model or Tiny()
    config = given.pop("config", settings())
    given.setdefault("evaluate", held_out(model))
    return train(model, model.trainable(), Rows(), loss, config, work=work, resume=resume, label="test", **given)


class EndAt(Rows):
    """Rows up to a step, at which the run is to end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch(self, step: int) -> dict[str, Tensor]:
        if step == self.step:
            raise EndOfRun("enough", "that is enough", hint="ask for less")
        return super().batch(step)


def records(work: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in found]


def untimed(outcome: Outcome) -> dict[str, object]:
    timed = ("seconds", "tokens_per_second", "peak_bytes")
    return {name: value for name, value in outcome.figures().items() if name not in timed}


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert untimed(found) == untimed(expected)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def test_training_lowers_the_loss_and_says_what_it_did(tmp_path):
    model = Tiny()
    frozen = model.embed.weight.clone()
    outcome = run(tmp_path / "w", model=model, config=settings(steps=30, checkpoint_every=30))
    assert outcome.final_loss < 0.8 * outcome.first_loss
    assert (outcome.steps, outcome.tokens) == (30, 30 * 20)
    assert [step for step, _ in outcome.evaluations] == list(range(2, 31, 2))
    assert (outcome.best_step, outcome.best_loss) == min(outcome.evaluations, key=lambda pair: pair[1])
    assert outcome.seconds > 0
    assert outcome.tokens_per_second > 0
    assert torch.equal(model.embed.weight, frozen)
    assert set(outcome.tensors) == {"top.hidden.weight", "top.hidden.bias", "top.out.weight", "top.out.bias"}
    assert outcome.tensors["top.out.bias"].data_ptr() == model.out.bias.data_ptr()
    json.dumps(outcome.figures(), allow_nan=False)


def test_the_log_has_every_step(tmp_path):
    run(tmp_path / "w")
    found = records(tmp_path / "w")
    assert [record["step"] for record in found] == list(range(1, 13))
    assert set(found[0]) == {"step", "loss", "rate", "gradient_norm", "tokens"}
    assert set(found[1]) == {"step", "loss", "rate", "gradient_norm", "tokens", "evaluation_loss"}
    assert found[-1]["tokens"] == 240


@pytest.mark.parametrize("killed_at", [1, 3, 4, 8, 12])
def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path, killed_at):
    unbroken = run(tmp_path / "unbroken")
    with pytest.raises(Kill):
        run(tmp_path / "broken", loss=KillAt(killed_at))
    resumed = run(tmp_path / "broken", resume=True)
    assert_same(resumed, unbroken)
    assert records(tmp_path / "broken") == records(tmp_path / "unbroken")


def test_a_run_broken_twice_with_parts_ends_as_an_unbroken_one(tmp_path):
    config = settings(accumulate=2)
    unbroken = run(tmp_path / "unbroken", config=config)
    for calls in (9, 7):
        with pytest.raises(Kill):
            run(tmp_path / "broken", config=config, loss=KillAt(calls), resume=(tmp_path / "broken").exists())
    assert_same(run(tmp_path / "broken", config=config, resume=True), unbroken)


def test_a_finished_run_resumes_without_a_step(tmp_path):
    done = run(tmp_path / "w")
    again = run(tmp_path / "w", resume=True, loss=KillAt(1))
    assert_same(again, done)
    assert again.peak_bytes == done.peak_bytes


def test_resume_without_a_checkpoint_begins(tmp_path, capsys):
    outcome = run(tmp_path / "w", resume=True)
    assert outcome.steps == 12
    assert "test: starting anew" in capsys.readouterr().err


def test_the_best_weights_are_kept(tmp_path):
    losses = [5.0, 3.0, 1.0, 2.0, 1.0, 4.0]
    model = Tiny()
    outcome = run(tmp_path / "best", model=model, evaluate=Scripted(model, losses))
    assert (outcome.best_step, outcome.best_loss) == (6, 1.0)
    until_six = run(tmp_path / "six", config=settings(), evaluate=None, loss=KillAt(13))
    model = Tiny()
    with pytest.raises(Kill):
        run(tmp_path / "killed", model=model, evaluate=None, loss=KillAt(7))
    at_six = load_file(tmp_path / "killed" / "checkpoint-6" / "trainable.safetensors")
    assert all(torch.equal(outcome.tensors[name], tensor) for name, tensor in at_six.items())
    model = Tiny()
    last = run(tmp_path / "last", model=model, evaluate=Scripted(model, losses), keep_best=False)
    assert (last.best_step, last.best_loss) == (6, 1.0)
    assert all(torch.equal(last.tensors[name], tensor) for name, tensor in until_six.tensors.items())
    assert not (tmp_path / "last" / "best.safetensors").exists()


def test_the_best_of_a_step_that_is_done_again_is_not_trusted(tmp_path):
    model = Tiny()
    with pytest.raises(Kill):  # the evaluation of step 8 was written, its checkpoint never
        run(tmp_path / "w", model=model, evaluate=Scripted(model, [5.0, 4.0, 3.0, 0.0]), loss=KillAt(9))
    model = Tiny()
    outcome = run(tmp_path / "w", model=model, evaluate=Scripted(model, [6.0, 6.0, 6.0]), resume=True)
    assert (outcome.best_step, outcome.best_loss) == (6, 3.0)
    on_disk = load_file(tmp_path / "w" / "best.safetensors")
    assert all(torch.equal(outcome.tensors[name], tensor) for name, tensor in on_disk.items())


def test_without_evaluation_the_last_weights_stay(tmp_path):
    outcome = run(tmp_path / "w", evaluate=None)
    assert (outcome.best_step, outcome.best_loss, outcome.evaluations) == (12, None, [])
    assert not (tmp_path / "w" / "best.safetensors").exists()


def test_modes_are_put_back_after_an_evaluation(tmp_path):
    model = Tiny().train()
    model.hidden.eval()
    seen = set()

    def noting(model, batch):
        seen.add((model.training, model.hidden.training, model.drop.training))
        return next_token(model, batch)

    run(tmp_path / "w", model=model, loss=noting)
    assert seen == {(True, False, True)}


def test_the_callers_generator_is_left_as_it_was(tmp_path):
    model = Tiny()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path / "w", model=model)
    assert torch.equal(torch.rand(3), expected)


def test_a_leftover_work_folder_is_refused_and_untouched(tmp_path):
    run(tmp_path / "w")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "w").rglob("*"))
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        run(tmp_path / "w")
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "w").rglob("*")) == before


def test_other_settings_are_refused_by_name(tmp_path):
    run(tmp_path / "w", binding={"data": "sha256:1"})
    with pytest.raises(ConfigError, match=r"checkpoint-12 was made with learning_rate 0\.02 \(now 0\.01\), seed 0"):
        run(tmp_path / "w", resume=True, config=settings(learning_rate=0.01, seed=1), binding={"data": "sha256:1"})
    with pytest.raises(ConfigError, match=r"data 'sha256:1' \(now 'sha256:2'\)"):
        run(tmp_path / "w", resume=True, binding={"data": "sha256:2"})
    run(tmp_path / "w", resume=True, config=settings(checkpoint_every=5), binding={"data": "sha256:1"})


def test_another_models_checkpoint_is_refused(tmp_path):
    run(tmp_path / "w")
    model = Tiny()
    model.out = nn.Linear(16, 12)
    with pytest.raises(RunFailed, match=r"tensor 'top\.out\.weight': F32 \(11, 16\), expected F32 \(12, 16\)"):
        run(tmp_path / "w", model=model, resume=True)


def test_a_nan_names_the_step_and_what_is_kept(tmp_path):
    def bad(model, batch):
        loss, count = next_token(model, batch)
        bad.calls += 1
        return loss * (float("nan") if bad.calls == 8 else 1.0), count

    bad.calls = 0
    with pytest.raises(RunFailed, match="loss is nan at step 8") as caught:
        run(tmp_path / "w", loss=bad)
    assert caught.value.hint == "lower the learning rate; checkpoint-6 is kept"
    assert [record["step"] for record in records(tmp_path / "w")] == list(range(1, 8))
    with pytest.raises(RunFailed, match="evaluation loss is nan at step 2") as caught:
        run(tmp_path / "v", evaluate=lambda: float("nan"))
    assert caught.value.hint == "lower the learning rate; no checkpoint was written yet"


def test_a_full_disk_keeps_the_earlier_checkpoint_and_resumes(tmp_path, monkeypatch):
    unbroken = run(tmp_path / "unbroken")

    def full(tensors, path):
        if "checkpoint-6" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    save = checkpoints.save_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(RunFailed, match="no space left on device") as caught:
            run(tmp_path / "w")
    assert "checkpoint-3 is kept" in str(caught.value.hint)
    assert_same(run(tmp_path / "w", resume=True), unbroken)


def test_an_interrupt_writes_a_checkpoint_after_the_step(tmp_path):
    unbroken = run(tmp_path / "unbroken")

    def pressing(model, batch):
        pressing.calls += 1
        if pressing.calls == 5:
            signal.raise_signal(signal.SIGINT)
        return next_token(model, batch)

    pressing.calls = 0
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "w", loss=pressing)
    assert pressing.calls == 5
    assert (tmp_path / "w" / "checkpoint-5").is_dir()
    assert_same(run(tmp_path / "w", resume=True), unbroken)


def test_what_a_killed_write_left_is_collected(tmp_path):
    with pytest.raises(Kill):
        run(tmp_path / "w", loss=KillAt(5))
    (tmp_path / "w" / ".checkpoint-6.0123abcd.partial").mkdir()
    run(tmp_path / "w", resume=True)
    names = {path.name for path in (tmp_path / "w").iterdir()}
    assert names == {"checkpoint-9", "checkpoint-12", "best.safetensors", "log.jsonl"}


def test_what_cannot_be_trained_is_refused(tmp_path):
    def attempt(model: nn.Module, trainable: dict[str, nn.Parameter], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            train(model, trainable, Rows(), next_token, settings(), work=tmp_path / "w", resume=False, label="test")
        assert not (tmp_path / "w").exists()

    model = Tiny()
    attempt(model, {}, "nothing to train")
    attempt(model, {"x": Tiny().out.bias}, "'x' is not one of the model")
    attempt(model, {"embed": model.embed.weight}, "'embed' is not one of the model that requires a gradient")
    attempt(model, {"a": model.out.bias}, r"parameter 'hidden\.bias' requires a gradient and is not among")
    attempt(model, {**model.trainable(), "twice": model.out.bias}, "under two names")
    attempt(model.bfloat16(), model.trainable(), "torch.bfloat16, expected float32")


def test_steps_that_count_nothing_are_logged_and_alone_refused(tmp_path):
    def sometimes(model, batch):
        loss, count = next_token(model, batch)
        sometimes.calls += 1
        return (loss * 0, count * 0) if sometimes.calls == 1 or sometimes.never else (loss, count)

    sometimes.calls, sometimes.never = 0, False
    outcome = run(tmp_path / "w", loss=sometimes)
    found = records(tmp_path / "w")
    assert found[0]["loss"] is None
    assert outcome.first_loss == found[1]["loss"]
    sometimes.never = True
    with pytest.raises(DataError, match="nothing counts in the loss of any of the 12 steps"):
        run(tmp_path / "v", loss=sometimes)


def test_peak_bytes_are_this_processs():
    before = peak_bytes(torch.device("cpu"))
    statm = Path("/proc/self/statm")  # what earlier tests had and gave back comes on top of the 256 MiB
    held = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else before
    block = torch.ones((2**28 + max(0, before - held)) // 4)
    assert peak_bytes(torch.device("cpu")) - before > 2**27
    assert before < 2**36
    del block


@pytest.mark.slow
def test_a_sigkill_at_a_random_step_changes_nothing(tmp_path):
    def worker(name: str, **given: object) -> int:
        paths = {"work": str(tmp_path / f"{name}.work"), "out": str(tmp_path / name)}
        script = str(Path(__file__).parent / "loop_worker.py")
        return subprocess.run([sys.executable, script, json.dumps({**paths, **given})]).returncode

    call = random.Random().randrange(1, 13)
    assert worker("unbroken") == 0
    assert worker("broken", kill_at_call=call) == -signal.SIGKILL
    assert not (tmp_path / "broken").exists()
    assert worker("broken", resume=True) == 0
    assert records(tmp_path / "broken.work") == records(tmp_path / "unbroken.work"), f"killed in step {call}"
    left, right = (load_file(tmp_path / name / "tensors.safetensors") for name in ("broken", "unbroken"))
    assert all(torch.equal(left[name], tensor) for name, tensor in right.items()), f"killed in step {call}"


# --- a run that ends before its last step


def ending(work: Path, at: int, *, resume: bool = False, loss=next_token, losses=(9.0, 3.0, 2.0, 5.0)) -> Outcome:
    model = Tiny()
    given = {"label": "test", "evaluate": Scripted(model, list(losses)), "figures": lambda: {"told": 1.0}}
    return train(model, model.trainable(), EndAt(at), loss, settings(), work=work, resume=resume, **given)


def test_a_run_that_is_to_end_keeps_its_best_weights_and_what_was_told(tmp_path, capsys):
    whole = run(tmp_path / "whole", evaluate=Scripted(Tiny(), [9.0, 3.0, 2.0, 5.0, 5.0, 5.0]))
    found = ending(tmp_path / "ended", 9)
    assert (found.steps, found.best_step, found.ended) == (9, 6, "enough")
    assert found.figures()["ended"] == "enough"
    assert "ended" not in whole.figures()
    assert all(torch.equal(found.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert "test: ended after step 9: that is enough; the weights of step 6 are kept" in capsys.readouterr().err
    assert [record["told"] for record in records(tmp_path / "ended")] == [1.0] * 9
    with pytest.raises(Kill):
        ending(tmp_path / "killed", 9, loss=KillAt(8))
    again = ending(tmp_path / "killed", 9, resume=True, losses=[5.0])
    assert again.ended == "enough"
    assert all(torch.equal(again.tensors[name], found.tensors[name]) for name in found.tensors)


def test_a_run_that_is_to_end_before_anything_was_evaluated_fails(tmp_path):
    with pytest.raises(RunFailed, match="that is enough at step 1, before any weights were validated") as caught:
        ending(tmp_path, 1)
    assert caught.value.hint == "ask for less"


def patiently(work, losses, *, patience=3, **given) -> Outcome:
    model = Tiny()
    return run(work, model=model, evaluate=Scripted(model, losses), config=settings(patience=patience), **given)


def test_patience_ends_a_run_and_one_that_is_resumed_ends_alike(tmp_path, capsys):
    losses = [3.0, 2.0, 2.5, 2.1, 2.2, 0.5]
    whole = patiently(tmp_path / "whole", losses)
    assert (whole.steps, whole.best_step, whole.best_loss, whole.ended) == (10, 4, 2.0, "patience")
    assert "3 validation(s) in a row found no lower loss; the weights of step 4" in capsys.readouterr().err
    with pytest.raises(Kill):
        patiently(tmp_path / "killed", losses, loss=KillAt(9))  # the newest checkpoint is of step 6
    assert_same(patiently(tmp_path / "killed", losses[3:], resume=True), whole)

    class Interrupted(Scripted):
        def __call__(self) -> float:
            if self.calls == 4:  # in the very step in which the run is to end
                signal.raise_signal(signal.SIGINT)
            return super().__call__()

    model, config = Tiny(), settings(patience=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "late", model=model, evaluate=Interrupted(model, losses), config=config)
    assert (tmp_path / "late" / "checkpoint-10").is_dir()
    assert_same(patiently(tmp_path / "late", [], resume=True), whole)
    more = patiently(tmp_path / "patient", losses, patience=4)
    assert (more.steps, more.best_step, more.ended) == (12, 12, None)
    assert "patience" not in settings().binding()  # a checkpoint of before knows of none
