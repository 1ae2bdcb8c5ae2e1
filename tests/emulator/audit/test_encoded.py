"""What audits, inspect and mark make of packages whose middle is stored as factors or packed."""

from __future__ import annotations

import json

import pytest
import torch

from emulator.audit.similarity import similarity
from emulator.audit.union import held, union_share
from emulator.compression.compress import Recipe, compress
from emulator.compression.lowrank import low_rank  # noqa: F401 - registers the method
from emulator.compression.packed import packed  # noqa: F401 - registers the method
from emulator.distillation.publish import publish
from emulator.marking.mark import mark
from offsite import cli
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.digests import model_digest
from offsite.errors import UnsupportedModel
from offsite.keys.identity import generate, save_identity
from offsite.modelling.split import make_plan

MAKES = {"low-rank": {"rank_share": 0.5}, "packed": {"packing": "nf3"}, "int8": {"packing": "int8"}}


@pytest.fixture
def full(tiny):
    return tiny("llama")


@pytest.fixture
def make(full, tokenizer, tmp_path):
    numbered = iter(range(100))

    def package(name, seed=0):
        plan = make_plan(full, num_bottom=1, num_top=1)
        ids = torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        method = name if name == "low-rank" else "packed"
        found = compress(full, plan, method, Recipe(calibration=[batch], **MAKES[name]))
        return publish(
            tmp_path / f"package-{next(numbered)}",
            model=found.model,
            tokenizer=tokenizer,
            plan=plan,
            compressed=found,
            method=method,
            base_digest=model_digest(full),
            figures={},
            dtype="float32",
        )

    return package


def record_of(package):
    return read_owner_record(owner_record_path(package.path))


@pytest.mark.parametrize("name", list(MAKES))
def test_nothing_of_the_middles_linears_is_verbatim(make, full, batch, name):
    package = make(name)
    found = similarity(full, package.load_model(), record_of(package), [batch], dtype=torch.float32)
    encoded = sum(full.get_parameter(tensor).numel() for tensor in package.manifest.encodings)
    assert found.num_verbatim == found.num_verbatim_by_row == found.num_within_rounding
    assert found.num_verbatim == found.num_parameters - encoded  # ends, embeddings, norms
    middle = [one for one in found.blocks if one.block.startswith("middle.")]
    least = {"low-rank": 0.5, "packed": 0.95, "int8": 0.9999}[name]
    assert all(least < one.cosine < 1 - 1e-7 for one in middle)  # the cosine tells what packing hides: nothing


def test_a_union_counts_the_numbers_of_factors_and_adds_other_packages_directions(make, full):
    first, second, third = record_of(make("low-rank")), record_of(make("low-rank", seed=1)), record_of(make("packed"))
    sizes = {n: sum(p.numel() for p in block.parameters()) for n, block in enumerate(full.model.layers)}
    block = held(first)[2]
    norms = 2 * 32
    factors = sum(one.rank * sum(full.get_parameter(f"model.layers.2.{name.split('.', 2)[2]}").shape)
                  for name, one in first.encodings.items() if name.startswith("middle.1."))  # fmt: skip
    assert block.num_parameters == norms + factors < 0.55 * sizes[2]
    assert not block.is_whole
    found = union_share([first, second], sizes=sizes)
    assert found.share_single == pytest.approx(block.num_parameters / sizes[2])
    assert found.share_union == pytest.approx(min(1.0, 2 * block.num_parameters / sizes[2]))
    assert union_share([first, first], sizes=sizes).share_union == found.share_single
    assert union_share([first, third], sizes=sizes).share_union == 1.0  # packing withholds nothing
    assert union_share([third, third], sizes=sizes).share_single == 1.0


@pytest.mark.parametrize("name", ["low-rank", "packed"])
def test_a_mark_is_refused(make, tmp_path, name):
    package = make(name)
    save_identity(tmp_path / "keys", generate("owner", days=1), b"correct horse battery")
    with pytest.raises(UnsupportedModel, match="stores 28 matrices as factors or packed"):
        mark(package, tmp_path / "marked", recipient="x", keys=tmp_path / "keys")
    assert not (tmp_path / "marked").exists()
    assert not owner_record_path(tmp_path / "marked").exists()


def test_inspect_tells_how_tensors_are_stored(make, capsys):
    for name, words in {"low-rank": "as factors of rank", "packed": "28 tensors packed as nf3 in groups of 64"}.items():
        package = make(name)
        assert cli.run(["inspect", str(package.path)]) == 0
        shown = capsys.readouterr()
        assert words in shown.err
        assert json.loads(shown.out.splitlines()[-1])["encoded_tensors"] == 28
