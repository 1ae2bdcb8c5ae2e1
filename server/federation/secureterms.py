"""What a secure round is asked under: the terms that every client must agree to before it sends anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapters.vector import vector_shapes
from offsite.errors import ConfigError
from offsite.secagg.terms import make_terms
from offsite.strictjson import write_compact
from offsite.tensors import TensorSpec
from server.federation.config import RoundsConfig


def secure_terms(
    config: RoundsConfig,
    *,
    federation_id: str,
    expected: Mapping[str, TensorSpec],
    number: int,
    clients: Sequence[str],
    asked: str,
) -> str:
    """Return the terms of the round's secure aggregation in their one form.

    Args:
        expected: shapes and dtypes of the adapter's tensors, by name.
        number: of the round, from 1.
        clients: fingerprints of everybody who is asked.
        asked: digest of what is asked of all clients alike (`RoundManifest.asked`).

    Raises:
        ConfigError: when no client would agree to them: too few clients, or a threshold not over half of them.
    """
    num = len(clients)
    terms = make_terms(
        federation=federation_id,
        round=number,
        members=clients,
        threshold=config.threshold or max(2 * num // 3 + 1, min(config.min_clients, num)),
        limit=config.clip,
        shapes=vector_shapes(expected),
        asked=asked,
    )
    if 2 * terms.threshold <= num:
        raise ConfigError(f"--threshold {terms.threshold} is not over half of the {num} clients of round {number}")
    return write_compact(terms).decode("ascii")
