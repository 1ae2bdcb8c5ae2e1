from __future__ import annotations

import inspect

import pytest

from offsite import errors

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == "offsite.errors"]
CODES = {"ConfigError": 2, "DataError": 2, "UnsupportedModel": 2, "ArtefactError": 3, "PolicyError": 4, "RunFailed": 5}


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_every_class_is_in_the_tree_that_the_module_draws(found):
    assert issubclass(found, errors.OffsiteError)
    assert found.__name__ in (errors.__doc__ or "")
    assert found.__doc__


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes(name, code):
    assert getattr(errors, name).exit_code == code


def test_every_rejection_of_an_artefact_exits_alike():
    rejections = [found for found in CLASSES if issubclass(found, errors.ArtefactError)]
    assert len(rejections) == 16
    assert {found.exit_code for found in rejections} == {3}


def test_an_error_carries_message_and_hint():
    error = errors.ConfigError("no such thing", hint="try another")
    assert str(error) == "no such thing"
    assert error.hint == "try another"
    assert errors.RunFailed("broke off").hint is None
