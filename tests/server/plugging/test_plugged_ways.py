"""Plugging in, measuring and serving in a way: from the settings to the folder, the registry and the server."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.cli import run as cli
from offsite.errors import ConfigError, DataError
from offsite.evaluation.results import read_results
from offsite.modelling.load import load_model, load_tokenizer
from offsite.text.records import read_files
from server.evaluation.candidates import read_own
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import Ruler, held_out
from server.plugging.adapted import load_adapted, open_adapted
from server.plugging.config import MeasuredWaySettings, PlugConfig
from server.plugging.fit import fit, plug, plugged
from server.plugging.plug import merge, run
from server.plugging.shares import taken
from server.plugging.sparing import public_text
from server.plugging.ways import Way
from server.registry.registry import Registry
from server.serving.config import ServeConfig
from server.serving.serve import load_served, mark_served

WORD = "attention=0.5,mlp=0.75"


@pytest.fixture
def public(tmp_path):
    path = tmp_path / "public.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n} of the public text says {n * n}"}) + "\n" for n in range(40)))
    return path


@pytest.fixture
def plugging(shelve, dropped_package, make_bundle, llama_folder, tmp_path):
    """Return settings of the verb for a bundle of a kind, accepted in a registry of its own."""

    def make(kind="lora", **settings):
        bundle = make_bundle(tmp_path / "bundle", dropped_package, kind=kind, shake=0.2)
        named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf")
        given = {"model": str(llama_folder), "output": tmp_path / "adapted", **named, **settings}
        return bundle, PlugConfig(**given)

    return make


def expected_model(llama_folder, package, bundle, way, public):
    record = read_owner_record(owner_record_path(package.path))
    model = load_model(str(llama_folder), dtype="float32")
    examples, _ = public_text([public], load_tokenizer(str(llama_folder)), limit_tokens=20_000)
    adapter = taken(model, fit(model, read_own(bundle, record), record), way, examples)
    return merge(plug(model, adapter))


@pytest.mark.parametrize("kind", ["lora", "blocks"])
@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_what_is_written_computes_the_way_and_says_it(
    kind, form, plugging, public, dropped_package, llama_folder, logits_of, capsys, tmp_path
):
    way = Way.parse(f"{WORD},spare=0.5")
    bundle, config = plugging(kind, scale=WORD, spare=(public,), spare_half=0.5, merge=form == "merged")
    assert config.way == way
    told = run(config)
    expected = logits_of(expected_model(llama_folder, dropped_package, bundle, way, public))
    manifest = open_adapted(config.output)
    assert (manifest.plugged, manifest.scale, told["way"]) == (way, 1.0, str(way))
    assert manifest.spare_text.startswith("sha256:")
    torch.testing.assert_close(logits_of(load_adapted(config.output)[0]), expected, rtol=0, atol=1e-4)
    if (kind, form) == ("lora", "adapter"):
        vanilla = PeftModel.from_pretrained(load_model(str(llama_folder)), config.output).eval()
        torch.testing.assert_close(logits_of(vanilla), expected, rtol=0, atol=1e-4)
    assert "0.75 of mlp, spared where public text uses" in (config.output / "README.md").read_text()
    assert str(tmp_path) not in (config.output / "offsite.json").read_text() + (config.output / "README.md").read_text()
    assert "0.5 of attention" in capsys.readouterr().err
    assert cli(["inspect", str(config.output)]) == 0
    assert "0.5 of attention, 0.75 of mlp, spared where" in " ".join(capsys.readouterr().err.split())


def test_a_plain_way_leaves_no_trace(plugging):
    _, config = plugging(scale=0.5)
    run(config)
    stated = json.loads((config.output / "offsite.json").read_text())
    assert stated["scale"] == 0.5
    assert not {"way", "spare_text"} & stated.keys()


@pytest.mark.parametrize("other", [{"scale": "mlp=0.5"}, {"scale": 0.5}, {"spare_half": 2.0}, {"spare_tokens": 1}, {}])
def test_a_folder_of_another_way_is_not_taken_for_the_one_that_a_crash_left(other, plugging, public, monkeypatch):
    _, config = plugging(spare=(public,), spare_half=0.5)

    def crash(point):
        if point == "plug-published":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("server.plugging.plug.reach", crash)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    again = config.model_copy(update=other)
    if other:
        with pytest.raises(ConfigError, match="adapted"):
            run(again)
    assert run(config)["way"] == "spare=0.5"
    with Registry.open(config.registry, config.keys) as registry:
        (known,) = registry.ways(config.id, "plugged-in")
        assert known == ("spare=0.5", open_adapted(config.output).spare_text)


def test_the_registry_knows_every_way_once_and_in_which_it_is_served(plugging, tmp_path):
    _, config = plugging(scale=0.5)
    run(config)
    run(config.model_copy(update={"scale": 1.0, "output": tmp_path / "whole"}))
    run(config.model_copy(update={"output": tmp_path / "again"}))
    mark_served(tmp_path / "adapted", config.registry, config.keys, mix=0.7)
    mark_served(tmp_path / "adapted", config.registry, config.keys, mix=0.7)
    with Registry.open(config.registry, config.keys) as registry:
        assert registry.ways(config.id, "plugged-in") == [("1", ""), ("0.5", "")]  # the latest last
        assert registry.ways(config.id, "served") == [("0.5,mix=0.7", "")]
        registry.verify_log()


@pytest.mark.parametrize("kind", ["lora", "blocks"])
def test_a_folder_is_opened_mixed(kind, plugging, llama_folder, logits_of):
    _, config = plugging(kind)
    run(config)
    found = logits_of(load_served(ServeConfig(adapted=config.output, mix=0.7, device="cpu"))[0])
    full, whole = (torch.softmax(logits_of(model), -1) for model in
                   (load_model(str(llama_folder)), load_adapted(config.output)[0]))  # fmt: skip
    torch.testing.assert_close(found.exp(), 0.3 * full + 0.7 * whole, rtol=0, atol=1e-5)


def test_a_merged_folder_cannot_be_mixed(plugging):
    _, config = plugging(merge=True)
    run(config)
    with pytest.raises(ConfigError, match="the full model is not in it"):
        load_adapted(config.output, mix=0.5)


def test_an_evaluation_in_a_way_moves_one_row_alone_and_its_figure_is_of_that_way(
    dropped_package, make_bundle, llama_folder, public, capsys, tmp_path
):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"text": f"patient {n} has a fever and a cough"}) + "\n" for n in range(9)))
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora", shake=0.2)
    words = ["evaluate", str(llama_folder), "--package", str(dropped_package.path), "--bundle", str(bundle.path)]
    words += ["--data", str(heldout), "--block-tokens", "32", "--prompt", "patient 3", "--answer-tokens", "4"]
    way = ["--scale", WORD, "--spare", str(public), "--spare-half", "0.5", "--mix", "0.7"]
    found = {}
    for name, more in (("plain", []), ("way", way)):
        assert cli([*words, *more, "-o", str(tmp_path / name)]) == 0
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    for row in ("zero_shot", "emulator_zero_shot", "emulator_tuned"):
        assert found["plain"][row] == found["way"][row]
    results = read_results(tmp_path / "way")
    assert results.way == found["way"]["way"] == f"{WORD},spare=0.5,mix=0.7"
    assert results.spare_text
    assert "--spare public.jsonl" in results.command
    assert str(tmp_path) not in (tmp_path / "way" / "results.json").read_text()
    stated = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert not {"way", "spare_text"} & stated.keys()
    record = read_owner_record(owner_record_path(dropped_package.path))
    model = load_model(str(llama_folder), dtype="float32")
    examples, digest = public_text([public], load_tokenizer(str(llama_folder)), limit_tokens=20_000)
    assert digest == results.spare_text
    adapter = taken(model, fit(model, read_own(bundle, record), record), Way.parse(results.way), examples)
    given = {"package": dropped_package.path, "bundle": ("none",), "data": (heldout,), "block_tokens": 32}
    config = EvaluateConfig(model=str(llama_folder), output=tmp_path / "none", **given)
    tokenizer = load_tokenizer(str(llama_folder))
    ruler = Ruler(tokenizer, held_out(read_files([heldout]), tokenizer, config)[1])
    with plugged(model, adapter, mix=0.7) as both:
        assert ruler.score(both, "by hand")["perplexity"] == pytest.approx(found["way"]["plugged_in"], rel=1e-5)
    assert found["way"]["plugged_in"] != pytest.approx(found["plain"]["plugged_in"], rel=1e-4)
    assert cli(["report", "run", str(tmp_path / "way"), "-o", str(tmp_path / "way.html")]) == 0
    assert f"<code>{WORD},spare=0.5,mix=0.7</code>" in (tmp_path / "way.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scale", "mlp=2"], "--scale: mlp: expected more than 0 and at most 1, found 'mlp=2'"),
        (["--scale", "mpl=0.5"], "did you mean 'mlp'"),
        (["--scale", "0.5,mlp=0.5"], "not both"),
        (["--scale", "mix=0.5"], "settings of its own"),
        (["--scale", "spare=0.5"], "settings of its own"),
        (["--spare-half", "0.5"], "--spare-half goes with --spare"),
        (["--spare", "public.txt", "--spare-half", "0"], "--spare-half"),
        (["--mix", "0"], "--mix"),
        (["--mix", "1.5"], "--mix"),
    ],
)
@pytest.mark.parametrize("verb", ["plug-in", "evaluate", "audit plugged-in"])
def test_a_way_that_cannot_be_is_refused_in_one_line(verb, words, told, capsys, tmp_path):
    if verb == "plug-in" and "--mix" in words:
        told = "mix"
    given = {
        "plug-in": ["model", "0" * 16, "--registry", "registry"],
        "evaluate": ["model", "--package", "package", "--bundle", "bundle", "--data", "heldout.jsonl"],
        "audit plugged-in": ["model", "0" * 16, "--registry", "r", "--commitment", "c", "--reveal", "r"],
    }[verb]
    assert cli([*verb.split(), *given, "-o", str(tmp_path / "out"), *words]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n") <= 2) == ("", True)
    assert told in shown.err


def test_settings_say_the_way():
    class Settings(MeasuredWaySettings):
        verb = "none"

    assert Settings().way.is_plain
    assert Settings(scale=0.5).way == Way(0.5)
    assert Settings(scale=1).way == Way()
    assert Settings(scale="mlp=0.5,attention=1", mix=0.5).way == Way.parse("mlp=0.5,mix=0.5")


@pytest.mark.parametrize(("kind", "settings", "told"), [
    ("dora", {"scale": "mlp=0.5"}, "whole or not"),
    ("dora", {"spare": True}, "whole or not"),
    ("bitfit", {"spare": True}, "changes no matrix"),
    ("lora", {"scale": "middle=0.5"}, "the adapter changes nothing there"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_plugged_in_that_way_leaves_nothing(kind, settings, told, plugging, public):
    settings = {name: (public,) if name == "spare" else value for name, value in settings.items()}
    _, config = plugging(kind, **settings)
    with pytest.raises(ConfigError, match=told):
        run(config)
    assert not config.output.exists()
    (public.parent / "empty.txt").write_text("")
    with pytest.raises((ConfigError, DataError)):
        run(config.model_copy(update={"spare": (public.parent / "empty.txt",)}))
