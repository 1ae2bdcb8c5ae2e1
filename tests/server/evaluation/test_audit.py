"""An adapter that learned its canaries by heart is caught; a reveal is believed only if it was committed to."""

from __future__ import annotations

import copy
import json
import random
import string

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.kinds import attach, declared
from offsite.artefacts.bundle import AdapterSpec
from offsite.audits.canaries import CanarySet, CanaryText, Secret, records_of, words_of, write_canaries
from offsite.audits.canaryaudit import score_canaries
from offsite.audits.record import PluggedAudit, read_audit
from offsite.cli import run as offsite
from offsite.errors import ArtefactError, BadDigest, BadSchema, ConfigError, PolicyError, TooLarge, WrongBinding
from offsite.text.batches import IGNORED, collate, encode
from server.evaluation.audit import run
from server.evaluation.auditconfig import AuditPluggedConfig
from server.registry.registry import Registry

SPEC = {"kind": "blocks", "placement": "1+1"}


@pytest.fixture(scope="module")
def canaries() -> CanarySet:
    draw = random.Random(1)
    texts = ["".join(draw.choices(string.ascii_letters, k=16)) for _ in range(120)]
    return CanarySet(
        nonce=draw.randbytes(32).hex(),
        package_digest="sha256:" + "a" * 64,
        tokens=16,
        temperature=1.0,
        synthetic=tuple(CanaryText(text=text, included=draw.random() < 0.5) for text in texts),
        secrets=tuple(
            Secret(prefix=f"code {n} is", secret=words_of(draw.randbytes(4)), included=n % 2 == 0) for n in range(8)
        ),
        num_candidates=32,
    )


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """A random llama of three blocks that learns quickly; read only."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def base_folder(base, save_model, tmp_path_factory):
    return save_model(base, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def package(base, make_package, tmp_path_factory):
    return make_package(tmp_path_factory.mktemp("kept") / "package", model=base, kept=(0, 1, 2), ends=(1, 1))


@pytest.fixture(scope="module")
def learned_by_heart(package, canaries, letters_tokenizer, make_bundle, tmp_path_factory):
    """A bundle of an adapter that was trained on the included canaries and nothing else, two hundred times."""
    spec = AdapterSpec(dtype="float32", **SPEC)
    names = declared(spec, package.layout, package.block_tensors())
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    rows = encode(records_of(canaries), letters_tokenizer, context=128).examples
    num = canaries.num_included
    batches = [collate(rows[:num], 0), collate(rows[num:], 0)]
    optimizer = torch.optim.AdamW(list(attached.trainable.values()), lr=5e-3, weight_decay=0.0)
    attached.model.train()
    for _ in range(200):
        for batch in batches:
            logits = attached.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED
            ).backward()
        optimizer.step()
        optimizer.zero_grad()
    out = tmp_path_factory.mktemp("learned") / "bundle"
    return make_bundle(out, package, tensors=attached.tensors(), **SPEC)


@pytest.fixture(scope="module")
def untouched(package, make_bundle, tmp_path_factory):
    """A bundle of an adapter that never saw a canary."""
    return make_bundle(tmp_path_factory.mktemp("untouched") / "bundle", package, shake=0.01, **SPEC)


@pytest.fixture
def audit(shelve, package, base_folder, canaries, tmp_path):
    """Return settings of the verb, on a bundle in a registry and canaries that were made for its job."""

    def make(bundle, *, state="accepted", canaries=canaries, **changes):
        named = shelve(bundle.path, package.path, tmp_path / "shelf", state=state)
        with Registry.open(named["registry"], named["keys"]) as registry:
            job_id = registry.entry(named["id"]).job_id
        stated = canaries.model_copy(update={"package_digest": package.digest, "job_id": job_id})
        stated = stated.model_copy(update=changes.pop("stated", {}))
        write_canaries(tmp_path / "canaries", stated)
        given = {
            "commitment": tmp_path / "canaries" / "commitment",
            "reveal": tmp_path / "canaries" / "reveal",
            "output": tmp_path / "audit",
            "samples": 10,
            "device": "cpu",
            **named,
        }
        return AuditPluggedConfig(model=str(base_folder), **{**given, **changes})

    return make


def test_an_adapter_that_learned_by_heart_is_caught(
    audit, learned_by_heart, canaries, package, base_folder, tmp_path, capfd
):
    config = audit(learned_by_heart)
    words = ["audit", "plugged-in", str(base_folder), config.id, "--registry", str(config.registry)]
    words += ["--keys", str(config.keys), "--commitment", str(config.commitment), "--reveal", str(config.reveal)]
    assert offsite([*words, "--epsilon", "1.0", "--samples", "3", "--device", "cpu", "-o", str(config.output)]) == 0
    out, err = capfd.readouterr()
    told = json.loads(out.splitlines()[-1])
    found, digest = read_audit(tmp_path / "audit")
    assert isinstance(found, PluggedAudit)
    assert (told["audit_digest"], told["bundle_digest"]) == (digest, learned_by_heart.digest)
    assert (found.bundle_digest, found.package_digest) == (learned_by_heart.digest, package.digest)
    assert found.base_digest == package.manifest.base_digest
    assert told["auc"]["reference"] > 0.95
    assert found.canaries.bound is not None
    assert 2.0 < found.canaries.bound.epsilon == told["epsilon_at_least"]
    assert found.canaries.exposure is not None
    assert found.canaries.exposure.num_secrets == 4
    assert told["num_extracted"] >= 2
    assert told["exposure_bits"] > 4.0
    assert told["gates"] == {"epsilon": "failed"}
    assert "epsilon failed: attacks show epsilon of at least" in err
    shown = out + err + (tmp_path / "audit" / "audit.json").read_text()
    assert not any(canary.text in shown for canary in canaries.synthetic)
    assert not any(secret.secret in shown for secret in canaries.secrets)


def test_an_adapter_that_never_saw_them_is_not(audit, untouched):
    told = run(audit(untouched))
    assert told["gates"] == {"secrets": "passed"}
    assert told["num_extracted"] == 0
    assert told["epsilon_at_least"] < 0.5


def test_what_is_measured_is_what_is_served(audit, untouched, package, base, monkeypatch, capsys):
    """The canaries are scored by the mixture of shares that the settings name, the record says so, others are told."""
    config = audit(untouched, scale="mlp=0.5,attention=0.25", mix=0.5, samples=0)
    ids, seen, score = torch.tensor([[5, 60, 7, 100]]), {}, score_canaries

    def spied(model, *args, label, **given):
        with torch.no_grad():
            seen[label] = torch.softmax(model(input_ids=ids).logits.double(), -1)
        return score(model, *args, label=label, **given)

    monkeypatch.setattr("server.evaluation.audit.score_canaries", spied)
    with Registry.open(config.registry, config.keys) as registry:
        registry.note_way(config.id, "plugged-in", "0.5")
    told = run(config)
    assert told["way"] == "attention=0.25,mlp=0.5,mix=0.5"
    assert "warning: plugged in was 0.5 of the update; this measures 0.25 of attention" in capsys.readouterr().err
    found, _ = read_audit(config.output)
    assert isinstance(found, PluggedAudit)
    assert (found.way, found.spare_text) == (told["way"], "")
    moved, before = copy.deepcopy(base), base.state_dict()
    for name, tensor in untouched.load_tensors(untouched.manifest.tensors).items():
        role, _, inner = name.split(".", 2)
        path = f"model.layers.{0 if role == 'bottom' else 2}.{inner}"
        share = 0.5 if ".mlp." in path else 0.25
        moved.get_parameter(path).data = before[path] + share * (tensor - before[path])
    with torch.no_grad():
        part = torch.softmax(moved(input_ids=ids).logits.double(), -1)
    torch.testing.assert_close(seen["plugged in"], (seen["full model"] + part) / 2, rtol=0, atol=1e-6)
    with Registry.open(config.registry, config.keys) as registry:
        registry.note_way(config.id, "served", "1")
    whole = config.model_copy(update={"output": config.output.with_name("whole"), "scale": 1.0, "mix": 1.0})
    assert run(whole)["way"] == "1"
    assert "warning" not in capsys.readouterr().err
    assert '"way"' not in (whole.output / "audit.json").read_text()


def test_half_precision_and_no_secrets(audit, untouched, canaries):
    told = run(audit(untouched, canaries=canaries.model_copy(update={"secrets": ()}), precision="bf16"))
    assert (told["exposure_bits"], told["gates"]) == (None, {"secrets": "not measurable"})


def flipped(folder):
    report = folder / "reveal" / "report.json"
    stated = json.loads(report.read_bytes())
    stated["synthetic"][0]["included"] = not stated["synthetic"][0]["included"]
    report.write_text(json.dumps(stated))


def overfull(folder):
    (folder / "commitment" / "report.json").write_bytes(b" " * 2**20)


def swapped(folder):
    (folder / "commitment").rename(folder / "c")
    (folder / "reveal").rename(folder / "commitment")
    (folder / "c").rename(folder / "reveal")


TAMPERED = {
    "a coin turned": (flipped, BadDigest, "committed to were"),
    "too large": (overfull, TooLarge, "over 65536 bytes"),
    "folders swapped": (swapped, ArtefactError, "report.json"),
    "no reveal": (lambda folder: (folder / "reveal" / "report.json").unlink(), ArtefactError, "holds no report"),
    "no commitment": (lambda folder: (folder / "commitment" / "report.json").unlink(), ArtefactError, "holds no"),
    "not JSON": (lambda folder: (folder / "commitment" / "report.json").write_text("{"), BadSchema, "is not JSON"),
}


@pytest.mark.parametrize(("change", "error", "message"), TAMPERED.values(), ids=TAMPERED.keys())
def test_what_was_not_committed_to_is_refused(audit, untouched, tmp_path, change, error, message):
    config = audit(untouched)
    change(tmp_path / "canaries")
    with pytest.raises(error, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "audit").exists()
    assert not list(tmp_path.glob(".audit*"))


@pytest.mark.parametrize("stated", [{"package_digest": "sha256:" + "c" * 64}, {"job_id": "c" * 32}, {"job_id": None}])
def test_a_commitment_for_something_else_is_refused(audit, untouched, tmp_path, stated):
    with pytest.raises(WrongBinding, match="were committed to for"):
        run(audit(untouched, stated=stated))
    assert not (tmp_path / "audit").exists()


def test_a_bundle_that_was_not_accepted_is_not_plugged_in(audit, untouched, tmp_path):
    with pytest.raises(PolicyError, match="not accepted"):
        run(audit(untouched, state="verified"))
    assert not (tmp_path / "audit").exists()


def test_another_model_and_an_output_that_stands_are_refused(audit, untouched, llama_folder, tmp_path):
    config = audit(untouched)
    with pytest.raises(WrongBinding, match="has digest"):
        run(config.model_copy(update={"model": str(llama_folder)}))
    (tmp_path / "audit").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        run(config)
    assert not list((tmp_path / "audit").iterdir())


def test_the_full_model_stays_as_it_was(audit, untouched, base_folder):
    before = {path.name: path.read_bytes() for path in base_folder.iterdir()}
    run(audit(untouched))
    assert {path.name: path.read_bytes() for path in base_folder.iterdir()} == before


def test_both_reports_cross_sealed(parties, make_job, dropped_package, canaries, tmp_path, capsys):
    owner, client = parties
    job_id = "d" * 32
    from offsite.artefacts.job import write_job

    write_job(tmp_path / "job", make_job(job_id=job_id))
    stated = canaries.model_copy(update={"package_digest": dropped_package.digest, "job_id": job_id})
    commitment = write_canaries(tmp_path / "canaries", stated)
    job = str(tmp_path / "job")
    assert offsite(["seal", job, "-o", str(tmp_path / "job.sealed"), *owner.flags]) == 0
    assert offsite(["open", str(tmp_path / "job.sealed"), "-o", str(tmp_path / "job.client"), *client.flags]) == 0
    for name in ("commitment", "reveal"):
        sealed, out = str(tmp_path / f"{name}.sealed"), str(tmp_path / f"{name}.opened")
        folder = str(tmp_path / "canaries" / name)
        assert offsite(["seal", folder, "--job", job, "--round", "0", "-o", sealed, *client.flags]) == 0
        assert offsite(["open", sealed, "-o", out, *owner.flags]) == 0
    capsys.readouterr()
    from offsite.audits.canaries import open_reveal, read_commitment

    assert read_commitment(tmp_path / "commitment.opened") == commitment
    assert open_reveal(tmp_path / "reveal.opened", commitment) == stated
