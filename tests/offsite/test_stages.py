"""Stages: processes side by side, each run once for the same words and inputs, and stopped together."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from offsite import stages as module
from offsite.errors import RunFailed
from offsite.stages import Stage, play, was_done

TELL = "import json, os, sys; print('chatter'); print(json.dumps({'n': 1, 'cwd': os.path.basename(os.getcwd())}))"
MAKE = "import pathlib; pathlib.Path('made').mkdir(); open('count', 'a').write('x'); print('{\"n\": 1}')"


@pytest.fixture
def scripts(monkeypatch):
    """Words are a Python program instead of a verb."""
    monkeypatch.setattr(module, "_command", lambda words: [sys.executable, "-S", "-c", *words])


@pytest.fixture
def party(tmp_path):
    (tmp_path / "party").mkdir()
    return tmp_path / "party"


def count(party):
    return len((party / "count").read_text())


def test_a_real_verb_in_a_partys_folder(party, tmp_path, dropped_package, capfd):
    stage = Stage("inspect", party, ["inspect", str(dropped_package.path)])
    play([stage], tmp_path / "notes")
    assert stage.outcome["digest"] == dropped_package.digest
    assert not stage.reused
    assert f"$ offsite inspect {dropped_package.path}" in capfd.readouterr().err
    wrong = Stage("gone", party, ["inspect", "a name with spaces"])
    with pytest.raises(RunFailed, match="step 'gone' ended with exit code 3") as caught:
        play([wrong], tmp_path / "notes")
    assert caught.value.hint
    err = capfd.readouterr().err
    assert "$ offsite inspect 'a name with spaces'" in err
    assert "offsite: error: no file or folder named 'a name with spaces'" in err


def test_a_module_in_the_partys_folder_is_not_run(party, tmp_path, dropped_package):
    for name in ("offsite.py", "client.py", "json.py"):
        (party / name).write_text("raise SystemExit('ran a stray module')")
    stage = Stage("inspect", party, ["inspect", str(dropped_package.path)])
    play([stage], tmp_path / "notes")
    assert stage.outcome["verified"]


def test_the_outcome_is_the_last_line(scripts, party, tmp_path):
    stage = Stage("tell", party, [TELL])
    play([stage], tmp_path / "notes")
    assert stage.outcome == {"n": 1, "cwd": "party"}
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["tell.json"]


def test_stages_run_side_by_side(scripts, party, tmp_path):
    meet = (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)\n"
        "print('{}')"
    )
    play([Stage("a", party, [meet, "a", "b"]), Stage("b", party, [meet, "b", "a"])], tmp_path / "notes")


def test_a_stage_is_run_once(scripts, party, tmp_path, capsys):
    def stage():
        return Stage("make", party, [MAKE], party / "made", {"model": "sha256:a"})

    first, again = stage(), stage()
    play([first], tmp_path / "notes")
    play([again], tmp_path / "notes")
    assert (first.reused, again.reused) == (False, True)
    assert again.outcome == first.outcome == {"n": 1}
    assert count(party) == 1
    assert "make: done before" in capsys.readouterr().err


def other_words(stage, notes):
    stage.words = [MAKE + "\n"]


def other_inputs(stage, notes):
    stage.inputs = {"model": "sha256:b"}


def gone(stage, notes):
    stage.leaves.rmdir()


def no_note(stage, notes):
    (notes / "make.json").unlink()


def torn_note(stage, notes):
    (notes / "make.json").write_text('{"words": [')


def strange_note(stage, notes):
    (notes / "make.json").write_text("[1, 2]")


def older_version(stage, notes):
    found = json.loads((notes / "make.json").read_text())
    (notes / "make.json").write_text(json.dumps({**found, "offsite": "0"}))


@pytest.mark.parametrize(
    "change",
    [other_words, other_inputs, gone, no_note, torn_note, strange_note, older_version],
    ids=lambda f: f.__name__,
)
def test_a_stage_is_run_again_when_anything_differs(scripts, party, tmp_path, change):
    stage = Stage("make", party, [MAKE], party / "made", {"model": "sha256:a"})
    play([stage], tmp_path / "notes")
    (party / "made.work").mkdir()
    (party / ".made.0a1b2c3d.partial").mkdir()
    again = Stage("make", party, [MAKE], party / "made", {"model": "sha256:a"})
    change(again, tmp_path / "notes")
    play([again], tmp_path / "notes")
    assert not again.reused
    assert count(party) == 2
    assert sorted(path.name for path in party.iterdir()) == ["count", "made"]


def test_a_stage_that_leaves_nothing_is_always_run(scripts, party, tmp_path):
    for _ in range(2):
        stage = Stage("make", party, [MAKE.replace("mkdir()", "mkdir(exist_ok=True)")])
        play([stage], tmp_path / "notes")
    assert count(party) == 2


def test_what_a_link_points_to_is_not_cleared(scripts, party, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (party / "made").symlink_to(tmp_path / "precious")
    play([Stage("make", party, [MAKE], party / "made")], tmp_path / "notes")
    assert (tmp_path / "precious" / "file").read_text() == "kept"
    assert not (party / "made").is_symlink()


SLOW = "import os, sys, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLOW
FAIL = (
    "import pathlib, sys, time\n"
    "while not (pathlib.Path('pid').exists() and pathlib.Path('pid').read_text()): time.sleep(0.01)\n"
    "sys.exit(4)"
)


@pytest.mark.parametrize("slow", [SLOW, DEAF], ids=["that listens", "that does not"])
@pytest.mark.parametrize("first", [True, False])
def test_when_one_fails_the_other_is_stopped_and_has_ended(scripts, party, tmp_path, monkeypatch, slow, first):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.3)
    both = [Stage("slow", party, [slow], party / "made"), Stage("fail", party, [FAIL])]
    began = time.monotonic()
    with pytest.raises(RunFailed, match="step 'fail' ended with exit code 4"):
        play(both if first else both[::-1], tmp_path / "notes")
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):  # not even a zombie
        os.kill(int((party / "pid").read_text()), 0)
    assert not (tmp_path / "notes" / "slow.json").exists()


def test_an_interrupt_stops_them_too(scripts, party, tmp_path, monkeypatch):
    def interrupt(_seconds):
        if (party / "pid").exists() and (party / "pid").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        play([Stage("slow", party, [SLOW])], tmp_path / "notes")
    with pytest.raises(ProcessLookupError):
        os.kill(int((party / "pid").read_text()), 0)


KEEPS = """
import signal, sys, time, pathlib
def keep(*_):
    time.sleep(0.3)
    pathlib.Path('kept').write_text('x')
    sys.exit(130)
signal.signal(signal.SIGINT, keep)
pathlib.Path('ready').write_text('x')
time.sleep(60)
"""


def test_one_that_resumes_may_end_its_step_when_it_is_interrupted(scripts, party, tmp_path, monkeypatch):
    def interrupt(_seconds):
        if (party / "ready").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        play([Stage("long", party, [KEEPS], party / "made", resumes=True)], tmp_path / "notes")
    assert (party / "kept").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_this_process_ends_theirs_first(number, scripts, party, tmp_path, monkeypatch):
    """As a service manager, or a terminal that is closed, sends it: to whoever plays the stage alone."""

    def end(_seconds):
        if (party / "ready").exists():
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)
    try:
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=end))
        with pytest.raises(SystemExit) as caught:
            play([Stage("long", party, [KEEPS], party / "made", resumes=True)], tmp_path / "notes")
        assert caught.value.code == 128 + number
        assert (party / "kept").exists()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_one_that_cannot_be_started_stops_the_ones_that_were(scripts, party, tmp_path, monkeypatch):
    started = []
    popen = module.subprocess.Popen
    monkeypatch.setattr(
        module.subprocess, "Popen", lambda *args, **given: started.append(popen(*args, **given)) or started[-1]
    )
    with pytest.raises(FileNotFoundError):
        play([Stage("slow", party, [SLOW]), Stage("lost", tmp_path / "nowhere", [TELL])], tmp_path / "notes")
    assert [process.returncode for process in started] == [-15]


@pytest.mark.parametrize(
    "program", ["pass", "print('done')", "print('{}'); print('bye')", "print('[1]')", "print('3')"]
)
def test_no_json_object_on_the_last_line(scripts, party, tmp_path, program):
    with pytest.raises(RunFailed, match="step 'mute' printed no JSON object"):
        play([Stage("mute", party, [program])], tmp_path / "notes")


def test_killed(scripts, party, tmp_path):
    with pytest.raises(RunFailed, match="step 'killed' was ended by signal 9"):
        play([Stage("killed", party, ["import os; os.kill(os.getpid(), 9)"])], tmp_path / "notes")


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _pid: set(range(6)), raising=False)
    assert [module._environment(num)["OMP_NUM_THREADS"] for num in (1, 2, 4, 7)] == ["6", "3", "1", "1"]
    assert module._environment(1)["OMP_WAIT_POLICY"] == os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert module._environment(1)["OMP_NUM_THREADS"] == "5"


HALF = (
    "import os, pathlib, sys; work = pathlib.Path('made.work'); work.mkdir(exist_ok=True)\n"
    "steps = len(list(work.iterdir())); (work / str(steps)).touch()\n"
    "sys.exit(1) if steps < 1 else pathlib.Path('made').mkdir(); print('{\"n\": %d}' % steps)"
)


def test_a_stage_that_resumes_goes_on_with_what_it_left_half_done(scripts, party, tmp_path):
    def stage(model):
        return Stage("make", party, [HALF], party / "made", {"model": model}, resumes=True)

    for model in ("a", "b"):  # of other inputs nothing is gone on with
        with pytest.raises(RunFailed):
            play([stage(model)], tmp_path / "notes")
    done = stage("b")
    play([done], tmp_path / "notes")
    assert done.outcome == {"n": 1}
    assert was_done(stage("b"), tmp_path / "notes")
    assert not was_done(stage("a"), tmp_path / "notes")


def test_a_process_gets_what_is_not_hidden(scripts, party, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "word")
    tell = "import json, os; print(json.dumps({'secret': os.environ.get('A_SECRET')}))"
    for hiding, expected in (((), "word"), ({"A_SECRET"}, None)):
        stage = Stage("tell", party, [tell], hiding=hiding)
        play([stage], tmp_path / "notes")
        assert stage.outcome == {"secret": expected}


def test_a_lock_is_held_by_the_processes_too(scripts, party, tmp_path):
    with (tmp_path / "lock").open("w") as held:
        tell = f"import os; os.fstat({held.fileno()}); print('{{}}')"
        play([Stage("tell", party, [tell], holding=[held.fileno()])], tmp_path / "notes")
