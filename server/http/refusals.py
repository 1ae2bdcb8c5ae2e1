"""What the exchange answers when it does not do what was asked: a status, the check's name, one line."""

from __future__ import annotations

from collections.abc import Mapping

from offsite.errors import ArtefactError, Replayed, TooLarge


class Refusal(Exception):
    """An answer other than the one asked for.

    Args:
        status: HTTP status, 400 to 499.
        name: the class of ``offsite/errors.py`` that says what failed, or `Busy`, `NotFound`, `WrongOffset`.
        message: for the person at the other side; holds no path and no text of this machine.
        facts: further members of the answer.
    """

    def __init__(self, status: int, name: str, message: str, *, retry_seconds: int = 0, **facts: object) -> None:
        super().__init__(message)
        self.status, self.name, self.message, self.facts = status, name, message, facts
        self.headers: Mapping[str, str] = {"Retry-After": str(retry_seconds)} if retry_seconds else {}

    @property
    def body(self) -> dict[str, object]:
        """The answer's JSON."""
        return {"reason": self.name, "message": self.message, **self.facts}


def busy(message: str, *, retry_seconds: int = 1) -> Refusal:
    """Return the answer to a request that may be repeated later."""
    return Refusal(429, "Busy", message, retry_seconds=retry_seconds)


def denied() -> Refusal:
    """Return the one answer to requests whose signature, signer, time or nonce is not in order."""
    return Refusal(401, "Untrusted", "this request is not accepted")


def not_found() -> Refusal:
    """Return the answer to whoever asks for what does not exist, or not for them."""
    return Refusal(404, "NotFound", "there is nothing at this address for you")


def of_artefact(error: ArtefactError) -> Refusal:
    """Return the answer that names the check which an artefact failed."""
    status = 413 if isinstance(error, TooLarge) else 409 if isinstance(error, Replayed) else 422
    return Refusal(status, type(error).__name__, str(error))
