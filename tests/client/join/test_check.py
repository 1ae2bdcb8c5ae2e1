"""The data before training: what cannot be read is told by its place, and rows are shown on a terminal alone."""

from __future__ import annotations

import json

import pytest

import client.join.people as people
import client.join.work as work
from client.join.work import data_digest
from offsite.errors import ConfigError, DataError, PolicyError


@pytest.fixture
def invitation(players):
    return players.invited()


def test_settings_that_tuning_does_not_take_are_told_before_anything(players):
    for tune, message in (
        ("steps=none", "--tune: --steps"),
        ("step=5", r"step \(offsite tune has no such setting\)"),
        ("output=x,launch=2", r"launch \(join tunes in one process\), output \(join decides it\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            players.join(players.mail / "none", tune=tune)


def test_no_data(players):
    players.data.unlink()
    with pytest.raises(DataError, match=r"private\.jsonl: no such file"):
        players.join(players.mail / "none")


def test_columns_that_nothing_is_known_of(players, invitation, capsys, monkeypatch):
    with pytest.raises(DataError, match=r"private\.jsonl: line 1: a field is missing") as caught:
        players.join(invitation, fields=None)
    assert "fields.text=COLUMN" in caught.value.hint
    assert "question" not in capsys.readouterr().err
    monkeypatch.setattr(people, "is_watched", lambda: True)
    with pytest.raises(DataError):
        players.join(invitation, fields=None)
    assert "  question: not read, unless a task names it" in capsys.readouterr().err
    assert players.played == []


def test_what_was_understood_is_shown_and_asked(players, invitation, capsys, monkeypatch):
    rows = [json.loads(line) for line in players.data.read_text().splitlines()]
    rows = [*rows, rows[0], {"question": "long?", "answer": " \x1b[2Jx" * 30}]
    players.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = iter(["yes", "no"])
    for name, stand_in in (
        ("is_watched", lambda: True),
        ("can_ask", lambda: True),
        ("typed", lambda _question: next(answers)),
    ):
        monkeypatch.setattr(people, name, stand_in)
    with pytest.raises(PolicyError, match="nothing was trained, nothing has left"):
        players.join(invitation, yes=False)
    told = capsys.readouterr().err
    assert "the data: 42 rows, 41 documents, read as prompts with answers" in told
    assert "1 rows say what another row says" in told
    assert "rows are longer than the context and are cut" in told
    assert "  question: read as prompt" in told
    assert told.count("  answer: the cough of bed") == 0
    assert told.count("  answer:  the cough of bed") == 3
    assert "\x1b" not in told
    assert not (players.client / "joined" / "bundle").exists()


def test_rows_held_out_in_a_file_of_its_own_are_known_to_the_check_and_to_every_step(
    players, invitation, capsys, monkeypatch
):
    rows = players.data.read_text().splitlines(keepends=True)
    held = players.data.with_name("held.jsonl")
    held.write_text(rows[0] + "".join(json.dumps({"question": f"new {n}?", "answer": " no"}) + "\n" for n in range(9)))
    staged = []

    def stop(stages, _notes):
        staged.extend(stages)
        raise PolicyError("stopped")

    monkeypatch.setattr(work, "play", stop)
    with pytest.raises(PolicyError, match="stopped"):
        players.join(invitation, eval=[str(held)], canaries="0")
    told = capsys.readouterr().err
    assert "1 rows stand in --eval, too: they are not trained on" in told
    assert ", 10 to choose the best weights by" in told
    (tune,) = staged
    assert tune.words[tune.words.index("--eval") + 1] == str(held)
    before = tune.inputs["data"]
    held.write_text(held.read_text().replace("new", "old"))
    assert data_digest(players.settings(invitation, eval=[str(held)])) != before
    both = [str(players.data), str(held)]
    digests = [data_digest(players.settings(invitation, **one)) for one in ({"eval": [str(held)]}, {"data": both})]
    assert digests[0] != digests[1]  # the same files, in other roles
    with pytest.raises(ConfigError, match=r"eval \(it is given beside --tune\)"):
        players.join(invitation, tune=f"eval={held}")


def test_terms_that_nobody_agrees_to(players, invitation, monkeypatch):
    with pytest.raises(ConfigError, match="nobody is here to answer: do you take part on these terms"):
        players.join(invitation, yes=False)
    monkeypatch.setattr(people, "can_ask", lambda: True)
    monkeypatch.setattr(people, "typed", lambda _question: "")
    with pytest.raises(PolicyError, match="not agreed: nothing was trained"):
        players.join(invitation, yes=False)
    assert players.played == []
