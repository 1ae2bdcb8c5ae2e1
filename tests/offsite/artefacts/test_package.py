"""The package: what crosses, what does not, and every check on arrival."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from offsite.artefacts import package as module
from offsite.artefacts.layout import Layout, Method
from offsite.artefacts.package import open_package, write_tokenizer
from offsite.errors import (
    ArtefactError,
    BadDigest,
    BadSchema,
    ConfigError,
    NotFinite,
    TooLarge,
    UnsupportedModel,
    WrongBinding,
    WrongNames,
    WrongShape,
)
from offsite.modelling.blocks import block_list, decoder_stack
from offsite.modelling.mlps import find_mlp, slice_mlp
from offsite.modelling.split import extract

IDS = torch.tensor([[5, 17, 200, 3, 44, 90, 12]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS % model.config.vocab_size).logits


# What a package gives back


def test_a_package_that_dropped_blocks_is_an_ordinary_checkpoint(dropped_package, full_llama):
    kept = extract(full_llama, {"model.layers": (0, 1, 2, 4, 5, 6, 7)})
    plain = AutoModelForCausalLM.from_pretrained(dropped_package.path)
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(logits(plain), logits(kept))
    assert torch.equal(logits(dropped_package.load_model()), logits(kept))


def test_a_package_that_keeps_everything_is_the_full_model(whole_package, full_llama):
    assert torch.equal(logits(whole_package.load_model()), logits(full_llama))


def test_a_narrow_package_is_rebuilt_exactly(narrow_package, narrow_channels, full_llama):
    expected = extract(full_llama, {"model.layers": tuple(range(8))})
    for name, channels in narrow_channels.items():
        block = expected.model.layers[2 + int(name.split(".")[1])]
        slice_mlp(block, find_mlp(block), torch.tensor(channels))
    found = narrow_package.load_model()
    assert torch.equal(logits(found), logits(expected))
    assert not torch.equal(logits(found), logits(full_llama))
    assert found.model.layers[3].mlp.down_proj.in_features == len(narrow_channels["middle.1"])
    assert found.lm_head.weight is found.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["gpt2", "phi3", "qwen2", "gemma2", "opt", "bloom", "gpt_neox", "phi", "olmo2"])
def test_narrow_packages_of_other_architectures(tmp_path, tiny_model, make_package, name):
    full = tiny_model(name)
    channels = {"middle.0": (1, 2, 3, 7, 40), "middle.1": tuple(range(0, 48, 2))}
    kept = tuple(range(6))
    expected = extract(full, {decoder_stack(full).name: kept})
    for role, numbers in channels.items():
        block = block_list(expected, decoder_stack(expected))[2 + int(role.split(".")[1])]
        slice_mlp(block, find_mlp(block), torch.tensor(numbers))
    package = make_package(tmp_path / "package", model=full, kept=kept, channels=channels)
    assert torch.equal(logits(package.load_model()), logits(expected))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe", "gemma3_text", "falcon", "smollm3", "gptj"])
def test_dropped_packages_of_other_architectures(tmp_path, tiny_model, make_package, name):
    full = tiny_model(name)
    kept = (0, 1, 3, 4, 5)
    package = make_package(tmp_path / "package", model=full, kept=kept)
    expected = extract(full, {decoder_stack(full).name: kept})
    assert torch.equal(logits(package.load_model()), logits(expected))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(package.path)), logits(expected))


def test_bf16_in_the_file_float32_in_memory(tmp_path, make_package, dropped_package):
    package = make_package(tmp_path / "package", dtype="bfloat16")
    assert {spec.dtype for spec in package.manifest.tensors.values()} == {"bfloat16"}
    model = package.load_model()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert package.num_bytes < 0.7 * dropped_package.num_bytes
    assert not model.training
    assert package.load_model(dtype="bfloat16").dtype is torch.bfloat16


def test_the_tokenizer_crosses(dropped_package, letters_tokenizer):
    text = "Naïve café, 3.5 mg\n\n </s>"
    for tokenizer in (dropped_package.load_tokenizer(), AutoTokenizer.from_pretrained(dropped_package.path)):
        assert tokenizer(text)["input_ids"] == letters_tokenizer(text)["input_ids"]
        assert tokenizer.eos_token == "</s>"
        assert tokenizer.pad_token_id == 0
        chat = [{"role": "user", "content": "hello"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>user:hello</s>"


def test_shards_and_their_index(tmp_path, monkeypatch, make_package, dropped_package):
    monkeypatch.setattr(module, "SHARD_LIMIT_BYTES", 40_000)
    package = make_package(tmp_path / "package")
    shards = [name for name in package.manifest.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in package.manifest.files
    assert torch.equal(logits(package.load_model()), logits(dropped_package.load_model()))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(package.path)), logits(dropped_package.load_model()))


# What does not cross


def everything(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.json")))


def test_a_package_does_not_depend_on_which_blocks_were_dropped(tmp_path, full_llama, make_package):
    """Of a model with two equal blocks either may go: the packages are the same, byte for byte."""
    twin = copy.deepcopy(full_llama)
    twin.model.layers[4].load_state_dict(twin.model.layers[3].state_dict())
    one = make_package(tmp_path / "one", model=twin, kept=(0, 1, 2, 3, 5, 6, 7))
    other = make_package(tmp_path / "other", model=twin, kept=(0, 1, 2, 4, 5, 6, 7))
    assert one.digest == other.digest
    assert {path.name: path.read_bytes() for path in one.path.iterdir()} == {
        path.name: path.read_bytes() for path in other.path.iterdir()
    }


def test_nothing_but_the_allowed_files_and_no_trace_of_where_it_was_made(tmp_path, full_llama, make_package):
    model = extract(full_llama, {"model.layers": tuple(range(8))})
    model.config._name_or_path = "/home/someone/secret-model"
    model.config.author = "someone@secret-host"
    model.config.auto_map = {"AutoModelForCausalLM": "secret--modeling.Model"}
    model.generation_config._from_model_config = False
    package = make_package(tmp_path / "package", model=model)
    assert sorted(path.name for path in package.path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "offsite.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    shown = everything(package.path)
    for word in ("secret", "someone", "auto_map", "_name_or_path", "transformers_version", str(tmp_path), "kept"):
        assert word not in shown
    header = (package.path / "model.safetensors").read_bytes()[:20_000].decode("latin-1")
    assert '"__metadata__":{"format":"pt"}' in header


def test_the_owners_numbers_are_in_the_record_alone(narrow_package, narrow_channels, dropped_package):
    record = json.loads((dropped_package.path.parent / "package.owner.json").read_text())
    assert record["kept"] == [0, 1, 2, 4, 5, 6, 7]
    record = json.loads((narrow_package.path.parent / "package.owner.json").read_text())
    assert record["channels"]["middle.1"] == list(narrow_channels["middle.1"])
    squeezed = re.sub(r"\s", "", everything(narrow_package.path))
    assert ",".join(map(str, narrow_channels["middle.1"][:4])) not in squeezed
    numbers = {int(found) for found in re.findall(r'"model\.layers\.(\d+)\.', everything(dropped_package.path))}
    assert numbers == set(range(7))


def test_a_package_does_not_depend_on_what_was_done_before(
    tmp_path, make_package, dropped_package, full_llama, letters_tokenizer
):
    letters_tokenizer(["a", "longer"], padding=True, truncation=True, max_length=3)  # leaves its settings behind
    full_llama.save_pretrained(tmp_path / "saved")  # writes into the configuration
    assert make_package(tmp_path / "again").digest == dropped_package.digest
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert make_package(tmp_path / "loaded", model=loaded).digest == dropped_package.digest


# What the owner may not write


def test_an_existing_output_is_refused(tmp_path, make_package):
    (tmp_path / "package").mkdir()
    with pytest.raises(ConfigError, match="output 'package' already exists"):
        make_package(tmp_path / "package")


def leaves_nothing(folder: Path) -> bool:
    return list(folder.iterdir()) == []


def test_weights_that_are_not_finite_are_not_shipped(tmp_path, full_llama, make_package):
    broken = extract(full_llama, {"model.layers": tuple(range(8))})
    weight = broken.model.layers[3].mlp.up_proj.weight.detach().clone()
    weight[0, 0] = float("nan")
    broken.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(weight)
    with pytest.raises(NotFinite, match=r"layers\.3\.mlp\.up_proj"):
        make_package(tmp_path / "package", model=broken, kept=tuple(range(8)))
    assert leaves_nothing(tmp_path)
    weight[0, 0] = 1e6
    broken.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(weight)
    with pytest.raises(NotFinite):
        make_package(tmp_path / "package", model=broken, kept=tuple(range(8)), dtype="float16")
    assert leaves_nothing(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"licence": "line\nbreak"}, {"licence": "x" * 201}, {"terms": "\x1b[2J"}, {"figures": {"Not A Name": 1.0}}],
)
def test_what_cannot_be_stated_is_one_error_and_no_output(tmp_path, make_package, changes):
    with pytest.raises(ConfigError, match="the package cannot state this: "):
        make_package(tmp_path / "package", **changes)
    assert leaves_nothing(tmp_path)


def test_figures_that_are_no_numbers_are_left_out(tmp_path, make_package):
    package = make_package(tmp_path / "package", figures={"kl": 0.25, "perplexity": float("inf")})
    assert package.manifest.figures == {"kl": 0.25}


def test_a_tokenizer_without_a_fast_form(tmp_path):
    class Slow:
        backend_tokenizer = None

    with pytest.raises(UnsupportedModel, match="no fast form"):
        write_tokenizer(tmp_path, Slow())


# What is refused on arrival: one change to a valid package, bound anew, and the class of error


def config(**changes):
    def change(folder):
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stated, **changes}))

    return change


def tokenizer(**changes):
    def change(folder):
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**stated, **changes}))

    return change


def tensors(edit):
    def change(folder):
        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def content(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def add_file(name):
    def edit(manifest):
        manifest["files"][name] = {"bytes": 0, "sha256": "sha256:" + "0" * 64}

    return edit


def at(*keys, value):
    def edit(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit


def without(*keys):
    def edit(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return edit


UP = "model.layers.3.mlp.up_proj.weight"
BASE = "sha256:" + "0" * 64
ON_OPENING = {
    "another version": (None, at("format", value="offsite/package/2"), WrongBinding),
    "a bundle's format": (None, at("format", value="offsite/bundle/1"), WrongBinding),
    "an unknown key": (None, at("run", value="rm -rf"), BadSchema),
    "a missing key": (None, without("base_digest"), BadSchema),
    "a base digest of another form": (None, at("base_digest", value="none"), BadSchema),
    "a figure that is no number": (None, at("figures", value={"kl": "low"}), BadSchema),
    "a figure that is infinite": (None, at("figures", value={"kl": float("inf")}), BadSchema),
    "a figure's name with escapes": (None, at("figures", value={"\x1b[2J": 1.0}), BadSchema),
    "a licence with escapes": (None, at("licence", value="\x1b[2J"), BadSchema),
    "terms with escapes": (None, at("terms", value="\x1b[2J"), BadSchema),
    "a method with a path": (None, at("method", value={"name": "../drop"}), BadSchema),
    "a setting with escapes": (None, at("method", value={"name": "drop", "settings": {"a": "\x1b"}}), BadSchema),
    "a file outside": (None, add_file("../offsite.json"), WrongNames),
    "a file of code": (content("modeling.py", b"import os"), add_file("modeling.py"), WrongNames),
    "pickled weights": (content("pytorch_model.bin", b"x"), add_file("pytorch_model.bin"), WrongNames),
    "generation settings": (content("generation_config.json", b"{}"), add_file("generation_config.json"), WrongNames),
    "a file that is not bound": (content("notes.txt", b"x"), None, WrongNames),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), without("files", "config.json"), WrongNames),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        without("files", "tokenizer.json"),
        WrongNames,
    ),
    "a digest that is off": (None, at("files", "config.json", "sha256", value=BASE), BadDigest),
    "a size that is off": (None, at("files", "config.json", "bytes", value=1), BadDigest),
    "a configuration that is no JSON": (content("config.json", b"{"), None, BadSchema),
    "a configuration that is a list": (content("config.json", b"[]"), None, BadSchema),
    "a configuration nested too deep": (content("config.json", b"[" * 100_000), None, BadSchema),
    "code of its own": (config(auto_map={"AutoModelForCausalLM": "evil--modeling.Model"}), None, BadSchema),
    "code of its own, further in": (config(rope_parameters={"auto_map": {"AutoConfig": "x"}}), None, BadSchema),
    "a private key": (config(_name_or_path="/home/someone"), None, BadSchema),
    "quantisation": (config(quantization_config={"quant_method": "bitsandbytes"}), None, BadSchema),
    "another architecture": (config(model_type="gpt2"), None, BadSchema),
    "an architecture with a path": (config(model_type="../x"), at("layout", "model_type", value="../x"), BadSchema),
    "a tokenizer of another class": (tokenizer(tokenizer_class="LlamaTokenizer"), None, BadSchema),
    "a tokenizer with code": (tokenizer(auto_map={"AutoTokenizer": ["x", None]}), None, BadSchema),
    "a tokenizer that names a file": (tokenizer(vocab_file="/etc/passwd"), None, BadSchema),
    "a tokenizer's settings as a list": (content("tokenizer_config.json", b"[]"), None, BadSchema),
    "a tensor more": (tensors(lambda found: found.update(more=torch.ones(1))), None, WrongNames),
    "a tensor less": (tensors(lambda found: found.pop(UP)), None, WrongNames),
    "a tensor of another shape": (tensors(lambda found: found.update({UP: torch.ones(2, 2)})), None, WrongShape),
    "a tensor of another dtype": (
        tensors(lambda found: found.update({UP: found[UP].to(torch.bfloat16)})),
        None,
        WrongShape,
    ),
    "notes in the tensor file": (
        lambda folder: save_file(
            load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"note": "x"}
        ),
        None,
        BadSchema,
    ),
    "a tensor file that is none": (content("model.safetensors", b"PK\x03\x04"), None, BadSchema),
    "a declared dtype that is none": (None, at("tensors", UP, "dtype", value="object"), BadSchema),
    "a declared dimension below zero": (None, at("tensors", UP, "shape", value=[-48, -32]), WrongShape),
    "an index that points elsewhere": (
        content("model.safetensors.index.json", json.dumps({"weight_map": {UP: "../x.safetensors"}}).encode()),
        add_file("model.safetensors.index.json"),
        None,
    ),
    "fewer blocks": (None, at("layout", "num_middle", value=2), BadSchema),
    "more blocks than memory": (None, at("layout", "num_middle", value=10**15), BadSchema),
    "no middle": (None, at("layout", "num_middle", value=0), BadSchema),
    "a stack that is elsewhere": (None, at("layout", "stack", value="model.norm"), BadSchema),
    "a stack with a path": (None, at("layout", "stack", value="../layers"), BadSchema),
    "a linear that is none": (None, at("layout", "linears", "bottom.0.mlp", value=[32, 48]), BadSchema),
    "a linear of no block": (None, at("layout", "linears", "bottom.7.mlp.up_proj", value=[32, 48]), BadSchema),
    "a linear without a block": (None, at("layout", "linears", "x", value=[32, 48]), BadSchema),
    "a linear of another size": (None, at("layout", "linears", "top.0.mlp.up_proj", value=[32, 96]), WrongShape),
    "an MLP linear that is none": (None, at("layout", "mlp_linears", value=["bottom.0.mlp"]), BadSchema),
    "an adaptable module that is none": (None, at("layout", "adaptable_middle", value=["mlp.experts"]), BadSchema),
}


@pytest.mark.parametrize("name", ON_OPENING)
def test_refused_on_opening(tamper, dropped_package, name):
    change, edit, expected = ON_OPENING[name]

    def rebind(manifest):
        if edit is not None:
            edit(manifest)

    folder = tamper(dropped_package.path, change=change, edit=rebind)
    with pytest.raises(expected or ArtefactError) as caught:
        open_package(folder)
    assert expected is None or type(caught.value) is expected
    message = str(caught.value)
    assert "\x1b" not in message
    assert "\n" not in message
    assert str(folder.parent) not in message


def test_an_untouched_copy_opens(tamper, dropped_package):
    again = open_package(tamper(dropped_package.path))
    assert again.manifest == dropped_package.manifest


def test_an_index_must_name_the_shards_that_hold_the_tensors(tmp_path, monkeypatch, make_package, tamper):
    monkeypatch.setattr(module, "SHARD_LIMIT_BYTES", 40_000)
    package = make_package(tmp_path / "package")

    def change(folder):
        path = folder / "model.safetensors.index.json"
        stated = json.loads(path.read_text())
        stated["weight_map"][UP] = "../../elsewhere.safetensors"
        path.write_text(json.dumps(stated))

    with pytest.raises(WrongNames, match="does not name the shards"):
        open_package(tamper(package.path, change=change))


def test_a_tensor_in_two_shards(tmp_path, monkeypatch, make_package, tamper):
    monkeypatch.setattr(module, "SHARD_LIMIT_BYTES", 40_000)
    package = make_package(tmp_path / "package")
    names = sorted(name for name in package.manifest.files if name.endswith(".safetensors"))

    def change(folder):
        first, second = (load_file(folder / name) for name in names[:2])
        name = next(iter(first))
        save_file({**second, name: first[name]}, folder / names[1], metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").unlink()

    with pytest.raises(WrongNames, match="repeats a tensor of another shard"):
        open_package(tamper(package.path, change=change, edit=without("files", "model.safetensors.index.json")))


def test_a_settings_file_over_the_limit(tamper, dropped_package, monkeypatch):
    monkeypatch.setattr("offsite.artefacts.layout.JSON_LIMIT_BYTES", 100)
    with pytest.raises(TooLarge, match=r"config\.json of 'package': over 100 bytes"):
        open_package(dropped_package.path)


# Layout


def test_a_layout_maps_roles_to_the_packages_own_numbers(narrow_package, dropped_package):
    assert dropped_package.layout.blocks == {
        "bottom.0": "model.layers.0",
        "bottom.1": "model.layers.1",
        "middle.0": "model.layers.2",
        "middle.1": "model.layers.3",
        "middle.2": "model.layers.4",
        "top.0": "model.layers.5",
        "top.1": "model.layers.6",
    }
    linears = narrow_package.layout.linears
    assert linears["bottom.1.mlp.up_proj"] == (32, 48)
    assert linears["middle.1.mlp.up_proj"] == (32, 12)
    assert linears["middle.1.mlp.down_proj"] == (12, 32)
    assert linears["top.0.self_attn.k_proj"] == (32, 16)
    assert len(linears) == 7 * 8
    assert len(narrow_package.layout.mlp_linears) == 3 * 8


def test_declared_tensors_of_the_blocks_under_canonical_names(narrow_package):
    found = narrow_package.block_tensors()
    assert found["middle.1.mlp.up_proj.weight"].shape == (12, 32)
    assert found["top.1.input_layernorm.weight"].shape == (32,)
    assert len(found) == 9 * 8
    assert not any("embed" in name or "lm_head" in name for name in found)


def test_ends_may_be_empty(tmp_path, make_package):
    package = make_package(tmp_path / "package", ends=(0, 1))
    assert next(iter(package.layout.blocks)) == "middle.0"
    with pytest.raises(ValueError, match="no block is of the middle"):
        Layout(model_type="llama", stack="model.layers", num_bottom=1, num_middle=0, num_top=1, linears={})
    with pytest.raises(ValueError, match="pattern"):
        Method(name="Drop!")
