"""Verbs were silent for minutes while they loaded, and after Ctrl-C nobody knew what was kept or how to go on."""

from __future__ import annotations

import subprocess
import sys

import pytest
from two_parties import TwoParties

from offsite import cli
from offsite.commands.verbs import HEAVY, VERBS


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    return TwoParties(tmp_path, monkeypatch, capsys)


def test_the_first_line_comes_before_anything_is_loaded(parties, monkeypatch, capsys):
    """The function is resolved (and torch with it) only after the line."""
    seen = []

    def resolved(spec):
        if spec == VERBS["tune"].function:
            seen.append(capsys.readouterr().err)
            return lambda _config: {}
        return made(spec)

    made = cli._resolve
    monkeypatch.setattr(cli, "_resolve", resolved)
    monkeypatch.delitem(sys.modules, "torch")  # as in a new process
    parties.run("client", "tune package --data private.jsonl -o out")
    assert seen == ["tune: loading\n"]


ENDS_AT_TORCH = """
import importlib, importlib.util, os, sys
class End:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == "torch" else None
    def create_module(self, spec):
        os._exit(1)
    exec_module = create_module
sys.meta_path.insert(0, End())
import offsite.config  # which every verb's module needs
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(module)
        except BaseException:
            os._exit(2)
        os._exit(0)
    print(module, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_verbs_that_load_for_seconds_are_those_that_say_so():
    """What a verb's module imports: torch takes seconds. (job create imports it within its function.)"""
    modules = sorted({verb.function.split(":")[0] for verb in VERBS.values()})
    told = subprocess.run(  # it ends as soon as it is known
        [sys.executable, "-c", ENDS_AT_TORCH, *modules], check=True, capture_output=True, text=True
    )
    codes = dict(line.split() for line in told.stdout.splitlines())
    assert sorted(codes) == modules
    assert set(codes.values()) == {"0", "1"}  # each can be imported, or asks for torch
    heavy = {module for module, code in codes.items() if code == "1"}
    found = {name for name, verb in VERBS.items() if verb.function.split(":")[0] in heavy}
    assert found | {"job create"} == HEAVY


def test_ctrl_c_says_what_stays_and_how_to_go_on(parties, monkeypatch):
    from client.tuning import verb as module

    def interrupted(*_words, **_named):
        raise KeyboardInterrupt

    words = "tune package --data private.jsonl --block-tokens 64 --steps 4 --checkpoint-every 1 -o out"
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_bundle", interrupted)
        parties.run("client", words, code=130)
    assert "offsite: interrupted; what was done is kept in 'out.work'" in parties.told
    assert "the same command with --resume goes on from there" in parties.told
    assert not (parties.client / "out").exists()
    monkeypatch.setenv("OFFSITE_PLAYED", "1")  # as a stage of a verb that has a way of its own to go on
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_bundle", interrupted)
        parties.run("client", f"{words} --resume", code=130)
    assert parties.told.endswith("offsite: interrupted\n")
    monkeypatch.delenv("OFFSITE_PLAYED")
    assert parties.run("client", f"{words} --resume")["steps"] == 4


def test_ctrl_c_before_anything_was_done(parties, monkeypatch):
    def interrupted(_config):
        raise KeyboardInterrupt

    monkeypatch.setattr("offsite.exchange.verbs.open_run", interrupted)
    parties.run("client", "open job.sealed --keys keys -o out", code=130)
    assert parties.told == "offsite: interrupted; 'out' was not written\n"
