from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offsite import cli
from offsite.commands import completion
from offsite.commands.verbs import GROUPS, VERBS
from offsite.config import flag_name, is_positional
from offsite.errors import ConfigError

OFFSITE = Path(sys.executable).parent / "offsite"


def asked(monkeypatch, capsys, line: str, shell: str = "bash") -> list[str]:
    """Return the lines that a shell is given for a command line, its last word unfinished."""
    words = line.split(" ")
    monkeypatch.setenv("_OFFSITE_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
    assert cli.run([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [found for found in out.splitlines() if found]


def values(lines: list[str]) -> set[str]:
    assert all(line.startswith("plain,") for line in lines)
    return {line.partition(",")[2] for line in lines}


def test_verbs_and_groups_complete(monkeypatch, capsys):
    assert values(asked(monkeypatch, capsys, "offsite ")) == {name for name in VERBS if " " not in name} | set(GROUPS)
    assert values(asked(monkeypatch, capsys, "offsite tu")) == {"tune"}
    assert values(asked(monkeypatch, capsys, "offsite re")) == {"rehearse", "realign", "rewrap", "registry", "report"}
    assert asked(monkeypatch, capsys, "offsite zz") == []


@pytest.mark.parametrize("group", list(GROUPS))
def test_the_verbs_of_a_group_complete(monkeypatch, capsys, group):
    own = {name.partition(" ")[2] for name in VERBS if name.startswith(f"{group} ")}
    assert values(asked(monkeypatch, capsys, f"offsite {group} ")) == own


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_flag_of_every_verb_completes(monkeypatch, capsys, verb):
    fields = cli._resolve(VERBS[verb].settings).model_fields
    flags = {flag_name(name) for name, field in fields.items() if not is_positional(field)} | {
        "--config",
        "--json",
        "--help",
    }
    flags |= {f"--no-{flag_name(name)[2:]}" for name, field in fields.items() if field.annotation is bool}
    assert values(asked(monkeypatch, capsys, f"offsite {verb} --")) == flags


def test_flags_already_typed_and_others_begun_differently_are_left_out(monkeypatch, capsys):
    found = values(asked(monkeypatch, capsys, "offsite tune package --batch-size 4 --b"))
    assert found == {"--block-tokens"}
    assert "--bundle" in values(asked(monkeypatch, capsys, "offsite evaluate m --bundle a --b"))  # may be repeated


def test_choices_complete_and_paths_are_left_to_the_shell(monkeypatch, capsys):
    assert values(asked(monkeypatch, capsys, "offsite tune p --targets ")) == {"all-linear", "attention", "mlp"}
    assert values(asked(monkeypatch, capsys, "offsite tune p --targets a")) == {"all-linear", "attention"}
    assert values(asked(monkeypatch, capsys, "offsite exchange pull u --kind r")) == {"round", "report"}
    assert asked(monkeypatch, capsys, "offsite tune p --data no") == ["file,no"]
    assert asked(monkeypatch, capsys, "offsite tune p --config ") == ["file,"]
    assert asked(monkeypatch, capsys, "offsite tune ") == ["file,"]
    assert asked(monkeypatch, capsys, "offsite tune p --epochs ") == []


def test_other_shells_are_told_what_it_means(monkeypatch, capsys):
    assert asked(monkeypatch, capsys, "offsite tu", "zsh") == ["plain", "tune", VERBS["tune"].summary]
    assert asked(monkeypatch, capsys, "offsite tu", "fish") == [f"plain,tune\t{VERBS['tune'].summary}"]


def test_completing_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_guard", lambda: pytest.fail("a verb was about to run"))
    assert asked(monkeypatch, capsys, "offsite registry list --registry r --k") == ["plain,--keys"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shells_script_is_printed(monkeypatch, capsys, shell):
    assert cli.run(["--show-completion", shell]) == 0
    shown = capsys.readouterr().out
    assert f"_OFFSITE_COMPLETE={shell}_complete" in shown
    assert shown == completion.script(shell)
    monkeypatch.setenv("_OFFSITE_COMPLETE", f"{shell}_source")
    assert cli.run([]) == 0
    assert capsys.readouterr().out == shown


def test_a_shell_without_a_script_is_refused(capsys):
    with pytest.raises(ConfigError, match="found 'tcsh', expected one of bash, zsh, fish"):
        completion.script("tcsh")
    assert cli.run(["--show-completion", "tcsh"]) == 2
    assert capsys.readouterr().err.startswith("offsite: error: --show-completion: found 'tcsh'")


def test_bash_completes_by_the_script(tmp_path):
    """The shell itself: evaluate the script, press the key, see what it offers."""
    press = "COMPREPLY=(); COMP_WORDS=({words}); COMP_CWORD={at}; _offsite_completion offsite; "
    press += "printf '%s\\n' \"${{COMPREPLY[@]}}\""
    lines = [
        'eval "$(offsite --show-completion bash)"',
        "complete -p offsite",
        *(press.format(words=words, at=at) for words, at in [("offsite dist", 1), ("offsite trust ''", 2)]),
        press.format(words="offsite federate serve --rou", at=3),
    ]
    path = f"{OFFSITE.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    registered, *offered = done.stdout.splitlines()
    assert "-F _offsite_completion offsite" in registered
    assert offered == ["distill", "add", "list", "revoke", "--rounds"]
    assert done.stderr == ""


def test_completing_imports_the_verbs_settings_alone():
    lines = [
        "import os, sys",
        "os.environ.update(_OFFSITE_COMPLETE='bash_complete', COMP_WORDS='offsite distill --b', COMP_CWORD='2')",
        "from offsite import cli",
        "assert cli.run([]) == 0",
        "heavy = {'torch', 'transformers', 'rich', 'peft', 'flwr', 'cryptography'} & sys.modules.keys()",
        "others = [name for name in sys.modules if name.startswith(('client.', 'server.'))]",
        "assert not heavy and not others, (heavy, others)",
        "assert 'emulator.distillation.config' in sys.modules",
        "assert 'emulator.distillation.distill' not in sys.modules",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True)
    flags = {line.removeprefix("plain,--") for line in done.stdout.split()}
    assert flags == {"batch-size", "block-tokens", "blocks", "bottom"}
