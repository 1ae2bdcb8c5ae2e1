"""The client's Flower app: a sealed round in, a sealed bundle out.

The app runs in one process (``offsite federate simulate``) and beside Flower's SuperNode (``offsite federate node``);
over an owner's exchange ``offsite federate join`` takes the same steps. It takes its settings from a file on its own
machine, which the node's configuration names; nothing that a message says chooses a path, a class or code. A message is
as trustworthy as any mail: what counts is the seal of what it carries. On the client's side only this file and
``client/federation/messages.py`` import flwr.

A client that cannot or will not answer says so by the class of its reason and nothing more, because a reason could hold
what is private.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.federation.config import MemberConfig
from client.federation.member import Member
from offsite.config import build
from offsite.console import say
from offsite.errors import BadSchema, ConfigError, OffsiteError
from offsite.exchange.packing import RAW, pack, unpack

SETTINGS = "client"
"""Key of the node's configuration under which the client's own settings file is named."""

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Tell whose node this is and which package it has; a claim, which the seals bear out or not."""
    try:
        member = member_of(context)
    except Exception as error:  # noqa: BLE001 - its text would reach the owner otherwise, see `declined`
        return declined(message, error)
    said = ConfigRecord({"client": member.job.client, "package": member.package.digest})
    return Message(RecordDict({"hello": said}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a round: with a sealed bundle, or with the first message of a secure one."""
    return _answered(message, context, lambda member, sealed: member.answer(member.take(sealed)))


@app.query("secagg")
def secagg(message: Message, context: Context) -> Message:
    """Answer the owner's next message of a secure round."""
    return _answered(message, context, Member.follow)


def _answered(message: Message, context: Context, act: Callable[[Member, Path], Path]) -> Message:
    try:
        member = member_of(context)
        arrived = member.config.work / ".arrived.partial"
        shutil.rmtree(arrived, ignore_errors=True)
        try:
            unpack(bytes_of(message), arrived, limit_bytes=member.config.limit_bytes)
            sealed = act(member, arrived)
        finally:
            shutil.rmtree(arrived, ignore_errors=True)
        return Message(RecordDict({"sealed": arrays_of(pack(sealed))}), reply_to=message)
    except Exception as error:  # noqa: BLE001 - its text would reach the owner otherwise, see `declined`
        return declined(message, error)


def declined(message: Message, error: Exception) -> Message:
    """Return the answer of a client that does not take part in this round; its machine alone hears why.

    Flower sends the text of an error that leaves the app to the other side: a path, or what was read of the data.
    """
    tell(error)
    reason = type(error).__name__ if isinstance(error, OffsiteError) else "RunFailed"
    return Message(RecordDict({"declined": ConfigRecord({"reason": reason})}), reply_to=message)


def tell(error: Exception) -> None:
    """The error is on this machine's terminal, as a verb's would be; of one that is a bug, its class."""
    say(f"offsite: error: {error}" if isinstance(error, OffsiteError) else f"offsite: bug: {type(error).__name__}")
    if hint := getattr(error, "hint", None):
        say(f"offsite: hint: {hint}")


def arrays_of(parts: dict[str, bytes]) -> ArrayRecord:
    """Return named bytes as Flower carries them: exact, whatever dtype the tensors inside have."""
    return ArrayRecord(array_dict={name: Array("uint8", (len(data),), RAW, data) for name, data in parts.items()})


def bytes_of(message: Message) -> dict[str, bytes]:
    """Return the named bytes of a message.

    Raises:
        BadSchema: when it carries none.
    """
    found = message.content.get("sealed") if message.has_content() else None
    if not isinstance(found, ArrayRecord) or any(array.stype != RAW for array in found.values()):
        raise BadSchema("a message of the federation carries nothing that is sealed")
    return {name: array.data for name, array in found.items()}


def member_of(context: Context) -> Member:
    """Return this node's client, with its keys open.

    Raises:
        ConfigError: when the node's configuration names no settings file, or the file is not one.
        ArtefactError: as `Member`.
    """
    path = context.node_config.get(SETTINGS)
    if not isinstance(path, str):
        raise ConfigError(f"the node's configuration names no settings file: {SETTINGS}=FILE")
    return _member(Path(path), Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)


@lru_cache(maxsize=128)
def _member(path: Path, stamp: int) -> Member:
    return Member(build(MemberConfig, file=path))
