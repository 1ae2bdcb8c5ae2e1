"""Plugging in a share of an adapter's update: W + scale (W' - W), for every kind that has one."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from offsite.artefacts.owner import DialFigures, Dialled, owner_record_path, read_owner_record
from offsite.cli import run as cli
from offsite.errors import ConfigError
from offsite.evaluation.results import read_results
from offsite.modelling.load import load_model
from server.evaluation.candidates import read_own
from server.plugging.adapted import load_adapted, open_adapted
from server.plugging.config import PlugConfig
from server.plugging.fit import fit, full_name, plug, plugged
from server.plugging.plug import merge, run

LINEAR = ["lora", "rslora", "blocks", "bitfit"]
SHARE = 0.3


@pytest.fixture
def bundle_of(dropped_package, make_bundle, tmp_path):
    def make(kind, **spec):
        return make_bundle(tmp_path / "bundle", dropped_package, kind=kind, **spec)

    return make


def weights_by_hand(folder, package, bundle, share):
    """The full model with every weight moved `share` of the way to where the whole adapter takes it."""
    record = read_owner_record(owner_record_path(package.path))
    whole = load_model(str(folder), dtype="float32")
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    after = merge(plug(whole, fit(whole, read_own(bundle, record), record))).state_dict()
    model = load_model(str(folder), dtype="float32")
    model.load_state_dict({name: value + share * (after[name] - value) for name, value in before.items()})
    return model.eval()


@pytest.mark.parametrize("kind", LINEAR)
def test_every_weight_goes_that_share_of_the_way(
    kind, plug_in, bundle_of, dropped_package, llama_folder, logits_of, tmp_path
):
    bundle = bundle_of(kind)
    expected = logits_of(weights_by_hand(llama_folder, dropped_package, bundle, SHARE))
    whole = logits_of(weights_by_hand(llama_folder, dropped_package, bundle, 1))
    assert not torch.allclose(whole, expected, atol=1e-2)
    given = {"package": dropped_package.path, "scale": SHARE}
    found = plug_in(llama_folder, bundle, tmp_path / "adapted", **given)
    assert found["scale"] == open_adapted(tmp_path / "adapted").scale == SHARE
    loaded, _ = load_adapted(tmp_path / "adapted")
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-4)
    plug_in(llama_folder, bundle, tmp_path / "merged", merge=True, **given)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_finds_the_share_in_alpha_and_the_tensors_as_they_came(
    kind, plug_in, bundle_of, dropped_package, llama_folder, logits_of, tmp_path
):
    bundle = bundle_of(kind, alpha=8.0)
    for name, scale in (("half", 0.5), ("whole", 1.0)):
        plug_in(llama_folder, bundle, tmp_path / name, package=dropped_package.path, scale=scale)
    alpha = {name: json.loads((tmp_path / name / "adapter_config.json").read_text())["lora_alpha"] for name in
             ("half", "whole")}  # fmt: skip
    assert alpha == {"half": 4, "whole": 8}
    raw = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("half", "whole")]
    assert raw[0] == raw[1]
    vanilla = PeftModel.from_pretrained(load_model(str(llama_folder)), tmp_path / "half").eval()
    expected = logits_of(weights_by_hand(llama_folder, dropped_package, bundle, 0.5))
    torch.testing.assert_close(logits_of(vanilla), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["blocks", "bitfit"])
def test_a_share_of_a_small_update_is_not_lost_in_bfloat16(
    kind, plug_in, bundle_of, dropped_package, llama_folder, tmp_path
):
    """The update is about as small as a step of bfloat16: rounded to it, half of it would be all or nothing."""
    bundle = bundle_of(kind, dtype="bfloat16", shake=3e-4)
    record = read_owner_record(owner_record_path(dropped_package.path))
    full = load_model(str(llama_folder))
    whole, half = (fit(full, read_own(bundle, record), record, scale=scale) for scale in (1, 0.5))
    state = full.state_dict()
    for name, tensor in half.tensors.items():
        before = state[full_name(name, half.sites)]
        torch.testing.assert_close(tensor - before, (whole.tensors[name].float() - before) / 2, rtol=0, atol=1e-6)
    plug_in(llama_folder, bundle, tmp_path / "adapted", package=dropped_package.path, scale=0.5)
    loaded = load_adapted(tmp_path / "adapted")[0].state_dict()
    for name, tensor in half.tensors.items():
        assert torch.equal(loaded[full_name(name, half.sites)], tensor)


def test_lifted_lora_is_scaled_too(narrow_package, full_llama, make_bundle, logits_of, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", narrow_package, kind="lora", placement="all", rank=4)
    record = read_owner_record(owner_record_path(narrow_package.path))
    adapter = fit(full_llama, read_own(bundle, record), record, scale=SHARE)
    whole = fit(full_llama, read_own(bundle, record), record)
    assert adapter.spec.alpha == pytest.approx(SHARE * whole.spec.alpha)
    assert adapter.tensors["middle.0.mlp.down_proj.lora_A"].shape == (4, 48)
    before = logits_of(full_llama)
    with plugged(full_llama, whole) as model:
        most = (logits_of(model) - before).abs().mean()
    with plugged(full_llama, adapter) as model:
        some = (logits_of(model) - before).abs().mean()
    assert 0 < some < most


def test_dora_is_plugged_in_whole_or_not(plug_in, bundle_of, dropped_package, llama_folder, tmp_path):
    bundle = bundle_of("dora")
    with pytest.raises(ConfigError, match="a dora adapter is plugged in whole or not"):
        plug_in(llama_folder, bundle, tmp_path / "adapted", package=dropped_package.path, scale=0.5)
    assert not (tmp_path / "adapted").exists()
    assert plug_in(llama_folder, bundle, tmp_path / "adapted", package=dropped_package.path)["scale"] == 1


def test_the_share_that_was_rehearsed_is_taken_unless_another_is_given(
    plug_in, make_bundle, dropped_package, llama_folder, tmp_path, capsys, monkeypatch
):
    lora, dora = (make_bundle(tmp_path / kind, dropped_package, kind=kind) for kind in ("lora", "dora"))
    figures = DialFigures(recovery=0.8, recovery_nats=0.8, withheld=0.3, gap=1.5, num_bytes=9)
    dial = Dialled(target="gap", value=1.5, method="drop", size=0.5, predicted=figures, measured=figures, scale=0.75,
                   exploration="sha256:" + "0" * 64)  # fmt: skip
    record = read_owner_record(owner_record_path(dropped_package.path))
    monkeypatch.setattr("server.plugging.plug.read_owner_record", lambda _: record.model_copy(update={"dial": dial}))
    given = {"package": dropped_package.path}
    assert plug_in(llama_folder, lora, tmp_path / "adapted", **given)["scale"] == 0.75
    assert "0.75 of the update, as was rehearsed" in capsys.readouterr().err
    assert plug_in(llama_folder, lora, tmp_path / "whole", scale=1.0, **given)["scale"] == 1
    assert plug_in(llama_folder, dora, tmp_path / "dora-whole", **given)["scale"] == 1
    assert "rehearsed" not in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["0", "-1", "1.5", "nan", "half"])
@pytest.mark.parametrize("verb", ["plug-in", "evaluate"])
def test_a_share_is_more_than_nothing_and_at_most_all(verb, scale, capsys, tmp_path):
    words = {
        "plug-in": ["model", "0" * 16, "--registry", "registry"],
        "evaluate": ["model", "--package", "package", "--bundle", "bundle", "--data", "heldout.jsonl"],
    }[verb]
    assert cli([verb, *words, "-o", str(tmp_path / "out"), "--scale", scale]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n") <= 2, "--scale" in shown.err) == ("", True, True)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_share_is_not_taken_for_the_one_that_a_crash_left(
    shelve, bundle_of, dropped_package, llama_folder, monkeypatch, tmp_path
):
    named = shelve(bundle_of("lora").path, dropped_package.path, tmp_path / "shelf")
    config = PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", scale=0.5, **named)

    def crash(point):
        if point == "plug-published":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("server.plugging.plug.reach", crash)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    with pytest.raises(ConfigError, match="adapted"):
        run(config.model_copy(update={"scale": 1.0}))
    assert run(config)["scale"] == 0.5


def test_evaluating_at_a_share_moves_one_row_alone(
    bundle_of, dropped_package, whole_package, llama_folder, make_bundle, capsys, tmp_path
):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"text": f"patient {n} has a fever and a cough"}) + "\n" for n in range(9)))
    bundle, reference = bundle_of("lora"), make_bundle(tmp_path / "r", whole_package, kind="lora", placement="all")
    words = ["evaluate", str(llama_folder), "--package", str(dropped_package.path), "--bundle", str(bundle.path)]
    words += ["--reference", f"lora_full={reference.path}", "--reference-package", str(whole_package.path)]
    words += ["--data", str(heldout), "--block-tokens", "32"]
    found = {}
    for scale in ("1", "0.5"):
        assert cli([*words, "--scale", scale, "-o", str(tmp_path / scale)]) == 0
        shown = capsys.readouterr()
        found[scale] = json.loads(shown.out.splitlines()[-1])
        assert ("0.5 of its update plugged in" in " ".join(shown.err.split())) == (scale == "0.5")
    for row in ("zero_shot", "emulator_zero_shot", "emulator_tuned", "lora_full"):
        assert found["1"][row] == found["0.5"][row]
    assert found["1"]["plugged_in"] != found["0.5"]["plugged_in"]
    results = read_results(tmp_path / "0.5")
    assert results.scale == found["0.5"]["scale"] == 0.5
    assert "--scale 0.5" in results.command
    assert "--scale 1.0" in read_results(tmp_path / "1").command  # typed, so a share that was rehearsed is not taken
    for scale, part in (("1", "put it into the full model"), ("0.5", "put 0.5 of its update into the full model")):
        assert cli(["report", "run", str(tmp_path / scale), "-o", str(tmp_path / f"{scale}.html")]) == 0
        assert part in (tmp_path / f"{scale}.html").read_text()


def test_bundles_that_cannot_be_scaled_are_refused_before_any_model_is_loaded(
    bundle_of, dropped_package, monkeypatch, capsys, tmp_path
):
    (tmp_path / "heldout.txt").write_text("fever\n")
    monkeypatch.setattr("server.evaluation.evaluate.load_model", None)
    bundle = bundle_of("dora")
    words = ["evaluate", "model", "--package", str(dropped_package.path), "--bundle", str(bundle.path)]
    assert cli([*words, "--data", str(tmp_path / "heldout.txt"), "-o", str(tmp_path / "out"), "--scale", "0.5"]) == 2
    assert "a dora adapter is plugged in whole or not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
