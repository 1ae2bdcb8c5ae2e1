"""An ``offsite`` for stories of many commands: each is a process of its own, forked from one that has loaded torch.

Loading torch, transformers and peft takes longer than most commands of a story, which is not what a story is to prove.
Of ours nothing is loaded before: a command begins with `offsite.cli` as the console script does, in the folder, with
the environment and the streams of whoever typed it, gets the signals SIGINT and SIGTERM, and its status is handed on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HEAVY = ("torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "peft")
SCRIPT = """#!{python} -IS
import json, os, signal, socket, sys
end = socket.socket(socket.AF_UNIX)
end.connect({address!r})
SIGNALS = signal.SIGINT, signal.SIGTERM
ignored = [one for one in SIGNALS if signal.getsignal(one) is signal.SIG_IGN]  # as of a shell's command with &
told = json.dumps([sys.argv, os.getcwd(), dict(os.environ), ignored]).encode()
socket.send_fds(end, [len(told).to_bytes(8)], [0, 1, 2])
end.sendall(told)
stream = end.makefile("r")
number = int(stream.readline())
for one in SIGNALS:
    signal.signal(one, lambda which, _: os.kill(number, which))
status = int(stream.readline())
sys.exit(status if status >= 0 else 128 - status)  # what a shell calls the end by a signal
"""


@contextlib.contextmanager
def offsite_script() -> Iterator[Path]:
    """Yield a folder that holds such an ``offsite``, for the front of a path; its commands end with the context."""
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), str(Path(name) / "address")
        script = folder / "offsite"
        script.write_text(SCRIPT.format(python=sys.executable, address=address))
        script.chmod(0o755)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(
            [sys.executable, __file__, address], env=env, stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield folder
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.communicate()


def serve(address: str) -> None:
    """Fork for everyone who asks, until killed."""
    import importlib

    for name in HEAVY:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        print("ready", flush=True)
        while True:
            end, _ = door.accept()
            if os.fork() == 0:
                door.close()
                answer(end)
            end.close()


def answer(end: socket.socket) -> None:
    """Run the command that is asked for in a child, say its number, and say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(end, 8, 3)
    told = b""
    while len(told) < int.from_bytes(size):
        told += end.recv(1 << 16)
    words, folder, env, ignored = json.loads(told)
    number = os.fork()
    if number == 0:
        end.close()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        for one in ignored:
            signal.signal(one, signal.SIG_IGN)
        command(words, folder, env)
    for stream in streams:  # a pipe ends when the command does
        os.close(stream)
    end.sendall(f"{number}\n".encode())
    _, status = os.waitpid(number, 0)
    end.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def command(words: list[str], folder: str, env: dict[str, str]) -> None:
    """Be the console script, to the interpreter's end."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    from offsite.cli import main

    sys.exit(main())


if __name__ == "__main__":
    serve(sys.argv[1])
