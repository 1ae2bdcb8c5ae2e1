"""Rebuilding a model and a tokenizer from a package whose files all agree, but do not make sense."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_loop import logits, pack
from tiny_architectures import tiny

from offsite.artefacts.package import open_package
from offsite.errors import ArtefactError, BadSchema, NotFinite, WrongNames, WrongShape

UP = "model.layers.3.mlp.up_proj.weight"


def config(**changes):
    def change(folder):
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stated, **changes}))

    return change


def tensors(edit):
    def change(folder):
        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def nan(found):
    found[UP][0, 0] = float("nan")


ON_REBUILDING = {
    "a key the architecture does not have": (config(evil_setting=1), BadSchema),
    "a size that is text": (config(hidden_size="32"), BadSchema),
    "a size that is a list": (config(num_attention_heads=[4]), BadSchema),
    "no heads": (config(num_attention_heads=0), BadSchema),
    "heads that do not divide": (config(num_attention_heads=5, head_dim=None), ArtefactError),
    "an activation that is none": (config(hidden_act="os.system"), BadSchema),
    "rotary settings of no known kind": (config(rope_parameters={"rope_type": "evil", "rope_theta": 1}), BadSchema),
    "a width beyond memory": (config(intermediate_size=2**40), ArtefactError),
    "fewer blocks": (config(num_hidden_layers=6), ArtefactError),
    "more blocks": (config(num_hidden_layers=8), BadSchema),
    "a larger vocabulary": (config(vocab_size=300), WrongShape),
    "untied": (config(tie_word_embeddings=False), WrongNames),
    "biases": (config(mlp_bias=True), WrongNames),
    "NaN": (tensors(nan), NotFinite),
    "whole numbers in place of weights": (
        tensors(lambda found: found.update({UP: found[UP].to(torch.int32)})),
        WrongShape,
    ),
}


@pytest.mark.parametrize("name", ON_REBUILDING)
def test_refused_on_rebuilding(tamper, dropped_package, name):
    change, expected = ON_REBUILDING[name]
    package = open_package(tamper(dropped_package.path, change=change, redeclare=True))
    with pytest.raises(expected) as caught:
        package.load_model()
    assert "\n" not in str(caught.value)


def narrower(width):
    """Change middle block 1's MLP to another width, in tensors, declarations and layout alike."""

    def change(folder):
        found = load_file(folder / "model.safetensors")
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            key = f"model.layers.3.mlp.{name}.weight"
            shape = list(found[key].shape)
            shape[axis] = width
            found[key] = torch.ones(shape)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    def edit(manifest):
        for name in ("gate_proj", "up_proj"):
            manifest["layout"]["linears"][f"middle.1.mlp.{name}"] = [32, width]
        manifest["layout"]["linears"]["middle.1.mlp.down_proj"] = [width, 32]

    return change, edit


@pytest.mark.parametrize(("width", "fits"), [(1, True), (20, True), (48, True), (49, False), (64, False)])
def test_an_mlp_is_as_wide_as_stated_and_never_wider_than_its_architecture(tamper, narrow_package, width, fits):
    change, edit = narrower(width)
    package = open_package(tamper(narrow_package.path, change=change, edit=edit, redeclare=True))
    if fits:
        assert package.load_model().model.layers[3].mlp.down_proj.in_features == width
    else:
        with pytest.raises(WrongShape, match=r"middle\.1: the stated MLP width is not between 1 and 48"):
            package.load_model()


def test_only_the_middle_may_be_narrower(tamper, narrow_package):
    def change(folder):
        found = load_file(folder / "model.safetensors")
        found["model.layers.0.mlp.up_proj.weight"] = torch.ones(20, 32)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    def edit(manifest):
        manifest["layout"]["linears"]["bottom.0.mlp.up_proj"] = [32, 20]

    with pytest.raises(WrongShape):
        open_package(tamper(narrow_package.path, change=change, edit=edit, redeclare=True)).load_model()


def test_attention_is_never_narrower(tamper, narrow_package):
    def change(folder):
        found = load_file(folder / "model.safetensors")
        found["model.layers.3.self_attn.q_proj.weight"] = torch.ones(16, 32)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    def edit(manifest):
        manifest["layout"]["linears"]["middle.1.self_attn.q_proj"] = [32, 16]

    with pytest.raises(WrongShape):
        open_package(tamper(narrow_package.path, change=change, edit=edit, redeclare=True)).load_model()


def test_a_linear_that_the_layout_leaves_out(tamper, dropped_package):
    def edit(manifest):
        del manifest["layout"]["linears"]["top.0.self_attn.q_proj"]
        manifest["layout"]["mlp_linears"] = []

    package = open_package(tamper(dropped_package.path, edit=edit))
    with pytest.raises(WrongShape, match=r"linears of top\.0 are not those of the architecture"):
        package.load_model()


@pytest.fixture(scope="session")
def narrow_mixture(tmp_path_factory, letters_tokenizer):
    """A package of a mixture with shared experts whose middle's MLPs are all narrowed; read only."""
    return pack(
        tiny("deepseek_v3"), letters_tokenizer, tmp_path_factory.mktemp("mixture") / "package", "width", width=0.5
    )


def experts(width, *, names=("experts.gate_up_proj", "experts.down_proj"), block="4"):
    """Change a mixture's experts to another width, in tensors and declarations alike."""

    def change(folder):
        found = load_file(folder / "model.safetensors")
        for name in names:
            key = f"model.layers.{block}.mlp.{name}"
            shape = list(found[key].shape)
            axis, halves = {"experts.gate_up_proj": (1, 2), "experts.down_proj": (2, 1)}.get(name, (1, 1))
            shape[axis] = width * halves
            found[key] = torch.ones(shape)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def test_a_narrowed_mixture_is_rebuilt_from_declared_shapes(narrow_mixture):
    model = narrow_mixture.package.load_model()
    assert torch.equal(logits(model), logits(narrow_mixture.emulator))
    empty = narrow_mixture.package.empty_model()
    assert {name: tuple(one.shape) for name, one in empty.state_dict().items()} == {
        name: tuple(one.shape) for name, one in model.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in empty.parameters())
    assert empty.model.layers[4].mlp.experts.down_proj.shape == (4, 32, 8)


@pytest.mark.parametrize(("width", "fits"), [(4, True), (12, True), (16, True), (17, False), (400, False)])
def test_experts_are_as_wide_as_stated_and_never_wider_than_their_architecture(tamper, narrow_mixture, width, fits):
    package = open_package(tamper(narrow_mixture.package.path, change=experts(width), redeclare=True))
    if fits:
        assert package.load_model().model.layers[4].mlp.experts.down_proj.shape[2] == width
    else:
        with pytest.raises(WrongShape, match=r"middle\.3: the stated MLP width is not between 1 and 16"):
            package.load_model()


@pytest.mark.parametrize(
    "change",
    [
        experts(7, names=("experts.down_proj",)),  # gate and up are not those of the output
        experts(7, block="5"),  # an end
        experts(7, names=("shared_experts.down_proj.weight",)),
        experts(16, names=("gate.weight",)),  # the router
    ],
)
def test_nothing_else_of_a_mixture_may_be_narrower(tamper, narrow_mixture, change):
    with pytest.raises(WrongShape):
        open_package(tamper(narrow_mixture.package.path, change=change, redeclare=True)).load_model()


TOKENIZERS = {
    "no JSON": ("tokenizer.json", b"{"),
    "empty": ("tokenizer.json", b""),
    "not UTF-8": ("tokenizer.json", b"\xff\xfe"),
    "of no known model": ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Evil"}}'),
    "settings of another type": (
        "tokenizer_config.json",
        b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 5}',
    ),
    "a template that is not UTF-8": ("chat_template.jinja", b"\xff"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_does_not_work(tamper, dropped_package, name):
    file, content = TOKENIZERS[name]
    package = open_package(tamper(dropped_package.path, change=lambda folder: (folder / file).write_bytes(content)))
    with pytest.raises(BadSchema, match="do not describe a working tokenizer"):
        package.load_tokenizer()


def test_a_chat_template_runs_in_a_sandbox(tamper, dropped_package):
    evil = b"{{ ''.__class__.__mro__[1].__subclasses__() }}"
    package = open_package(
        tamper(dropped_package.path, change=lambda folder: (folder / "chat_template.jinja").write_bytes(evil))
    )
    tokenizer = package.load_tokenizer()
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 64)
    | st.floats(-2, 2)
    | st.sampled_from(["x", "", [], [1], {}, {"a": 1}])
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_setting_of_any_value_rebuilds_or_is_refused(tmp_path_factory, dropped_package, data):
    folder = tmp_path_factory.mktemp("any") / "package"
    shutil.copytree(dropped_package.path, folder)
    stated = json.loads((folder / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(stated.keys() - {"num_hidden_layers", "vocab_size"})))
    raw = json.dumps({**stated, key: data.draw(VALUES)}).encode()
    (folder / "config.json").write_bytes(raw)
    manifest = json.loads((folder / "offsite.json").read_text())
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    manifest["files"]["config.json"] = {"bytes": len(raw), "sha256": digest}
    (folder / "offsite.json").write_text(json.dumps(manifest))
    try:
        open_package(folder).load_model()
    except ArtefactError:
        pass
    finally:
        shutil.rmtree(folder.parent)
