"""Which blocks carry an adapter, and which of their modules, from the package's layout alone."""

from __future__ import annotations

from collections.abc import Iterable

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout
from offsite.errors import ConfigError


def placed_blocks(spec: AdapterSpec, layout: Layout) -> tuple[str, ...]:
    """Return the canonical blocks that carry the adapter, in model order.

    Counts are taken from the outside: ``1+2`` is the first block of the model and its last two. ``top`` is all of the
    top end; ``last:5`` are the package's last five blocks in its own numbering, those of the middle among them. Of an
    encoder-decoder all of it is said of each stack.

    Raises:
        ConfigError: when there are fewer blocks than asked for, or blocks of the middle are asked of a package whose
            middle keeps nothing that can be lifted into the full model.
    """
    return tuple(name for side in layout.sides for name in _placed_in(tuple(side), spec, layout))


def _placed_in(every: tuple[str, ...], spec: AdapterSpec, layout: Layout) -> tuple[str, ...]:
    """Return those of one stack's blocks that carry the adapter."""
    bottoms, tops = ([name for name in every if name.startswith(f"{role}.")] for role in ("bottom", "top"))
    if spec.placement == "top":
        if not tops:
            raise ConfigError("--placement top: the package has no top end", hint="use --placement all")
        return tuple(tops)
    if spec.counts is None:
        if spec.last is not None and spec.last > len(every):
            raise ConfigError(
                f"--placement {spec.placement}: the package has {len(every)} blocks",
                hint=f"use at most --placement last:{len(every)}",
            )
        placed = every[-spec.last :] if spec.last is not None else every
        if in_middle(placed) and not layout.adaptable_middle:
            raise ConfigError(
                f"--placement {spec.placement}: this package's middle keeps no module one to one with the full model",
                hint=f"use --placement {layout.num_bottom}+{layout.num_top}",
            )
        return placed
    bottom, top = spec.counts
    if bottom > len(bottoms) or top > len(tops):
        raise ConfigError(
            f"--placement {spec.placement}: the package's ends have {len(bottoms)}+{len(tops)} blocks",
            hint=f"use at most --placement {len(bottoms)}+{len(tops)}",
        )
    return tuple(bottoms[:bottom] + tops[len(tops) - top :])


def in_middle(blocks: Iterable[str]) -> bool:
    """Tell whether any of these canonical blocks is one of the middle."""
    return any(block.startswith("middle.") for block in blocks)


def placed_linears(spec: AdapterSpec, layout: Layout, *, same_size_only: bool = False) -> dict[str, tuple[int, int]]:
    """Return the canonical linear modules that carry a low-rank adapter, with (inputs, outputs).

    Args:
        same_size_only: leave out middle modules that are smaller than the full model's (a shrunk MLP) or of lower rank.

    Raises:
        ConfigError: when nothing is left.
    """
    blocks = set(placed_blocks(spec, layout))
    feed_forward = set(layout.mlp_linears)
    found = {}
    for name, dims in layout.linears.items():
        role, number, inner = name.split(".", 2)
        if f"{role}.{number}" not in blocks or (role == "middle" and inner not in layout.adaptable_middle):
            continue
        if spec.targets != "all-linear" and (spec.targets == "mlp") != (name in feed_forward):
            continue
        is_own = layout.middle_whole or not (layout.stand_ins or name in feed_forward)
        if role == "middle" and same_size_only and not is_own:
            continue
        found[name] = dims
    if not found:
        raise ConfigError(f"--targets {spec.targets}: no linear module of the placed blocks is left to adapt")
    return found
