"""Runs side by side: how many at once, each asked for once, and the first that fails ends all with its reason."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import client.tuning.sidebyside as module
from client.tuning.sidebyside import num_at_once, train_side_by_side
from offsite.errors import ArtefactError, ConfigError, PolicyError, RunFailed

# What stands in place of a run: it says what it was asked, and ends as its settings say
STAND_IN = """
import json, os, signal, sys, time
asked = json.loads(sys.stdin.buffer.readline())
how = json.loads(asked["settings"])[str(asked["run"])]
folder = os.environ["STAND_IN"]
def stopped(*_):
    open(f"{folder}/stopped{asked['run']}", "w").close()
    os._exit(130)  # an exception would be lost where the signal comes while a file is closed
signal.signal(signal.SIGINT, stopped)
with open(f"{folder}/begun{asked['run']}.new", "w") as file: file.write(json.dumps(asked))
os.rename(file.name, f"{folder}/begun{asked['run']}")
if how == "stay":
    while True: time.sleep(0.01)
if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
if isinstance(how, list):
    while not all(os.path.exists(f"{folder}/begun{n}") for n in how[2]): time.sleep(0.01)
    if how[1] is not None: print(how[1])
    sys.exit(how[0])
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Play such runs; returns the folder in which they say what they were asked."""
    monkeypatch.setattr(module, "_COMMAND", (sys.executable, "-c", STAND_IN))
    monkeypatch.setattr(module, "num_cores", lambda: 4)
    monkeypatch.setenv("STAND_IN", str(tmp_path))

    def play(how, *, at_once=2):
        numbers = sorted(how)
        settings = json.dumps({str(number): one for number, one in how.items()})
        train_side_by_side(settings, numbers, num_runs=len(how), at_once=at_once)

    play.folder = tmp_path
    return play


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_run_is_done_once_with_its_share_of_the_cores(played):
    played({1: "end", 2: "end", 3: "end"})
    assert names(played.folder) == ["begun1", "begun2", "begun3"]
    asked = [json.loads((played.folder / f"begun{number}").read_text()) for number in (1, 2, 3)]
    assert [one["run"] for one in asked] == [1, 2, 3]
    assert {one["threads"] for one in asked} == {2}


def told(message, hint=None):
    return json.dumps({"error": message, "hint": hint})


@pytest.mark.parametrize(
    ("code", "line", "error", "words"),
    [
        (2, told("a setting", "another"), ConfigError, "^run 2 of 3: a setting$"),
        (3, told("a package"), ArtefactError, "^run 2 of 3: a package$"),
        (4, told("a rule"), PolicyError, "^run 2 of 3: a rule$"),
        (5, told("not finite"), RunFailed, "^run 2 of 3: not finite$"),
        (1, None, RunFailed, "^run 2 of 3 ended with exit code 1$"),
        (5, "no json", RunFailed, "^run 2 of 3 ended with exit code 5$"),
        (5, "[]", RunFailed, "^run 2 of 3 ended with exit code 5$"),
    ],
)
def test_the_first_that_fails_ends_all_with_its_reason_and_the_others_are_asked_to_stop(
    played, code, line, error, words
):
    with pytest.raises(error, match=words) as caught:
        played({1: "stay", 2: [code, line, [1, 2]], 3: "end"})
    assert caught.value.hint == (
        "another" if code == 2 else None if line and line.startswith("{") else caught.value.hint
    )
    assert "stopped1" in names(played.folder)
    assert "begun3" not in names(played.folder)


def test_one_that_is_killed_is_told(played):
    with pytest.raises(RunFailed, match=r"^run 1 of 1 was killed by signal 9$") as caught:
        played({1: "killed"})
    assert "--parallel" in caught.value.hint


def test_ctrl_c_stops_all_of_them(played, monkeypatch):
    def interrupt(_):
        if {"begun1", "begun2"} <= set(names(played.folder)):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        played({1: "stay", 2: "stay"})
    assert {"stopped1", "stopped2"} <= set(names(played.folder))


def test_a_run_whose_starter_is_gone_goes_too():
    script = "import client.tuning.onerun as one, threading, time\n"
    script += "threading.Thread(target=one._watch, daemon=True).start()\nprint('up', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    time.sleep(0.1)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(30) == 130
    process.stdout.close()


def test_ctrl_c_ends_a_run_also_while_an_object_is_finalised():
    script = (
        "import os, signal, sys, client.tuning.onerun as one\n"
        "class Held:\n    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "one._trained = lambda asked: [Held(), asked][1]\n"
        "sys.exit(one.main())"
    )
    done = subprocess.run([sys.executable, "-c", script], input=b"0\n", capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"")


def test_fewer_go_at_once_where_cores_or_memory_say_so(monkeypatch, capsys):
    monkeypatch.setattr("client.tuning.sidebyside.num_cores", lambda: 4)
    assert num_at_once(3, 8, need_bytes=10, free_bytes=100) == 3
    assert num_at_once(8, 2, need_bytes=10, free_bytes=100) == 2
    assert capsys.readouterr().err == ""
    assert num_at_once(8, 8, need_bytes=10, free_bytes=1000) == 4
    assert "4 run(s) at once instead of 8: cores allow no more" in capsys.readouterr().err
    assert num_at_once(8, 8, need_bytes=10, free_bytes=25) == 2
    assert num_at_once(8, 8, need_bytes=10, free_bytes=3) == 1
    assert "1 run(s) at once instead of 8: memory allow" in capsys.readouterr().err
