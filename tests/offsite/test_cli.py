from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from offsite import __version__, cli
from offsite.config import VerbConfig
from offsite.errors import ConfigError, PolicyError, RunFailed, WrongShape

OFFSITE = Path(sys.executable).parent / "offsite"


class EchoConfig(VerbConfig):
    """Settings of a verb that stands for all of them."""

    verb: ClassVar[str] = "echo"

    model: str = Field(description="a model", json_schema_extra={"positional": True})
    data: Path | None = Field(None, description="a file", json_schema_extra={"positional": True})
    output: Path = Field(description="a folder", json_schema_extra={"short": "-o"})
    num_steps: int = Field(3, ge=0, description="steps")
    rate: float = Field(1e-3, gt=0, description="rate, per step")
    resume: bool = Field(False, description="go on")
    kind: Literal["drop", "width"] = Field("drop", description="method")
    seeds: list[int] = Field([], description="seeds", json_schema_extra={"repeated": True})


CALLS: list[EchoConfig] = []
RAISES: list[BaseException] = []


def echo(config: EchoConfig) -> dict[str, object]:
    CALLS.append(config)
    print("chatter of the work itself")
    if RAISES:
        raise RAISES.pop()
    return {"steps": config.num_steps, "out": config.output.name}


@pytest.fixture(autouse=True)
def echo_verb(monkeypatch):
    CALLS.clear()
    RAISES.clear()
    monkeypatch.setitem(cli.VERBS, "echo", cli.Verb("say it again", "echo_verb:EchoConfig", "echo_verb:echo"))
    monkeypatch.setitem(sys.modules, "echo_verb", sys.modules[__name__])


def test_flags_words_overrides_and_file(tmp_path, capsys):
    file = tmp_path / "echo.yaml"
    file.write_text("rate: 1e-2\nkind: width\nnum_steps: 1\n")
    words = ["echo", "some/model", "num_steps=2", "-o", "out", "--config", str(file), "--resume", "rate=0.5"]
    assert cli.run([*words, "--seeds", "1", "--seeds", "2"]) == 0
    assert CALLS[0].model_dump() == {
        "model": "some/model",
        "data": None,
        "output": Path("out"),
        "num_steps": 2,
        "rate": 0.5,
        "resume": True,
        "kind": "width",
        "seeds": [1, 2],
    }
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"steps": 2, "out": "out"}
    assert err == ""


def test_a_word_with_an_equals_sign_that_is_a_file_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b.txt").write_text("text")
    assert cli.run(["echo", "model", "a=b.txt", "-o", "out"]) == 0
    assert CALLS[0].data == Path("a=b.txt")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["ecko"], "no such command 'ecko'; did you mean 'echo'?\n", "offsite --help"),
        (["echo", "m", "-o", "x", "--stepz", "3"], "no such option '--stepz'; did you mean", "offsite echo --help"),
        (["echo", "m", "-o", "x", "--num-steps"], "option '--num-steps' requires an argument", "offsite echo --help"),
        (["echo", "m", "d", "more", "-o", "x"], "unexpected word 'more'", "offsite echo --help"),
        (["echo", "m"], "--output is missing", "offsite echo --help lists every setting"),
        (["echo", "-o", "x"], "MODEL is missing", "offsite echo --help lists every setting"),
        (
            ["echo", "m", "-o", "x", "--num-steps", "-1"],
            "--num-steps: expected at least 0",
            None,
        ),
        (["echo", "m", "-o", "x", "--num-steps", "two"], "found 'two'", None),
        (["echo", "m", "-o", "x", "numsteps=2"], "unknown setting 'numsteps'", None),
        (["report"], "offsite report needs a second word: run, privacy", "offsite report --help"),
        (["report", "rum"], "no such command 'rum'", "offsite --help"),
    ],
)
def test_a_wrong_call_is_one_line_a_hint_and_exit_2(capsys, words, message, hint):
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert CALLS == []
    assert err.startswith("offsite: error: ")
    assert message in err
    assert len(err.splitlines()) == 2
    if hint:
        assert err.splitlines()[1] == f"offsite: hint: {hint}"


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("wrong"), 2), (WrongShape("bent"), 3), (PolicyError("no"), 4), (RunFailed("broke"), 5)],
)
def test_exit_codes_of_errors(capsys, error, code):
    RAISES.append(error)
    assert cli.run(["echo", "m", "-o", "x"]) == code
    assert capsys.readouterr().err == f"offsite: error: {error}\n"


def test_interruption_is_130(capsys):
    RAISES.append(KeyboardInterrupt())
    assert cli.run(["echo", "m", "-o", "x"]) == 130
    assert capsys.readouterr().err == "offsite: interrupted; 'x' was not written\n"


def test_a_bug_is_not_hidden():
    RAISES.append(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.run(["echo", "m", "-o", "x"])


def test_of_processes_launched_together_only_the_first_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.run(["echo", "m", "-o", "x"]) == 0
    RAISES.append(RunFailed("broke"))
    assert cli.run(["echo", "m", "-o", "x"]) == 5
    assert capsys.readouterr() == ("chatter of the work itself\n" * 2, "")


def test_version_and_help(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert cli.run([]) == 0
    shown = capsys.readouterr().out
    for verb in cli.VERBS:
        assert verb.split()[0] in shown
    assert cli.run(["report", "--help"]) == 0
    assert "run" in capsys.readouterr().out


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_help_of_a_verb_lists_every_setting_with_its_description(capsys, verb):
    assert cli.run([*verb.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in cli._resolve(cli.VERBS[verb].settings).model_fields.items():
        if cli_positional(field):
            assert f"{name.upper()} " in shown
            assert " ".join(field.description.split()) in shown
        else:
            assert f"--{name.replace('_', '-')}" in shown
        assert field.description
    assert "--config FILE" in shown


def cli_positional(field) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("positional"))


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_names_a_function_that_takes_its_settings(verb):
    settings = cli._resolve(cli.VERBS[verb].settings)
    assert issubclass(settings, VerbConfig)
    assert settings.verb == verb
    assert callable(cli._resolve(cli.VERBS[verb].function))


def test_no_verbs_settings_import_torch():
    lines = [
        "import sys",
        "from offsite import cli",
        "for verb in cli.VERBS: cli._resolve(cli.VERBS[verb].settings)",
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'fastapi', 'jinja2'} & sys.modules.keys()",
        "assert not heavy, heavy",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_importing_the_packages_imports_no_torch():
    lines = [
        "import sys, offsite, emulator, adapters, client, server",
        "from offsite.artefacts import bundle, inspect, owner, package",
        "from offsite.modelling import fetch, load",
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_help_answers_at_once():
    seconds = []
    for _ in range(3):  # processor's: other tests run beside this one
        began = os.times()
        done = subprocess.run([OFFSITE, "--help"], capture_output=True, text=True, check=True)
        ended = os.times()
        seconds.append(sum(ended[2:4]) - sum(began[2:4]))
    assert "distill" in done.stdout
    assert min(seconds) < 0.5


def test_the_console_script_ignores_a_users_own_modules(tmp_path):
    (tmp_path / "client.py").write_text("raise SystemExit('the user module ran')\n")
    done = subprocess.run(
        [OFFSITE, "inspect", "nothing"], cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 3
    assert done.stderr.startswith("offsite: error: no file or folder named 'nothing'")
    assert done.stdout == ""
