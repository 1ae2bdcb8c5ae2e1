"""How many tokens a model can read, under whatever name its configuration says so."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from offsite.errors import ConfigError

# Configuration fields that say it, in the order in which they are believed. Hidden names are in the classes'
# `attribute_map`, which reading an attribute follows; these are those that no class maps.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "seq_len",
    "n_ctx",
    "context_length",
    "model_max_length",
)
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")


def context_of(model: nn.Module) -> int | None:
    """Return the most tokens that the model can read; None where it states no limit.

    A table of learned positions counts as well: some architectures keep its first rows for padding, so that the
    configuration's number is more than they can read.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    fields = config.get_text_config()
    stated = [getattr(fields, key, None) for key in CONTEXT_KEYS]
    found = [number for number in stated if isinstance(number, int) and not isinstance(number, bool) and number > 0]
    return min([*found[:1], *_tables(model)], default=None)


def require_context(model: nn.Module, num_tokens: int, what: str) -> None:
    """Return only if the model can read so many tokens at once.

    Raises:
        ConfigError: naming both numbers, and `what` is too long.
    """
    context = context_of(model)
    if context is not None and num_tokens > context:
        raise ConfigError(
            f"{what} of {num_tokens} tokens, the model's context is {context}", hint=f"use --block-tokens {context}"
        )


def _tables(model: nn.Module) -> list[int]:
    """Return how many positions each table of learned ones has."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name):
            offset = getattr(module, "offset", 0)
            first = module.padding_idx + 1 if module.padding_idx is not None else offset
            found.append(module.num_embeddings - (first if isinstance(first, int) else 0))
    return found
