from __future__ import annotations

from itertools import pairwise

import pytest

from offsite.commands.verbs import GROUPS, PARTIES, VERBS, listed, verb_of


def test_every_verb_is_listed_for_the_one_who_uses_it_by_itself_or_by_its_group():
    shown = listed()
    assert list(shown) == list(PARTIES)
    for name, verb in VERBS.items():
        typed = [words for words, _ in shown[verb.party]]
        assert name in typed or name.split()[0] in typed
    everything = [words for lines in shown.values() for words, _ in lines]
    assert len(everything) == len(set(everything))


def test_the_parties_verbs_stand_in_the_order_of_their_work():
    order = [words for lines in listed().values() for words, _ in lines]
    story = ["keygen", "trust", "seal", "distill", "mark", "audit package", "rehearse", "job create"]
    story += ["intake", "registry", "plug-in", "evaluate"]
    for before, after in pairwise(story):
        assert order.index(before) < order.index(after)


def test_verbs_of_one_word_and_one_party_are_one_line():
    shown = listed()
    assert ("trust", GROUPS["trust"]) in shown["Both parties"]
    assert ("registry", GROUPS["registry"]) in shown["The owner"]
    assert "audit bundle" in dict(shown["The client"])
    assert "job create" in dict(shown["The owner"])


@pytest.mark.parametrize("group", list(GROUPS))
def test_a_group_lists_its_own_verbs_by_who_uses_them(group):
    own = {name.partition(" ")[2]: verb for name, verb in VERBS.items() if name.startswith(f"{group} ")}
    shown = {words: (party, text) for party, lines in listed(group).items() for words, text in lines}
    assert shown == {word: (verb.party, verb.summary) for word, verb in own.items()}
    assert shown


def test_every_first_word_of_two_is_a_group():
    assert {name.split()[0] for name in VERBS if " " in name} == set(GROUPS)
    assert not set(GROUPS) & set(VERBS)


def test_what_is_typed_names_a_verb():
    assert verb_of(["tune", "package", "-o", "x"]) == "tune"
    assert verb_of(["--quiet", "audit", "bundle"]) == "audit bundle"
    assert verb_of(["audit"]) is None
    assert verb_of([]) is None
    assert verb_of(["auditbundle"]) is None
