from __future__ import annotations

from contextlib import suppress

import pytest
from huggingface_hub.utils import logging as hub
from transformers.utils import logging

from offsite.errors import ConfigError
from offsite.modelling.locate import locate, quiet_libraries, shown


def test_errors_name_the_folder_not_the_path(tmp_path):
    assert shown(str(tmp_path / "llama")) == "'llama'"
    assert shown("org/name") == "'org/name'"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="folder 'empty' holds no") as caught:
        locate(str(tmp_path / "empty"))
    assert str(tmp_path) not in str(caught.value)


def test_libraries_speak_again_afterwards():
    before = logging.get_verbosity(), hub.get_verbosity()
    inside = []
    with suppress(KeyError), quiet_libraries():
        inside.append((logging.get_verbosity(), hub.get_verbosity()))
        raise KeyError
    assert inside == [(logging.ERROR, logging.ERROR)]
    assert (logging.get_verbosity(), hub.get_verbosity()) == before
