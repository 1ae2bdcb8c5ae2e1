from __future__ import annotations

import io
import json
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from offsite import cli
from offsite.errors import BadKey, BadSignature, ConfigError, Replayed, RunFailed, Untrusted, WrongBinding
from offsite.keys import trust
from offsite.keys.config import TrustRevokeConfig
from offsite.keys.identity import generate
from offsite.keys.trust import MAX_SKEW_SECONDS, TrustStore, revoke

NOW = int(time.time())


@pytest.fixture(scope="module")
def parties():
    """Three cards made at `NOW`: between collection and the first test more time may pass than clocks may differ."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("offsite.keys.identity.time.time", lambda: NOW)
        return [generate(name, days=30).public for name in ("Clinic", "Bank", "Model Co")]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "keys"
    path.mkdir(0o700)
    return path


@pytest.fixture
def store(folder):
    return TrustStore(folder)


def test_a_pinned_party_is_trusted_and_nobody_else(store, folder, parties):
    clinic, bank, _ = parties
    assert store.peers() == []
    assert store.add(clinic.card, clinic.fingerprint, now=NOW) == clinic
    assert store.require(clinic.fingerprint, now=NOW) == clinic
    assert (folder / "trust.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(Untrusted, match=f"^{bank.fingerprint} is not pinned here$"):
        store.require(bank.fingerprint, now=NOW)
    with pytest.raises(Untrusted, match=r"^that key is not pinned here$"):
        store.require("\x1b[31m", now=NOW)


def test_the_fingerprint_may_be_typed_in_capitals(store, parties):
    store.add(parties[0].card, f" {parties[0].fingerprint.upper()}\n", now=NOW)
    assert store.revoke(parties[0].fingerprint.upper(), now=NOW).keys == parties[0]


@pytest.mark.parametrize("given", ["", "yes", "a" * 64])
def test_a_card_of_another_fingerprint_is_refused(store, parties, given):
    for fingerprint in (given, parties[1].fingerprint):
        with pytest.raises(Untrusted, match=r"fingerprint is .*, not the one given") as caught:
            store.add(parties[0].card, fingerprint, now=NOW)
        assert "separate channels" in caught.value.hint
    assert store.peers() == []


def test_peers_are_listed_by_name_with_their_states(store, parties):
    for party in parties:
        store.add(party.card, party.fingerprint, now=NOW)
    store.revoke(parties[1].fingerprint, now=NOW + 5)
    found = store.peers()
    assert [peer.keys.name for peer in found] == ["Bank", "Clinic", "Model Co"]
    assert [peer.state(now=NOW) for peer in found] == ["revoked", "trusted", "trusted"]
    assert (found[0].added, found[0].revoked) == (NOW, NOW + 5)
    assert [peer.state(now=parties[0].expires) for peer in found] == ["revoked", "expired", "expired"]


def test_a_revoked_party_stays_revoked_since_the_first_time(store, parties):
    clinic = parties[0]
    store.add(clinic.card, clinic.fingerprint, now=NOW)
    assert store.revoke(clinic.fingerprint, now=NOW + 1).revoked == NOW + 1
    assert store.revoke(clinic.fingerprint, now=NOW + 9).revoked == NOW + 1
    with pytest.raises(Untrusted, match="was revoked here"):
        store.add(clinic.card, clinic.fingerprint, now=NOW + 2)
    with pytest.raises(Untrusted, match=f"^the key {clinic.fingerprint} is revoked$"):
        store.require(clinic.fingerprint, now=NOW)
    with pytest.raises(Untrusted, match="no peer of that fingerprint"):
        store.revoke(parties[1].fingerprint)


@pytest.mark.parametrize(
    ("offset", "state"),
    [("expires", "expired"), ("late", "expired"), ("early", "not yet valid"), ("last", None), ("skewed", None)],
)
def test_a_card_counts_between_its_dates(store, parties, offset, state):
    clinic = parties[0]
    store.add(clinic.card, clinic.fingerprint, now=clinic.created)
    now = {
        "expires": clinic.expires,
        "late": clinic.expires + 10**6,
        "early": clinic.created - MAX_SKEW_SECONDS - 1,
        "last": clinic.expires - 1,
        "skewed": clinic.created - MAX_SKEW_SECONDS,
    }[offset]
    if state is None:
        assert store.require(clinic.fingerprint, now=now) == clinic
        return
    with pytest.raises(Untrusted, match=f"is {state}$"):
        store.require(clinic.fingerprint, now=now)
    with pytest.raises(Untrusted, match=f"is {state}$"):
        store.add(clinic.card, clinic.fingerprint, now=now)


def renewed(identity, later):
    """The card of the same keys with both dates `later` seconds later."""
    import base64

    card = json.loads(identity.public.card)
    body = json.loads(base64.b64decode(card["body"]))
    raw = json.dumps({**body, "created": body["created"] + later, "expires": body["expires"] + later}).encode()
    signatures = identity.sign("card", raw).to_json()
    return json.dumps({**card, "body": base64.b64encode(raw).decode(), "signatures": signatures}).encode()


def test_a_later_card_of_the_same_keys_takes_the_former_ones_place(store):
    clinic = generate("Clinic", days=30)
    now = clinic.public.created
    store.add(clinic.public.card, clinic.public.fingerprint, now=now)
    card = renewed(clinic, 100)
    for _ in range(2):
        store.add(card, clinic.public.fingerprint, now=now + 100)
    (peer,) = store.peers()
    assert (peer.keys.expires, peer.added) == (clinic.public.expires + 100, now)
    with pytest.raises(Replayed, match=r"a later card of .* is pinned here"):
        store.add(clinic.public.card, clinic.public.fingerprint, now=now + 100)
    assert store.peers() == [peer]


def test_a_revocation_counts_at_once_for_stores_that_are_open(store, folder, parties):
    store.add(parties[0].card, parties[0].fingerprint, now=NOW)
    TrustStore(folder).revoke(parties[0].fingerprint)
    with pytest.raises(Untrusted):
        store.require(parties[0].fingerprint, now=NOW)


EDITS = {
    "not JSON": lambda text: text[:-3],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "unknown field": lambda text: text.replace('"added"', '"addet"'),
    "repeated field": lambda text: text.replace('"added"', '"revoked": null, "added"'),
    "revoked as text": lambda text: text.replace('"revoked": null', '"revoked": "no"'),
    "negative time": lambda text: text.replace('"revoked": null', '"revoked": -1'),
    "card changed": lambda text: text.replace('"card": "ew', '"card": "ex'),
    "card gone": lambda text: text.replace('"card": "', '"card": "?'),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_trust_file_edited_by_hand_is_refused_in_one_line(store, folder, parties, edit):
    store.add(parties[0].card, parties[0].fingerprint, now=NOW)
    path = folder / "trust.json"
    before, after = path.read_text(), EDITS[edit](path.read_text())
    assert before != after
    path.write_text(after)
    for ask in (store.peers, lambda: store.require(parties[0].fingerprint, now=NOW)):
        with pytest.raises(BadKey, match=r"^trust file 'trust.json'[^\n]*$") as caught:
            ask()
        assert caught.value.hint.startswith("put a copy of it back")


def test_a_trust_file_of_another_version_is_refused(store, folder):
    (folder / "trust.json").write_text('{"format": "offsite/trust/2", "peers": {}}')
    (folder / "trust.json").chmod(0o600)
    with pytest.raises(WrongBinding, match="format is offsite/trust/2, expected offsite/trust/1"):
        store.peers()


def test_a_card_under_another_ones_fingerprint_is_refused(store, folder, parties):
    store.add(parties[0].card, parties[0].fingerprint, now=NOW)
    path = folder / "trust.json"
    path.write_text(path.read_text().replace(parties[0].fingerprint, parties[1].fingerprint))
    with pytest.raises(BadKey, match="not the card of its fingerprint"):
        store.require(parties[1].fingerprint, now=NOW)


def test_a_store_open_to_others_is_refused(store, folder, parties):
    store.add(parties[0].card, parties[0].fingerprint, now=NOW)
    (folder / "trust.json").chmod(0o620)
    with pytest.raises(BadKey, match=r"trust file 'trust.json' is open to others"):
        store.require(parties[0].fingerprint, now=NOW)
    folder.chmod(0o770)
    with pytest.raises(BadKey, match="keys folder 'keys' is open to others"):
        TrustStore(folder)


def test_nothing_changes_when_the_disk_is_full(store, folder, parties, monkeypatch):
    store.add(parties[0].card, parties[0].fingerprint, now=NOW)
    before = (folder / "trust.json").read_bytes()

    def full_disk(path, content):
        Path(path).write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trust, "write_private", full_disk)
    for change in (
        lambda: store.add(parties[1].card, parties[1].fingerprint),
        lambda: store.revoke(parties[0].fingerprint),
    ):
        with pytest.raises(RunFailed, match=r"cannot write 'trust.json': no space left on device"):
            change()
    assert (folder / "trust.json").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["trust.json"]


def test_parties_added_at_the_same_time_are_all_kept(folder):
    cards = [generate(f"Party {number}", days=1).public for number in range(8)]
    threads = [
        threading.Thread(target=lambda card=card: TrustStore(folder).add(card.card, card.fingerprint)) for card in cards
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [peer.keys for peer in TrustStore(folder).peers()] == cards


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(capsys, *words):
    code = cli.run(list(map(str, words)))
    told = capsys.readouterr()
    return code, json.loads(told.out) if told.out else None, told.err


def test_the_verbs_add_list_and_revoke(folder, parties, capsys, tmp_path):
    clinic, card = parties[0], tmp_path / "card.json"
    card.write_bytes(clinic.card)
    assert run(capsys, "trust", "list", "--keys", folder) == (0, {"peers": []}, "nobody is pinned here yet\n")
    code, told, shown = run(capsys, "trust", "add", card, "--keys", folder, "--fingerprint", clinic.fingerprint)
    assert (code, told["state"], told["fingerprint"]) == (0, "trusted", clinic.fingerprint)
    assert shown.startswith("trusted until ")
    _, told, shown = run(capsys, "trust", "list", "--keys", folder)
    assert told["peers"][0].keys() == {"added", "expires", "fingerprint", "name", "revoked", "state"}
    assert shown.split() == ["trusted", "Clinic", clinic.fingerprint]
    code, told, _ = run(capsys, "trust", "revoke", clinic.fingerprint, "--keys", folder)
    assert (code, told["state"]) == (0, "revoked")
    _, told, shown = run(capsys, "trust", "list", "--keys", folder)
    assert (told["peers"][0]["state"], told["peers"][0]["revoked"] >= NOW) == ("revoked", True)
    code, _, shown = run(capsys, "trust", "revoke", parties[1].fingerprint, "--keys", folder)
    assert (code, shown.splitlines()[0]) == (3, "offsite: error: no peer of that fingerprint is pinned here")


def test_adding_without_a_fingerprint_needs_a_person_who_compared(folder, parties, capsys, tmp_path, monkeypatch):
    clinic, card = parties[0], tmp_path / "card.json"
    card.write_bytes(clinic.card)
    for stdin in (io.StringIO("yes\n"), None, Terminal("y\n"), Terminal(""), Terminal("no\n")):
        monkeypatch.setattr("sys.stdin", stdin)
        code, _, shown = run(capsys, "trust", "add", card, "--keys", folder)
        assert code == 2
        assert clinic.fingerprint in shown
        assert "offsite: hint: compare it with the one the other party tells you over another channel" in shown
        assert list(folder.iterdir()) == []
    monkeypatch.setattr("sys.stdin", Terminal("Yes\n"))
    code, told, shown = run(capsys, "trust", "add", card, "--keys", folder)
    assert (code, told["state"]) == (0, "trusted")
    assert f"the card of Clinic has the fingerprint\n  {clinic.fingerprint}\n" in shown


def test_a_bad_card_is_refused_before_anybody_is_asked(folder, parties, tmp_path, monkeypatch):
    from offsite.keys.config import TrustAddConfig

    monkeypatch.setattr(trust, "_confirmed", lambda keys: pytest.fail("asked"))
    card = tmp_path / "card.json"
    for content, error in [
        (b"", BadKey),
        (parties[0].card.replace(b'"mldsa65": "', b'"mldsa65": "AAAA'), BadSignature),
    ]:
        card.write_bytes(content)
        with pytest.raises(error):
            trust.add(TrustAddConfig(card=card, keys=folder))
    with pytest.raises(ConfigError, match="no keys folder"):
        trust.add(TrustAddConfig(card=card, keys=tmp_path / "other"))


def test_two_processes_take_turns(folder, parties):
    """The lock holds between processes, not only between threads."""
    context = multiprocessing.get_context("fork")
    with TrustStore(folder)._locked():
        other = context.Process(target=TrustStore(folder).add, args=(parties[0].card, parties[0].fingerprint))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert TrustStore(folder).peers() == []
    other.join(20)
    assert other.exitcode == 0
    assert TrustStore(folder).peers()[0].keys == parties[0]


def test_a_party_is_called_by_its_name_or_the_beginning_of_its_fingerprint(store, parties):
    clinic, bank, _ = parties
    for party in (clinic, bank):
        store.add(party.card, party.fingerprint, now=NOW)
    assert store.named(" clinic ", now=NOW) == clinic.fingerprint
    assert store.named(clinic.fingerprint[:8].upper(), now=NOW) == clinic.fingerprint
    stranger = parties[2].fingerprint
    assert store.named(stranger, now=NOW) == stranger  # whole: whoever needs it trusted asks for that
    for word, told in [
        ("Clinc", "nobody called 'Clinc' is trusted here; did you mean 'Clinic'?"),
        (clinic.fingerprint[:7], "is trusted here$"),
        ("", "nobody called '' is trusted here"),
    ]:
        with pytest.raises(Untrusted, match=told):
            store.named(word, now=NOW)
    store.revoke(clinic.fingerprint)
    with pytest.raises(Untrusted, match="nobody called 'Clinic'"):
        store.named("Clinic", now=NOW)


def test_two_of_one_name_have_to_be_told_apart(store, parties, monkeypatch):
    monkeypatch.setattr("offsite.keys.identity.time.time", lambda: NOW)
    twins = [parties[0], generate("clinic", days=30).public]
    for party in twins:
        store.add(party.card, party.fingerprint, now=NOW)
    with pytest.raises(Untrusted, match="2 trusted parties are called 'Clinic'"):
        store.named("Clinic", now=NOW)
    store.revoke(twins[1].fingerprint)
    assert store.named("Clinic", now=NOW) == twins[0].fingerprint


def test_a_name_that_looks_like_anothers_fingerprint_hides_nobody(folder, store, parties, monkeypatch):
    monkeypatch.setattr("offsite.keys.identity.time.time", lambda: NOW)
    clinic = parties[0]
    whole, beginning = (generate(clinic.fingerprint[:end], days=30).public for end in (64, 9))
    for party in (clinic, whole, beginning):
        store.add(party.card, party.fingerprint, now=NOW)
    assert store.named(clinic.fingerprint, now=NOW) == clinic.fingerprint
    with pytest.raises(Untrusted, match="2 trusted parties are called"):
        store.named(clinic.fingerprint[:9], now=NOW)
    told = revoke(TrustRevokeConfig(fingerprint=clinic.fingerprint, keys=folder))
    assert told["name"] == "Clinic"
    with pytest.raises(Untrusted, match="is revoked"):
        store.require(clinic.fingerprint, now=NOW)
