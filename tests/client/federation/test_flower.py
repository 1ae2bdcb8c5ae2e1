"""The client's Flower app: what it says, what it refuses to read, and that no error's text leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

import client.federation.flower as module
from client.federation.flower import SETTINGS, arrays_of
from offsite.errors import DataError
from offsite.exchange.packing import pack
from server.federation.grids import in_process


@pytest.fixture
def ask(federated):
    """Send anna's node one message through Flower's own app, and return its answer's content."""

    def ask(kind, content=None, settings=None):
        path = federated.settings["anna"] if settings is None else settings
        grid = in_process({2: {} if path == "" else {SETTINGS: str(path)}}, "client.federation.flower:app")
        message = Message(content or RecordDict(), dst_node_id=2, message_type=kind, group_id="1")
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error()
        return reply.content

    yield ask
    module._member.cache_clear()


@pytest.fixture
def asked(federated):
    with federated.opened() as federation:
        return federation.ask(1)[federated.key("anna")]


def declined(content):
    assert list(content) == ["declined"]
    assert list(content["declined"]) == ["reason"]
    return content["declined"]["reason"]


def test_hello_says_whose_it_is_and_nothing_else(ask, federated):
    found = ask("query.hello")
    assert list(found) == ["hello"]
    assert dict(found["hello"]) == {"client": federated.key("anna"), "package": federated.package.digest}


def test_a_round_is_answered_with_a_bundle_that_counts(ask, federated, asked):
    found = ask("train", RecordDict({"sealed": arrays_of(pack(asked))}))
    assert list(found) == ["sealed"]
    with federated.opened() as federation:
        assert federation.take_in({name: array.data for name, array in found["sealed"].items()}).state == "verified"
    assert not list(federated.member("anna").config.work.glob(".arrived*"))


def numpy_arrays(parts):
    return ArrayRecord({name: Array(np.frombuffer(data, dtype=np.uint8)) for name, data in parts.items()})


MESSAGES = {
    "nothing": (lambda parts: RecordDict(), "BadSchema"),
    "settings": (lambda parts: RecordDict({"sealed": ConfigRecord({"package": "/etc"})}), "BadSchema"),
    "numpy's format": (lambda parts: RecordDict({"sealed": numpy_arrays(parts)}), "BadSchema"),
    "no files": (lambda parts: RecordDict({"sealed": ArrayRecord()}), "WrongNames"),
    "a path": (lambda parts: RecordDict({"sealed": arrays_of({**parts, "../evil.py": b"x"})}), "WrongNames"),
    "half": (lambda parts: RecordDict({"sealed": arrays_of({**parts, "manifest.json": b"{}"})}), "BadSignature"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_that_are_no_round(name, ask, federated, asked):
    change, reason = MESSAGES[name]
    assert declined(ask("train", change(pack(asked)))) == reason
    work = federated.member("anna").config.work
    assert [path.name for path in work.iterdir() if path.name != ".lock"] == []
    assert not list(federated.folder.rglob("evil.py"))


@pytest.mark.parametrize("error", [RuntimeError, OSError, DataError, MemoryError])
@pytest.mark.parametrize("kind", ["query.hello", "train"])
def test_no_error_s_text_leaves(error, kind, ask, asked, monkeypatch, capsys):
    secret = "patient 7 in /home/anna/ward.jsonl"

    def fail(*_args, **_kwargs):
        raise error(secret)

    monkeypatch.setattr(module, "member_of", fail)
    found = ask(kind, RecordDict({"sealed": arrays_of(pack(asked))}))
    assert declined(found) == ("DataError" if error is DataError else "RunFailed")
    told = capsys.readouterr().err
    assert (secret in told) == (error is DataError)  # its own terminal hears what our errors say, which is fit for it


def test_settings_that_are_missing(ask, tmp_path):
    assert declined(ask("query.hello", settings="")) == "ConfigError"
    assert declined(ask("query.hello", settings=tmp_path / "nowhere.json")) == "ConfigError"
    (tmp_path / "broken.json").write_text("{")
    assert declined(ask("train", settings=tmp_path / "broken.json")) == "ConfigError"


def test_a_message_chooses_no_settings(ask, federated, asked):
    """Whatever the run says, the node's own configuration names the file."""
    content = RecordDict(
        {"sealed": arrays_of(pack(asked)), "config": ConfigRecord({SETTINGS: "/etc/passwd", "steps": 9})}
    )
    assert list(ask("train", content)) == ["sealed"]


def test_keys_are_opened_once_until_the_settings_change(ask, federated, monkeypatch):
    opened = []
    monkeypatch.setattr(module, "Member", lambda config: opened.append(config) or federated.member("anna"))
    for _ in range(3):
        ask("query.hello")
    assert len(opened) == 1
    stated = {**json.loads(federated.settings["anna"].read_text()), "limit_steps": 5}
    federated.settings["anna"].write_text(json.dumps(stated))
    ask("query.hello")
    assert [config.limit_steps for config in opened][-1] == 5
    assert len(opened) == 2
