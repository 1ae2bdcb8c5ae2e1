"""The server killed while it answers, and tenant verbs killed at every call: what was counted and known stands."""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
from federation_lab import Processes
from served import calling
from shelf import Shelf

from offsite import cli
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.generation.generate import generate
from offsite.generation.sampling import Settings
from server.evaluation.candidates import read_own
from server.plugging.fit import fit, plugged
from server.registry.registry import Registry
from server.tenants.store import Tenants, Used

ROOT = Path(__file__).resolve().parents[2]
OWN_KEY = "the-servers-own-key"
NUM_KILLS = 2
NUM_PROMPTS = 12
NUM_CLIENTS = 4
"""Of each tenant."""


@dataclass
class Told:
    """What one tenant's clients asked and heard, over all lives of the server."""

    num_asked: int = 0
    num_heard: int = 0
    num_tokens: int = 0
    num_open: int = 0
    "Tokens that answers which were never heard may have cost at most."
    wrong: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path, wait_seconds=300.0)
    yield made
    made.close()


@pytest.fixture
def shelf(tmp_path, dropped_package, make_bundle):
    made = Shelf(tmp_path, dropped_package, make_bundle)
    made.put("b", "anna", kind="lora", rank=2, placement="1+1")
    made.put("c", "bert", kind="lora", rank=5, placement="1+1")
    made.registry.close()
    return made


@pytest.fixture
def expected(shelf, full_llama, letters_tokenizer, dropped_package):
    """What each client's adapter answers alone, by name, prompt and length."""
    model = copy.deepcopy(full_llama)
    record = read_owner_record(owner_record_path(dropped_package.path))
    adapters = {
        name: fit(model, read_own(bundle, record), record)
        for name, bundle in zip(("anna", "bert"), shelf.bundles.values(), strict=True)
    }
    known = {}

    def answer(name, number):
        if (name, number) not in known:
            settings = Settings(limit_tokens=length(number), temperature=0.0)
            with plugged(model, adapters[name]) as one:
                pieces = generate(one, letters_tokenizer, prompt(number), settings, end_ids=frozenset({2}))
                known[name, number] = "".join(piece.text for piece in pieces)
        return known[name, number]

    return answer


def prompt(number):
    drawn = random.Random(number)
    return [drawn.randrange(3, 250) for _ in range(1 + number * 7 % 30)]


def length(number):
    return 8 + number * 5 % 24


def start(processes, shelf, llama_folder, tmp_path):
    """Serve the registry; return where, once it answers."""
    key = tmp_path / "own.key"
    key.write_text(OWN_KEY)
    before = processes.log("server").count("Ctrl-C ends it")
    processes.start(
        "server", "serve", llama_folder, "--registry", tmp_path / "registry", "--keys", shelf.keys, "--key-file", key,
        "--tenants", tmp_path / "tenants.db", "--port", 0, "--limit-rows", 6, "--limit-waiting", 4, "--device", "cpu",
    )  # fmt: skip
    processes.until(lambda: processes.log("server").count("Ctrl-C ends it") > before, "server")
    return re.findall(r"at (http://\S+)/v1;", processes.log("server"))[-1]


def ask_until_it_is_gone(address, key, name, told, expected, seed):
    """Ask one thing after another, every other one as a stream, until the server answers no more."""
    drawn = random.Random(seed)
    with calling(address, key) as client:
        while True:
            number = drawn.randrange(NUM_PROMPTS)
            ask = {"model": name, "prompt": prompt(number), "max_tokens": length(number), "temperature": 0}
            most = len(prompt(number)) + length(number)
            with told.lock:
                told.num_asked += 1
                told.num_open += most
            try:
                text, num_tokens = one_answer(client, ask, streamed=number % 2 == 0)
            except openai.RateLimitError:
                with told.lock:
                    told.num_asked -= 1
                    told.num_open -= most
                continue
            except (openai.APIConnectionError, httpx.HTTPError):
                return
            with told.lock:
                told.num_heard += 1
                told.num_open -= most
                told.num_tokens += num_tokens
                if text != expected(name, number):
                    told.wrong.append((text, expected(name, number)))


def one_answer(client, ask, *, streamed):
    if not streamed:
        whole = client.completions.create(**ask)
        return whole.choices[0].text, whole.usage.total_tokens
    text, usage = "", None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    if usage is None:
        raise httpx.RemoteProtocolError("the stream ended before its last event")
    return text, usage.total_tokens


def require_counted(path, told):
    """What was heard is counted, and nothing that was not asked; return what is counted."""
    with Tenants.open(path) as tenants:
        found = {name: tenants.used(name) for name in told}
    for name, one in told.items():
        assert one.wrong == []
        assert one.num_heard <= found[name].num_requests <= one.num_asked
        assert one.num_tokens <= found[name].num_tokens <= one.num_tokens + one.num_open
    return found


@pytest.mark.slow
def test_a_server_that_is_killed_loses_at_most_what_was_under_way(processes, shelf, expected, llama_folder, tmp_path):
    file = tmp_path / "tenants.db"
    with Tenants.open(file, create=True) as tenants:
        keys = {name: tenants.add(name, models=(name,)) for name in ("anna", "bert")}
        frugal = tenants.add("cora", models=("anna",), tokens_per_day=40)
    for name in keys:
        for number in range(NUM_PROMPTS):
            expected(name, number)
    told: dict[str, Told] = defaultdict(Told)
    for life in range(NUM_KILLS):
        address = start(processes, shelf, llama_folder, tmp_path)
        if life == 0:
            with calling(address, frugal) as client:
                ask = {"model": "anna", "prompt": [9] * 4, "max_tokens": 20, "logit_bias": {"2": -100}}
                assert client.completions.create(**ask).usage.total_tokens == 24
        goal = {name: told[name].num_heard + 5 + 4 * life for name in keys}
        threads = [
            threading.Thread(
                target=ask_until_it_is_gone,
                args=(address, keys[name], name, told[name], expected, f"{life} {name} {number}"),
            )
            for name in keys
            for number in range(NUM_CLIENTS)
        ]
        for thread in threads:
            thread.start()
        processes.until(lambda goal=goal: all(told[name].num_heard >= goal[name] for name in goal), "server")
        processes.kill("server")
        for thread in threads:
            thread.join(180)
        assert not any(thread.is_alive() for thread in threads)
        counted = require_counted(file, told)
    assert all(one.num_asked > one.num_heard for one in told.values())  # each kill had something under way

    address = start(processes, shelf, llama_folder, tmp_path)
    with Tenants.open(file) as tenants:
        assert {name: tenants.used(name) for name in keys} == counted
        assert tenants.used("cora") == Used(1, 4, 20)
    for name, key in keys.items():
        with calling(address, key) as client:
            assert [model.id for model in client.models.list()] == [name]
            ask = {"model": name, "prompt": prompt(3), "max_tokens": length(3), "temperature": 0}
            assert one_answer(client, ask, streamed=False)[0] == expected(name, 3)
    with calling(address, frugal) as client:
        ask = {"model": "anna", "prompt": [9] * 4, "logit_bias": {"2": -100}}
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**ask, max_tokens=13)
        assert caught.value.code == "tokens_per_day"
        assert client.completions.create(**ask, max_tokens=12).usage.total_tokens == 16
    with calling(address, "offsite-nobody") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    processes.running["server"].send_signal(signal.SIGTERM)
    assert processes.end("server")["num_completions"] == 4
    with Registry.open(tmp_path / "registry", shelf.keys) as registry:
        registry.verify_log()
        assert {entry.id: entry.state for entry in registry.entries()} == dict.fromkeys(shelf.bundles, "accepted")
    everything = processes.log("server")
    assert not any(key in everything for key in (*keys.values(), frugal))


EVERY_CALL = """
import os, signal, sys
from pathlib import Path
from server.tenants.config import TenantAddConfig
from server.tenants.verbs import add_run

def child(folder, stop):
    (folder / "out").mkdir(parents=True)
    if stop % 2:  # beside one that is there already; otherwise the file is made
        add_run(TenantAddConfig(tenant="first", tenants=folder / "t.db", output=folder / "first.key"))
    config = TenantAddConfig(tenant="anna", tenants=folder / "t.db", output=folder / "out" / "key", tokens_per_day=7)
    count = 0
    def look(frame, event, argument):
        nonlocal count
        if event == "c_call":
            count += 1
            if count > stop:
                os.kill(os.getpid(), signal.SIGKILL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.setprofile(look)
    add_run(config)
    sys.setprofile(None)
    os._exit(0)

stop = 0
while True:
    number = os.fork()
    if number == 0:
        child(Path(sys.argv[1]) / str(stop), stop)
    if os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0 and stop % 2:
        break
    stop += 1
print(stop)
"""


@pytest.mark.slow
def test_adding_a_tenant_killed_at_every_call_leaves_a_file_that_opens(tmp_path, monkeypatch, capsys):
    program = [sys.executable, "-c", EVERY_CALL, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
    known = 0
    for folder in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        file, key = folder / "t.db", folder / "out" / "key"
        if file.exists():
            assert file.stat().st_mode & 0o777 == 0o600
        with Tenants.open(file, create=True) as tenants:
            names = [tenant.name for tenant in tenants.all()]
            if int(folder.name) % 2:
                assert tenants.find((folder / "first.key").read_text().strip()).name == "first"
                names.remove("first")
            assert names in ([], ["anna"])
            if key.exists():  # whoever has a key can use it
                assert key.stat().st_mode & 0o777 == 0o600
                assert tenants.find(key.read_text().strip()).tokens_per_day == 7
            known += names == ["anna"]
        if int(folder.name) % 10 > 1:
            continue
        again = ["--tenants", str(file), "-o", str(folder / "again")]
        if names:
            assert cli.run(["tenant", "add", "anna", *again]) == 2  # told, and what to do
            assert "offsite tenant revoke first" in capsys.readouterr().err
            assert cli.run(["tenant", "revoke", "anna", "--tenants", str(file)]) == 0
        assert cli.run(["tenant", "add", "anna", *again]) == 0
        with Tenants.open(file) as tenants:
            assert tenants.find((folder / "again").read_text().strip()).name == "anna"
            assert not key.exists() or tenants.find(key.read_text().strip()) is None
    assert 1 < known < int(done.stdout)


ADD_FOREVER = """
import sys
from pathlib import Path
from server.tenants.store import Tenants

with Tenants.open(Path(sys.argv[1]), create=True) as tenants:
    begun = len(tenants.all())
    for number in range(begun, 10**9):
        key = tenants.add(f"t{number}")
        tenants.charge(f"t{number}", num_prompt_tokens=number, num_answer_tokens=1)
        print(number, key, flush=True)
"""


@pytest.mark.slow
def test_a_file_of_tenants_that_is_written_when_it_is_killed_keeps_what_was_said_to_be_there(tmp_path):
    file, drawn, keys = tmp_path / "t.db", random.Random(0), {}
    for life in range(1, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", ADD_FOREVER, str(file)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        first = process.stdout.readline()
        time.sleep(drawn.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        for line in (first + said).splitlines(keepends=True):
            if line.endswith("\n"):
                number, key = line.split()
                keys[int(number)] = key
        with Tenants.open(file) as tenants:
            for number, key in keys.items():
                assert tenants.find(key).name == f"t{number}"
                assert tenants.used(f"t{number}") == Used(1, number, 1)
            assert len(tenants.all()) <= len(keys) + life  # one of each life that was not said any more
        connection = sqlite3.connect(file)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()
    assert len(keys) > 50
