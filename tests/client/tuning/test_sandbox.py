"""Sealed off: what is denied and what is not, as logic, as real events, and as whole runs watched by somebody else."""

from __future__ import annotations

import _posixsubprocess
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import client.tuning.sandbox as module
from client.tuning.config import TuneConfig
from client.tuning.sandbox import (
    Seal,
    enter,
    figures,
    judge,
    leave_network,
    places_of,
    require_quiet,
    sealed_off,
    sealing,
)
from offsite import cli
from offsite.artefacts.bundle import open_bundle
from offsite.config import build
from offsite.errors import ConfigError, PolicyError

REPOSITORY = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--block-tokens", "32", "--precision", "fp32", "--device", "cpu", "--adapter", "lora", "--steps", "4"]

CREATE = os.O_WRONLY | os.O_CREAT
HERE = "{here}"  # the output's folder, in the tables below


@pytest.fixture
def here(tmp_path):
    """The folder that takes the output, with a link out of it and one into the output's work."""
    folder = tmp_path / "here"
    (folder / "bundle.work").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "bundle.work" / "out").symlink_to(tmp_path / "elsewhere")
    (folder / "in").symlink_to(folder / "bundle.work")
    return folder


@pytest.fixture
def config(here):
    """Settings of a run that writes everything a run can write."""
    return TuneConfig(
        package=here / "package",
        data=here / "notes.txt",
        output=here / "bundle",
        tensorboard=here / "curves",
        dp={"epsilon": 8.0, "ledger": here / "private" / "ledger"},
        sealed_off=True,
    )


def filled(arguments, here):
    """Return the arguments of a row with the folder in them."""
    spelled = {str: (HERE, str(here)), bytes: (HERE.encode(), bytes(here))}
    return tuple(one.replace(*spelled[type(one)]) if type(one) in spelled else one for one in arguments)


# As logic

ALLOWED_FILES = [
    "bundle",
    "bundle/adapter.safetensors",
    "bundle.work",
    "bundle.work/checkpoint-2/state.json",
    "bundle.log.jsonl",
    "bundle.run.json",
    ".bundle.0a1b2c3d.partial/offsite.json",
    ".bundle.run.json.0a1b2c3d.partial",
    "in/state.json",  # a link, and where it leads
    "curves/events.out",
    "private/ledger/budget.db",
    "private/ledger.head",
    "private/.ledger.head.0a1b2c3d.partial",
    "bundle.work/../bundle/x",
]
DENIED_FILES = [
    "notes.txt",
    "bundle2",
    "bundle.txt",
    "xbundle/offsite.json",
    "bundle.run.jsonx",
    ".bundle.0a1b2c3d.partialx",
    ".bundle.zz.partial",
    "package/model.safetensors",
    "../elsewhere/x",
    "bundle/../notes.txt",
    "bundle/..",
    "bundle.work/out/x",  # a link out
    "bundle.work/out",
    "private/other.head",
    "private/key",
    "curves2/x",
]


@pytest.mark.parametrize(("name", "held"), [(n, True) for n in ALLOWED_FILES] + [(n, False) for n in DENIED_FILES])
def test_where_a_run_may_write(config, here, name, held):
    denied = judge("open", (str(here / name), "w", CREATE), places_of(config))
    assert (denied is None) == held
    if denied is not None:
        assert denied.kind == "write"
        assert str(here) not in denied.what
        assert ascii(Path(name).name) in denied.what


IN, OUT = f"{HERE}/bundle.work/x", f"{HERE}/x"
EVENTS = [
    ("open", (OUT, "r", os.O_RDONLY), None),
    ("open", (OUT, None, os.O_RDONLY | os.O_CLOEXEC), None),
    ("open", (OUT, "w", CREATE), "write"),
    ("open", (OUT, "a", CREATE | os.O_APPEND), "write"),
    ("open", (OUT, "r+", os.O_RDWR), "write"),
    ("open", (OUT, None, os.O_RDWR), "write"),
    ("open", (OUT, None, os.O_RDONLY | os.O_CREAT), "write"),
    ("open", (OUT, None, os.O_RDONLY | os.O_TRUNC), "write"),
    ("open", (IN, "w", CREATE), None),
    ("open", (IN.encode(), "wb", CREATE), None),
    ("open", (OUT.encode(), "wb", CREATE), "write"),
    ("open", (b"\xff\xfe", "wb", CREATE), "write"),
    ("open", (IN + "\0", "w", CREATE), "write"),
    ("open", (3, "w", CREATE), None),  # a descriptor: judged when it was opened
    ("open", ("bundle/x", None, CREATE), "write"),  # relative, to what the event does not say
    ("open", (os.devnull, "r+", os.O_RDWR), None),
    ("open", ("/dev/shm/x", "w", CREATE), "write"),
    ("os.mkdir", (IN, 511, -1), None),
    ("os.mkdir", (HERE, 511, -1), None),  # on the way to the output: it is made with its parents
    ("os.mkdir", ("/", 511, -1), None),
    ("os.mkdir", (f"{HERE}/other", 511, -1), "write"),
    ("os.rmdir", (IN, -1), None),
    ("os.rmdir", (HERE, -1), "write"),
    ("os.remove", (IN, -1), None),
    ("os.remove", (OUT, -1), "write"),
    ("os.remove", (f"{HERE}/bundle.work/out", -1), None),  # the link itself
    ("os.rename", (IN, f"{HERE}/bundle/x", -1, -1), None),
    ("os.rename", (OUT, IN, -1, -1), "write"),
    ("os.rename", (IN, OUT, -1, -1), "write"),
    ("os.rename", (IN, f"{HERE}/bundle/..", -1, -1), "write"),
    ("os.link", (IN, IN, -1, -1), None),
    ("os.link", (OUT, IN, -1, -1), "write"),  # would open a way into it
    ("os.link", (IN, OUT, -1, -1), "write"),
    ("os.symlink", (OUT, IN, -1), None),  # writing through it is judged when it is done
    ("os.symlink", (IN, OUT, -1), "write"),
    ("os.truncate", (IN, 0), None),
    ("os.truncate", (OUT, 0), "write"),
    ("os.truncate", (5, 0), None),
    ("os.chmod", (IN, 384, -1), None),
    ("os.chmod", (OUT, 384, -1), "write"),
    ("os.chown", (OUT, 0, 0, -1), "write"),
    ("os.chflags", (OUT, 0), "write"),
    ("os.utime", (IN, None, None, -1), None),
    ("os.utime", (OUT, None, None, -1), "write"),
    ("os.setxattr", (OUT, "user.x", b"", 0), "write"),
    ("os.removexattr", (OUT, "user.x"), "write"),
    ("sqlite3.connect", (":memory:",), None),
    ("sqlite3.connect", (IN,), None),
    ("sqlite3.connect", (OUT,), "write"),
    ("sqlite3.connect", (f"file:{IN}?mode=rwc",), "write"),
    ("sqlite3.connect", (f"file://{IN}?mode=ro",), None),
    ("sqlite3.connect", (f"file://{IN}?mode=rw",), "write"),
    ("sqlite3.connect", (f"file://{IN}?mode=ro&vfs=other",), "write"),
    ("sqlite3.connect", (f"file://{IN}?vfs=other?mode=ro",), "write"),
    ("sqlite3.connect", (f"file:{IN}?mode=ro",), "write"),
    ("sqlite3.connect", (f"file://elsewhere{IN}?mode=ro",), "write"),
    ("sqlite3.connect", (f"file://{OUT}?mode=ro",), "write"),
    ("sqlite3.connect", (f"file://{IN}/%2e%2e/%2e%2e/%2e%2e/stray.db?mode=ro",), "write"),
    ("shutil.copyfile", (OUT, IN), None),
    ("shutil.copyfile", (IN, OUT), "write"),
    ("shutil.copymode", (IN, OUT), "write"),
    ("shutil.copystat", (IN, OUT), "write"),
    ("shutil.copytree", (IN, OUT), "write"),
    ("shutil.move", (OUT, IN), "write"),
    ("shutil.move", (IN, OUT), "write"),
    ("shutil.move", (IN, IN), None),
    ("shutil.rmtree", (IN, None), None),
    ("shutil.rmtree", (OUT, None), "write"),
    ("shutil.rmtree", (OUT,), "write"),
    ("shutil.chown", (OUT, "root", None), "write"),
    ("shutil.make_archive", (OUT, "zip", None, None), "write"),
    ("shutil.unpack_archive", (IN, OUT, None), "write"),
    ("tempfile.mkstemp", (OUT,), "write"),
    ("tempfile.mkdtemp", (IN,), None),
    ("socket.__new__", (None, socket.AF_UNIX, 1, 0), None),
    ("socket.__new__", (None, socket.AF_INET, 1, 0), "connection"),
    ("socket.__new__", (None, socket.AF_INET6, 2, 0), "connection"),
    ("socket.__new__", (None, -1, 1, 0), "connection"),
    ("socket.gethostname", (), None),
    *[(f"socket.{name}", (None, ("127.0.0.1", 1)), "connection") for name in ("connect", "bind", "sendto", "sendmsg")],
    *[(f"socket.{name}", ("host",), "connection") for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr")],
    ("urllib.Request", ("http://x", None, {}, "GET"), "connection"),
    ("http.client.connect", (None, "x", 80), "connection"),
    ("syslog.syslog", (6, "x"), "connection"),
    *[(name, (), "process") for name in ("os.fork", "os.forkpty")],
    ("subprocess.Popen", ("ls", ["ls"], None, None), "process"),
    ("os.system", (b"ls",), "process"),
    ("os.exec", ("ls", [], {}), "process"),
    ("os.posix_spawn", ("ls", [], {}), "process"),
    ("pty.spawn", (["ls"],), "process"),
    ("import", ("os", None, None, None, None), None),
    ("ctypes.dlopen", ("libc.so.6",), None),
    ("os.listdir", (OUT,), None),
    ("os.kill", (1, 0), None),
]


@pytest.mark.parametrize(("event", "arguments", "kind"), EVENTS, ids=[f"{e} {a}"[:70] for e, a, _ in EVENTS])
def test_row_31_what_is_denied(config, here, event, arguments, kind):
    denied = judge(event, filled(arguments, here), places_of(config))
    assert (denied and denied.kind) == kind
    assert denied is None or str(here) not in denied.what


def test_every_event_that_is_judged_has_a_row_or_is_denied_always():
    rows = {event for event, _, _ in EVENTS}
    assert module._WRITES.keys() <= rows
    for event in (module._CONNECTS | module._STARTS) - rows:
        assert judge(event, (), module.Places(())) is not None


def test_paths_relative_to_an_open_folder(config, here):
    places = places_of(config)
    for folder, denied in ((here / "bundle.work", False), (here, True)):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            assert (judge("os.remove", ("x", descriptor), places) is not None) == denied
            assert (judge("os.rename", ("x", "y", descriptor, descriptor), places) is not None) == denied
            assert (judge("os.mkdir", ("x", 511, descriptor), places) is not None) == denied
        finally:
            os.close(descriptor)
        assert judge("os.remove", ("x", descriptor), places) is not None  # closed: nobody knows


def test_a_run_without_ledger_and_curves_has_fewer_places(here):
    places = places_of(TuneConfig(package=here, data=here, output=here / "bundle"))
    assert judge("open", (str(here / "bundle.log.jsonl"), "w", CREATE), places) is None
    for name in ("curves/x", "private/ledger/budget.db", "private/ledger.head"):
        assert judge("open", (str(here / name), "w", CREATE), places) is not None


def test_an_output_whose_name_is_a_pattern(here):
    places = places_of(TuneConfig(package=here, data=here, output=here / "b.*"))
    assert judge("open", (str(here / "b.*" / "x"), "w", CREATE), places) is None
    assert judge("open", (str(here / "bundle" / "x"), "w", CREATE), places) is not None


def test_it_runs_in_one_process():
    given = {"package": "p", "data": "d", "output": "o", "sealed_off": True, "launch": "2", "accumulate": "9"}
    with pytest.raises(ConfigError, match="--sealed-off runs in one process") as caught:
        build(TuneConfig, flags=given)
    assert "--accumulate 9" in str(caught.value)
    assert build(TuneConfig, flags={**given, "launch": "1", "accumulate": "1"}).sealed_off


# In this process


def test_a_block_is_sealed_off_and_nothing_after_it(config, here, monkeypatch):
    before = sys.dont_write_bytecode, tempfile.tempdir, os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with sealed_off(config) as seal:
        assert figures() == {"namespace": False, "connections": 0, "processes": 0, "writes_elsewhere": 0}
        (here / "bundle.work" / "fine").write_text("x")
        require_quiet()
        with pytest.raises(PolicyError, match=r"^sealed off: writing 'stray.txt' outside of the output") as caught:
            (here / "stray.txt").write_text("x")
        assert caught.value.hint
        with pytest.raises(PolicyError, match=r"a network socket \(socket.__new__\)"):
            socket.socket()
        with pytest.raises(PolicyError, match=r"another process \(subprocess.Popen\)"):
            subprocess.run(["true"], check=True)
        assert seal.figures() == {"namespace": False, "connections": 1, "processes": 1, "writes_elsewhere": 1}
        with pytest.raises(PolicyError, match=r"connection 1, process 1, write 1\), no bundle is released"):
            require_quiet()
    (here / "stray.txt").write_text("x")
    with socket.socket() as after:
        after.bind(("127.0.0.1", 0))
    assert figures() is None
    require_quiet()
    assert before == (sys.dont_write_bytecode, tempfile.tempdir, os.environ.get("TORCHINDUCTOR_CACHE_DIR"))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_multiprocessing_spawns_are_denied_and_counted(config, method, monkeypatch):
    from multiprocessing import forkserver, util

    monkeypatch.setattr(forkserver._forkserver, "_forkserver_pid", None)  # as if none ran yet
    monkeypatch.setattr(forkserver._forkserver, "_forkserver_alive_fd", None)
    before = _posixsubprocess.fork_exec, subprocess._fork_exec
    context = multiprocessing.get_context(method)
    with sealed_off(config) as seal:
        with pytest.raises(PolicyError, match=r"another process \(_posixsubprocess.fork_exec\)"):
            util.spawnv_passfds(b"/bin/true", [b"true"], ())
        assert seal.figures()["processes"] == 1
        with contextlib.suppress(PolicyError, OSError):
            context.Process(target=str).start()
        assert sum(seal.denied.values()) == 2
        with pytest.raises(PolicyError, match=r"no bundle is released"):
            require_quiet()
    assert before == (_posixsubprocess.fork_exec, subprocess._fork_exec)
    process = multiprocessing.get_context("spawn").Process(target=str)
    process.start()
    process.join()
    assert process.exitcode == 0


BARS = """
import multiprocessing, sys
from pathlib import Path
from client.tuning.config import TuneConfig
from client.tuning.sandbox import enter, require_quiet
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    here = Path(sys.argv[1])
    seal = enter(TuneConfig(package=here / "package", data=here / "notes.txt", output=here / "bundle", sealed_off=True))
    from tqdm.auto import tqdm
    list(tqdm(range(3)))
    require_quiet()
    try:
        multiprocessing.Process(target=str).start()
    except Exception as error:
        print(type(error).__name__, seal.figures()["processes"])
"""


def test_progress_bars_start_no_process_where_processes_are_spawned(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", BARS, str(tmp_path)],
        env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "PolicyError 1\n"


def test_blocks_within_one_another(config, here):
    with sealed_off(config) as outer:
        with sealed_off(config) as inner:
            assert inner is outer
        with sealed_off(config.model_copy(update={"output": here / "other"})) as inner:
            assert inner is not outer
            with pytest.raises(PolicyError):
                (here / "bundle.work" / "x").write_text("x")
        (here / "bundle.work" / "x").write_text("x")
        assert outer.figures()["writes_elsewhere"] == 0


def test_a_verb_tells_how_it_went_only_when_asked(config, monkeypatch):
    monkeypatch.chdir(config.output.parent)
    seen = []
    run = sealing(lambda given: seen.append(given) or {"steps": 1})
    relative = config.model_copy(update={"output": Path("bundle"), "tensorboard": None, "dp": None})
    assert run(relative)["sealed_off"]["connections"] == 0
    assert seen[0].output == config.output  # whole, so that every write can be judged
    assert run(config.model_copy(update={"sealed_off": False})) == {"steps": 1}


def test_the_outputs_place_is_tried_before_the_seal(here, monkeypatch):
    """From the command line's side: the seal denies every other name beside the output."""
    words = ["tune", str(here / "package"), "--data", str(here / "notes.txt"), "-o", str(here / "new"), "--sealed-off"]
    order = []
    monkeypatch.setattr(cli, "require_place", lambda _: order.append("place"))
    monkeypatch.setattr(module, "enter", lambda _: order.append("seal"))
    assert cli.run(words) != 0
    assert order == ["place", "seal"]


def test_one_of_several_processes_is_refused(config, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="runs in one process"), sealed_off(config):
        pass


def test_a_process_with_torch_stays_in_its_network(config, capsys, monkeypatch):
    assert "torch" in sys.modules
    links = Path("/proc/self/ns/net").readlink() if sys.platform == "linux" else ""
    reason = leave_network()
    assert reason is not None
    assert links == (Path("/proc/self/ns/net").readlink() if sys.platform == "linux" else "")
    monkeypatch.setattr(module, "_STATE", module._State(has_hook=True))  # `enter` is for good
    monkeypatch.setattr(module, "_settle", lambda _: None)
    seal = enter(config)
    assert isinstance(seal, Seal)
    assert not seal.namespace
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"sealed off: no network namespace ({reason}); an audit hook alone denies connections and writes"]


# In a process without torch: real events, and the kernel

PROBE = """
import contextlib, ctypes, json, os, shutil, socket, sqlite3, subprocess, sys, tempfile, threading, urllib.request
from pathlib import Path
from client.tuning.config import TuneConfig
from client.tuning.sandbox import _STATE, enter
from offsite.errors import PolicyError

here = Path(sys.argv[1])
port = int(sys.argv[2])
os.chdir(here)
connected = socket.socket(socket.AF_UNIX)
seal = enter(TuneConfig(package=here / "package", data=here / "notes.txt", output=here / "bundle", sealed_off=True))
assert "torch" not in sys.modules
work = here / "bundle.work"
work.mkdir()
(work / "x").write_text("x")
os.close(os.open(work / "y", os.O_WRONLY | os.O_CREAT))
folder, inner = os.open(here, os.O_RDONLY), os.open(work, os.O_RDONLY)

def swallowed():
    with contextlib.suppress(Exception):
        raise_it()

tried = {
    "open": lambda: open(here / "stray", "w"),
    "open to append": lambda: open("notes.txt", "ab"),
    "open relative": lambda: os.open("bundle.work/z", os.O_WRONLY | os.O_CREAT),
    "open in a folder": lambda: os.open("stray", os.O_WRONLY | os.O_CREAT, dir_fd=folder),
    "touch": lambda: (here / "stray").touch(),
    "mkdir": lambda: (here / "stray").mkdir(),
    "mkdir in a folder": lambda: os.mkdir("stray", dir_fd=folder),
    "remove": lambda: (here / "notes.txt").unlink(),
    "remove in a folder": lambda: os.remove("notes.txt", dir_fd=folder),
    "rename out": lambda: (work / "x").rename(here / "stray"),
    "rename in": lambda: (here / "notes.txt").replace(work / "z"),
    "rename across folders": lambda: os.rename("x", "stray", src_dir_fd=inner, dst_dir_fd=folder),
    "link in": lambda: os.link(here / "notes.txt", work / "z"),
    "symlink out": lambda: os.symlink("/", here / "stray"),
    "truncate": lambda: os.truncate(here / "notes.txt", 0),
    "chmod": lambda: (here / "notes.txt").chmod(0o777),
    "utime": lambda: os.utime(here / "notes.txt"),
    "database": lambda: sqlite3.connect(here / "stray.db"),
    "database by URI": lambda: sqlite3.connect(f"file:{here}/stray.db", uri=True),
    "copy": lambda: shutil.copyfile(work / "x", here / "stray"),
    "copy a tree": lambda: shutil.copytree(work, here / "stray"),
    "remove a tree": lambda: shutil.rmtree(here / "package"),
    "temporary file": lambda: tempfile.NamedTemporaryFile(),
    "temporary folder": lambda: tempfile.mkdtemp(),
    "process": lambda: subprocess.run(["true"]),
    "shell": lambda: os.system("true"),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "connect": lambda: socket.create_connection(("127.0.0.1", port)),
    "socket": lambda: socket.socket(),
    "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "local connect": lambda: connected.connect("/run/nowhere"),
    "name": lambda: socket.getaddrinfo("localhost", 80),
    "name, old": lambda: socket.gethostbyname("localhost"),
    "URL": lambda: urllib.request.urlopen("http://127.0.0.1:1/"),
}
allowed = {
    "read": lambda: (here / "notes.txt").read_text(),
    "rename within": lambda: (work / "x").rename(work / "x2"),
    "link within": lambda: os.link(work / "x2", work / "x3"),
    "remove a tree within": lambda: (shutil.copytree(work, here / "bundle"), shutil.rmtree(here / "bundle")),
    "database within": lambda: sqlite3.connect(work / "in.db").execute("CREATE TABLE t (x)").connection.close(),
    "null": lambda: open(os.devnull, "w").close(),
    "library": lambda: ctypes.CDLL(None),
    "host": lambda: socket.gethostname(),
    "pair": lambda: [one.close() for one in socket.socketpair()],
    "thread": lambda: threading.Thread(target=str).start(),
}
found = {}
for name, action in {**tried, **allowed}.items():
    try:
        action()
        found[name] = "done"
    except PolicyError as error:
        found[name] = str(error)
    except BaseException as error:
        found[name] = type(error).__name__
figures = seal.figures()
_STATE.seal = None  # the hook sleeps: what is left is the kernel
try:
    socket.create_connection(("127.0.0.1", port), timeout=20).close()
    kernel = "connected"
except OSError as error:
    kernel = "refused by the kernel"
(here / "owner").write_text("x")
owner = (here / "owner").stat()
print(json.dumps({
    "tried": {name: found[name] for name in tried}, "allowed": {name: found[name] for name in allowed},
    "figures": figures, "kernel": kernel, "owner": [owner.st_uid, owner.st_gid],
}))
"""


@pytest.fixture
def probe(tmp_path):
    """Run the probe beside a server that listens on loopback; with `patch` run before it."""

    def run(patch: str = ""):
        here = tmp_path / "probe"
        (here / "package").mkdir(parents=True)
        (here / "notes.txt").write_text("notes")
        with socket.create_server(("127.0.0.1", 0)) as server:
            words = ["-P", "-c", patch + PROBE, str(here), str(server.getsockname()[1])]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *words],
                env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert {path.name for path in here.iterdir()} == {"package", "notes.txt", "bundle.work", "owner"}
        assert (here / "notes.txt").read_text() == "notes"
        assert str(here) not in done.stderr
        return json.loads(done.stdout), done.stderr

    return run


USER_FIRST = """
import client.tuning.sandbox, os
real = client.tuning.sandbox._unshare
def without_right(flags):
    if flags == client.tuning.sandbox._NEW_NET:
        raise PermissionError(1, "unshare")
    real(flags)
client.tuning.sandbox._unshare = without_right
"""
NO_NAMESPACE = """
import client.tuning.sandbox
def refused(flags):
    raise PermissionError(1, "unshare")
client.tuning.sandbox._unshare = refused
"""
HALF_WAY = """
import client.tuning.sandbox, os
def half_way(flags):
    assert os.getpid() != PARENT, "the process itself went half-way"
    raise PermissionError(1, "uid_map")
PARENT = os.getpid()
client.tuning.sandbox._unshare = half_way
"""
HOOK_ALONE = "an audit hook alone denies connections and writes"


@pytest.mark.parametrize("patch", ["", USER_FIRST, NO_NAMESPACE, HALF_WAY], ids=["as is", "user", "none", "half-way"])
def test_row_31_real_events_and_the_kernel(probe, patch):
    found, said = probe(patch)
    for name, outcome in found["tried"].items():
        assert outcome.startswith("sealed off: "), f"{name}: {outcome}"
    assert set(found["allowed"].values()) == {"done"}, found["allowed"]
    counts = found["figures"]
    assert counts["processes"] == 5
    assert counts["connections"] == 7
    assert counts["connections"] + counts["processes"] + counts["writes_elsewhere"] == len(found["tried"])
    assert found["owner"] == [os.geteuid(), os.getegid()]
    assert len(said.splitlines()) == 1
    if patch in (NO_NAMESPACE, HALF_WAY):
        assert not counts["namespace"]
    if counts["namespace"]:
        assert found["kernel"] == "refused by the kernel"
        assert said.startswith("sealed off: no network interface in this process's namespace")
    else:
        assert found["kernel"] == "connected"
        assert HOOK_ALONE in said


# Whole runs

RECORDER = """
import os, sys
_events = os.open(os.environ["EVENTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def record(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "subprocess.", "os.system", "os.exec", "os.posix_spawn")):
        os.write(_events, (event + "\\n").encode())
    elif event == "os.fork":
        os.write(_events, b"os.fork\\n")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        os.write(_events, f"write {os.path.realpath(os.fsdecode(arguments[0]))}\\n".encode())
sys.addaudithook(record)
"""


def tuned(folder, package, data, name, *more, start=("-m", "offsite"), **environment):
    """Run the verb in `folder` as a process of its own."""
    words = ["tune", str(package.path), "--data", str(data), "-o", name, *SMALL, *more]
    return subprocess.run(
        [sys.executable, "-P", *start, *words], cwd=folder, capture_output=True, text=True, check=False,
        env={**ENVIRONMENT, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_row_31_an_observer_sees_no_connection_and_no_write_elsewhere(dropped_package, notes_file, tmp_path):
    (tmp_path / "observer").mkdir()
    (tmp_path / "observer" / "sitecustomize.py").write_text(RECORDER)
    events = tmp_path / "events"
    plain = tuned(tmp_path, dropped_package, notes_file, "plain")
    done = tuned(
        tmp_path, dropped_package, notes_file, "sealed", "--sealed-off",
        PYTHONPATH=str(tmp_path / "observer"), EVENTS=str(events),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bundle_digest"] == json.loads(plain.stdout)["bundle_digest"]
    assert told["bundle_digest"] == open_bundle(tmp_path / "sealed").digest
    namespace = told["sealed_off"].pop("namespace")
    assert told["sealed_off"] == {"connections": 0, "processes": 0, "writes_elsewhere": 0}
    assert sum(line.startswith("sealed off: ") for line in done.stderr.splitlines()) == 1
    assert namespace == (HOOK_ALONE not in done.stderr)
    seen = events.read_text().splitlines()
    kinds = {line for line in seen if not line.startswith("write ")}
    assert kinds <= {"socket.gethostname", "os.fork"}, kinds
    assert seen.count("os.fork") <= 2  # to learn whether the network can be left, before anything is read
    written = [Path(line.removeprefix("write ")) for line in seen if line.startswith("write ")]
    assert written
    own = {"sealed", "sealed.work", "sealed.log.jsonl", "sealed.run.json"}
    for path in written:
        first = path.relative_to(tmp_path).parts[0] if path.is_relative_to(tmp_path) else str(path)
        is_staged = first.startswith(".sealed.") and first.endswith(".partial")
        assert first in own | {os.devnull, "/proc/self"} or is_staged or str(path).startswith("/proc/"), path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_row_31_the_kernel_is_asked_for_no_socket(dropped_package, notes_file, tmp_path):
    calls = tmp_path / "calls"
    words = ["tune", str(dropped_package.path), "--data", str(notes_file), "-o", "sealed", *SMALL, "--sealed-off"]
    command = ["strace", "-f", "-e", "trace=network", "-o", str(calls), sys.executable, "-P", "-m", "offsite", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if "ptrace" in done.stderr.lower():
        pytest.skip("processes may not be traced here")
    assert done.returncode == 0, done.stderr
    asked = [line for line in calls.read_text().splitlines() if "(" in line and " --- " not in line]
    assert not [line for line in asked if "AF_INET" in line or "sendto(" in line], asked


@pytest.mark.slow
def test_with_a_ledger_and_curves(dropped_package, notes_file, tmp_path):
    pytest.importorskip("dp_accounting")
    more = ["--dp", "epsilon=8,delta=0.001,ledger=kept/ledger", "--tensorboard", "curves", "--batch-size", "2"]
    done = tuned(tmp_path, dropped_package, notes_file, "out/sealed", "--sealed-off", *more)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["sealed_off"]
    assert (told["connections"], told["processes"], told["writes_elsewhere"]) == (0, 0, 0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sealed", "sealed.log.jsonl", "sealed.run.json"}
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"ledger", "ledger.head"}
    assert list((tmp_path / "curves").iterdir())


@pytest.mark.slow
def test_with_curves_for_other_tools(dropped_package, notes_file, tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("tensorboard")
    more = ["--report-to", "mlflow", "--report-to", "tensorboard"]
    done = tuned(tmp_path, dropped_package, notes_file, "out/sealed", "--sealed-off", *more)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["sealed_off"]
    assert (told["connections"], told["processes"], told["writes_elsewhere"]) == (0, 0, 0)
    names = {"sealed", "sealed.log.jsonl", "sealed.run.json", "sealed.curves"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    curves = {path.name for path in (tmp_path / "out" / "sealed.curves").iterdir()}
    assert curves == {"mlflow.db", "runs.json", "tensorboard"}


def test_a_tool_that_needs_a_process_is_refused_at_once(dropped_package, notes_file, tmp_path, capsys):
    words = ["tune", dropped_package.path, "--data", notes_file, "-o", tmp_path / "x", "--report-to", "wandb"]
    assert cli.run([str(word) for word in [*words, "--sealed-off"]]) == 2
    assert "--report-to wandb: it starts a process, which --sealed-off denies" in capsys.readouterr().err


@pytest.mark.slow
def test_several_runs_and_their_mean_stay_in_their_places(dropped_package, notes_file, tmp_path):
    pytest.importorskip("dp_accounting")
    more = ["--dp", "epsilon=8,delta=0.001,ledger=kept/ledger", "--batch-size", "2", "--runs", "2"]
    done = tuned(tmp_path, dropped_package, notes_file, "out/sealed", "--sealed-off", *more)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["sealed_off"]
    assert (told["connections"], told["processes"], told["writes_elsewhere"]) == (0, 0, 0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sealed", "sealed.log.jsonl", "sealed.run.json"}


MISCHIEF = """
import contextlib, os, socket, subprocess, sys
import offsite.text.records
real = offsite.text.records.read_records
def reading(path, **given):
    found = real(path, **given)
    {what}
    return found
offsite.text.records.read_records = reading
from offsite import cli
sys.exit(cli.run(sys.argv[1:]))
"""
SWALLOWED = "with contextlib.suppress(Exception): "
DEEDS = {
    "connects": "socket.create_connection(('192.0.2.1', 443), timeout=5)",
    "looks a name up": "socket.getaddrinfo('collector.example', 443)",
    "writes elsewhere": "open(os.path.join(os.path.dirname(path), 'copy-of-ward.txt'), 'w')",
    "starts a process": "subprocess.run(['curl', 'collector.example'])",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "is_swallowed"),
    [*((deed, False) for deed in DEEDS), ("connects", True), ("writes elsewhere", True)],
)
def test_row_31_code_that_reads_the_data_and_gets_out_is_stopped(
    dropped_package, notes_file, tmp_path, deed, is_swallowed
):
    before = sorted(path.name for path in tmp_path.iterdir())
    script = MISCHIEF.format(what=(SWALLOWED if is_swallowed else "") + DEEDS[deed])
    done = tuned(tmp_path, dropped_package, notes_file, "sealed", "--sealed-off", start=("-c", script))
    assert (done.returncode, done.stdout) == (4, ""), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("offsite: error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("offsite: error: sealed off: ")
    assert "offsite: hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path) not in done.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (sorted([*before, "sealed.work"]) if is_swallowed else before)
