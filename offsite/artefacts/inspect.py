"""Opening a package, round or bundle by what its manifest states, without loading a tensor."""

from __future__ import annotations

import json
import re
from pathlib import Path

from offsite.artefacts.bundle import BUNDLE_FORMAT, Bundle, open_bundle
from offsite.artefacts.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME
from offsite.artefacts.package import PACKAGE_FORMAT, Package, open_package
from offsite.artefacts.round import ROUND_FORMAT, Round, open_round
from offsite.errors import BadSchema, WrongBinding
from offsite.tensors import TensorSpec


def inspect_artefact(path: Path) -> Package | Round | Bundle:
    """Return the package, round or bundle at `path`, with every file checked against its manifest.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    manifest = path / MANIFEST_NAME
    if manifest.is_symlink() or not manifest.is_file() or manifest.stat().st_size > MANIFEST_LIMIT_BYTES:
        return open_package(path)  # refuses it
    try:
        stated = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError):
        raise BadSchema(f"{MANIFEST_NAME} of {path.name!r} is not JSON") from None
    found = stated.get("format") if isinstance(stated, dict) else None
    if found == BUNDLE_FORMAT:
        return open_bundle(path)
    if found == ROUND_FORMAT:
        return open_round(path)
    if found != PACKAGE_FORMAT:
        shown = found if isinstance(found, str) and re.fullmatch(r"[a-z/0-9-]{1,40}", found) else "another format"
        known = ", ".join((PACKAGE_FORMAT, ROUND_FORMAT, BUNDLE_FORMAT))
        raise WrongBinding(f"{path.name!r} is {shown}, expected one of {known}")
    return open_package(path)


def tensors_of(artefact: Package | Round | Bundle) -> dict[str, TensorSpec]:
    """Return the tensors that the artefact declares."""
    if isinstance(artefact, Round):
        return {name: spec for tensors in artefact.manifest.stated().values() for name, spec in tensors.items()}
    return artefact.manifest.tensors
