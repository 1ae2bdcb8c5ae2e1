import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from emulator.compression.compress import Recipe, compress
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run
from emulator.distillation.imitation import distill
from emulator.distillation.objective import Pair, Weights, measure
from emulator.distillation.public import prepare
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.config import build
from offsite.digests import model_digest
from offsite.errors import ConfigError, DataError, OffsiteError, UnsupportedModel
from offsite.modelling.load import load_model
from offsite.modelling.split import make_plan
from offsite.text.records import read_records
from offsite.training.config import LoopConfig
from offsite.training.processes import Processes

ONE = Processes(0, 1, torch.device("cpu"), True)
SMALL = {"batch_size": "4", "block_tokens": "16", "bottom": "1", "top": "1", "precision": "fp32", "device": "cpu"}
SHORT = {**SMALL, "steps": "6", "warmup_steps": "1", "holdout": "0.2", "checkpoint_every": "2", "evaluate_every": "3"}


def settings(model: Path, output: Path, **changes: object) -> DistillConfig:
    flags = {"model": str(model), "output": str(output), **SHORT, **changes}
    return build(DistillConfig, flags={key: value for key, value in flags.items() if value is not None})


@pytest.fixture
def text(tiny, tokenizer, public_file):
    return prepare(
        read_records(public_file),
        tokenizer,
        tiny("llama"),
        block_tokens=16,
        batch_size=8,
        seed=0,
        holdout=0.2,
        evaluation_tokens=512,
        calibration_tokens=512,
    )


@pytest.mark.parametrize(("method", "recipe"), [("drop", {"blocks": 2}), ("width", {"width": 0.25})])
def test_distilling_brings_the_emulator_closer(tiny, text, tmp_path: Path, method: str, recipe: dict) -> None:
    full = tiny("llama")
    plan = make_plan(full, num_bottom=1, num_top=1)
    digest = model_digest(full)
    compressed = compress(full, plan, method, Recipe(**recipe, calibration=text.calibration))
    before = measure(Pair(full, compressed.model, plan, compressed.kept), text.held_out, ONE)
    loop = LoopConfig(steps=60, learning_rate=3e-3, precision="fp32", evaluate_every=20)
    done = distill(full, compressed, plan, text, loop, weights=Weights(), work=tmp_path / "work")
    after = measure(Pair(full, compressed.model, plan, compressed.kept), text.held_out, ONE)
    assert after.kl < 0.8 * before.kl
    assert after.hidden < before.hidden
    assert after == done.fidelity
    assert after.kl == done.outcome.best_loss
    assert model_digest(full) == digest  # nothing of the full model was trained


def test_only_the_middle_is_trained(tiny, text, tmp_path: Path) -> None:
    full = tiny("llama")
    plan = make_plan(full, num_bottom=1, num_top=1)
    compressed = compress(full, plan, "drop", Recipe(blocks=2))
    loop = LoopConfig(steps=2, precision="fp32")
    done = distill(full, compressed, plan, text, loop, weights=Weights(), work=tmp_path / "work")
    assert {name.split(".")[2] for name in done.outcome.tensors} == {"1", "2"}
    theirs = dict(full.named_parameters())
    for name, parameter in compressed.model.named_parameters():
        if name not in done.outcome.tensors:
            old = name.replace("layers.3.", "layers.5.")
            assert parameter.data_ptr() == theirs[old].data_ptr()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "keep-all", "steps": "0"},
        {"method": "drop", "blocks": "3", "steps": "0", "public": None},
        {"method": "drop", "blocks": "2", "choice": "influence"},
        {"method": "width", "width": "0.5"},
    ],
)
def test_the_verb_writes_a_package_that_opens(model_folder, public_file, tmp_path: Path, changes: dict) -> None:
    out = tmp_path / "package"
    result = run(settings(model_folder, out, **{"public": str(public_file), **changes}))
    package = open_package(out)
    assert result["package"] == "package"
    assert result["package_digest"] == package.digest
    assert result["package_bytes"] == package.num_bytes
    assert json.loads(json.dumps(result, allow_nan=False)) == json.loads(json.dumps(result))
    assert package.manifest.base_digest == model_digest(load_model(str(model_folder)))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.isfinite(package.load_model()(ids).logits).all()
    trained = int(changes.get("steps", SHORT["steps"]))
    assert result["steps"] == trained
    left = {"package", "package.owner.json"} | ({"package.log.jsonl"} if trained else set())
    assert {path.name for path in tmp_path.iterdir()} == left
    if trained:
        assert len((tmp_path / "package.log.jsonl").read_text().splitlines()) == trained
        assert package.manifest.figures["held_out_kl"] == pytest.approx(result["held_out_kl"], rel=1e-5)


@pytest.mark.parametrize("changes", [{"field_text": True}, {"pack": "nf4"}])
def test_a_checkpoint_of_bfloat16_is_distilled_in_bfloat16(model_folder, public_file, tmp_path: Path, changes) -> None:
    """Its ends stay as they are, its middle is trained in float32: whatever looks at both computes in one dtype."""
    load_model(str(model_folder)).bfloat16().save_pretrained(tmp_path / "half")
    for path in model_folder.glob("*token*"):
        (tmp_path / "half" / path.name).write_bytes(path.read_bytes())
    changes = {name: str(public_file) if value is True else value for name, value in changes.items()}
    given = {
        "public": str(public_file),
        "method": "width",
        "width": "0.5",
        "precision": "bf16",
        "steps": "2",
        **changes,
    }
    result = run(settings(tmp_path / "half", tmp_path / "package", **given))
    assert result["steps"] == 2
    with torch.no_grad():
        logits = open_package(tmp_path / "package").load_model()(torch.arange(3, 15)[None]).logits
    assert torch.isfinite(logits).all()


def test_a_package_that_keeps_all_is_the_model_bit_for_bit(model_folder, tmp_path: Path) -> None:
    run(settings(model_folder, tmp_path / "package", method="keep-all", steps="0"))
    full, package = load_model(str(model_folder)), open_package(tmp_path / "package")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(package.load_model()(ids).logits, full(ids).logits)


def test_numbers_of_the_full_model_stay_with_the_owner(model_folder, public_file, tmp_path: Path) -> None:
    out = tmp_path / "package"
    changes = {"method": "drop", "blocks": "2", "public": str(public_file), "licence": "CC0"}
    terms = tmp_path / "terms.txt"
    terms.write_text("for this study only")
    run(settings(model_folder, out, **changes, terms=str(terms)))
    record = read_owner_record(owner_record_path(out))
    assert record.kept == (0, 1, 4, 5)
    assert record.num_blocks == 6
    manifest = json.loads((out / "offsite.json").read_text())
    assert (manifest["licence"], manifest["terms"]) == ("CC0", "for this study only")
    assert manifest["method"] == {"name": "drop", "settings": {"blocks": 2}}
    stated = {"distillation_steps", "distillation_tokens", "held_out_kl", "held_out_hidden_error"}
    assert set(manifest["figures"]) == stated
    for path in out.iterdir():
        raw = path.read_bytes()
        assert b"layers.5" not in raw
        assert b"layers.4" not in raw
        assert b"tiny-llama" not in raw
        assert str(tmp_path).encode() not in raw
        assert b"kept" not in raw
        assert b"channels" not in raw


def test_kept_channels_stay_with_the_owner(model_folder, public_file, tmp_path: Path) -> None:
    out = tmp_path / "package"
    run(settings(model_folder, out, method="width", width="0.5", steps="0", public=str(public_file)))
    record = read_owner_record(owner_record_path(out))
    assert {role: len(kept) for role, kept in record.channels.items()} == {f"middle.{i}": 32 for i in range(4)}
    manifest = (out / "offsite.json").read_text()
    for kept in record.channels.values():
        assert ", ".join(map(str, kept[:4])) not in re.sub(r"\s+", " ", manifest)


def test_unequal_widths_and_a_variant_are_of_the_owner_alone(model_folder, public_file, tmp_path: Path) -> None:
    """The package opens at the client with its own widths; the average is told; which variant, only the record says."""
    flags = {"width": "0.25", "steps": "0", "public": str(public_file)}
    usual = run(settings(model_folder, tmp_path / "usual", **flags))
    flags |= {"wider": "2-3:0.5", "variant": "40961", "variant_noise": "0.75", "refit_jacobian": "0.1", "seed": "0"}
    found = run(settings(model_folder, tmp_path / "package", **flags))
    assert (usual["width"], found["width"]) == (0.25, 0.375)
    package = open_package(tmp_path / "package")
    assert package.manifest.method.settings == {"width": 0.375}
    widths = [block.mlp.down_proj.in_features for block in package.load_model().model.layers]
    assert widths == [64, 16, 32, 32, 16, 64]
    for path in (tmp_path / "package").rglob("*"):
        if path.is_file() and path.suffix == ".json" and "tokenizer" not in path.name:
            assert "40961" not in path.read_text()
            assert "variant" not in path.read_text()
    assert read_owner_record(owner_record_path(tmp_path / "package")).variant == 40961
    record = owner_record_path(tmp_path / "usual")
    assert read_owner_record(record).variant == 0
    assert "variant" not in record.read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"wider": "0-3:0.5", "width": "0.25"},
            ConfigError,
            "--wider names block 0, expected blocks of the middle: 1 to 4",
        ),
        ({"method": "drop", "blocks": "5"}, ConfigError, "keep 5 blocks of the middle, which has 4"),
        ({"bottom": "3", "top": "3"}, ConfigError, "no middle"),
        ({"public": "nowhere.txt"}, DataError, "nowhere.txt"),
        ({"model": "nowhere/at/all"}, ConfigError, "nowhere"),
        ({"block_tokens": "65"}, ConfigError, "context is 64"),
        ({"terms": "nowhere.txt"}, ConfigError, "cannot read terms 'nowhere.txt'"),
    ],
)
def test_what_is_wrong_leaves_nothing(model_folder, public_file, tmp_path: Path, changes, error, message) -> None:
    flags = {"public": str(public_file), **changes}
    model = flags.pop("model", str(model_folder))
    with pytest.raises(error, match=message) as caught:
        run(settings(model, tmp_path / "package", **flags))
    assert isinstance(caught.value, OffsiteError)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_of_experts_is_narrowed_and_distilled(tiny, tokenizer, public_file, tmp_path: Path) -> None:
    folder = tmp_path / "experts"
    tiny("mixtral").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run(settings(folder, tmp_path / "package", public=str(public_file), width="0.5"))
    model = open_package(tmp_path / "package").load_model()
    widths = [block.mlp.experts.down_proj.shape[2] for block in model.model.layers]
    assert widths == [64, 32, 32, 32, 32, 64]
    record = read_owner_record(owner_record_path(tmp_path / "package"))
    assert {name: len(lists) for name, lists in record.experts.items()} == {
        f"middle.{number}.mlp.experts": 4 for number in range(4)
    }


def test_an_mlp_with_a_norm_along_its_channels_is_refused(tiny, tokenizer, public_file, tmp_path: Path) -> None:
    folder = tmp_path / "normed"
    tiny("bitnet").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="not a linear's"):
        run(settings(folder, tmp_path / "package", public=str(public_file)))


def test_a_tokenizer_of_another_model_is_refused(tiny, tokenizer, public_file, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    tiny("llama", vocab_size=50).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="the model knows 50"):
        run(settings(folder, tmp_path / "package", public=str(public_file)))


def test_existing_output_and_unfinished_work_are_not_touched(model_folder, public_file, tmp_path: Path) -> None:
    out = tmp_path / "package"
    (tmp_path / "package.work").mkdir()
    (tmp_path / "package.work" / "checkpoint").write_text("x")
    with pytest.raises(ConfigError, match="unfinished run"):
        run(settings(model_folder, out, public=str(public_file)))
    out.mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        run(settings(model_folder, out, public=str(public_file)))


def test_resuming_another_run_is_refused(model_folder, public_file, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "package"
    monkeypatch.setattr("emulator.distillation.distill.publish", _full_disk)
    with pytest.raises(OffsiteError, match="disk is full"):
        run(settings(model_folder, out, public=str(public_file)))
    assert (tmp_path / "package.work").is_dir()
    for changes in ({"kl_weight": "2"}, {"width": "0.5"}, {"block_tokens": "8"}, {"learning_rate": "1e-2"}):
        with pytest.raises(ConfigError):
            run(settings(model_folder, out, public=str(public_file), resume=True, **changes))
    monkeypatch.undo()
    result = run(settings(model_folder, out, public=str(public_file), resume=True))
    assert result["steps"] == 6
    assert not (tmp_path / "package.work").exists()


def _full_disk(*_: object, **__: object) -> None:
    raise OffsiteError("the disk is full")


def command(model: Path, output: Path, public: Path, **changes: str) -> list[str]:
    flags = {**SHORT, "public": str(public), **changes}
    words = [f"{key}={value}" for key, value in flags.items()]
    return [sys.executable, "-m", "offsite", "distill", str(model), *words, "-o", str(output)]


def figures(ended: "subprocess.CompletedProcess[str]") -> dict[str, object]:
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    return {key: found[key] for key in found if key not in _TIMED}


_TIMED = {"seconds", "tokens_per_second", "peak_bytes", "package"}


@pytest.mark.slow
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_killed_and_resumed_is_an_unbroken_run(model_folder, public_file, tmp_path: Path, draw: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    long = {"steps": "40", "checkpoint_every": "3", "evaluate_every": "10"}
    whole = command(model_folder, tmp_path / "whole", public_file, **long)
    wanted = figures(subprocess.run(whole, capture_output=True, text=True, env=environment, check=False))

    broken = command(model_folder, tmp_path / "broken", public_file, **long)
    process = subprocess.Popen(broken, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    log, kill_after = tmp_path / "broken.work" / "log.jsonl", 5 + 11 * draw
    while not (log.exists() and log.read_bytes().count(b"\n") >= kill_after):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken").exists()

    again = subprocess.run([*broken, "--resume"], capture_output=True, text=True, env=environment, check=False)
    assert figures(again) == wanted
    assert not (tmp_path / "broken.work").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken.log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"method": "drop", "blocks": "2"}, {"method": "width", "width": "0.5"}])
def test_two_processes_equal_one(model_folder, public_file, tmp_path: Path, method: dict[str, str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    every = {**method, "kl_share": "1.0", "cache_bytes": "0"}  # several processes keep no states, which are rounded
    one = command(model_folder, tmp_path / "one", public_file, **every)
    two = [*command(model_folder, tmp_path / "two", public_file, **every), "--launch", "2"]
    wanted = figures(subprocess.run(one, capture_output=True, text=True, env=environment, check=False))
    found = figures(subprocess.run(two, capture_output=True, text=True, env=environment, check=False))
    assert found["held_out_kl"] == pytest.approx(wanted["held_out_kl"], rel=1e-4)
    assert found["final_loss"] == pytest.approx(wanted["final_loss"], rel=1e-4)
    first, second = (open_package(tmp_path / name).load_model().state_dict() for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_error_in_several_processes_is_one_line(model_folder, public_file, tmp_path: Path) -> None:
    words = command(model_folder, tmp_path / "out", public_file, method="drop", blocks="9")
    ended = subprocess.run([*words, "--launch", "2"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    lines = [line for line in ended.stderr.splitlines() if "error" in line]
    assert lines == ["offsite: error: asked to keep 9 blocks of the middle, which has 4"]
    assert list(tmp_path.iterdir()) == []


def _narrowed(monkeypatch: pytest.MonkeyPatch, *, stop_at: int | None = None) -> list[int]:
    """Count the blocks whose channels are chosen; Ctrl-C comes while block number `stop_at` is refitted."""
    from emulator.compression import compress as module

    done: list[int] = []
    made = module.refit

    def refit(*words: object) -> None:
        if len(done) == stop_at:
            raise KeyboardInterrupt
        made(*words)
        done.append(len(done))

    monkeypatch.setattr(module, "refit", refit)
    return done


@pytest.mark.parametrize("steps", ["0", "2"])
def test_choosing_channels_goes_on_where_it_was_broken_off(
    model_folder, public_file, tmp_path: Path, monkeypatch, steps: str
) -> None:
    given = {"public": str(public_file), "steps": steps, "width": "0.5"}
    with monkeypatch.context() as patched:
        everything = _narrowed(patched)
        whole = run(settings(model_folder, tmp_path / "whole", **given))
    with monkeypatch.context() as patched:
        _narrowed(patched, stop_at=1)
        with pytest.raises(KeyboardInterrupt):
            run(settings(model_folder, tmp_path / "broken", **given))
    assert len(list((tmp_path / "broken.work" / "compression").iterdir())) == 1
    with pytest.raises(ConfigError, match="unfinished run"):
        run(settings(model_folder, tmp_path / "broken", **given))
    with monkeypatch.context() as patched:
        rest = _narrowed(patched)
        again = run(settings(model_folder, tmp_path / "broken", **given, resume=True))
    assert len(rest) == len(everything) - 1
    assert again["package_digest"] == whole["package_digest"]
    assert not (tmp_path / "broken.work").exists()


@pytest.fixture(scope="module")
def one_block_chosen(model_folder, public_file, tmp_path_factory) -> Path:
    """A folder where a run to `out` was broken off with one block's channels chosen; copied, never used in place."""
    folder = tmp_path_factory.mktemp("chosen")
    with pytest.MonkeyPatch.context() as patched:
        _narrowed(patched, stop_at=1)
        with pytest.raises(KeyboardInterrupt):
            run(settings(model_folder, folder / "out", public=str(public_file), steps="0", width="0.5"))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"width": "0.25"},
        {"channels": "activation"},
        {"calibration_tokens": "16"},
        {"wider": "1:0.75"},
        {"variant": "1"},
        {"refit_jacobian": "0.1"},
        {"channels": "gradot"},
    ],
)
def test_blocks_chosen_under_other_settings_are_chosen_again(
    model_folder, public_file, one_block_chosen, tmp_path: Path, change: dict[str, str]
) -> None:
    given = {"public": str(public_file), "steps": "0", "width": "0.5"}
    shutil.copytree(one_block_chosen, tmp_path, dirs_exist_ok=True)
    found = run(settings(model_folder, tmp_path / "out", resume=True, **{**given, **change}))
    assert (
        found["package_digest"]
        == run(settings(model_folder, tmp_path / "new", **{**given, **change}))["package_digest"]
    )


def test_a_kept_block_that_cannot_be_read_is_chosen_again(
    model_folder, public_file, tmp_path: Path, monkeypatch
) -> None:
    given = {"public": str(public_file), "steps": "0", "width": "0.5"}
    with monkeypatch.context() as patched:
        _narrowed(patched, stop_at=1)
        with pytest.raises(KeyboardInterrupt):
            run(settings(model_folder, tmp_path / "out", **given))
    (kept,) = (tmp_path / "out.work" / "compression").iterdir()
    kept.write_bytes(kept.read_bytes()[:40])
    found = run(settings(model_folder, tmp_path / "out", resume=True, **given))
    assert found["package_digest"] == run(settings(model_folder, tmp_path / "new", **given))["package_digest"]


def test_progress_is_told_from_the_beginning(model_folder, public_file, tmp_path: Path, capsys) -> None:
    run(settings(model_folder, tmp_path / "package", public=str(public_file), steps="0", width="0.5"))
    told = capsys.readouterr().err
    places = [
        told.index(part) for part in ("loading", "reading the public text", "reading calibration text", "choosing")
    ]
    assert places == sorted(places)
