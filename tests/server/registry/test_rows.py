"""Rows of the registry: what holds a round, and how a refusal is told again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from offsite.errors import ArtefactError, NormTooLarge, Replayed
from server.registry.rows import Seen, check_unseen, refusal, short_id

MANIFEST = SimpleNamespace(job_id="0" * 32, round=2, sequence=5)
OURS, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.mark.parametrize("seen", [Seen(None, 4), Seen(None, 0), Seen(OURS, 5), Seen(OURS, 9)])
def test_what_is_new_or_the_same_passes(seen):
    check_unseen(MANIFEST, OURS, seen)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (Seen(OTHER, 4), "is taken by sha256:222"),
        (Seen(None, 5), "not newer than 5"),
        (Seen(None, 6), "not newer than 6"),
    ],
)
def test_what_was_passed_is_refused(seen, message):
    with pytest.raises(Replayed, match=message):
        check_unseen(MANIFEST, OURS, seen)


def test_a_refusal_is_told_by_the_class_it_had():
    assert type(refusal("NormTooLarge", "x")) is NormTooLarge
    for unknown in ("PolicyError", "OffsiteError", "annotations", "nothing", ""):
        assert type(refusal(unknown, "x")) is ArtefactError


def test_ids_are_the_beginning_of_the_digest():
    assert short_id(OURS) == "1" * 16
