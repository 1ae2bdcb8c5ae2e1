"""What an evaluation compares: package, bundles and references, opened and bound to each other before any model.

A client's bundle comes from the registry, by its id. A bundle folder is the owner's own making: it is held against its
package, and nothing is asked of where it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from offsite.artefacts.bundle import Bundle, open_bundle
from offsite.artefacts.owner import OwnerRecord, find_owner_record, owner_record_path, read_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.errors import ConfigError
from offsite.evaluation.results import RowName
from server.evaluation.config import EvaluateConfig, named_paths, registered_id
from server.plugging.plug import accepted
from server.registry.intake import read_registered
from server.registry.registry import Registry
from server.registry.verify import Verified, expected_tensors, verify_own


@dataclass(frozen=True)
class Candidate:
    """One bundle, its adapter as verified, and the record of the package it was tuned on."""

    bundle: Bundle
    verified: Verified
    record: OwnerRecord


@dataclass(frozen=True)
class Candidates:
    """The artefacts to be compared: opened, bound to each other, their tensors known to be sound.

    Attributes:
        bundles: by seed; all of one adapter, tuned on `package`.
        references: by row, then seed; each tuned on a keep-all package.
    """

    package: Package
    record: OwnerRecord
    bundles: Mapping[str, Candidate]
    references: Mapping[RowName, Mapping[str, Candidate]]


def open_candidates(config: EvaluateConfig) -> Candidates:
    """Return package, bundles and references once they are known to belong together, without a model.

    Raises:
        ConfigError: when the bundles are not seeds of one adapter, or a reference is not what its name says.
        ArtefactError: when one is rejected.
    """
    package = open_package(config.package)
    record = read_owner_record(owner_record_path(config.package))
    bundles = {name: _candidate(config, path, record) for name, path in named_paths(config.bundle)}
    first = next(iter(bundles.values())).bundle
    for bundle in (candidate.bundle for candidate in bundles.values()):
        bundle.bind(package_digest=package.digest, base_digest=package.manifest.base_digest)
        if bundle.manifest.adapter != first.manifest.adapter:
            raise ConfigError(
                f"--bundle: {bundle.path.name!r} and {first.path.name!r} hold different adapters",
                hint="several bundles are several seeds of one adapter; evaluate each adapter by itself",
            )
    known = [read_owner_record(owner_record_path(path)) for path in config.reference_package]
    references: dict[RowName, dict[str, Candidate]] = {}
    for row, path in named_paths(config.reference):
        bundle = open_bundle(path)
        matching = [found for found in known if found.package_digest == bundle.manifest.package_digest]
        reference = matching[0] if matching else find_record(bundle)
        candidate = Candidate(bundle, read_own(bundle, reference), reference)
        _require_reference(row, bundle, reference, record, first)
        seeds = references.setdefault(cast(RowName, row), {})
        seeds[path.name if path.name not in seeds else f"{path.name}-{len(seeds) + 1}"] = candidate
    return Candidates(package, record, bundles, references)


def read_own(bundle: Bundle, record: OwnerRecord) -> Verified:
    """Return the adapter of a bundle that the owner tuned itself. Never for what came from a client.

    Raises:
        WrongBinding, BadSchema, WrongNames, WrongShape, NotFinite: when it is not sound, or of another package.
    """
    what = f"bundle {bundle.path.name!r}"
    expected = expected_tensors(what, bundle.manifest, record, None)
    return verify_own(what, bundle.manifest, bundle.load_tensors(expected), record, bundle_digest=bundle.digest)


def find_record(bundle: Bundle) -> OwnerRecord:
    """Return the owner's record of the package the bundle was tuned on, found near it or the current folder.

    Raises:
        ConfigError: when none is found.
    """
    folder = bundle.path.resolve().parent
    return find_owner_record(bundle.manifest.package_digest, None, [folder, Path.cwd(), folder.parent])


def with_whole_ids(config: EvaluateConfig) -> EvaluateConfig:
    """Return the settings with registered bundles by their whole ids, as results name them: the latest will be another.

    Raises:
        ConfigError: when a word names none, or several.
    """
    named = named_paths(config.bundle)
    if config.registry is None or not any(registered_id(path) for _, path in named):
        return config
    found = []
    with Registry.open(config.registry, config.keys) as registry:
        for label, path in named:
            word = registered_id(path)
            place = str(path) if word is None else registry.named(word).id
            found.append(place if label == path.name else f"{label}={place}")
    return config.model_copy(update={"bundle": tuple(found)})


def _candidate(config: EvaluateConfig, path: Path, record: OwnerRecord) -> Candidate:
    bundle_id = registered_id(path)
    if bundle_id is None or config.registry is None:
        bundle = open_bundle(path)
        return Candidate(bundle, read_own(bundle, record), record)
    with Registry.open(config.registry, config.keys) as registry:
        entry = accepted(registry, bundle_id)
        verified = read_registered(registry, entry, record)
        return Candidate(open_bundle(registry.bundle_folder(entry.id)), verified, record)


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
    whole = reference.kept == tuple(range(reference.num_blocks))
    if not whole or reference.channels or reference.encodings:
        raise ConfigError(
            f"{what} was tuned on a package that does not keep all of the model",
            hint="tune references on a package of: offsite distill MODEL --method keep-all --steps 0",
        )
    if bundle.manifest.adapter.head != first.manifest.adapter.head:
        raise ConfigError(f"{what} is for another task than the bundles, or for other labels")
    wanted, fits = _FITS[row]
    if not fits(bundle, first):
        found = bundle.manifest.adapter
        raise ConfigError(f"{what} is {found.kind} with placement {found.placement}, expected {wanted}")
