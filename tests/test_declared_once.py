"""A setting that several verbs take is declared once, in a class that they inherit."""

from __future__ import annotations

import inspect
from collections import defaultdict

from offsite import cli
from offsite.config import VerbConfig

SEVERAL = {
    "output": "every verb writes something else, and its line says what",
    "bundle": "the one that is put on a package's model, or that a report is about",
    "prompt": "what two models go on from, to be compared, or what one is asked",
    "package": "the line says which package it has to be, as it came or with its owner's record",
    "data": "the line says whose text it is and what for: tuned on, measured on, audited",
    "results": "the line says what they are taken for: an audit's figures, or an adapted folder's card",
    "sealed": "the line says what has to be sealed in it",
    "model": "a word where the verb is about the model, a flag where it is about something else",
    "job": "what a job is asked for is each verb's own: its adapter, its terms, its name",
    "public": "what public text is for: distilling, attacking, realigning",
    "registry": "made where there is none, or taken for bundles named by ids, or told of serving",
    "round": "what a round is asked for: to go on from it, or to rebuild what a bundle was tuned on",
    "canaries": "planted by tune, looked for by the audit",
    "certificate": "a server's own, or the one a client trusts",
    "field_text": "what text of the client's field is for: measuring on, or playing a client on",
    "parallel": "sizes tried, or runs of a client, at a time",
    "fingerprint": "of a card that is pinned, or of one that is used this once",
    "days": "of keys, or of a TLS certificate",
    "delta": "of a client's claim, or of the guarantee that the owner gives",
    "evaluate_every": "what 0 means: three to ten times per run, or once at the end",
    "holdout": "what an attacker sets aside, or what fidelity is measured on",
    "learning_rate": "a client's own, one that is advised, one that a round asks for; their bounds differ",
    "rank": "cut the emulator's difference, or the sum of all rounds",
    "temperature": "of canaries' texts that are made up, or of answers that are learnt from",
    "rules": "what sampled answers are rewarded for, or what held-out prompts' answers are measured by",
    "steps": "of a realignment, or of a client in a round",
    "task": "questions that are measured, a task that rows are read by, one that a job carries, those that are served",
    "tune": "a client's own settings, or everybody's in a simulation",
    "work": "a client's folder, or everybody's in a simulation",
}
"""Settings of one name, type and default that are several things, and why."""


def declarations() -> dict[tuple[str, str, str], set[str]]:
    """Return the classes that declare a setting, by its name, type and default."""
    settings = [cli._resolve(verb.settings) for verb in cli.VERBS.values()]
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for cls in {part for one in settings for part in one.__mro__ if issubclass(part, VerbConfig)}:
        for name in inspect.get_annotations(cls).keys() & cls.model_fields.keys():
            field = cls.model_fields[name]
            found[name, str(field.annotation), repr(field.default)].add(cls.__qualname__)
    return found


def test_a_setting_of_several_verbs_is_declared_once():
    several = {key: sorted(classes) for key, classes in declarations().items() if len(classes) > 1}
    new = {key: classes for key, classes in several.items() if key[0] not in SEVERAL}
    assert not new, "put the setting into a class that these inherit, or say in SEVERAL why they differ"
    assert {key[0] for key in several} == SEVERAL.keys(), "declared once by now: take it off the list"


def test_what_is_not_allowed_to_repeat_would_be_found():
    found = declarations()
    assert found["device", "<class 'str'>", "'auto'"] == {"DeviceSettings"}
    assert found["rank", "<class 'int'>", "8"] == {"AdapterSettings"}
    assert len(found["output", "<class 'pathlib.Path'>", "PydanticUndefined"]) > 10
