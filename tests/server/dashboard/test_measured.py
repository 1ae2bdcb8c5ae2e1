"""Figures of an evaluation on a bundle's page: what has to be read first stands first."""

from __future__ import annotations

import pytest

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.manifest import FileEntry
from offsite.evaluation.results import (
    Crossing,
    Data,
    Parameters,
    Results,
    Row,
    Safety,
    SafetyChange,
    Summary,
    write_results,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4
WARNING = "Plugged in, the model refuses fewer harmful requests than before, by more than 5% of them."


def figure(value):
    return Summary(mean=value, deviation=None, values={"seed0": value})


def results(bundle_digest, safety):
    """Results of one bundle that loses three of ten refusals."""
    shares = {"zero_shot": 0.9, "emulator_zero_shot": 0.9, "emulator_tuned": 0.7, "plugged_in": 0.6}
    refused = {
        row: {"refuses_harmful": figure(share), "refuses_harmless": figure(0.0)} for row, share in shares.items()
    }
    crossing = Crossing(
        name="one",
        digest=bundle_digest,
        files={"adapter.safetensors": FileEntry(bytes=9, sha256=DIGEST)},
        num_parameters=2,
    )
    return Results(
        model="model",
        base_digest=DIGEST,
        method={"name": "drop"},
        adapter=AdapterSpec(),
        data=Data(name="held.jsonl", sha256=DIGEST, num_records=9, num_examples=9, num_tokens=99, num_truncated=0),
        rows={
            row: Row(perplexity=figure(12.0), tasks={"safety": one} if safety else {}) for row, one in refused.items()
        },
        metrics={"gap": figure(1.0)},
        tasks={"safety": 20} if safety else {},
        task_metrics={},
        parameters=Parameters(full=4, middle=2, emulator=1, adapter=1),
        package=crossing,
        bundles={"seed0": crossing},
        safety=safety,
        config={},
        command="offsite evaluate model",
        versions={},
        device="cpu",
        seconds=1.0,
    )


def asked(limit):
    harmful = SafetyChange(difference=-0.3, low=-0.6, high=-0.01, num_lost=4, num_gained=1)
    harmless = SafetyChange(difference=0.0, low=-0.2, high=0.2, num_lost=0, num_gained=0)
    return Safety(
        set_sha256=DIGEST,
        num_harmful=10,
        num_harmless=10,
        num_tokens=32,
        limit=limit,
        changes={"seed0": {"harmful": harmful, "harmless": harmless}},
    )


@pytest.mark.parametrize(("safety", "is_flagged"), [(asked(0.05), True), (asked(0.5), False), (None, False)])
def test_fewer_refusals_are_said_before_the_figures(desk, arrived, safety, is_flagged):
    with desk.registry() as registry:
        digest = registry.entry(arrived).bundle_digest
    (desk.folder / "results").mkdir()
    write_results(desk.folder / "results", results(digest, safety))
    page = desk.logged_in().get(f"/submissions/{arrived}").text
    assert "On held-out text: results" in page
    assert (WARNING in page) == is_flagged
    if is_flagged:
        assert page.index(WARNING) < page.index("your model as it was (before)")
    for cell in ("harmful, seed0", "-30.0 %", "-60.0 to -1.0 %"):
        assert (f"<bdi>{cell}</bdi>" in page) == (safety is not None)
