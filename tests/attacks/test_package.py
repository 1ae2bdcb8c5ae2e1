"""Rows 33 and 34: what a package's files and its audit tell of the full model, and clients who pool their packages."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

from offsite import cli
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.audits.record import PackageAudit, read_audit
from offsite.errors import PolicyError

ALL = tuple(range(8))
CHANNELS = {f"middle.{number}": tuple(range(number, 48, 3)) for number in range(4)}
MAKES = {
    "drop": {"kept": (0, 1, 2, 4, 6, 7)},
    "width": {"kept": ALL, "channels": CHANNELS},
}


@pytest.fixture(scope="module")
def letters(letters_tokenizer):
    return torch.tensor(letters_tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"]))


@pytest.fixture(scope="module")
def speaker(full_llama, letters):
    """The llama of eight blocks, sure of its next letter: text drawn from it is text it is good at."""
    model = copy.deepcopy(full_llama)
    with torch.no_grad():
        model.model.norm.weight.mul_(6.0)
        spoken = model.model.embed_tokens.weight[letters].clone()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[letters] = spoken
    return model


@pytest.fixture(scope="module")
def secret_place(tmp_path_factory):
    """A folder whose name must not be found in anything that is made in it."""
    return tmp_path_factory.mktemp("mallory-of-acme")


@pytest.fixture(scope="module")
def speaker_folder(speaker, save_model, secret_place):
    return save_model(speaker, secret_place / "unreleased-model-x")


@pytest.fixture(scope="module")
def heldout(speaker, letters, letters_tokenizer, secret_place):
    generator = torch.Generator().manual_seed(0)
    ids_BT = letters[torch.randint(26, (40, 1), generator=generator)]
    with torch.no_grad():
        for _ in range(30):
            drawn = torch.multinomial(speaker(ids_BT).logits[:, -1, letters].softmax(-1), 1, generator=generator)
            ids_BT = torch.cat([ids_BT, letters[drawn]], 1)
    path = secret_place / "patients-of-dr-smith.jsonl"
    rows = [{"text": "".join(letters_tokenizer.convert_ids_to_tokens(row))} for row in ids_BT.tolist()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=list(MAKES))
def audited(request, make_package, speaker, speaker_folder, heldout, secret_place):
    """A package, its audit as JSON text, and the owner's record."""
    package, audit = secret_place / f"package-{request.param}", secret_place / f"audit-{request.param}"
    made = make_package(package, model=speaker, **MAKES[request.param])
    words = ["--heldout", heldout, "--public", heldout, "--block-tokens", "32", "--limit-tokens", "600"]
    words += ["--recovery-tokens", "200", "--similarity-tokens", "64", "--device", "cpu", "-o", audit]
    assert cli.run(["audit", "package", str(package), "--model", str(speaker_folder), *map(str, words)]) == 0
    assert isinstance(read_audit(audit)[0], PackageAudit)
    return made, (audit / "audit.json").read_text(), read_owner_record(owner_record_path(package))


def test_row_33_an_audit_names_no_block_channel_path_file_or_person(audited):
    _, text, record = audited
    hidden = "mallory acme smith patients unreleased layers kept_ channels .jsonl / \\".split()
    told = text.replace(record.base_digest, "").replace("offsite/audit/1", "")
    assert [word for word in hidden if word in told] == []
    numbers = [int(number) for number in re.findall(r"(?<![\w.:-])\d+(?![\w.])", text)]
    assert not any(numbers[i : i + 3] == list(record.kept[2:5]) for i in range(len(numbers)))  # no list of blocks
    stated = json.loads(text)
    assert [one["block"] for one in stated["similarity"]["blocks"]] == list(record.layout.blocks)  # the package's own
    assert all(set(one) == {"block", "cosine", "cka"} for one in stated["similarity"]["blocks"])
    for kept in record.channels.values():
        assert re.sub(r"\s", "", text).find(",".join(map(str, kept[:4]))) == -1


def test_row_33_audits_of_packages_that_keep_other_blocks_tell_alike(
    make_package, speaker, speaker_folder, heldout, tmp_path
):
    """What an audit says of which blocks were kept is the figures alone: its form is the same."""
    forms = []
    for name, kept in {"a": (0, 1, 2, 4, 6, 7), "b": (0, 1, 3, 5, 6, 7)}.items():
        make_package(tmp_path / name, model=speaker, kept=kept)
        words = [
            "--heldout",
            heldout,
            "--block-tokens",
            "32",
            "--limit-tokens",
            "600",
            "-o",
            tmp_path / f"audit-{name}",
        ]
        assert (
            cli.run(["audit", "package", str(tmp_path / name), "--model", str(speaker_folder), *map(str, words)]) == 0
        )
        stated = json.loads((tmp_path / f"audit-{name}" / "audit.json").read_text())
        forms.append((stated["similarity"]["num_verbatim"], stated["emulator_parameters"], _form(stated)))
    assert forms[0] == forms[1]


def _form(value):
    if isinstance(value, dict):
        return {key: _form(inner) for key, inner in value.items()}
    return [_form(inner) for inner in value] if isinstance(value, list) else type(value).__name__


def test_row_33_a_package_is_canonical(audited):
    package, _, record = audited
    manifest = json.loads((package.path / "offsite.json").read_text())
    config = json.loads((package.path / "config.json").read_text())
    assert config["num_hidden_layers"] == len(record.kept)
    assert not [key for key in config if key.startswith("_") or key in ("name_or_path", "transformers_version")]
    stack = record.layout.stack
    numbers = {int(name.removeprefix(f"{stack}.").split(".")[0]) for name in manifest["tensors"] if stack in name}
    assert numbers == set(range(len(record.kept)))
    for path in package.path.iterdir():
        raw = path.read_bytes()
        for word in (b"mallory", b"acme", b"unreleased", b"owner", b"kept"):
            assert word not in raw, path.name


def test_row_33_the_same_package_made_elsewhere_is_the_same_bytes(make_package, speaker, tmp_path):
    first = make_package(tmp_path / "here" / "a", model=speaker, **MAKES["drop"])
    second = make_package(tmp_path / "there" / "b", model=speaker, **MAKES["drop"])
    assert first.digest == second.digest


# --- row 34


def audit_words(package, speaker_folder, heldout, out, *more):
    words = [package, "--model", speaker_folder, "--heldout", heldout, "--block-tokens", "32", "--limit-tokens", "600"]
    return ["audit", "package", *map(str, [*words, "-o", out, *more])]


def test_row_34_what_colluding_clients_hold_together_is_found_and_refused(
    make_package, make_job, parties, speaker, speaker_folder, heldout, tmp_path, capsys
):
    from offsite.audits.gates import package_gates, passed

    for name, kept in {"first": (0, 1, 2, 4, 6, 7), "second": (0, 1, 3, 5, 6, 7)}.items():
        make_package(tmp_path / name, model=speaker, kept=kept)
    words = audit_words(tmp_path / "second", speaker_folder, heldout, tmp_path / "audit")
    assert cli.run([*words, "--earlier", str(tmp_path / "first"), "--max-union", "0.8"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["union"] == 1  # half each, and all of it together
    assert [(gate["name"], gate["verdict"]) for gate in told["gates"]] == [("union", "failed")]
    audit, _ = read_audit(tmp_path / "audit")
    assert isinstance(audit, PackageAudit)
    assert audit.union is not None
    assert audit.union.share_single == 0.5
    assert not passed(package_gates(audit, max_union=0.99))
    assert passed(package_gates(audit, max_union=1.0))


def test_row_34_the_same_blocks_for_every_client_add_nothing(
    make_package, speaker, speaker_folder, heldout, tmp_path, capsys
):
    for name in ("first", "second"):
        make_package(tmp_path / name, model=speaker, **MAKES["drop"])
    words = audit_words(tmp_path / "second", speaker_folder, heldout, tmp_path / "audit")
    assert cli.run([*words, "--earlier", str(tmp_path / "first"), "--max-union", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["union"] == 0.5
    assert [gate["verdict"] for gate in told["gates"]] == ["passed"]


def test_row_34_sealing_refuses_past_the_limit_with_the_figure(
    make_package, make_job, parties, speaker, speaker_folder, heldout, tmp_path, capsys
):
    from offsite.config import build
    from offsite.sealed.config import SealConfig
    from offsite.sealed.release import require_gates

    for name, kept in {"first": (0, 1, 2, 4, 6, 7), "second": (0, 1, 3, 5, 6, 7)}.items():
        made = make_package(tmp_path / name, model=speaker, kept=kept)
    words = audit_words(tmp_path / "second", speaker_folder, heldout, tmp_path / "audit")
    assert cli.run([*words, "--earlier", str(tmp_path / "first")]) == 0
    owner, _ = parties
    flags = {"input": str(made.path), "output": str(tmp_path / "out"), "keys": str(owner.keys)}
    flags |= {"audit": str(tmp_path / "audit"), "max_union": "0.75"}
    config = build(SealConfig, flags=flags)
    with pytest.raises(PolicyError, match=r"union failed: together the packages hold 1\.00 of it, limit 0\.75"):
        require_gates(config, "package", made.digest)
