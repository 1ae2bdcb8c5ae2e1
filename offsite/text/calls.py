"""Calls of a tokenizer or a chat template on text that others must not read: what they raise is never told.

Both come with a package or a model, and their errors quote what they were given: a template may raise the conversation
itself, a compiled tokenizer panics (which is no `Exception`) and writes that to stderr before Python hears of it. Every
such call goes through `quietly`: whatever comes of it but a result is one error of ours, which may name the class of
what was raised and nothing else of it. Ctrl-C and the end of the process pass.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from offsite.errors import DataError, OffsiteError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")
Refusal = Callable[[str], Exception]

_LEAST_SECONDS = 60.0
_CHARACTERS_PER_SECOND = 5_000.0  # a hundredth of what a slow machine does
_PIPE_BYTES = 2**20


class TookTooLong(Exception):
    """Work went on past its limit; `quietly` tells its name alone."""


def quietly(
    work: Callable[[], Result], refusal: Refusal, *, compiled: bool = False, limit_seconds: float | None = None
) -> Result:
    """Return what `work` returns; it has told nobody anything if it failed.

    Args:
        refusal: makes the error to raise instead of any that `work` raises, given the name of that one's class.
        compiled: `work` runs compiled code, whose panics write to stderr: nothing of it is seen there.
        limit_seconds: how long it may take, none for any time; what goes on past it is left behind in its thread, so
            it may not do this again inside.

    Raises:
        OffsiteError: as `work` raises it, or `refusal` makes it.
    """
    with _hushed(compiled) as said:
        try:
            return work() if limit_seconds is None else _within(work, limit_seconds)
        except (OffsiteError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a compiled tokenizer's panic is no Exception
            said.clear()
            raise refusal(type(error).__name__) from None


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, what: str, add_special_tokens: bool = True) -> list[int]:
    """Return the tokens of one text.

    Args:
        what: named where it fails, as "a prompt"; nothing of it is.

    Raises:
        DataError: when the tokenizer fails on it, or does not come to an end.
    """

    def encode() -> list[int]:
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    return quietly(encode, _refusing(what), compiled=True, limit_seconds=enough_seconds(len(text)))


def decoded(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    *,
    what: str,
    skip_special: bool,
    clean_up: bool | None = None,
) -> str:
    """Return the text of tokens.

    Args:
        clean_up: whether spaces before punctuation are taken away; as the tokenizer says by default.
        what: named where it fails, as "an answer"; nothing of it is.

    Raises:
        DataError: when the tokenizer fails on them.
    """

    def decode() -> str:
        found = tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=clean_up)
        return str(found)

    return quietly(decode, _refusing(what), compiled=True)


def _refusing(what: str) -> Refusal:
    return lambda kind: DataError(
        f"the model's tokenizer fails on {what} ({kind})", hint="is it the model's own tokenizer?"
    )


def enough_seconds(num_characters: int) -> float:
    """Return how long any sound tokenizer or template needs at most for so much text, on any machine."""
    return _LEAST_SECONDS + num_characters / _CHARACTERS_PER_SECOND


def _within(work: Callable[[], Result], limit_seconds: float) -> Result:
    """Return what `work` returns in time: tokenizers let other threads run while they work."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TookTooLong
    return results[0]


class _Hush:
    """Where stderr leads while a thread is hushed: into a pipe, which is no file; what it cannot hold is lost."""

    lock = threading.Lock()
    num_inside = 0
    stderr = -1
    pipe = -1


@contextmanager
def _hushed(is_hushed: bool) -> Iterator[list[bool]]:
    """What is written to stderr, by compiled code too, is written at the end unless the yielded list was cleared."""
    worth_telling = [True]
    if not is_hushed:
        yield worth_telling
        return
    _begin_hush()
    try:
        yield worth_telling
    finally:
        _end_hush(tell=bool(worth_telling))


def _begin_hush() -> None:
    with _Hush.lock:
        _Hush.num_inside += 1
        if _Hush.num_inside > 1:
            return
        _Hush.stderr = -1
        with suppress(OSError):  # there may be no stderr
            _Hush.stderr = os.dup(2)
            _Hush.pipe, into = os.pipe()
            os.set_blocking(_Hush.pipe, False)
            os.set_blocking(into, False)
            os.dup2(into, 2)
            os.close(into)


def _end_hush(*, tell: bool) -> None:
    with _Hush.lock:
        if not tell and _Hush.stderr >= 0:
            _drained()
        _Hush.num_inside -= 1
        if _Hush.num_inside or _Hush.stderr < 0:
            return
        os.dup2(_Hush.stderr, 2)
        with suppress(OSError):
            os.write(_Hush.stderr, _drained())
        os.close(_Hush.pipe)
        os.close(_Hush.stderr)


def _drained() -> bytes:
    """Return what lies in the pipe."""
    parts = []
    with suppress(BlockingIOError):
        while part := os.read(_Hush.pipe, _PIPE_BYTES):
            parts.append(part)
    return b"".join(parts)
