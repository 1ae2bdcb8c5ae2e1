"""The process around the application: key, socket, announcement, and a clean end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from pydantic import ValidationError

import server.serving.serve
from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.errors import ConfigError, RunFailed
from server.http.serve import listen
from server.serving.config import ServeConfig
from server.serving.serve import load_served, read_key, serve


def config(tmp_path, **fields):
    return ServeConfig(adapted=tmp_path / "adapted", **{"port": 0, **fields})


@pytest.mark.parametrize("fields", [{"port": -1}, {"port": 65536}, {"host": ""}, {"limit_bytes": 0}, {"key": "x"}])
def test_settings_are_bounded_and_hold_no_key(tmp_path, fields):
    with pytest.raises(ValidationError):
        config(tmp_path, **fields)


def test_a_key_comes_from_the_file_then_the_environment_then_chance(tmp_path, monkeypatch):
    monkeypatch.delenv("OFFSITE_API_KEY", raising=False)
    (first, is_fresh), (second, _) = read_key(None), read_key(None)
    assert is_fresh
    assert first != second
    assert len(first) >= 40
    monkeypatch.setenv("OFFSITE_API_KEY", " from-environment ")
    assert read_key(None) == ("from-environment", False)
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert read_key(file) == ("from-file", False)


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nlines", "schlüssel".encode(), b"a\x00b", None])
def test_an_unusable_key_is_refused_and_not_shown(tmp_path, monkeypatch, content):
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="key file 'key'") as caught:
        read_key(file)
    assert "two" not in str(caught.value)
    monkeypatch.setenv("OFFSITE_API_KEY", "")
    with pytest.raises(ConfigError, match="OFFSITE_API_KEY"):
        read_key(None)


def test_a_taken_port_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(server.serving.serve, "load_served", lambda _: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunFailed, match=f"port {port}: is in use") as caught:
            serve(config(tmp_path, port=port))
    assert "--port" in caught.value.hint


def test_an_unknown_host_is_a_setting_gone_wrong():
    with pytest.raises(ConfigError, match="not an address"):
        listen("no such host", 0)


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_an_impossible_device_is_told_before_the_model_is_loaded(tmp_path, monkeypatch, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device"):
        load_served(config(tmp_path, device=device))


class Ended:
    """Stands for a process that is told to stop as soon as it runs."""

    def __init__(self, app):
        self.should_exit = False

    def run(self, sockets):
        httpx_address.append(sockets[0].getsockname())


httpx_address: list = []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_what_is_announced(tmp_path, monkeypatch, capsys, spread_llama, bytes_tokenizer, host):
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    monkeypatch.delenv("OFFSITE_API_KEY", raising=False)
    monkeypatch.setattr(server.serving.serve, "load_served", lambda _: (spread_llama, bytes_tokenizer, "tiny"))
    monkeypatch.setattr(server.serving.serve, "_held", lambda _: (None, None))
    monkeypatch.setattr(server.serving.serve, "Process", Ended)
    before = signal.getsignal(signal.SIGTERM)
    done = serve(config(tmp_path, host=host))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert (host == "0.0.0.0") == ("warning" in shown.err)
    assert f"serving 'tiny' at {done['url']}/v1" in shown.err
    assert shown.err.count("key (shown once): ") == 1
    assert signal.getsignal(signal.SIGTERM) is before
    json.dumps(done, allow_nan=False)

    monkeypatch.setenv("OFFSITE_API_KEY", "a-secret-key")
    serve(config(tmp_path, host=host))
    assert "key" not in capsys.readouterr().err


def test_it_serves_until_told_to_end(tmp_path, monkeypatch, capsys, parrot, bytes_tokenizer):
    monkeypatch.setenv("OFFSITE_API_KEY", "k")
    monkeypatch.setattr(server.serving.serve, "load_served", lambda _: (parrot("the cough"), bytes_tokenizer, "tiny"))
    monkeypatch.setattr(server.serving.serve, "_held", lambda _: (None, None))
    made, real = [], server.serving.serve.Process
    monkeypatch.setattr(server.serving.serve, "Process", lambda app: made.append(real(app)) or made[0])
    lines, results = [], []
    monkeypatch.setattr(server.serving.serve, "say", lines.append)
    thread = threading.Thread(target=lambda: results.append(serve(config(tmp_path))))
    thread.start()
    while not lines and thread.is_alive():
        thread.join(0.02)
    address = lines[0].partition(" at ")[2].partition(";")[0]
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 50}
    reply = httpx.post(f"{address}/completions", json=body, headers={"Authorization": "Bearer k"})
    made[0].should_exit = True
    thread.join(20)
    assert reply.json()["choices"][0]["text"] == "the cough"
    counts = {name: results[0][name] for name in ("model", "num_requests", "num_completions", "num_prompt_tokens")}
    assert counts == {"model": "tiny", "num_requests": 1, "num_completions": 1, "num_prompt_tokens": 2}


PROGRAM = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import server.serving.serve
from server.serving.config import ServeConfig

def load(config):
    model = AutoModelForCausalLM.from_pretrained(config.adapted).eval()
    return model, AutoTokenizer.from_pretrained(config.adapted), "tiny"

server.serving.serve.load_served = load
server.serving.serve._held = lambda config: (None, None)
print(json.dumps(server.serving.serve.serve(ServeConfig(adapted=Path(sys.argv[1]), port=0))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_cleanly_in_the_middle_of_an_answer(tmp_path, spread_llama, bytes_tokenizer, ending):
    spread_llama.save_pretrained(tmp_path)
    bytes_tokenizer.save_pretrained(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(server.serving.serve.__file__).parents[2])}
    environment.pop("OFFSITE_API_KEY", None)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        told = {}
        for line in process.stderr:
            if line.startswith("serving"):
                told["url"] = line.partition(" at ")[2].partition(";")[0]
            elif line.startswith("key (shown once): "):
                told["key"] = line.rpartition(" ")[2].strip()
                break
        headers = {"Authorization": f"Bearer {told['key']}"}
        body = {"model": "tiny", "prompt": [""] * 64, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{told['url']}/completions", json=body, headers=headers, timeout=60) as reply:
            lines = reply.iter_lines()
            assert "choices" in next(lines)
            process.send_signal(ending)
            assert any("shutting down" in line for line in lines)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    done = json.loads(out.splitlines()[-1])
    assert (done["num_completions"], done["num_broken_off"]) == (1, 1)
    assert done["num_completion_tokens"] > 0


def test_a_head_answers_no_tasks_which_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    task = Path(__file__).parents[3] / "examples" / "tasks" / "intents" / "task.yaml"
    spec = AdapterSpec(kind="lora", head=Head(task="classify", labels=("a", "b"), hidden=32))
    monkeypatch.setattr(server.serving.serve, "open_adapted", lambda _: SimpleNamespace(adapter=spec))
    monkeypatch.setattr(server.serving.serve, "load_served", lambda _: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="--task: 'adapted' is for classify and writes no text") as caught:
        serve(config(tmp_path, task=(task,)))
    assert "/v1/classify" in caught.value.hint
