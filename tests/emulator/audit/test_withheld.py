"""What is withheld after tuning: each way's figure from losses worked out by hand, and what a client is played on."""

from __future__ import annotations

import math

import pytest

from emulator.audit.heal import LORA
from emulator.audit.recovery import Run
from emulator.audit.withheld import by_attack, by_client, by_rehearsal, without
from offsite.audits.record import Capability, Recovery, RecoveryPoint
from offsite.text.records import Record


def attack(name, *points):
    return Recovery(
        attack=name,
        trained_parameters=1,
        points=tuple(
            RecoveryPoint(num_tokens=num_tokens, perplexity=perplexity, regained=0.0)
            for num_tokens, perplexity in points
        ),
    )


def test_a_rehearsed_client_by_its_loss():
    run = Run(chosen_by=2.0, loss=3.25, num_tokens=640, trained_parameters=9, rate=2e-3, seconds=1.0)
    found = by_rehearsal(run, LORA, full=3.0, steps=40, num_rates=2, text="text of the field")
    assert found.way == "rehearsed client"
    assert found.nats == pytest.approx(0.25)
    assert found.perplexity == pytest.approx(math.exp(3.25))
    assert found.num_tokens == 640
    for words in ("rank 8", "40 step(s) on text of the field", "rate 0.002, the best of 2"):
        assert words in found.told
    alone = by_rehearsal(run, LORA, full=3.5, steps=40, num_rates=1, text="text of the field")
    ends = by_rehearsal(
        run, LORA.model_copy(update={"placement": "1+2"}), full=3.5, steps=40, num_rates=1, text="the public text"
    )
    assert "on every linear of 1+2 blocks, 40 step(s) on the public text" in ends.told
    assert alone.nats == pytest.approx(-0.25)  # better than the full model was: nothing is withheld
    assert "the best of" not in alone.told


def test_an_attack_by_its_best_point_and_its_largest_budget():
    """A full model of 10; the best of all points is 20 at 100 tokens, though 400 were tried: ln 2 is withheld."""
    found = by_attack(
        [attack("as_is_all", (0, 90.0), (100, 20.0), (400, 30.0)), attack("split_all", (0, 95.0))], full=math.log(10.0)
    )
    assert found is not None
    assert found.nats == pytest.approx(math.log(2.0))
    assert (found.way, found.perplexity, found.num_tokens) == ("recovery attack", 20.0, 400)
    assert "as_is_all, at 100 tokens" in found.told


@pytest.mark.parametrize("attacks", [[], [attack("as_is", (0, 90.0)), attack("split", (0, 20.0))]])
def test_an_attack_that_trained_on_nothing_is_no_tuning(attacks):
    assert by_attack(attacks, full=1.0) is None


def test_without_an_evaluation_the_client_is_not_known():
    text = Capability(
        name="perplexity", metric="nats", num_rows=1, chance=7.0, full=3.0, emulator=5.0, emulator_tuned=3.5, kept=0.5
    )
    assert by_client(text, None) is None


def row(text, document):
    return Record(segments=((text, True),), document=document, row=0)


def test_no_client_is_played_on_a_document_that_is_measured_on(capsys):
    field = [row("a b", "one"), row("c d", "one"), row("e f", "two"), row("g h", "three")]
    kept = without(field, [row("c d", "elsewhere"), row("x y", "two")])
    assert [record.whole_text for record in kept] == ["e f", "g h"]
    assert "1 document(s) of the held-out text are left out" in capsys.readouterr().err
    assert without(field, []) == field
