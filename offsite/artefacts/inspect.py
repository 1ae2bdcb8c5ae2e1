"""`offsite inspect ARTEFACT`: show what crosses, verified, without loading a tensor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

from offsite.artefacts.bundle import BUNDLE_FORMAT, Bundle, open_bundle
from offsite.artefacts.config import InspectConfig
from offsite.artefacts.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME
from offsite.artefacts.package import PACKAGE_FORMAT, Package, open_package
from offsite.artefacts.round import ROUND_FORMAT, Round, open_round
from offsite.console import say, table
from offsite.errors import BadSchema
from offsite.tensors import TensorSpec


def inspect_artefact(path: Path) -> Package | Round | Bundle:
    """Return the package, round or bundle at `path`, with every file checked against its manifest.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    manifest = path / MANIFEST_NAME
    if manifest.is_file() and manifest.stat().st_size <= MANIFEST_LIMIT_BYTES:
        try:
            stated = json.loads(manifest.read_bytes())
        except (ValueError, RecursionError):
            raise BadSchema(f"{MANIFEST_NAME} of {path.name!r} is not JSON") from None
        if isinstance(stated, dict) and stated.get("format") == BUNDLE_FORMAT:
            return open_bundle(path)
        if isinstance(stated, dict) and stated.get("format") == ROUND_FORMAT:
            return open_round(path)
    return open_package(path)


def run(config: InspectConfig) -> dict[str, object]:
    """Print what the artefact holds, on stderr, and return its digest and sizes."""
    artefact = inspect_artefact(config.artefact)
    if isinstance(artefact, Bundle):
        shown = _show_bundle(artefact)
    else:
        shown = _show_package(artefact) if isinstance(artefact, Package) else _show_round(artefact)
    table("files", ["name", "bytes", "sha256"], [
        [name, f"{entry.bytes:,}", entry.sha256.removeprefix("sha256:")[:16]]
        for name, entry in artefact.manifest.files.items()
    ])  # fmt: skip
    if config.tensors:
        rows = [[name, spec.dtype, "x".join(map(str, spec.shape))] for name, spec in tensors_of(artefact).items()]
        table("tensors", ["name", "dtype", "shape"], rows)
    return {**shown, "digest": artefact.digest, "bytes": artefact.num_bytes, "verified": True}


def _show_package(package: Package) -> dict[str, object]:
    manifest, layout = package.manifest, package.layout
    say(f"package {package.path.name}: every file agrees with the manifest")
    say(f"  format       {manifest.format}")
    say(f"  digest       {package.digest}")
    say(f"  base model   {manifest.base_digest}")
    counts = f"{layout.num_bottom} bottom + {layout.num_middle} middle + {layout.num_top} top"
    say(f"  architecture {layout.model_type}: {counts}")
    settings = ", ".join(f"{name} {value}" for name, value in manifest.method.settings.items())
    say(f"  middle       {manifest.method.name}{f' ({settings})' if settings else ''}")
    adaptable = (
        f"and {len(layout.adaptable_middle)} modules of each middle block" if layout.adaptable_middle else "only"
    )
    say(f"  adapters     on the ends {adaptable}")
    for name, value in manifest.figures.items():
        say(f"  {name:<12} {value:,.6g}")
    say(f"  licence      {manifest.licence or 'none stated'}")
    if manifest.terms:
        say(f"  terms        {len(manifest.terms)} characters, in offsite.json")
    parts = _by_role(package.block_tensors())
    rows = [[role, f"{count:,}"] for role, count in parts.items()]
    total = _num_parameters(manifest.tensors)
    rows.append(["embeddings, norms, head", f"{total - sum(parts.values()):,}"])
    table("parameters", ["part", "number"], rows)
    return {"kind": PACKAGE_FORMAT.split("/")[1], "parameters": total, "middle_parameters": parts.get("middle", 0)}


def _show_bundle(bundle: Bundle) -> dict[str, object]:
    manifest = bundle.manifest
    spec = manifest.adapter
    say(f"bundle {bundle.path.name}: every file agrees with the manifest")
    say(f"  format       {manifest.format}")
    say(f"  digest       {bundle.digest}")
    say(f"  package      {manifest.package_digest}")
    say(f"  base model   {manifest.base_digest}")
    low_rank = f", rank {spec.rank} on {spec.targets}" if "lora_A" in " ".join(manifest.tensors) else ""
    say(f"  adapter      {spec.kind} on {spec.placement}{low_rank}, {spec.dtype}")
    disclosed = ", ".join(f"{name} {value:g}" for name, value in manifest.disclosed.items())
    say(f"  disclosed    {disclosed or 'nothing beyond shapes'}")
    parts = _by_role(manifest.tensors)
    table("parameters", ["part", "number"], [[role, f"{count:,}"] for role, count in parts.items()])
    return {"kind": BUNDLE_FORMAT.split("/")[1], "parameters": _num_parameters(manifest.tensors)}


def _show_round(found: Round) -> dict[str, object]:
    manifest = found.manifest
    say(f"round {found.path.name}: every file agrees with the manifest")
    say(f"  format       {manifest.format}")
    say(f"  digest       {found.digest}")
    say(f"  federation   {manifest.federation_id}")
    say(f"  round        {manifest.round} of {manifest.num_rounds}: {manifest.task}")
    say(f"  package      {manifest.package_digest}")
    say(f"  base model   {manifest.base_digest}")
    say(f"  asks for     {manifest.adapter.kind} on {manifest.adapter.placement}, {manifest.steps} steps")
    parts = _by_role(manifest.update)
    table("numbers that earlier rounds added", ["part", "number"], [[role, f"{n:,}"] for role, n in parts.items()])
    return {"kind": ROUND_FORMAT.split("/")[1], "parameters": _num_parameters(manifest.update)}


def tensors_of(artefact: Package | Round | Bundle) -> dict[str, TensorSpec]:
    """Return the tensors that the artefact declares."""
    if isinstance(artefact, Round):
        return {name: spec for tensors in artefact.manifest.stated().values() for name, spec in tensors.items()}
    return artefact.manifest.tensors


def _by_role(tensors: Mapping[str, TensorSpec]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, spec in tensors.items():
        counts[name.split(".", 1)[0]] += prod(spec.shape)
    return dict(counts)


def _num_parameters(tensors: Mapping[str, TensorSpec]) -> int:
    return sum(prod(spec.shape) for spec in tensors.values())
