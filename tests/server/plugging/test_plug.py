"""Plugging in: exact on every architecture and kind, vanilla peft agrees, and no bad bundle gets through."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from offsite import cli, faults
from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.digests import model_digest
from offsite.errors import (
    BadDigest,
    BadSchema,
    ConfigError,
    NotFinite,
    RunFailed,
    WrongBinding,
    WrongNames,
    WrongShape,
)
from offsite.modelling.load import load_model
from server.evaluation.candidates import read_own
from server.plugging.adapted import load_adapted
from server.plugging.config import PlugConfig
from server.plugging.fit import fit, plug, plugged
from server.plugging.merging import write_checkpoint
from server.plugging.plug import merge, run
from server.plugging.probe import deviation
from server.registry.registry import Registry

SMALL = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
FOR_OTHERS = ("README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
ARCHITECTURES = {
    "llama": GROUPED,
    "gpt2": {**SMALL, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "n_inner": 48},
    "qwen3": GROUPED,
    "gpt_neox": {**WIDE, "max_position_embeddings": 64, "attention_bias": True},
    "mixtral": {**GROUPED, "num_local_experts": 4},
}


def tiny(architecture, **changes):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def owner_side(tmp_path_factory, make_package, save_model):
    """Per architecture: (checkpoint folder, package without block 3)."""
    made = {}

    def get(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            save_model(tiny(architecture), folder / "base")
            model = load_model(str(folder / "base"))
            made[architecture] = (folder / "base", make_package(folder / "package", model=model, kept=(0, 1, 2, 4, 5)))
        return made[architecture]

    return get


def with_blocks_by_hand(full, package, tensors):
    """The full model with the bundle's tensors copied in by a loop written here, for whole-parameter kinds."""
    record = read_owner_record(owner_record_path(package.path))
    model = load_model(str(full), dtype="float32")
    state = model.state_dict()
    for name, tensor in tensors.items():
        role, number, inner = name.split(".", 2)
        place = list(record.layout.blocks).index(f"{role}.{number}")
        state[f"{record.layout.stack}.{record.kept[place]}.{inner}"].copy_(tensor)
    return model


@pytest.mark.parametrize(  # rslora is named for peft as lora is
    ("architecture", "kind"), [*itertools.product(ARCHITECTURES, ("lora", "dora")), ("llama", "rslora")]
)
def test_vanilla_peft_opens_the_folder_on_the_right_blocks(
    plug_in, architecture, kind, owner_side, make_bundle, logits_of, tmp_path
):
    full, package = owner_side(architecture)
    targets = "attention" if architecture == "mixtral" else "all-linear"
    bundle = make_bundle(tmp_path / "bundle", package, kind=kind, targets=targets, rank=3)
    result = plug_in(full, bundle, tmp_path / "adapted", package=package.path)
    assert result["form"] == "peft"

    model = load_model(str(full))
    before = logits_of(model)
    record = read_owner_record(owner_record_path(package.path))
    with plugged(model, fit(model, read_own(bundle, record), record)) as carrying:
        ours = logits_of(carrying)
    assert deviation(ours, before) > 1e-2  # the adapter does something
    assert torch.equal(logits_of(model), before)  # and was taken off again

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        vanilla = PeftModel.from_pretrained(load_model(str(full)), tmp_path / "adapted").eval()
    torch.testing.assert_close(logits_of(vanilla), ours, rtol=0, atol=1e-5)
    reached = {int(n.split(".layers.")[-1].split(".h.")[-1].split(".")[0]) for n, _ in lora_modules(vanilla)}
    assert reached == {0, 1, 4, 5}  # of six: never the package's own 3 and 4

    loaded, tokenizer = load_adapted(tmp_path / "adapted")
    torch.testing.assert_close(logits_of(loaded), ours, rtol=0, atol=1e-6)
    assert tokenizer("fever")["input_ids"]


def lora_modules(model):
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize(
    ("architecture", "targets", "form"),
    [
        ("llama", "all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("llama", "attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("gpt2", "all-linear", ["c_attn", "c_fc", "c_proj"]),
        ("gpt2", "mlp", ["mlp.c_fc", "mlp.c_proj"]),  # plain c_proj would reach attention's too
    ],
)
def test_the_peft_folder_names_its_targets_as_vllm_reads_them(
    plug_in, architecture, targets, form, owner_side, make_bundle, tmp_path
):
    full, package = owner_side(architecture)
    bundle = make_bundle(tmp_path / "bundle", package, kind="lora", targets=targets)
    plug_in(full, bundle, tmp_path / "adapted", package=package.path)
    config = json.loads((tmp_path / "adapted" / "adapter_config.json").read_text())
    assert config["target_modules"] == form
    assert config["layers_to_transform"] == [0, 1, 4, 5]
    assert config["layers_pattern"] == ("h" if architecture == "gpt2" else "layers")
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    assert config["base_model_name_or_path"] == "base"
    assert sorted(path.name for path in (tmp_path / "adapted").iterdir()) == sorted(
        ["adapter_config.json", "adapter_model.safetensors", "offsite.json", *FOR_OTHERS]
    )


def test_targets_that_differ_between_blocks_are_named_in_full(full_llama):
    from adapters.targets import peft_targets

    modules = ["model.layers.0.self_attn.q_proj", "model.layers.5.mlp.up_proj"]
    assert peft_targets(full_llama, modules) == {
        "target_modules": modules,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


@pytest.mark.parametrize("kind", ["blocks", "bitfit"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_whole_parameters_land_where_a_loop_by_hand_puts_them(
    plug_in, architecture, kind, owner_side, make_bundle, logits_of, tmp_path
):
    full, package = owner_side(architecture)
    bundle = make_bundle(tmp_path / "bundle", package, kind=kind)
    result = plug_in(full, bundle, tmp_path / "adapted", package=package.path)
    assert result["form"] == "own"
    names = {path.name for path in (tmp_path / "adapted").iterdir()}
    assert names == {"adapter.safetensors", "offsite.json", *FOR_OTHERS}
    by_hand = with_blocks_by_hand(full, package, load_file(bundle.path / "adapter.safetensors"))
    loaded, _ = load_adapted(tmp_path / "adapted")
    assert torch.equal(logits_of(loaded), logits_of(by_hand))
    stored = load_file(tmp_path / "adapted" / "adapter.safetensors")
    assert stored.keys() <= by_hand.state_dict().keys()
    assert not torch.equal(logits_of(loaded), logits_of(load_model(str(full))))


@pytest.mark.parametrize("kind", ["blocks", "lora", "rslora", "dora", "bitfit"])
def test_a_package_that_keeps_everything_plugs_in_to_itself(
    kind, whole_package, full_llama, llama_folder, make_bundle, logits_of, tmp_path
):
    bundle = make_bundle(tmp_path / "bundle", whole_package, kind=kind, placement="all")
    record = read_owner_record(owner_record_path(whole_package.path))
    package_model = whole_package.load_model()
    from adapters.kinds import attach, declared

    spec = bundle.manifest.adapter
    names = declared(spec, whole_package.layout, whole_package.block_tensors())
    tuned = attach(package_model, spec, whole_package.layout.blocks, names)
    tuned.load(bundle.load_tensors(names))
    tuned.model.eval()
    full = load_model(str(llama_folder))
    with plugged(full, fit(full, read_own(bundle, record), record)) as model:
        assert torch.equal(logits_of(model), logits_of(tuned.model))


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_lora_on_shrunk_mlps_equals_the_package_where_the_other_channels_are_zero(
    kind, narrow_package, narrow_channels, full_llama, make_bundle, logits_of, tmp_path
):
    """Lifted onto a full model whose dropped channels are zeroed, the adapter computes what it did on the package."""
    from adapters.kinds import attach, declared
    from offsite.modelling.blocks import block_list, decoder_stack
    from offsite.modelling.mlps import find_mlp, zero_mlp_channels
    from server.plugging.fit import Fitted

    bundle = make_bundle(tmp_path / "bundle", narrow_package, kind=kind, placement="all", rank=4)
    record = read_owner_record(owner_record_path(narrow_package.path))
    spec = bundle.manifest.adapter
    names = declared(spec, narrow_package.layout, narrow_package.block_tensors())
    compact = attach(narrow_package.load_model(), spec, narrow_package.layout.blocks, names)
    compact.load(bundle.load_tensors(names))
    compact.model.eval()

    import copy

    full = copy.deepcopy(full_llama)
    adapter = fit(full, read_own(bundle, record), record)
    assert adapter.tensors["middle.0.mlp.down_proj.lora_A"].shape == (4, 48)
    blocks = block_list(full, decoder_stack(full))
    tensors = dict(adapter.tensors)
    for name, kept in narrow_channels.items():
        block = blocks[2 + int(name.split(".")[1])]
        dropped = torch.tensor([channel for channel in range(48) if channel not in kept])
        zero_mlp_channels(block, find_mlp(block), dropped)
        for part in ("gate_proj", "up_proj"):
            assert not tensors[f"{name}.mlp.{part}.lora_B"][dropped].any()
    with plugged(full, Fitted(adapter.spec, tensors, adapter.sites)) as model:
        torch.testing.assert_close(logits_of(model), logits_of(compact.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["blocks", "lora", "rslora", "dora", "bitfit"])
def test_merged_computes_what_unmerged_does(
    plug_in, kind, dropped_package, llama_folder, make_bundle, logits_of, tmp_path
):
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind=kind)
    alone = plug_in(llama_folder, bundle, tmp_path / "alone", package=dropped_package.path)
    merged = plug_in(llama_folder, bundle, tmp_path / "merged", package=dropped_package.path, merge=True)
    assert (alone["merged"], merged["merged"]) == (False, True)
    assert merged["deviation"] <= 1e-4 < merged["effect"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    unmerged, _ = load_adapted(tmp_path / "alone")
    torch.testing.assert_close(logits_of(plain), logits_of(unmerged), rtol=0, atol=1e-4)
    loaded, tokenizer = load_adapted(tmp_path / "merged")
    assert torch.equal(logits_of(loaded), logits_of(plain))
    assert tokenizer.eos_token == "</s>"


def test_either_form_is_asked_by_generate(plug_in, make_bundle, llama_folder, dropped_package, tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora", rank=3)
    texts = []
    for name, whole in (("alone", False), ("merged", True)):
        plug_in(llama_folder, bundle, tmp_path / name, package=dropped_package.path, merge=whole)
        capsys.readouterr()
        assert (
            cli.run(["generate", str(tmp_path / name), "--prompt", "ward", "--max-tokens", "8", "--device", "cpu"]) == 0
        )
        texts.append(json.loads(capsys.readouterr().out)["answers"][0]["text"])
    model, tokenizer = load_adapted(tmp_path / "alone")
    ids = torch.tensor([tokenizer("ward")["input_ids"][:4]])
    said = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 4:]
    assert texts == [tokenizer.decode(said, skip_special_tokens=True)] * 2


def test_merging_keeps_the_models_dtype(plug_in, make_package, make_bundle, save_model, logits_of, tmp_path):
    save_model(tiny("llama").to(torch.bfloat16), tmp_path / "base")
    full = load_model(str(tmp_path / "base"))
    package = make_package(tmp_path / "package", model=full, kept=(0, 1, 3, 4, 5), dtype="bfloat16")
    bundle = make_bundle(tmp_path / "bundle", package, kind="lora", dtype="bfloat16")
    result = plug_in(tmp_path / "base", bundle, tmp_path / "merged", package=package.path, merge=True)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert 0 < result["deviation"] < 0.1
    plug_in(tmp_path / "base", bundle, tmp_path / "alone", package=package.path)
    for dtype in ("auto", "float32"):
        model, _ = load_adapted(tmp_path / "alone", dtype=dtype)
        assert model.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
        assert model.lm_head.weight is model.model.embed_tokens.weight or not model.config.tie_word_embeddings
        assert torch.isfinite(logits_of(model)).all()


def test_the_full_model_on_disk_is_not_touched(plug_in, dropped_package, llama_folder, make_bundle, tmp_path):
    def state():
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in llama_folder.iterdir()}

    before = state()
    for kind, merged in (("blocks", False), ("lora", False), ("lora", True)):
        bundle = make_bundle(tmp_path / f"{kind}-{merged}", dropped_package, kind=kind)
        plug_in(llama_folder, bundle, tmp_path / f"out-{kind}-{merged}", package=dropped_package.path, merge=merged)
    assert state() == before


def test_the_model_in_memory_is_as_it_was_after_plugged(dropped_package, full_llama, make_bundle, tmp_path):
    record = read_owner_record(owner_record_path(dropped_package.path))
    before = model_digest(full_llama)
    names = [name for name, _ in full_llama.named_modules()]
    for kind in ("blocks", "lora", "dora", "bitfit", "lora"):
        bundle = make_bundle(tmp_path / f"b{len(list(tmp_path.iterdir()))}", dropped_package, kind=kind)
        with plugged(full_llama, fit(full_llama, read_own(bundle, record), record, base_digest=before)) as model:
            assert model_digest(model) != before
        assert model_digest(full_llama) == before
        assert [name for name, _ in full_llama.named_modules()] == names


def test_a_package_that_moved_is_named_with_package(
    plug_in, shelve, dropped_package, llama_folder, make_bundle, tmp_path
):
    for name in ("package", "package.owner.json"):
        source = dropped_package.path if name == "package" else owner_record_path(dropped_package.path)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    bundle = make_bundle(tmp_path / "bundle", dropped_package)
    named = shelve(bundle.path, tmp_path / "package", tmp_path / "shelf")
    (tmp_path / "package.owner.json").unlink()
    settings = PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", **named)
    with pytest.raises(ConfigError, match=r"owner's record 'package\.owner\.json' is not where it was") as caught:
        run(settings)
    assert "--package" in caught.value.hint
    assert not (tmp_path / "adapted").exists()
    found = run(settings.model_copy(update={"package": dropped_package.path}))
    assert found["package_digest"] == dropped_package.digest


def test_a_fetched_name_is_written_as_it_is_and_found_where_it_was_fetched(
    plug_in, dropped_package, llama_folder, make_bundle, monkeypatch, logits_of, tmp_path
):
    shutil.copytree(llama_folder, tmp_path / "cache" / "smollm2-135m")
    monkeypatch.setenv("OFFSITE_CACHE", str(tmp_path / "cache"))
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    plug_in("smollm2-135m", bundle, tmp_path / "adapted", package=dropped_package.path)
    config = json.loads((tmp_path / "adapted" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m"
    assert not (tmp_path / "adapted.base.json").exists()
    by_folder, _ = load_adapted(tmp_path / "adapted", base=str(llama_folder))
    assert torch.equal(logits_of(load_adapted(tmp_path / "adapted")[0]), logits_of(by_folder))


@pytest.mark.parametrize("merged", [False, True])
def test_the_command_line_ends_with_one_json_object(
    merged, shelve, dropped_package, llama_folder, make_bundle, capsys, tmp_path
):
    from offsite.cli import run as cli

    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf")
    words = ["plug-in", str(llama_folder), named["id"], "-o", str(tmp_path / "adapted")]
    words += ["--registry", str(named["registry"]), "--keys", str(named["keys"])]
    assert cli([*words, *(["--merge"] if merged else [])]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["kind"], found["merged"], found["bundle_digest"]) == ("lora", merged, bundle.digest)
    with Registry.open(named["registry"], named["keys"]) as registry:
        assert registry.entry(named["id"]).state == "plugged-in"
        assert registry.verify_log().number == 7  # in which way is a line of its own


def test_what_was_not_accepted_is_not_plugged_in(shelve, dropped_package, llama_folder, make_bundle, capsys, tmp_path):
    from offsite.cli import run as cli

    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf", state="verified")
    where = ["--registry", str(named["registry"]), "--keys", str(named["keys"])]
    words = ["plug-in", str(llama_folder), named["id"], "-o", str(tmp_path / "adapted"), *where]
    assert cli(words) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == f"offsite: error: bundle {named['id']} is verified, not accepted"
    assert f"offsite registry accept {named['id']}" in captured.err.splitlines()[1]
    assert cli(["registry", "refuse", named["id"], *where]) == 0
    assert cli(words) == 3
    assert "was refused: refused by the owner" in capsys.readouterr().err
    assert cli([*words[:2], "0" * 16, *words[3:]]) == 2
    assert cli(words[:2]) == 2
    assert not (tmp_path / "adapted").exists()


@pytest.mark.parametrize("name", ["offsite.json", "adapter.safetensors"])
def test_row_15_a_file_changed_since_it_was_verified_is_not_plugged_in(
    name, shelve, dropped_package, llama_folder, make_bundle, tmp_path
):
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf")
    path = named["registry"] / "bundles" / named["id"] / name
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadDigest, match="is not the one that was verified"):
        run(PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", **named))
    assert not (tmp_path / "adapted").exists()
    with Registry.open(named["registry"], named["keys"]) as registry:
        assert registry.entry(named["id"]).state == "accepted"


def test_row_24_published_before_the_registry_was_told_is_made_good(
    shelve, dropped_package, llama_folder, make_bundle, monkeypatch, tmp_path
):
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf")
    settings = PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", **named)

    def crash(point):
        if point == "plug-published":
            raise KeyboardInterrupt

    faults.set_hook(crash)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    finally:
        faults.set_hook(None)
    assert (tmp_path / "adapted").is_dir()
    with pytest.raises(ConfigError, match="already exists"):  # what stands there is not what is asked for now
        run(settings.model_copy(update={"merge": True}))
    with monkeypatch.context() as patched:  # also where the package has moved meanwhile
        patched.setattr("server.plugging.plug.owner_record_path", lambda _: tmp_path / "gone.owner.json")
        assert run(settings)["bundle_digest"] == bundle.digest
    with pytest.raises(ConfigError, match="already exists"):
        run(settings)
    again = run(settings.model_copy(update={"output": tmp_path / "elsewhere"}))
    assert again["bundle_digest"] == bundle.digest


def test_serving_tells_the_registry_once(shelve, dropped_package, llama_folder, make_bundle, tmp_path):
    from server.serving.serve import mark_served

    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf")
    run(PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", **named))
    for _ in range(2):
        mark_served(tmp_path / "adapted", named["registry"], named["keys"])
    with Registry.open(named["registry"], named["keys"]) as registry:
        assert registry.entry(named["id"]).state == "served"
        assert registry.verify_log().number == 9  # each with a line that says in which way


# --- refusals


def rewrite(**changes):
    """A change of the tensor file: some tensors replaced, added or (None) removed."""

    def change(folder):
        path = folder / "adapter.safetensors"
        tensors = load_file(path)
        for name, value in changes.items():
            name = name.replace("__", ".")
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value
        save_file(tensors, path)

    return change


def declare(**changes):
    """A change of the manifest's tensor table, to go along with `rewrite`."""

    def edit(manifest):
        for name, value in changes.items():
            name = name.replace("__", ".")
            manifest["tensors"].pop(name, None)
            if value is not None:
                manifest["tensors"][name] = {"shape": list(value), "dtype": "float32"}

    return edit


def put(*path, value):
    def edit(manifest):
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


A = "top__0__mlp__up_proj__lora_A"  # (8, 32)
EVIL = "model__embed_tokens__weight"
OTHER = "sha256:" + "0" * 64
TAMPERED = {
    "nan": (rewrite(**{A: torch.full((8, 32), math.nan)}), None, NotFinite),
    "infinity": (rewrite(**{A: torch.full((8, 32), math.inf)}), None, NotFinite),
    "a tensor is missing": (rewrite(**{A: None}), declare(**{A: None}), WrongNames),
    "a tensor too many": (rewrite(**{EVIL: torch.zeros(2)}), declare(**{EVIL: (2,)}), WrongNames),
    "a tensor of the base": (
        rewrite(**{"middle__0__mlp__up_proj__weight": torch.zeros(48, 32)}),
        declare(**{"middle__0__mlp__up_proj__weight": (48, 32)}),
        WrongNames,
    ),
    "another rank": (rewrite(**{A: torch.zeros(4, 32)}), declare(**{A: (4, 32)}), WrongShape),
    "another dtype": (
        rewrite(**{A: torch.zeros(8, 32, dtype=torch.bfloat16)}),
        put("tensors", "top.0.mlp.up_proj.lora_A", value={"shape": [8, 32], "dtype": "bfloat16"}),
        WrongShape,
    ),
    "file and manifest disagree": (rewrite(**{A: torch.zeros(4, 32)}), None, WrongShape),
    "another package": (None, put("package_digest", value=OTHER), WrongBinding),
    "another base model": (None, put("base_digest", value=OTHER), WrongBinding),
    "another format": (None, put("format", value="offsite/bundle/9"), WrongBinding),
    "a kind nobody knows": (None, put("adapter", "kind", value="evil"), BadSchema),
    "a placement the package lacks": (None, put("adapter", "placement", value="9+9"), BadSchema),
    "another placement": (None, put("adapter", "placement", value="0+2"), WrongNames),
    "more last blocks than there are": (None, put("adapter", "placement", value="last:99"), BadSchema),
    "the last blocks": (None, put("adapter", "placement", value="last:1"), WrongNames),
    "other targets": (None, put("adapter", "targets", value="attention"), WrongNames),
    "a larger rank stated": (None, put("adapter", "rank", value=16), WrongShape),
    "another kind stated": (None, put("adapter", "kind", value="dora"), WrongNames),
    "an infinite scale": (None, put("adapter", "alpha", value=math.inf), BadSchema),
    "a key nobody knows": (None, put("adapter", "auto_map", value="x"), BadSchema),
    "a digest of other bytes": (None, put("files", "adapter.safetensors", "sha256", value=OTHER), BadDigest),
    "a pickle beside": (lambda folder: (folder / "x.bin").write_bytes(b"x"), None, WrongNames),
    "a file that is no tensor file": (
        lambda folder: (folder / "adapter.safetensors").write_bytes(b"x" * 99),
        None,
        BadSchema,
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_bundle_of_ones_own_is_refused(case, dropped_package, make_bundle, tamper, tmp_path):
    """What comes from a client is refused earlier and by more: tests/attacks/test_intake.py."""
    change, edit, expected = TAMPERED[case]
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    bad = tamper(bundle.path, change=change, edit=edit)
    with pytest.raises(expected) as caught:
        read_own(open_bundle(bad), read_owner_record(owner_record_path(dropped_package.path)))
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)


def test_a_scale_beyond_floats_is_not_published(plug_in, dropped_package, llama_folder, make_bundle, tamper, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    bad = open_bundle(tamper(bundle.path, edit=put("adapter", "alpha", value=1e308)))
    with pytest.raises(NotFinite):
        plug_in(llama_folder, bad, tmp_path / "adapted", package=dropped_package.path)
    assert not list(tmp_path.glob("*adapted*"))


def test_an_untouched_copy_of_the_bundle_passes(plug_in, dropped_package, llama_folder, make_bundle, tamper, tmp_path):
    bundle = open_bundle(tamper(make_bundle(tmp_path / "bundle", dropped_package, kind="lora").path))
    assert plug_in(llama_folder, bundle, tmp_path / "adapted", package=dropped_package.path)["kind"] == "lora"


def test_another_model_is_refused(plug_in, dropped_package, full_llama, make_bundle, save_model, tmp_path):
    import copy

    other = copy.deepcopy(full_llama)
    other.model.norm.weight.data[0] += 1e-3
    save_model(other, tmp_path / "other")
    bundle = make_bundle(tmp_path / "bundle", dropped_package)
    with pytest.raises(
        WrongBinding, match=r"model 'other' has digest sha256:.{12}, bundle [0-9a-f]{16} belongs to sha256"
    ):
        plug_in(tmp_path / "other", bundle, tmp_path / "adapted", package=dropped_package.path)
    assert not (tmp_path / "adapted").exists()


def test_a_bundle_of_another_package_is_refused(
    shelve, dropped_package, narrow_package, llama_folder, make_bundle, tmp_path
):
    bundle = make_bundle(tmp_path / "bundle", dropped_package)
    named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf")
    settings = PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", package=narrow_package.path, **named)
    with pytest.raises(WrongBinding, match="was tuned on package"):
        run(settings)
    assert not (tmp_path / "adapted").exists()


def test_an_existing_output_is_left_alone(plug_in, dropped_package, llama_folder, make_bundle, tmp_path):
    (tmp_path / "adapted").mkdir()
    bundle = make_bundle(tmp_path / "bundle", dropped_package)
    with pytest.raises(ConfigError, match="already exists"):
        plug_in(llama_folder, bundle, tmp_path / "adapted", package=dropped_package.path)


def test_a_merge_that_changes_what_is_computed_is_not_published(
    plug_in, dropped_package, llama_folder, make_bundle, monkeypatch, tmp_path
):
    def broken(attached, folder):
        model = merge(attached, folder)
        model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr("server.plugging.plug.merge", broken)
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    with pytest.raises(RunFailed, match=r"merged logits differ from unmerged ones by .* tolerance 0\.0001"):
        plug_in(llama_folder, bundle, tmp_path / "adapted", package=dropped_package.path, merge=True)
    assert not (tmp_path / "adapted").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.model.norm.weight.data.mul_(1.01), "reads back as other tensors"),
        (lambda model: setattr(model.config, "rms_norm_eps", 0.5), "reads back with logits that differ"),
    ],
)
def test_a_checkpoint_that_reads_back_otherwise_is_not_published(
    plug_in, change, message, dropped_package, llama_folder, make_bundle, monkeypatch, tmp_path
):
    """What is on disk is compared, configuration included, not only what was merged in memory."""

    def save(model, folder):
        other = copy.deepcopy(model)
        change(other)
        write_checkpoint(other, folder)

    monkeypatch.setattr("server.plugging.plug.write_checkpoint", save)
    bundle = make_bundle(tmp_path / "bundle", dropped_package)
    with pytest.raises(RunFailed, match=message):
        plug_in(llama_folder, bundle, tmp_path / "adapted", package=dropped_package.path, merge=True)
    assert not (tmp_path / "adapted").exists()


def test_a_peft_folder_that_opens_as_another_model_is_not_published(
    plug_in, dropped_package, llama_folder, make_bundle, monkeypatch, tmp_path
):
    from server.plugging import peftfolder

    def wrong(model, modules, dora):  # the package's own numbers: what peft would load without a word
        return {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 5], "layers_pattern": "layers"}

    monkeypatch.setattr(peftfolder, "peft_targets", wrong)
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RunFailed, match="peft opens the adapter with logits that differ"):
            plug_in(llama_folder, bundle, tmp_path / "adapted", package=dropped_package.path)
    assert not (tmp_path / "adapted").exists()


def test_an_adapter_on_fewer_modules_is_noticed(dropped_package, full_llama, make_bundle, tmp_path):
    from server.plugging.fit import Fitted

    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    record = read_owner_record(owner_record_path(dropped_package.path))
    adapter = fit(full_llama, read_own(bundle, record), record)
    elsewhere = dict.fromkeys(adapter.sites, "model.layers.99")
    with pytest.raises(WrongNames, match=r"model\.layers\.99"):
        plug(full_llama, Fitted(adapter.spec, adapter.tensors, elsewhere))


# --- opening what was written


@pytest.fixture(scope="module")
def plugged_in(shelve, dropped_package, llama_folder, make_bundle, tmp_path_factory):
    """Return where an adapted folder of that form lies, named by it, and what is beside it; never used in place."""
    made = {}

    def make(form):
        if form not in made:
            folder = made[form] = tmp_path_factory.mktemp(form)
            kind = "blocks" if form == "own" else "lora"
            bundle = make_bundle(folder / "bundle", dropped_package, kind=kind)
            named = shelve(bundle.path, dropped_package.path, folder / "shelf")
            run(PlugConfig(model=str(llama_folder), output=folder / form, merge=form == "merged", **named))
        return made[form]

    return make


@pytest.fixture
def adapted(plugged_in, tmp_path):
    def make(form):
        shutil.copytree(plugged_in(form) / form, tmp_path / form)
        for beside in plugged_in(form).glob(f"{form}.*"):
            shutil.copy(beside, tmp_path)
        return tmp_path / form

    return make


@pytest.mark.parametrize("form", ["peft", "own", "merged"])
def test_a_changed_file_is_refused(form, adapted):
    folder = adapted(form)
    path = next(folder.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadDigest):
        load_adapted(folder)


@pytest.mark.parametrize("form", ["peft", "own"])
def test_another_base_is_refused(form, adapted, save_model, tmp_path):
    save_model(tiny("llama"), tmp_path / "other")
    with pytest.raises(WrongBinding, match=r"model 'other' has digest .* adapter"):
        load_adapted(adapted(form), base=str(tmp_path / "other"))


def test_a_base_that_moved_is_named_with_base(adapted, llama_folder, tmp_path, logits_of):
    folder = adapted("own")
    shutil.copytree(llama_folder, tmp_path / "moved")
    model, _ = load_adapted(folder, base=str(tmp_path / "moved"))
    assert torch.equal(logits_of(model), logits_of(load_adapted(folder)[0]))


def test_a_folder_of_before_says_where_its_base_was(adapted, llama_folder, tmp_path, logits_of):
    folder = adapted("own")
    expected = logits_of(load_adapted(folder)[0])
    (tmp_path / "own.base.json").unlink()
    manifest = json.loads((folder / "offsite.json").read_text())
    del manifest["base_kind"]
    for base in (tmp_path / "gone", llama_folder):
        manifest["base"] = str(base)
        (folder / "offsite.json").write_text(json.dumps(manifest))
        if base == llama_folder:
            assert torch.equal(logits_of(load_adapted(folder)[0]), expected)
        else:
            with pytest.raises(ConfigError, match="no model folder"):
                load_adapted(folder)


UP = "model__layers__0__mlp__up_proj__weight"
ADAPTED_TAMPERED = {
    "nan": (
        "own",
        rewrite(**{"model__layers__0__mlp__up_proj__weight": torch.full((48, 32), math.nan)}),
        None,
        NotFinite,
    ),
    "a tensor too many": ("own", rewrite(**{EVIL: torch.zeros(2)}), None, WrongNames),
    "a site that is not there": ("own", None, put("sites", "top.0", value="model.layers.99"), WrongNames),
    "two sites in one place": ("own", None, put("sites", "top.0", value="model.layers.7"), BadSchema),
    "no site": ("own", None, put("sites", value={}), BadSchema),
    "another form": ("own", None, put("form", value="peft"), WrongNames),
    "a merged digest where none belongs": ("own", None, put("merged_digest", value=OTHER), BadSchema),
    "another merge": ("merged", None, put("merged_digest", value=OTHER), BadDigest),
    "another format": ("peft", None, put("format", value="offsite/bundle/1"), WrongBinding),
    "a way in another form": ("peft", None, put("way", value="mlp=0.50"), BadSchema),
    "a way of no known module": ("peft", None, put("way", value="head=0.5"), BadSchema),
    "a way of another share": ("peft", None, put("way", value="0.5,top=1"), BadSchema),
    "a way that is mixed": ("peft", None, put("way", value="mix=0.5"), BadSchema),
    "a way that is no word": ("peft", None, put("way", value=0.5), BadSchema),
    "directions spared on no text": ("peft", None, put("way", value="spare=1"), BadSchema),
    "text, and nothing spared": ("peft", None, put("spare_text", value=OTHER), BadSchema),
}


@pytest.mark.parametrize("case", ADAPTED_TAMPERED)
def test_a_tampered_adapted_folder_is_refused(case, adapted, tamper):
    form, change, edit, expected = ADAPTED_TAMPERED[case]
    with pytest.raises(expected) as caught:
        load_adapted(tamper(adapted(form), change=change, edit=edit))
    assert type(caught.value) is expected


def test_a_peft_configuration_of_another_hand_changes_nothing(adapted, tamper, logits_of):
    """The adapter is rebuilt from the manifest; adapter_config.json is there for other programs."""
    folder = adapted("peft")
    expected = logits_of(load_adapted(folder)[0])

    def change(copy):
        (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "auto_mapping": {"base_model_class": "x"}}')

    assert torch.equal(logits_of(load_adapted(tamper(folder, change=change))[0]), expected)


def test_the_manifest_binds_every_file(adapted):
    folder = adapted("merged")
    manifest = json.loads((folder / "offsite.json").read_text())
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"offsite.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == "sha256:" + hashlib.sha256((folder / name).read_bytes()).hexdigest()
