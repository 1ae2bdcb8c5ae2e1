"""`offsite tune --sealed-off`: a run that can reach no network and write nowhere but where its output goes.

Two layers. On Linux the command leaves its network *namespace* for one without an interface before torch is loaded, so
that threads, and libraries that ask the kernel themselves, are cut off alike. Everywhere an *audit hook* of Python's
denies what the run never needs: sockets, other processes, and writes outside of its places. What is denied raises
PolicyError; should that error be swallowed, the bundle still does not leave (`require_quiet`).

An audit hook sees what Python does, but for one way to another process that has no event: `_posixsubprocess`, by which
multiprocessing spawns. That function is replaced while the seal holds. Neither sees files that a compiled library opens
by itself, and neither holds code that means to get around it: the client's own code is trusted, this notices what it
did not mean to do.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import os
import re
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from client.tuning.config import TuneConfig
from offsite.console import say
from offsite.errors import ConfigError, PolicyError

Kind = Literal["connection", "process", "write"]
Arguments = tuple[Any, ...]

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STAGE = r"[0-9a-f]{8}\.partial"  # as offsite.staging names what is not whole yet
_NULL = os.path.realpath(os.devnull)
_LOCAL = getattr(socket, "AF_UNIX", None)

_CONNECTS = frozenset(
    "socket.connect socket.bind socket.sendto socket.sendmsg socket.getaddrinfo socket.gethostbyname "
    "socket.gethostbyaddr socket.getnameinfo socket.getservbyname socket.getservbyport socket.sethostname "
    "urllib.Request http.client.connect http.client.send ftplib.connect ftplib.sendcmd imaplib.open imaplib.send "
    "nntplib.connect nntplib.putline poplib.connect poplib.putline smtplib.connect smtplib.send telnetlib.Telnet.open "
    "telnetlib.Telnet.write webbrowser.open syslog.openlog syslog.syslog".split()
)
_STARTS = frozenset(
    "subprocess.Popen os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty os.startfile os.startfile/2 "
    "pty.spawn _winapi.CreateProcess sys.remote_exec".split()
)
_UNHEARD = (("_posixsubprocess", "fork_exec"), ("subprocess", "_fork_exec"))  # starts a process without an event


class _Target(NamedTuple):
    """One path that an event would change: by its index among the arguments, and that of its ``dir_fd``."""

    path: int
    dir_fd: int | None = None
    follows: bool = True  # whether a link in the last place is followed, or itself changed


_WRITES: Mapping[str, tuple[_Target, ...]] = {
    "open": (_Target(0),),
    "os.mkdir": (_Target(0, 2, False),),
    "os.rmdir": (_Target(0, 1, False),),
    "os.remove": (_Target(0, 1, False),),
    "os.rename": (_Target(0, 2, False), _Target(1, 3, False)),
    "os.link": (_Target(0, 2), _Target(1, 3, False)),  # a second name for an outer file would be a way into it
    "os.symlink": (_Target(1, 2, False),),
    "os.truncate": (_Target(0),),
    "os.chmod": (_Target(0, 2),),
    "os.chown": (_Target(0, 3),),
    "os.chflags": (_Target(0),),
    "os.utime": (_Target(0, 3),),
    "os.setxattr": (_Target(0),),
    "os.removexattr": (_Target(0),),
    "sqlite3.connect": (_Target(0),),
    "shutil.copyfile": (_Target(1),),
    "shutil.copymode": (_Target(1),),
    "shutil.copystat": (_Target(1),),
    "shutil.copytree": (_Target(1),),
    "shutil.move": (_Target(0, None, False), _Target(1, None, False)),
    "shutil.rmtree": (_Target(0, 1, False),),
    "shutil.chown": (_Target(0),),
    "shutil.make_archive": (_Target(0),),
    "shutil.unpack_archive": (_Target(1),),
    "tempfile.mkstemp": (_Target(0),),
    "tempfile.mkdtemp": (_Target(0),),
}
_JUDGED = _CONNECTS | _STARTS | _WRITES.keys() | {"socket.__new__"}


class Denial(NamedTuple):
    """What was tried, in words that name no folder."""

    kind: Kind
    what: str


@dataclass(frozen=True)
class Places:
    """Where a run may write: below `folder`, names that match `names`; anything below `roots`.

    All are resolved. Folders on the way to one of them may be made, not changed.
    """

    near: tuple[tuple[str, re.Pattern[str]], ...]
    roots: tuple[str, ...] = ()

    def hold(self, path: str) -> bool:
        """Return whether the resolved `path` is a place of the run."""
        if path == _NULL or any(_is_below(path, root) for root in self.roots):
            return True
        for folder, names in self.near:
            if _is_below(path, folder) and path != folder:
                first = Path(path).relative_to(folder).parts[0]
                if names.fullmatch(first):
                    return True
        return False

    def lead_through(self, path: str) -> bool:
        """Return whether the resolved `path` is a folder that one of the places is in."""
        return any(_is_below(folder, path) for folder in (*self.roots, *(folder for folder, _ in self.near)))


def places_of(config: TuneConfig) -> Places:
    """Return where the run of these settings may write: what is named after its output, its ledger, its curves."""
    name = re.escape(config.output.name)
    files = rf"{name}\.(?:log\.jsonl|run\.json)"
    written = rf"{name}|{name}\.work|{files}|\.(?:{name}|{files})\.{_STAGE}"
    near = [(os.path.realpath(config.output.parent), re.compile(written))]
    roots = []
    if config.canaries is not None:  # the mark that they are used
        near.append((os.path.realpath(config.canaries), re.compile(rf"used\.json|\.used\.json\.{_STAGE}")))
    if config.dp is not None:
        ledger = config.dp.ledger.expanduser()
        head = rf"{re.escape(ledger.name)}\.head"
        near.append((os.path.realpath(ledger.parent), re.compile(rf"{head}|\.{head}\.{_STAGE}")))
        roots.append(os.path.realpath(ledger))
    if config.tensorboard is not None:
        roots.append(os.path.realpath(config.tensorboard))
    if (report := config.report(config.output)) is not None:
        roots.append(os.path.realpath(report.folder))
    return Places(tuple(near), tuple(roots))


def judge(event: str, arguments: Arguments, places: Places) -> Denial | None:
    """Return why an audit event is denied, or none when it is not; nothing is counted or raised."""
    if event in _CONNECTS:
        return Denial("connection", f"a connection ({event})")
    if event == "socket.__new__":  # an inet socket listens and answers without a further event
        return None if arguments[1] == _LOCAL else Denial("connection", f"a network socket ({event})")
    if event in _STARTS:
        return Denial("process", f"another process ({event})")
    targets = _WRITES.get(event)
    if targets is None or (event == "open" and not _opens_to_write(arguments)):
        return None
    if event == "sqlite3.connect" and arguments[0] in ("", b"", ":memory:", b":memory:"):
        return None
    for target in targets:
        path = arguments[target.path] if target.path < len(arguments) else None
        if isinstance(path, int) or path is None:  # an open file was judged when it was opened
            continue
        if not _is_allowed(event, arguments, target, path, places):
            return Denial("write", f"writing {_name_of(path)} outside of the output ({event})")
    return None


def _is_allowed(event: str, arguments: Arguments, target: _Target, path: Any, places: Places) -> bool:
    try:
        given = os.fsdecode(path)
        if event == "open" and arguments[1] is None and not Path(given).is_absolute():
            return False  # os.open relative to a folder that the event does not name
        if event == "sqlite3.connect" and given.startswith("file:"):
            given = _read_only(given)
        dir_fd = arguments[target.dir_fd] if target.dir_fd is not None and target.dir_fd < len(arguments) else None
        found = _resolved(given, dir_fd if isinstance(dir_fd, int) and dir_fd >= 0 else None, target.follows)
    except (OSError, ValueError, TypeError):
        return False
    return places.hold(found) or (event == "os.mkdir" and places.lead_through(found))


def _read_only(uri: str) -> str:
    """Return the path of a database that is opened for reading alone, as a ledger is before it is trusted.

    Raises:
        ValueError: when the address says more or less than that, or could be taken for a file's name.
    """
    path, mode = uri.removesuffix("?mode=ro"), uri[-len("?mode=ro") :]
    if mode != "?mode=ro" or not path.startswith("file:///") or set("?#") & set(path) or os.path.lexists("file:"):
        raise ValueError("not an absolute path, read only")
    return unquote(path.removeprefix("file://"))


def _opens_to_write(arguments: Arguments) -> bool:
    _, mode, flags = arguments
    return bool(isinstance(flags, int) and flags & _WRITE_FLAGS) or bool(
        isinstance(mode, str) and set(mode) & set("wax+")
    )


def _resolved(path: str, dir_fd: int | None, follows: bool) -> str:
    """Return the path as the kernel would find it. Raises OSError when `dir_fd` cannot be looked up."""
    if dir_fd is not None and not os.path.isabs(path):  # noqa: PTH117 - bytes and strings of events, not our paths
        path = os.path.join(_folder_of(dir_fd), path)  # noqa: PTH118
    folder, name = os.path.split(path.rstrip(os.sep) or os.sep)
    if follows or name in ("", os.curdir, os.pardir):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(folder or os.curdir), name)  # noqa: PTH118


def _folder_of(descriptor: int) -> str:
    if sys.platform == "darwin":
        import fcntl

        raw: bytes = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
        return os.fsdecode(raw.rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _name_of(path: Any) -> str:
    try:
        return ascii(os.path.basename(os.fsdecode(path).rstrip(os.sep))[:80])  # noqa: PTH119
    except (TypeError, ValueError):
        return "a file"


@dataclass
class Seal:
    """What holds while a run is sealed off, and what it tried all the same."""

    places: Places
    namespace: bool
    denied: Counter[Kind] = field(default_factory=Counter)
    num_seen: int = 0

    def figures(self) -> dict[str, object]:
        """Return what the run may state, as JSON takes it; attempts are counted although they were denied."""
        return {
            "namespace": self.namespace,
            "connections": self.denied["connection"],
            "processes": self.denied["process"],
            "writes_elsewhere": self.denied["write"],
        }


@dataclass
class _State:
    """Of this process: the seal in force, whether the hook is in, and whether the network was left."""

    seal: Seal | None = None
    has_hook: bool = False
    has_left: bool = False


_STATE = _State()


def enter(config: TuneConfig) -> Seal:
    """This process is sealed off for good, as these settings say: for the command line, before torch is loaded."""
    reason = leave_network(_reached(config))
    _tell(reason)
    _settle(config)
    _bar_unheard()
    return _arm(Seal(places_of(config), reason is None))


@contextmanager
def sealed_off(config: TuneConfig) -> Iterator[Seal]:
    """The block runs sealed off; afterwards all is as before. Yields what `enter` made, if it was called.

    The process stays in the network that it is in: only `enter` leaves it.

    Raises:
        ConfigError: in one of several launched processes, which need each other.
    """
    from offsite.training.processes import is_launched

    if is_launched():
        raise ConfigError("--sealed-off: runs in one process, this one is of several")
    before = _STATE.seal
    if before is not None and before.places == places_of(config):
        yield before
        return
    if not _STATE.has_left:
        _tell("it is left by the command line only, before torch is loaded")
    undo, unbar = _settle(config), _bar_unheard()
    try:
        yield _arm(Seal(places_of(config), _STATE.has_left))
    finally:
        _STATE.seal = before
        unbar()
        undo()


def sealing(run: Callable[[TuneConfig], dict[str, object]]) -> Callable[[TuneConfig], dict[str, object]]:
    """Decorate a verb: with ``sealed_off`` it runs so, and its result says how that went."""

    @functools.wraps(run)
    def sealed_run(config: TuneConfig) -> dict[str, object]:
        if not config.sealed_off:
            return run(config)
        with sealed_off(config) as seal:
            result = run(_absolute(config))
            return {**result, "sealed_off": seal.figures()}

    return sealed_run


def figures() -> dict[str, object] | None:
    """Return the figures of the seal in force; none when the run is not sealed off."""
    return None if _STATE.seal is None else _STATE.seal.figures()


def require_quiet() -> None:
    """Return only if nothing was denied since the run was sealed off; always when it is not.

    Raises:
        PolicyError: with what was tried. The error of each attempt was raised at the time, and something swallowed it.
    """
    seal = _STATE.seal
    if seal is not None and seal.denied.total():
        tried = ", ".join(f"{kind} {seal.denied[kind]}" for kind in sorted(seal.denied) if seal.denied[kind])
        raise PolicyError(f"sealed off: the run tried what was denied ({tried}), no bundle is released", hint=_HINT)


_HINT = "find out which library asked for it; without --sealed-off it would have been done"


def _absolute(config: TuneConfig) -> TuneConfig:
    """Return the settings with whole paths: an event does not say which folder a relative one begins at."""
    changes: dict[str, Any] = {"output": Path(os.path.abspath(config.output))}  # noqa: PTH100 - links stay links
    if config.tensorboard is not None:
        changes["tensorboard"] = Path(os.path.abspath(config.tensorboard))  # noqa: PTH100
    if config.dp is not None:
        ledger = Path(os.path.abspath(config.dp.ledger.expanduser()))  # noqa: PTH100
        changes["dp"] = config.dp.model_copy(update={"ledger": ledger})
    return config.model_copy(update=changes)


def _arm(seal: Seal) -> Seal:
    _STATE.seal = seal
    if not _STATE.has_hook:
        sys.addaudithook(_make_hook(_STATE))
        _STATE.has_hook = True
    return seal


def _make_hook(state: _State) -> Callable[[str, Arguments], None]:
    judged, decide, error = _JUDGED, judge, PolicyError  # module globals are gone before the hook is

    def hook(event: str, arguments: Arguments) -> None:
        seal = state.seal
        if event not in judged or seal is None:
            return
        seal.num_seen += 1
        denial = decide(event, arguments, seal.places)
        if denial is not None:
            seal.denied[denial.kind] += 1
            raise error(f"sealed off: {denial.what} was denied", hint=_HINT)

    return hook


def _bar_unheard() -> Callable[[], None]:
    """What starts a process without an audit event is denied and counted while there is a seal.

    Returns what undoes it.
    """
    before = []
    for module_name, name in _UNHEARD:
        try:
            module = importlib.import_module(module_name)
            before.append((module, name, getattr(module, name)))
        except (ImportError, AttributeError):  # another platform or another Python
            continue
        setattr(module, name, _barred(before[-1][2]))

    def undo() -> None:
        for module, name, function in before:
            setattr(module, name, function)

    return undo


def _barred(function: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(function)
    def barred(*arguments: Any) -> int:
        seal = _STATE.seal
        if seal is None:
            return function(*arguments)
        seal.num_seen += 1
        seal.denied["process"] += 1
        raise PolicyError("sealed off: another process (_posixsubprocess.fork_exec) was denied", hint=_HINT)

    return barred


def _settle(config: TuneConfig) -> Callable[[], None]:
    """Libraries do not write beside the run out of habit: bytecode, a temporary folder, torch's cache of kernels.

    Nor do they start a process out of habit: where processes are spawned, the lock that progress bars share would start
    multiprocessing's tracker of resources. There is one process, so that the bars need no lock but among threads.

    Returns what undoes it.
    """
    if config.report_to:
        from offsite.training.trackers import load

        load(config.report_to)
    folder = Path(os.path.realpath(config.output.parent))
    while not folder.is_dir():
        folder = folder.parent
    cache = "TORCHINDUCTOR_CACHE_DIR"  # torch makes this folder when it is imported; this one is there
    before = sys.dont_write_bytecode, tempfile.tempdir, os.environ.get(cache)
    sys.dont_write_bytecode, tempfile.tempdir = True, str(folder)
    os.environ[cache] = str(folder)
    with suppress(ImportError):
        lock = importlib.import_module("tqdm.std").TqdmDefaultWriteLock
        if not hasattr(lock, "mp_lock"):
            lock.mp_lock = None

    def undo() -> None:
        sys.dont_write_bytecode, tempfile.tempdir = before[0], before[1]
        if before[2] is None:
            os.environ.pop(cache, None)
        else:
            os.environ[cache] = before[2]

    return undo


def _tell(reason: str | None) -> None:
    if reason is None:
        say("sealed off: no network interface in this process's namespace; an audit hook denies connections and writes")
    else:
        say(f"sealed off: no network namespace ({reason}); an audit hook alone denies connections and writes")


# The namespace


def leave_network(reached: Sequence[tuple[Path, int]] = ()) -> str | None:
    """This process is in a network namespace without an interface, or why it is not is returned.

    Files keep their owner: where a user namespace is needed for the right to do so, the user stays who he was. But root
    stays root over his own files only. So it is tried in a child first; half-way through there is no way back.

    Args:
        reached: paths, each with the access (as `os.access` takes it) that must be as it was.
    """
    if _STATE.has_left:
        return None
    if sys.platform != "linux":
        return "this platform has none"
    if "torch" in sys.modules or _num_threads() != 1:
        return "this process has threads, or torch, which stay outside"
    number = 0
    for flags in (_NEW_NET, _NEW_USER | _NEW_NET):
        number = _tried(flags, reached)
        if number == 0:
            _unshare(flags)
            _STATE.has_left = True
            return None
    return f"the system refuses: {os.strerror(number).lower()}"


def _num_threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208
    except OSError:
        return 0


def _reached(config: TuneConfig) -> list[tuple[Path, int]]:
    """Return what the run reads and where it writes, each with the access that takes."""
    inputs = [folder for folder in (config.package, config.job, config.reward) if folder is not None]
    inputs += [] if config.anchor is None else [config.anchor]
    read = [*config.data, *config.eval, *inputs, *(path for folder in inputs for path in folder.glob("*"))]
    written = [config.output.parent, config.output.parent / f"{config.output.name}.work", config.tensorboard]
    if config.dp is not None:
        ledger = config.dp.ledger.expanduser()
        written += [ledger, ledger / "key", ledger.parent]
    return [(path, os.R_OK) for path in read] + [(path, os.W_OK) for path in written if path is not None]


def _tried(flags: int, reached: Sequence[tuple[Path, int]]) -> int:
    """Return the error number of leaving the network in a child of this process; 0 when it can."""
    before = [os.access(*one) for one in reached]
    child = os.fork()
    if child == 0:
        number = errno.EPERM
        try:
            _unshare(flags)
            number = 0 if [os.access(*one) for one in reached] == before else errno.EACCES
        except OSError as error:
            number = error.errno or errno.EPERM
        finally:
            os._exit(number)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else (errno.EPERM if -code in (signal.SIGSYS, signal.SIGKILL) else errno.EINVAL)


def _unshare(flags: int) -> None:
    """The process is in new namespaces of these kinds. Raises OSError with the system's number."""
    user, group = os.geteuid(), os.getegid()
    if hasattr(os, "unshare"):
        os.unshare(flags)
    elif ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if flags & _NEW_USER:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
                file.write(line)
