"""A project's folder: keys are made once, its file tells commands where they are, and only its owner's file does."""

from __future__ import annotations

from pathlib import Path

import pytest

from offsite.config import PROJECT_NAME, build
from offsite.errors import ConfigError
from offsite.keys.config import DEFAULT_KEYS, InitConfig, TrustListConfig
from offsite.keys.start import run
from server.evaluation.config import EvaluateConfig
from server.registry.config import RegistryListConfig

PASSPHRASE = "six unlikely words stand in this line"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder, and a passphrase from the environment."""
    monkeypatch.setenv("OFFSITE_PASSPHRASE", PASSPHRASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_in_and_below_a_project_find_its_folders(project, monkeypatch):
    assert build(TrustListConfig).keys == DEFAULT_KEYS.expanduser()
    with pytest.raises(ConfigError, match="--registry is missing"):
        build(RegistryListConfig)
    told = run(InitConfig(name="Example Labs"))
    assert (told["name"], told["project"]) == ("Example Labs", str(project / PROJECT_NAME))
    (project / "below").mkdir()
    for place in (project, project / "below"):
        monkeypatch.chdir(place)
        found = build(RegistryListConfig)
        assert (found.keys, found.registry) == (project / "keys", project / "registry")
        assert found.key_words() == []
    assert build(RegistryListConfig, flags={"keys": "other", "registry": "r"}).key_words() == ["--keys", "other"]
    words = {"model": "m", "package": "p", "bundle": ["latest"], "data": ["d.txt"], "output": "o"}
    assert build(EvaluateConfig, flags=words).registry == project / "registry"


def test_keys_that_are_there_are_kept_and_a_project_begins_once(project):
    first = run(InitConfig(name="Example Labs"))
    (project / PROJECT_NAME).unlink()
    with pytest.raises(ConfigError, match="keys of 'Example Labs' are there already"):
        run(InitConfig(name="Another"))
    with pytest.raises(ConfigError, match="there are keys already"):
        run(InitConfig(days=5))
    again = run(InitConfig(folder=Path()))
    assert again["fingerprint"] == first["fingerprint"]
    with pytest.raises(ConfigError, match="is there already"):
        run(InitConfig())
    with pytest.raises(ConfigError, match="'nowhere' is no folder"):
        run(InitConfig(folder=Path("nowhere")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keys = keys", "is not valid TOML"),
        ("keys = 3", "keys is not the path of a folder"),
        ('keys = ""', "keys is not the path of a folder"),
        ('keys = "~nobody-of-that-name/keys"', "the home of somebody unknown"),
        ('passphrase = "x"', "names 'passphrase', expected some of: keys, registry"),
        ("a" * 70_000, "is larger than 65536 bytes"),
    ],
)
def test_another_file_is_one_line(project, text, told):
    (project / PROJECT_NAME).write_text(text)
    (project / PROJECT_NAME).chmod(0o600)
    with pytest.raises(ConfigError, match=told):
        build(TrustListConfig)


def test_a_file_that_others_may_write_or_a_link_is_refused(project):
    path = project / PROJECT_NAME
    path.write_text('keys = "keys"\n')
    path.chmod(0o664)
    with pytest.raises(ConfigError, match="can be written by others") as caught:
        build(TrustListConfig)
    assert "chmod go-w" in caught.value.hint
    path.rename(project / "real.toml")
    path.symlink_to("real.toml")
    with pytest.raises(ConfigError, match="is not a file"):
        build(TrustListConfig)
