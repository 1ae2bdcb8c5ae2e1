"""Two files were given to a verb that took one; only the last was read, and nothing was said."""

from __future__ import annotations

import pytest

from offsite import cli
from offsite.commands.verbs import VERBS
from offsite.config import build, declared, flag_name, is_positional
from offsite.errors import ConfigError
from offsite.modelling.config import FetchConfig


def single_flags():
    for name, verb in VERBS.items():
        for field, info in cli._resolve(verb.settings).model_fields.items():
            if not is_positional(info) and info.annotation is not bool and not declared(info).get("repeated"):
                yield name, field


@pytest.mark.parametrize(("verb", "field"), sorted(single_flags()))
def test_a_flag_that_takes_one_value_takes_no_second(capsys, verb, field):
    assert cli.run([*verb.split(), flag_name(field), "1", flag_name(field), "1"]) == 2
    assert f"{flag_name(field)} is given 2 times, it takes one value" in capsys.readouterr().err


def test_a_short_flag_and_its_long_one_are_one(capsys):
    assert cli.run(["keygen", "-o", "a", "--output", "b"]) == 2
    assert "--output is given 2 times" in capsys.readouterr().err


def test_one_settings_file_is_read(tmp_path, capsys):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("cache: x\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert cli.run(["fetch", "name", *files]) == 2
    assert "--config is given 2 times, it takes one value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dp", "epsilon=3,epsilon=8"], "--dp: epsilon is given twice"),
        (["--fields", "text=a,text=b"], "text is given twice"),
    ],
)
def test_a_setting_inside_one_is_given_once(flags, told, capsys):
    assert cli.run(["tune", "package", "--data", "a.txt", "-o", "out", *flags]) == 2
    assert f"offsite: error: {told}" in capsys.readouterr().err


def test_a_key_is_given_once():
    with pytest.raises(ConfigError, match="cache is given twice"):
        build(FetchConfig, overrides=["cache=a", "cache=b"], flags={"name": "x"})


@pytest.mark.parametrize("text", ["name: x\ncache: a\ncache: b\n", '{"name": "x", "cache": "a", "cache": "b"}'])
def test_a_setting_stands_once_in_a_file(tmp_path, text):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"'settings\.yaml' gives 'cache' twice"):
        build(FetchConfig, file=tmp_path / "settings.yaml")


def test_a_later_source_still_wins(tmp_path):
    (tmp_path / "settings.yaml").write_text("name: x\ncache: a\n")
    found = build(FetchConfig, file=tmp_path / "settings.yaml", overrides=["cache=b"], flags={"cache": "c"})
    assert str(found.cache) == "c"
