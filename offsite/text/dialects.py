"""Rows as other tools write them, in this project's shapes: Alpaca's instructions and ShareGPT's conversations.

A row is taken for one of them if it holds what that dialect must and no field of this project's shapes, whatever stands
in them, so that all rows of a file are read one way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offsite.text.rows import Row, checked_string

ALPACA = ("instruction", "output")
ALPACA_INPUT = "input"
SHAREGPT = "conversations"
_OWN = ("text", "prompt", "completion", "messages", "chosen", "rejected", "label")
_UNREAD = ("system", "history")  # of such rows, where they are filled in
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ROLE_HINT = "roles are human, gpt and system, or user and assistant; give others as messages"


def told_in_shapes(row: Row) -> Row:
    """Return the row in a shape of this project where it is in a known dialect, else the row itself.

    Alpaca's ``instruction``, ``output`` and, where it is not empty, ``input`` become a prompt, its parts and its end
    apart by empty lines, and a completion. ShareGPT's ``conversations`` of ``from`` and ``value`` become messages.
    Every other field stays as it is.

    A row of Alpaca's that also has ``text``, the same filled into a template, counts as one of Alpaca's.

    Raises:
        DataError: when such a row does not hold text, a turn is nobody's, or it holds what would be lost: ``system``,
            ``history``, or a turn's ``weight`` of 0.
    """
    written_out = all(name in row.values for name in (*ALPACA, ALPACA_INPUT))
    if any(name in row.values for name in _OWN if not (written_out and name == "text")):
        return row
    if SHAREGPT in row.values or all(name in row.values for name in ALPACA):
        for name in _UNREAD:
            if row.values.get(name) not in (None, "", []):
                raise row.error(f"field '{name}' would be lost", hint="give the row as messages, with it in them")
    if SHAREGPT in row.values:
        rest = {name: value for name, value in row.values.items() if name != SHAREGPT}
        return Row({**rest, "messages": _messages(row)}, row.number, row.place)
    if all(name in row.values for name in ALPACA):
        rest = {name: value for name, value in row.values.items() if name not in (*ALPACA, ALPACA_INPUT, "text")}
        parts = [row.string(ALPACA[0])]
        if row.values.get(ALPACA_INPUT) not in (None, ""):
            parts.append(row.string(ALPACA_INPUT, empty=True))
        prompt = "".join(f"{part.strip()}\n\n" for part in parts if part.strip())
        return Row({**rest, "prompt": prompt, "completion": row.string(ALPACA[1])}, row.number, row.place)
    return row


def _messages(row: Row) -> list[dict[str, Any]]:
    turns = row.values[SHAREGPT]
    if not isinstance(turns, list) or not turns:
        raise row.error(f"field '{SHAREGPT}' is not a list of turns, expected objects with from and value")
    return [_message(turn, number, row) for number, turn in enumerate(turns, 1)]


def _message(turn: object, number: int, row: Row) -> dict[str, Any]:
    keys = ("from", "value") if isinstance(turn, Mapping) and "from" in turn else ("role", "content")
    if not isinstance(turn, Mapping) or any(key not in turn for key in keys):
        raise row.error(f"turn {number} does not have the fields from and value")
    if turn.get("weight") in (0, False) and "weight" in turn:
        raise row.error(f"turn {number} has weight 0, which would be lost", hint="leave the row out, or cut it before")
    role = _ROLES.get(checked_string(turn[keys[0]], f"role of turn {number}", row).strip().lower())
    if role is None:
        raise row.error(f"turn {number} is nobody's that is known", hint=_ROLE_HINT)
    return {"role": role, "content": checked_string(turn[keys[1]], f"text of turn {number}", row)}
