"""Who joins, and whom: keys where there are none, and the owner's card once a person compared its fingerprint."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from client.join.config import InvitedConfig
from client.join.people import can_ask, typed
from offsite.config import PROJECT_NAME, project_file
from offsite.console import say
from offsite.errors import ConfigError, WrongRecipient
from offsite.keys.config import DEFAULT_KEYS, KeygenConfig
from offsite.keys.files import check_folder
from offsite.keys.identity import CARD_NAME, Identity, make_identity, open_identity
from offsite.keys.start import write_project
from offsite.keys.trust import TrustStore
from offsite.sealed.invitation import Invited, fingerprint_words
from offsite.staging import staged_file

_WORDS_IN_A_LINE = 8
_COMPARE = "the owner reads it to you over another channel, by telephone or in a meeting; then --fingerprint F"


@dataclass(frozen=True)
class Joining:
    """Who joins and whom: open keys, the pinned parties, the owner's fingerprint. `is_new`: keys were made just now."""

    identity: Identity
    trust: TrustStore
    keys: Path
    owner: str
    is_new: bool

    @property
    def own(self) -> str:
        """The client's fingerprint."""
        return self.identity.public.fingerprint


def become(config: InvitedConfig, invited: Invited) -> Joining:
    """Return who joins once there are keys and the owner's card is pinned.

    Raises:
        ConfigError: when keys are to be made without a name, or a fingerprint is to be compared and nobody is there.
        WrongRecipient: when the invitation is for another client's keys.
        Untrusted: when the owner's fingerprint is not the one that was told, or it was revoked here.
        BadKey: when the keys do not open.
    """
    keys = _keys_folder(config)
    is_new = not keys.is_dir()
    wanted = invited.invitation.client
    if is_new and wanted is not None:
        raise ConfigError(
            f"the invitation is for the keys {wanted[:9]}, and there are none at {keys.name!r}",
            hint="name the folder of the keys whose card the owner has: --keys FOLDER",
        )
    identity = _made(config, keys) if is_new else open_identity(config.model_copy(update={"keys": keys}))
    own = identity.public.fingerprint
    if wanted not in (None, own):
        raise WrongRecipient(
            f"the invitation is for the keys {wanted}, these are {own}", hint="--keys FOLDER, or ask for another one"
        )
    trust = TrustStore(keys)
    _pin(config, trust, invited)
    return Joining(identity, trust, keys, invited.owner.fingerprint, is_new)


def _keys_folder(config: InvitedConfig) -> Path:
    """Return the folder of this party's keys, or where they are to be made: this folder's, unless one was named."""
    usual = config.keys == DEFAULT_KEYS.expanduser()
    return Path.cwd() / "keys" if usual and not config.keys.is_dir() else config.keys


def _made(config: InvitedConfig, keys: Path) -> Identity:
    """Return new keys, and have this folder's project file name them where they lie in it."""
    name = config.name
    if "name" not in config.model_fields_set:
        if not can_ask():
            raise ConfigError("--name is missing: there are no keys yet, and their card bears a name", hint="--name N")
        name = typed("there are no keys yet. What name is the card to bear, as Example Hospital?")
    try:
        settings = KeygenConfig(output=keys, name=name, days=config.days, passphrase_file=config.passphrase_file)
    except ValueError:
        raise ConfigError("a card's name has letters, digits, spaces, '.', '_' and '-', at most 64") from None
    identity = make_identity(settings)
    project = Path.cwd() / PROJECT_NAME
    if keys == Path.cwd() / "keys" and project_file() is None:
        write_project(project)
    return identity


def _pin(config: InvitedConfig, trust: TrustStore, invited: Invited) -> None:
    """The owner's card is pinned, and was before or is by a fingerprint that somebody compared."""
    card, now = invited.owner, int(time.time())
    known = next((one for one in trust.peers() if one.keys.fingerprint == card.fingerprint), None)
    if known is not None and config.fingerprint is None:
        trust.require(card.fingerprint, now=now)
        say(f"from {card.name}, whose card is pinned here: {card.fingerprint}")
        return
    say(f"from somebody who is called {card.name} on their card, with the fingerprint")
    _say_fingerprint(card.fingerprint)
    told = config.fingerprint
    if told is None:
        if not can_ask():
            raise ConfigError(f"--fingerprint is missing; the card's own is {card.fingerprint}", hint=_COMPARE)
        question = "did the owner tell you the same letters or words over another channel? type yes:"
        if typed(question).lower() != "yes":
            raise ConfigError("not confirmed, nobody was pinned", hint=_COMPARE)
        told = card.fingerprint
    trust.add(card.card, told)
    say(f"pinned: {card.name}")


def write_card(joining: Joining, work: Path) -> Path:
    """Return the file in the work folder with this party's card, for an owner who has not pinned it yet."""
    check_folder(joining.keys)
    name = joining.identity.public.name.lower().replace(" ", "-")
    out = work / f"{name}.card.json"
    with staged_file(out, replace=True) as stage:
        shutil.copyfile(joining.keys / CARD_NAME, stage)
    return out


def say_card(joining: Joining, card: Path) -> None:
    """It is on stderr what to do with the card, and what its fingerprint is."""
    say(f"send {card} to the owner by any way, and read them your fingerprint over another, letters or words:")
    _say_fingerprint(joining.own)
    say(f"the owner then runs: offsite trust add {card.name}, and makes your job: offsite job create, offsite invite")


def _say_fingerprint(fingerprint: str) -> None:
    """A fingerprint is on stderr, in letters and in words that say the same."""
    say(f"  {fingerprint}")
    words = fingerprint_words(fingerprint)
    for start in range(0, len(words), _WORDS_IN_A_LINE):
        say(f"  {' '.join(words[start : start + _WORDS_IN_A_LINE])}")
