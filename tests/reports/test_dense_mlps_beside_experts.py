"""LoRA on the dense and shared MLPs that some mixtures of experts have beside their experts.

People who asked peft for such modules by name found the router and the fused experts adapted in their place, or an
error about a projection that is fused with another: peft rewrites targets that are called as an expert's projections
once were, whatever module they name in full. Here a job for such an adapter was agreed on, and only the client's tuning
found out. Now exactly the named modules carry it, in tuning, plugged in and in the folder that vanilla peft opens; what
cannot be written for peft is refused when the job is made.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_loop import logits, pack, plug_in, tune
from tiny_architectures import tiny

from adapters.kinds import attach, declared
from adapters.lowrank import quiet_peft
from adapters.targets import peft_targets, require_carried
from offsite import cli
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import UnsupportedModel

BESIDE = ["glm4_moe", "deepseek_v2", "dots1", "hunyuan_v1_moe"]  # dense in the first three blocks; shared in all
SUFFIX = ".lora_A.default.weight"


@pytest.fixture(scope="module")
def packed(letters_tokenizer, tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = pack(tiny(name), letters_tokenizer, folder / "package", "drop", blocks=2)
        return made[name]

    return get


def wrapped(model, **settings):
    with quiet_peft():
        return get_peft_model(model, LoraConfig(r=2, **settings))


def reached(model):
    names = [name for name, _ in model.named_parameters() if name.endswith(SUFFIX)]
    return {name.removeprefix("base_model.model.").removesuffix(SUFFIX) for name in names}


def test_what_peft_alone_makes_of_full_names():
    model = tiny("glm4_moe")
    wanted = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    found = reached(wrapped(model, target_modules=wanted))
    assert not found & set(wanted)
    assert any(name.endswith("experts") for name in found)


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_attached_to_exactly_the_named_modules(name, kind, packed):
    package = packed(name).package
    spec = AdapterSpec(kind=kind, rank=2, dtype="float32", placement="1+1")
    names = declared(spec, package.layout, package.block_tensors())
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    modules = {canonical.rpartition(".")[0] for canonical in names}
    assert any(".mlp." in module for module in modules)
    stack = package.layout.stack
    places = {f"{role}.0": f"{stack}.{number}" for role, number in (("bottom", 0), ("top", 3))}
    assert reached(attached.model) == {f"{places[m[: m.index('.0') + 2]]}{m[m.index('.0') + 2 :]}" for m in modules}


@pytest.mark.parametrize("targets", ["mlp", "all-linear", "attention"])
def test_opened_by_vanilla_peft_on_exactly_those(targets, packed, tmp_path):
    both = packed("glm4_moe")
    spec = AdapterSpec(kind="rslora", rank=2, dtype="float32", placement="1+1", targets=targets, dropout=0.1)
    found = plug_in(both, tune(both.package, tmp_path / "bundle", spec), tmp_path)
    assert found.reached == found.wanted
    assert (found.own - found.before).abs().max() > 1e-2
    torch.testing.assert_close(found.vanilla, found.own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.merged, found.own, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(both.full), found.before)


@pytest.mark.parametrize("name", BESIDE)
def test_dora_is_refused_where_it_has_no_form_for_peft_with_the_way_out(name, packed):
    package = packed(name).package
    spec = AdapterSpec(kind="dora", rank=2, dtype="float32", placement="1+1")
    with pytest.raises(UnsupportedModel, match=r"cannot name .*: peft takes it for an expert's") as caught:
        require_carried(package, spec)
    assert caught.value.hint == "--targets attention, or --adapter lora"  # both were tried
    assert require_carried(package, spec.model_copy(update={"targets": "attention"})) > 0
    assert require_carried(package, spec.model_copy(update={"kind": "lora"})) > 0


def test_a_job_that_could_not_be_kept_is_not_made(packed, parties, tmp_path, capsys):
    owner, client = parties
    words = ["job", "create", packed("glm4_moe").package.path, "--client", client.fingerprint, "--placement", "1+1"]
    words += ["--registry", tmp_path / "registry", "--keys", owner.keys, "-o", tmp_path / "job"]
    assert cli.run([str(word) for word in [*words, "--adapter", "dora"]]) == 2
    err = capsys.readouterr().err
    assert "offsite: hint: --targets attention, or --adapter lora" in err
    assert not (tmp_path / "job").exists()
    assert not (tmp_path / "registry").exists()
    assert cli.run([str(word) for word in [*words, "--adapter", "lora"]]) == 0


@pytest.mark.parametrize(
    "modules",
    [
        ["model.layers.0.mlp.gate_proj"],  # without the one it was once fused with
        ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"],
        ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.4.self_attn.v_proj"],
    ],
)
def test_any_choice_of_modules_is_named_for_peft(modules):
    model = tiny("glm4_moe")
    settings = peft_targets(model, modules)
    assert reached(wrapped(model, **settings)) == set(modules)
