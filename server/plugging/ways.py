"""The ways to plug an adapter in: how much of its update, of which modules, in which directions, how mixed when asked.

A `Way` is small and stands as a word wherever one was used: on the command line, in an adapted folder, in results, in
an audit. The words are ``0.5``, or ``attention=0.5,mlp=0.75,top=0.5``, each with ``spare=0.1`` or ``mix=0.7`` after it.
What each part does is in ``server/plugging/shares.py``, ``server/plugging/sparing.py`` and
``server/plugging/mixing.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Self

from offsite.errors import ConfigError
from offsite.problems import meant

KINDS = ("attention", "mlp")
PLACES = ("bottom", "middle", "top")
PARTS = (*KINDS, *PLACES)
"""What shares by module may name: a kind of module, or one of the three parts of the model; each at most once."""

LEAST_SPARE, MOST_SPARE = 1e-6, 1e6

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?", re.ASCII)
_WORDS = (*PARTS, "spare", "mix")


@dataclass(frozen=True)
class Way:
    """One way to plug an adapter in; the plain one takes all of it.

    Attributes:
        scale: share of the update, of all modules alike, in (0, 1].
        by_module: shares by kind of module or part of the model (`PARTS`), each in (0, 1]; those that name a weight are
            multiplied, and a weight that none names is plugged in whole. Either these or `scale`.
        spare: use of an input direction by public text, over the mean direction's, at which half of the update is kept;
            None spares nothing. See ``server/plugging/sparing.py``.
        mix: share of the plugged-in model's probabilities in (0, 1], the rest being the full model's own.

    Raises:
        ConfigError: when a value is outside its range, or both shares are given.
    """

    scale: float = 1.0
    by_module: tuple[tuple[str, float], ...] = ()
    spare: float | None = None
    mix: float = 1.0

    def __post_init__(self) -> None:
        for name, share in (("scale", self.scale), *self.by_module, ("mix", self.mix)):
            if not 0 < share <= 1:
                raise ConfigError(f"{name}: expected more than 0 and at most 1")
        if self.spare is not None and not LEAST_SPARE <= self.spare <= MOST_SPARE:
            raise ConfigError(f"spare: expected {LEAST_SPARE:g} to {MOST_SPARE:g}")
        names = [name for name, _ in self.by_module]
        for name in names:
            if name not in PARTS:
                raise ConfigError(f"{name!r} is no kind of module, expected one of {', '.join(PARTS)}")
            if names.count(name) > 1:
                raise ConfigError(f"{name} is given twice")
        if self.scale != 1 and self.by_module:
            raise ConfigError("one share of all modules, or shares by module: not both")
        kept = sorted(((name, share) for name, share in self.by_module if share != 1), key=_place)
        object.__setattr__(self, "by_module", tuple(kept))  # what says the same is the same

    def __str__(self) -> str:
        """Return the word that `parse` reads as this way; ``1`` is the plain one."""
        words = [f"{name}={_shown(share)}" for name, share in self.by_module]
        if not words and (self.scale != 1 or (self.spare is None and self.mix == 1)):
            words = [_shown(self.scale)]
        if self.spare is not None:
            words.append(f"spare={_shown(self.spare)}")
        if self.mix != 1:
            words.append(f"mix={_shown(self.mix)}")
        return ",".join(words)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the way that `text` names.

        Raises:
            ConfigError: in one line, when it names none.
        """
        try:
            return cls.read(text)
        except ConfigError as error:
            raise ConfigError(f"{error}, found {text[:80]!r}") from None

    @classmethod
    def read(cls, text: str) -> Self:
        """Return the way that `text` names, as `parse` does; the error is of whoever knows where the text stood."""
        first, *rest = words = text.split(",")
        scale = 1.0
        if "=" not in first:
            scale, words = _number(first), rest
        found: dict[str, float] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in _WORDS:
                raise ConfigError(f"expected NAME=SHARE of {', '.join(_WORDS)}{meant(name[:40], _WORDS)}")
            if name in found:
                raise ConfigError(f"{name} is given twice")
            found[name] = _number(value)
        spare, mix = found.pop("spare", None), found.pop("mix", 1.0)
        return cls(scale, tuple(found.items()), spare, mix)

    @classmethod
    def stated(cls, scale: float, word: str) -> Self:
        """Return the way that a file states: a share in a field of its own, and a word where that does not say it all.

        Raises:
            ConfigError: when the word names no way, is not written as `word` writes it, or is of another share.
        """
        if not word:
            return cls(scale)
        found = cls.parse(word)
        if found.word != word or found.scale != scale:
            raise ConfigError(f"the way {word[:80]!r} and the share {scale:g} do not agree")
        return found

    @property
    def word(self) -> str:
        """What a file states beside the share; empty where the share alone says it all."""
        return "" if self == Way(self.scale) else str(self)

    @property
    def told(self) -> str:
        """The way as people read it: ``0.5 of the update``, with what else is done."""
        share = ", ".join(f"{value:g} of {name}" for name, value in self.by_module)
        parts = [share or ("" if self.scale == 1 else f"{self.scale:g} of the update")]
        if self.spare is not None:
            parts.append(f"spared where public text uses more than {self.spare:g} of the mean")
        if self.mix != 1:
            parts.append(f"{self.mix:g} of the probabilities")
        return ", ".join(part for part in parts if part) or "all of the update"

    @property
    def is_plain(self) -> bool:
        """Whether all of the update is plugged in and nothing else is done."""
        return self == Way()

    @property
    def written(self) -> Way:
        """The part of the way that an adapted folder holds: all but the mixing, which is done when it is asked."""
        return replace(self, mix=1.0)

    @property
    def names_kinds(self) -> bool:
        """Whether a share depends on the kind of module."""
        return any(name in KINDS for name, _ in self.by_module)

    def share_of(self, name: str, *, is_mlp: bool) -> float:
        """Return the share of the update of the tensor with that canonical name (``top.0.mlp.up_proj.lora_A``).

        Args:
            is_mlp: whether it lies in its block's feed-forward part; all else of a block counts as attention.
        """
        meant_by = (name.partition(".")[0], "mlp" if is_mlp else "attention")
        return self.scale * math.prod(share for part, share in self.by_module if part in meant_by)


OFFSET = "offset="
"""How the word begins under which a bundle is known that is served from its emulator, and not plugged in at all."""


def told(word: str) -> str:
    """Return how people read the word under which a bundle was plugged in or served.

    Raises:
        ConfigError: when it is none.
    """
    if word.startswith(OFFSET):
        return f"an offset of {_number(word.removeprefix(OFFSET)):g}, from the emulator"
    return Way.parse(word).told


def ways(
    *,
    shares: Sequence[str] = ("1", "0.75", "0.5"),
    spares: Sequence[float | None] = (None,),
    mixes: Sequence[float] = (1.0,),
) -> Iterator[Way]:
    """Yield every way of these shares, spared uses and mixtures, each once: for a rehearsal to try in turn.

    Args:
        shares: as ``--scale`` takes them: a number, or shares by module.

    Raises:
        ConfigError: when one is not as `Way` needs it.
    """
    yield from dict.fromkeys(
        replace(Way.parse(share), spare=spare, mix=mix) for share, spare, mix in product(shares, spares, mixes)
    )


def _place(pair: tuple[str, float]) -> int:
    return PARTS.index(pair[0])


def _shown(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ConfigError(f"expected a number, or NAME=SHARE of {', '.join(_WORDS)}")
    return float(text)
