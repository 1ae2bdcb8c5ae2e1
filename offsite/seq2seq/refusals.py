"""What cannot be done with an encoder-decoder, in one line."""

from __future__ import annotations

from collections.abc import Mapping

from offsite.errors import ConfigError, UnsupportedModel

_WHAT_GOES = (
    "encoder-decoders go through distill (keep-all, drop, width), tune on rows of a prompt and an answer, seal, "
    "intake, plug-in, evaluate and serve of what was plugged in"
)


def not_taken(what: str) -> UnsupportedModel:
    """Return the error for a model or package where none is taken.

    Args:
        what: names it, as ``model 't5'``.
    """
    return UnsupportedModel(
        f"{what} is an encoder-decoder, which this cannot be done with", hint=f"{_WHAT_GOES}; nothing else yet"
    )


def refuse_settings(what: str, asked: Mapping[str, bool], hint: str) -> None:
    """Return only if none of the settings is asked for.

    Args:
        what: names the model or package.
        asked: of each flag, whether it is.

    Raises:
        ConfigError: naming those that are.
    """
    if found := [flag for flag, is_asked in asked.items() if is_asked]:
        raise ConfigError(f"{what} is an encoder-decoder: {' and '.join(found)} cannot be had with it", hint=hint)
