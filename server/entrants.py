"""What an evaluation compares: package, bundles and references, opened and bound to each other before any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from offsite.bundle import Bundle, open_bundle
from offsite.errors import ConfigError
from offsite.owner import OwnerRecord, owner_record_path, read_owner_record
from offsite.package import Package, open_package
from offsite.results import RowName
from server.config import EvaluateConfig, named_paths
from server.fit import read_adapter
from server.plug import find_record


@dataclass(frozen=True)
class Entrants:
    """The artefacts to be compared: opened, bound to each other, their tensors known to be sound.

    Attributes:
        bundles: by seed; all of one adapter, tuned on `package`.
        references: by row, then seed: a bundle and the record of the keep-all package it was tuned on.
    """

    package: Package
    record: OwnerRecord
    bundles: Mapping[str, Bundle]
    references: Mapping[RowName, Mapping[str, tuple[Bundle, OwnerRecord]]]


def open_entrants(config: EvaluateConfig) -> Entrants:
    """Return package, bundles and references once they are known to belong together, without a model.

    Raises:
        ConfigError: when the bundles are not seeds of one adapter, or a reference is not what its name says.
        ArtefactError: when one is rejected.
    """
    package = open_package(config.package)
    record = read_owner_record(owner_record_path(config.package))
    bundles = {name: open_bundle(path) for name, path in named_paths(config.bundle)}
    first = next(iter(bundles.values()))
    for bundle in bundles.values():
        bundle.bind(package_digest=package.digest, base_digest=package.manifest.base_digest)
        read_adapter(bundle, record)
        if bundle.manifest.adapter != first.manifest.adapter:
            raise ConfigError(
                f"--bundle: {bundle.path.name!r} and {first.path.name!r} hold different adapters",
                hint="several bundles are several seeds of one adapter; evaluate each adapter by itself",
            )
    known = [read_owner_record(owner_record_path(path)) for path in config.reference_package]
    references: dict[RowName, dict[str, tuple[Bundle, OwnerRecord]]] = {}
    for row, path in named_paths(config.reference):
        bundle = open_bundle(path)
        matching = [found for found in known if found.package_digest == bundle.manifest.package_digest]
        reference = matching[0] if matching else find_record(bundle, None)
        read_adapter(bundle, reference)
        _require_reference(row, bundle, reference, record, first)
        seeds = references.setdefault(cast(RowName, row), {})
        seeds[path.name if path.name not in seeds else f"{path.name}-{len(seeds) + 1}"] = (bundle, reference)
    return Entrants(package, record, bundles, references)


_FITS: dict[str, tuple[str, Callable[[Bundle, Bundle], bool]]] = {
    "ceiling": (
        "the same adapter as the bundle",
        lambda found, first: found.manifest.adapter == first.manifest.adapter,
    ),
    "lora_full": (
        "low-rank with placement all",
        lambda found, _: (
            found.manifest.adapter.kind in ("lora", "rslora", "dora") and found.manifest.adapter.placement == "all"
        ),
    ),
    "full": (
        "whole blocks with placement all",
        lambda found, _: found.manifest.adapter.kind == "blocks" and found.manifest.adapter.placement == "all",
    ),
}


def _require_reference(row: str, bundle: Bundle, reference: OwnerRecord, record: OwnerRecord, first: Bundle) -> None:
    what = f"--reference {row}: bundle {bundle.path.name!r}"
    if reference.base_digest != record.base_digest:
        raise ConfigError(f"{what} belongs to another base model than the package")
    if reference.kept != tuple(range(reference.num_blocks)) or reference.channels:
        raise ConfigError(
            f"{what} was tuned on a package that does not keep all of the model",
            hint="tune references on a package of: offsite distill MODEL --method keep-all --steps 0",
        )
    wanted, fits = _FITS[row]
    if not fits(bundle, first):
        found = bundle.manifest.adapter
        raise ConfigError(f"{what} is {found.kind} with placement {found.placement}, expected {wanted}")
