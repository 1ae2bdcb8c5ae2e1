"""EMLoC's correction: on the adapter's own directions the full model computes what was tuned on the emulator."""

from __future__ import annotations

import pytest
import torch

from emulator.compression.compress import Recipe, compress
from emulator.compression.lowrank import low_rank  # noqa: F401 - registers the method
from emulator.compression.packed import pack_middle
from emulator.distillation.publish import publish
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.audits.canaries import CanarySet, CanaryText, write_canaries
from offsite.audits.canaryaudit import score_canaries
from offsite.audits.record import read_audit
from offsite.digests import model_digest
from offsite.errors import ConfigError, WrongShape
from offsite.modelling.load import load_model
from offsite.modelling.split import make_plan
from server.evaluation.audit import run
from server.evaluation.auditconfig import AuditPluggedConfig
from server.evaluation.candidates import read_own
from server.plugging.adapted import load_adapted, open_adapted
from server.plugging.fit import corrected, fit, plugged
from server.registry.registry import Registry


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layer():
    """W, What, and an adapter of rank 4 with s = 2, that is as large as what the two differ by."""
    adapter = {"m.lora_A": some(4, 12, seed=3), "m.lora_B": 0.2 * some(9, 4, seed=4)}
    return some(9, 12, seed=1), some(9, 12, seed=1) + 0.1 * some(9, 12, seed=2), adapter


def test_on_its_own_directions_the_full_model_computes_what_the_emulator_did(layer):
    full, emulator, tensors = layer
    found = corrected(tensors, {"m": full}, {"m": emulator}, scale=2.0, limit=float("inf"))
    tuned = emulator + 2.0 * tensors["m.lora_B"] @ tensors["m.lora_A"]
    plugged = full + 2.0 * found["m.lora_B"].double() @ found["m.lora_A"].double()
    inside = tensors["m.lora_A"].T @ some(4, 50)  # inputs in the span of A's rows
    torch.testing.assert_close(plugged @ inside, tuned @ inside, rtol=1e-5, atol=1e-5)
    outside = some(12, 50)
    outside -= tensors["m.lora_A"].T @ torch.linalg.lstsq(tensors["m.lora_A"].T, outside).solution
    torch.testing.assert_close(plugged @ outside, full @ outside, rtol=1e-5, atol=1e-5)  # nothing elsewhere
    assert found["m.lora_A"].shape == (4, 12)
    assert found["m.lora_B"].shape == (9, 4)


def test_each_direction_is_corrected_by_at_most_the_limit(layer):
    """Against the four steps of arXiv:2506.12015, one direction after the other."""
    full, emulator, tensors = layer
    u, size, vt = torch.linalg.svd(tensors["m.lora_A"].T, full_matrices=False)
    updates = [2.0 * tensors["m.lora_B"] @ (size[i] * vt[i]) for i in range(4)]
    faults = [(full - emulator) @ u[:, i] for i in range(4)]
    ratios = [float(c.abs().mean() / b.abs().mean()) for b, c in zip(updates, faults, strict=True)]
    limit = sorted(ratios)[1] * 1.01  # two directions are shortened, two are not
    wanted = torch.zeros(9, 12, dtype=torch.float64)
    for i in range(4):
        wanted += torch.outer(updates[i] - faults[i] * min(1.0, limit / ratios[i]), u[:, i])
    found = corrected(tensors, {"m": full}, {"m": emulator}, scale=2.0, limit=limit)
    update = 2.0 * found["m.lora_B"].double() @ found["m.lora_A"].double()
    torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_does_nothing_stays_one_and_equal_weights_change_nothing(layer):
    full, emulator, tensors = layer
    idle = {**tensors, "m.lora_B": torch.zeros(9, 4, dtype=torch.float64)}
    assert corrected(idle, {"m": full}, {"m": emulator}, scale=2.0)["m.lora_B"].eq(0).all()
    same = corrected(tensors, {"m": full}, {"m": full}, scale=2.0)
    product = same["m.lora_B"].double() @ same["m.lora_A"].double()
    torch.testing.assert_close(product, tensors["m.lora_B"] @ tensors["m.lora_A"], rtol=1e-5, atol=1e-5)
    assert corrected(tensors, {}, {}, scale=2.0) == tensors


def test_weights_of_other_shapes_are_refused(layer):
    full, _, tensors = layer
    with pytest.raises(WrongShape):
        corrected(tensors, {"m": full[:-1]}, {"m": full[:-1]}, scale=1.0)


@pytest.fixture
def make(full_llama, letters_tokenizer, tmp_path):
    """Make a package of the llama of eight blocks by a method, through the same calls as the verb."""

    def package(method, pack=None, **recipe):
        plan = make_plan(full_llama)
        ids = torch.randint(3, 259, (4, 32), generator=torch.Generator().manual_seed(2))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = compress(full_llama, plan, method, Recipe(calibration=[batch], packing=pack or "", **recipe))
        if pack and method != "packed":
            found = found.__class__(**{**vars(found), "encoded": pack_middle(found.model, plan, pack, {}).encoded})
        return publish(
            tmp_path / "package",
            model=found.model,
            tokenizer=letters_tokenizer,
            plan=plan,
            compressed=found,
            method=method,
            base_digest=model_digest(full_llama),
            figures={},
            dtype="float32",
        )

    return package


MAKES = {"low-rank": {"rank_share": 0.6}, "packed": {"pack": "nf3"}}


@pytest.mark.parametrize("method", list(MAKES))
def test_an_adapter_of_an_encoded_package_is_plugged_in_as_it_is(
    method, make, plug_in, make_bundle, llama_folder, logits_of, tmp_path
):
    """The oracle adds s B A to the full model's own weights by hand."""
    package = make(method, **MAKES[method])
    bundle = make_bundle(tmp_path / "bundle", package, kind="lora", placement="all", rank=4, alpha=8.0)
    plug_in(llama_folder, bundle, tmp_path / "adapted", package=package.path)
    model = load_model(str(llama_folder))
    record = read_owner_record(owner_record_path(package.path))
    tensors = read_own(bundle, record).tensors
    modules = {name.rpartition(".")[0] for name in tensors}
    assert {name.split(".")[0] for name in modules} == {"bottom", "middle", "top"}
    with torch.no_grad():
        for module in modules:
            role, number, inner = module.split(".", 2)
            weight = model.get_parameter(f"{record.sites[f'{role}.{number}']}.{inner}.weight")
            weight += 2.0 * tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"]
    loaded, _ = load_adapted(tmp_path / "adapted")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", list(MAKES))
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_verb_corrects_the_middle_and_says_so(
    kind, method, make, plug_in, make_bundle, llama_folder, logits_of, tmp_path
):
    package = make(method, **MAKES[method])
    bundle = make_bundle(tmp_path / "bundle", package, kind=kind, placement="all", rank=4, alpha=8.0)
    plain = plug_in(llama_folder, bundle, tmp_path / "plain", package=package.path)
    told = plug_in(llama_folder, bundle, tmp_path / "corrected", package=package.path, correct=True)
    assert (plain["corrected"], told["corrected"]) == (False, True)
    assert '"corrected"' not in (tmp_path / "plain" / "offsite.json").read_text()
    assert open_adapted(tmp_path / "corrected").corrected
    assert open_adapted(tmp_path / "corrected").adapter == bundle.manifest.adapter  # rank and alpha stay
    assert "corrected" in (tmp_path / "corrected" / "README.md").read_text()
    full, emulator = load_model(str(llama_folder)), package.load_model()
    record = read_owner_record(owner_record_path(package.path))
    verified = read_own(bundle, record)
    fitted = fit(full, verified, record, emulator=package)
    scale = 8.0 / (4 if kind == "lora" else 2)
    for name in ("middle.1.mlp.down_proj", "middle.0.self_attn.q_proj"):
        path = name.replace("middle.1", "model.layers.3").replace("middle.0", "model.layers.2") + ".weight"
        wanted = corrected(
            {key: one for key, one in verified.tensors.items() if key.startswith(f"{name}.")},
            {name: full.get_parameter(path)},
            {name: emulator.get_parameter(path)},
            scale=scale,
        )
        assert all(torch.allclose(fitted.tensors[key], one, atol=1e-6) for key, one in wanted.items())
        assert not torch.allclose(fitted.tensors[f"{name}.lora_B"], verified.tensors[f"{name}.lora_B"])
    ends = [key for key in verified.tensors if not key.startswith("middle.")]
    assert all(fitted.tensors[key] is verified.tensors[key] for key in ends)
    loaded, _ = load_adapted(tmp_path / "corrected")
    other, _ = load_adapted(tmp_path / "plain")
    assert not torch.allclose(logits_of(loaded), logits_of(other), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "recipe", "spec", "words"),
    [
        ("width", {"width": 0.5}, {"kind": "lora"}, "method width: what its refit made up for would count twice"),
        ("width", {"width": 0.5, "pack": "nf4"}, {"kind": "lora"}, "method width"),
        ("drop", {"blocks": 2}, {"kind": "lora", "placement": "2+2"}, "method drop"),
        ("keep-all", {}, {"kind": "lora"}, "do not stand for"),
        ("packed", {"pack": "nf4"}, {"kind": "dora"}, "a dora adapter has no directions to correct"),
        ("packed", {"pack": "nf4"}, {"kind": "blocks", "placement": "2+2"}, "a blocks adapter"),
    ],
)
def test_what_cannot_be_corrected(method, recipe, spec, words, make, plug_in, make_bundle, llama_folder, tmp_path):
    package = make(method, **recipe)
    bundle = make_bundle(tmp_path / "bundle", package, **{"placement": "all", **spec})
    with pytest.raises(ConfigError, match=f"--correct: .*{words}"):
        plug_in(llama_folder, bundle, tmp_path / "adapted", package=package.path, correct=True)
    assert not (tmp_path / "adapted").exists()


def test_magnitudes_are_not_learnt_on_linears_of_lower_rank(make, make_bundle, tmp_path):
    package = make("low-rank", rank_share=0.6)
    bundle = make_bundle(tmp_path / "bundle", package, kind="dora", placement="all")
    assert not any(name.startswith("middle.") for name in bundle.manifest.tensors)


def test_an_audit_measures_the_corrected_update_and_says_so(
    make, make_bundle, llama_folder, logits_of, shelve, tmp_path, monkeypatch, capsys
):
    package = make("packed", **MAKES["packed"])
    bundle = make_bundle(tmp_path / "bundle", package, kind="lora", placement="all", rank=4, alpha=8.0)
    named = shelve(bundle.path, package.path, tmp_path / "shelf")
    with Registry.open(named["registry"], named["keys"]) as registry:
        job_id = registry.entry(named["id"]).job_id
    texts = tuple(CanaryText(text=f"canary {number}" * 2, included=number % 2 == 0) for number in range(8))
    canaries = CanarySet(nonce="0" * 64, package_digest=package.digest, job_id=job_id, tokens=8, temperature=1.0,
                         synthetic=texts, secrets=(), num_candidates=32)  # fmt: skip
    write_canaries(tmp_path / "canaries", canaries)
    seen, score = {}, score_canaries

    def spied(model, *args, label, **given):
        seen[label] = logits_of(model)
        return score(model, *args, label=label, **given)

    monkeypatch.setattr("server.evaluation.audit.score_canaries", spied)
    given = {"commitment": tmp_path / "canaries" / "commitment", "reveal": tmp_path / "canaries" / "reveal"}
    config = AuditPluggedConfig(
        model=str(llama_folder), output=tmp_path / "audit", samples=0, device="cpu", correct=True, **given, **named
    )
    assert run(config)["corrected"] is True
    assert "all of the update, corrected" in capsys.readouterr().err
    assert read_audit(config.output)[0].corrected
    full = load_model(str(llama_folder))
    fitted = fit(full, read_own(bundle, read_owner_record(owner_record_path(package.path))),
                 read_owner_record(owner_record_path(package.path)), emulator=package)  # fmt: skip
    with plugged(full, fitted) as adapted:
        torch.testing.assert_close(seen["plugged in"], logits_of(adapted), rtol=0, atol=1e-5)
    plain = config.model_copy(update={"output": tmp_path / "plain", "correct": False})
    assert run(plain)["corrected"] is False
    assert '"corrected"' not in (plain.output / "audit.json").read_text()
