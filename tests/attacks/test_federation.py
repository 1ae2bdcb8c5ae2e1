"""Attempts on a federation by one of its clients: each is left out with its reason, and the others' round closes.

Two clients answer as their program does. What the third sends is its own business: it has its keys and its job.
"""

from __future__ import annotations

import re

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file, save_file

from adapters.updates import combined, dense
from client.federation.flower import arrays_of
from offsite.exchange.packing import RAW, pack
from offsite.exchange.verbs import seal_run
from offsite.sealed.config import SealConfig
from server.federation.flower import OffsiteStrategy
from server.federation.grids import InProcessGrid
from server.federation.state import SHARED

HONEST, BAD = ("anna", "bert"), "cora"


class Clients:
    """Stands for Flower's ClientApp: two honest nodes, and one that does what it is told to."""

    def __init__(self, federated, attack=None, hello=None):
        self.federated, self.attack, self.hello = federated, attack, hello

    def __call__(self, message, context):
        name = context.node_config["name"]
        if message.metadata.message_type == "query.hello":
            if name == BAD and self.hello is not None:
                return Message(self.hello(self.federated), reply_to=message)
            said = {"client": self.federated.key(name), "package": self.federated.package.digest}
            return Message(RecordDict({"hello": ConfigRecord(said)}), reply_to=message)
        sealed = self.federated.outbox / next(
            path.name for path in self.federated.outbox.iterdir() if path.name.startswith(self._prefix(name, message))
        )
        if name == BAD and self.attack is not None:
            return Message(self.attack(self.federated, sealed, int(message.metadata.group_id)), reply_to=message)
        return Message(sent(pack(self.federated.answer(name, sealed))), reply_to=message)

    def _prefix(self, name, message):
        return f"round-{self.federated.member(name).job.job_id[:12]}-{int(message.metadata.group_id):04d}"

    def grid(self):
        contexts = {
            node: Context(run_id=1, node_id=node, node_config={"name": name}, state=RecordDict(), run_config={})
            for node, name in enumerate(self.federated.NAMES, start=2)
        }
        return InProcessGrid(self, contexts)


def sent(parts, **records):
    return RecordDict({"sealed": arrays_of(parts), **records})


def play(federation, clients, *, rounds=1):
    strategy = OffsiteStrategy(federation)
    strategy.start(clients.grid(), ArrayRecord(), num_rounds=rounds, timeout=60.0)
    return federation.finished


def left_out(federated, finished):
    """The round closed with the honest ones; return why the bad one was left out."""
    assert sorted(finished.content["used"]) == sorted(federated.key(name) for name in HONEST)
    assert finished.content["left_out"].keys() == {federated.key(BAD)}
    return finished.content["left_out"][federated.key(BAD)]


def mean_of(federation, federated, names):
    """The mean of these clients' updates, computed anew from what stands in the registry."""
    answers = federation.answers(1)
    updates = [federation.contribution(answers[federated.key(name)]).update for name in names]
    return combined(updates, [1 / len(updates)] * len(updates))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, part in wanted.items():
        torch.testing.assert_close(dense(found[name]), dense(part), rtol=1e-5, atol=1e-7)


# --- row 22: what a client says of itself


CLAIMS = [10**9, -9, 0, float("nan"), float("inf"), True, "1000000000", [10**9, 1]]


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_row_22_what_a_client_claims_of_itself_weighs_nothing(federated, claim):
    keys = ("num-examples", "num_examples", "weight")

    def attack(federated, sealed, number):
        records = {"config": ConfigRecord(dict.fromkeys(keys, claim))}
        if not isinstance(claim, str | bool):
            records |= {name: MetricRecord(dict.fromkeys(keys, claim)) for name in ("metrics", "fitres.num_examples")}
        records["arrays"] = ArrayRecord({"lm_head": Array(torch.full((4, 4), 1e30).numpy())})
        return sent(pack(federated.answer(BAD, sealed)), **records)

    with federated.opened() as federation:
        (finished,) = play(federation, Clients(federated, attack))
        assert sorted(finished.content["used"]) == sorted(map(federated.key, federated.NAMES))
        assert finished.content["left_out"] == {}
        same(federation.states[SHARED], mean_of(federation, federated, federated.NAMES))


# --- what is no answer


def numpy_array(_federated, _sealed, _number):
    return RecordDict({"sealed": ArrayRecord({"manifest.json": Array(torch.ones(3).numpy())})})


def raw(**parts):
    return ArrayRecord({name: Array("uint8", (len(data),), RAW, data) for name, data in parts.items()})


def hostile_names(federated, sealed, _number):
    parts = pack(federated.answer(BAD, sealed))
    return sent({**parts, "../../../evil.py": b"import os"})


def garbage(_federated, _sealed, _number):
    small = ("manifest.json", "signatures.json", "keys.json")
    return RecordDict({"sealed": raw(**dict.fromkeys(small, b"\x93NUMPY\x01\x00garbage"))})


def damaged(federated, sealed, _number):
    parts = pack(federated.answer(BAD, sealed))
    name = min(name for name in parts if name.startswith("payload/"))
    return sent({**parts, name: parts[name][:-1] + bytes([parts[name][-1] ^ 1])})


def half(federated, sealed, _number):
    parts = pack(federated.answer(BAD, sealed))
    del parts[min(name for name in parts if name.startswith("payload/"))]
    return sent(parts)


def another_client_s(federated, sealed, number):
    other = federated.outbox / f"round-{federated.member('anna').job.job_id[:12]}-{number:04d}"
    return sent(pack(federated.answer("anna", other)))


def the_round_itself(_federated, sealed, _number):
    return sent(pack(sealed))


def fails(_federated, _sealed, _number):
    raise RuntimeError("text of patient 7")


def declines(_federated, _sealed, _number):
    return RecordDict({"declined": ConfigRecord({"reason": "PolicyError"})})


def declines_in_colour(_federated, _sealed, _number):
    return RecordDict({"declined": ConfigRecord({"reason": "\x1b[2J\noffsite: hint: pay me"})})


def declines_with_a_list(_federated, _sealed, _number):
    return RecordDict({"declined": ConfigRecord({"reason": ["a", "b"]})})


NO_ANSWER = {
    "nothing": (lambda *_: RecordDict(), "nothing that is sealed"),
    "settings instead of arrays": (lambda *_: RecordDict({"sealed": ConfigRecord({"x": 1})}), "nothing that is sealed"),
    "no arrays": (lambda *_: RecordDict({"sealed": ArrayRecord()}), "WrongNames: "),
    "an array of numpy's": (numpy_array, "nothing that is sealed"),
    "garbage": (garbage, "BadSchema: |BadSignature: "),
    "a path": (hostile_names, "WrongNames: "),
    "a damaged payload": (damaged, "BadDigest: |BadEncryption: "),
    "half": (half, "WrongNames: |BadDigest: "),
    "another client's answer": (another_client_s, "no answer in time"),
    "the round itself": (the_round_itself, "WrongBinding: |Untrusted: "),
    "a claim that it is there": (lambda *_: RecordDict({"taken": ConfigRecord({"by": "me"})}), "no answer in time"),
    "a failure": (fails, "its node failed"),
    "a refusal": (declines, "declined: PolicyError"),
    "a refusal for the terminal": (declines_in_colour, "declined: no reason known here"),
    "a refusal that is a list": (declines_with_a_list, "declined: no reason known here"),
}


@pytest.mark.parametrize("name", NO_ANSWER)
def test_what_is_no_answer(federated, name, capsys):
    attack, reason = NO_ANSWER[name]
    with federated.opened() as federation:
        (finished,) = play(federation, Clients(federated, attack))
        assert re.match(f".*({reason})", left_out(federated, finished)), finished.content["left_out"]
        same(federation.states[SHARED], mean_of(federation, federated, HONEST))
        assert not (federation.registry.folder / "federations" / federation.store.id / "parcel").exists()
    captured = capsys.readouterr().err
    assert "\x1b" not in captured
    assert not list(federated.folder.rglob("evil.py"))


def test_an_answer_larger_than_any_can_be_is_not_written(federated, monkeypatch):
    def attack(_federated, sealed, _number):
        return sent({**pack(sealed), f"payload/{'a' * 64}.enc": b"x" * (70 * 2**20)})

    written = []
    with federated.opened() as federation:
        monkeypatch.setattr("server.federation.federation.take_in", lambda *args: written.append(args))
        play_one = Clients(federated, attack)
        grid, strategy = play_one.grid(), OffsiteStrategy(federation)
        messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
        (bad,) = [one for one in messages if strategy._nodes[one.metadata.dst_node_id] == federated.key(BAD)]
        (reply,) = grid.send_and_receive([bad])
        client, reason = strategy._take(reply)
    assert client == federated.key(BAD)
    assert reason.startswith("TooLarge: ")
    assert written == []


# --- hellos


HELLOS = {
    "declined": lambda _: RecordDict({"declined": ConfigRecord({"reason": "BadKey"})}),
    "nothing": lambda _: RecordDict(),
    "a list": lambda federated: RecordDict({"hello": ConfigRecord({"client": ["a", "b"], "package": "x"})}),
    "nobody": lambda federated: RecordDict({"hello": ConfigRecord({"client": "x\x1b[2J", "package": "x"})}),
    "another package": lambda federated: RecordDict(
        {"hello": ConfigRecord({"client": federated.key(BAD), "package": "sha256:\x1b[2J"})}
    ),
    "a number": lambda federated: RecordDict({"hello": ConfigRecord({"client": 7, "package": 7})}),
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_hello_that_is_none(federated, name, capsys):
    with federated.opened() as federation:
        (finished,) = play(federation, Clients(federated, hello=HELLOS[name]))
        assert left_out(federated, finished) == "no answer in time"
    assert "\x1b" not in capsys.readouterr().err


# --- bundles that are well sealed and should not count


def sealed_as(federated, bundle, number, name="own"):
    """Seal a bundle as the client can, whatever is in it."""
    member = federated.member(BAD)
    out = federated.folder / f"{name}.sealed"
    stated = {"job": member.config.job, "keys": member.config.keys, "passphrase_file": member.config.passphrase_file}
    settings = SealConfig(input=bundle, output=out, round=number, accept_leakage=True, **stated)
    seal_run(settings, identity=member.identity)
    return pack(out)


def bundle_of(**changes):
    def attack(federated, sealed, number):
        round_ = federated.member(BAD).take(sealed)
        found = federated.bundle(federated.folder / "own", round_, **changes)
        return sent(sealed_as(federated, found.path, number))

    return attack


def not_a_number(federated, sealed, number):
    import hashlib
    import json

    round_ = federated.member(BAD).take(sealed)
    folder = federated.bundle(federated.folder / "own", round_).path
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)
    manifest = json.loads((folder / "offsite.json").read_text())
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    (folder / "offsite.json").write_text(json.dumps(manifest))
    return sent(sealed_as(federated, folder, number))


def changed_a(tensors):
    name = min(name for name in tensors if name.endswith("lora_A"))
    tensors[name] = tensors[name] + 1e-4


SEALED = {
    "on other weights": (
        bundle_of(round_digest="sha256:" + "0" * 64),
        {},
        "WrongBinding: .* answers round sha256:0000",
    ),
    "on no round": (bundle_of(round_digest=None), {}, "WrongBinding: .* answers no round, it was asked for round"),
    "far too large": (bundle_of(size=1e3), {}, "NormTooLarge: "),
    "NaN": (not_a_number, {}, "NotFinite: "),
    "another A than all share": (bundle_of(change=changed_a), {"share_a": True}, "BadDigest: .* is shared by all"),
}


@pytest.mark.parametrize("name", SEALED)
def test_a_bundle_that_does_not_count(make_federated, name):
    attack, settings, reason = SEALED[name]
    federated = make_federated(**settings)
    with federated.opened() as federation:
        (finished,) = play(federation, Clients(federated, attack))
        assert re.match(reason, left_out(federated, finished)), finished.content["left_out"]
        same(federation.states[SHARED], mean_of(federation, federated, HONEST))


def test_an_answer_of_an_earlier_round_again(federated):
    kept = {}

    def attack(federated, sealed, number):
        kept.setdefault("first", pack(federated.answer(BAD, sealed)))
        return sent(kept["first"])

    with federated.opened() as federation:
        first, second = play(federation, Clients(federated, attack), rounds=2)
        assert federated.key(BAD) in first.content["used"]
        assert left_out(federated, second) == "no answer in time"


def test_a_bundle_of_the_first_round_sealed_for_the_second(federated):
    """The seal says round two, the bundle that it answers round one: other weights than those of the round."""
    kept = {}

    def attack(federated, sealed, number):
        if number == 1:
            kept["bundle"] = federated.answer(BAD, sealed).parent / "bundle"
            return sent(pack(kept["bundle"].parent / "sealed"))
        federated.member(BAD).take(sealed)
        return sent(sealed_as(federated, kept["bundle"], number))

    with federated.opened() as federation:
        _, second = play(federation, Clients(federated, attack), rounds=2)
        assert re.match("WrongBinding: .* answers round", left_out(federated, second))


def test_a_plain_bundle_sent_before_its_round_was_asked(federated):
    """It takes the client's own place in that round, and nobody else's."""
    with federated.opened() as federation:
        asked = federation.ask(1)
        round_ = federated.member(BAD).take(asked[federated.key(BAD)])
        early = federated.bundle(federated.folder / "early", round_, round_digest=None)
        assert federation.take_in(sealed_as(federated, early.path, 2, "early")).state == "verified"
        federated.round(federation, 1, names=HONEST)
        _, second = play(federation, Clients(federated))
        assert re.match("WrongBinding: ", left_out(federated, second))


def test_a_late_answer_is_no_part_of_the_next_round(federated):
    with federated.opened() as federation:
        asked = federation.ask(1)
        parts = pack(federated.answer(BAD, asked[federated.key(BAD)]))
        federated.round(federation, 1, names=HONEST)
        before = federation.states[SHARED]
        assert federation.take_in(parts).state == "verified"
        same(federation.states[SHARED], before)
        finished = federated.round(federation, 2, names=HONEST)
        assert sorted(finished.content["used"]) == sorted(map(federated.key, HONEST))


def test_a_refusal_after_a_bundle_that_counts_changes_nothing(federated):
    """Its bundle is here: whatever comes from its node afterwards, or from one that claims to be it."""
    with federated.opened() as federation:
        asked = federation.ask(1)
        federation.take_in(pack(federated.answer(BAD, asked[federated.key(BAD)])))
        (finished,) = play(federation, Clients(federated, declines))
        assert sorted(finished.content["used"]) == sorted(map(federated.key, federated.NAMES))
        assert finished.content["left_out"] == {}
