"""Packages, bundles, rounds, jobs, and the owner's record of a package, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from offsite.artefacts.bundle import Bundle
from offsite.artefacts.encodings import Encoding
from offsite.artefacts.inspect import inspect_artefact, tensors_of
from offsite.artefacts.job import JOB_LIMIT_BYTES, parse_job, read_job
from offsite.artefacts.layout import EncoderLayout, Layout
from offsite.artefacts.owner import read_owner_record
from offsite.artefacts.package import Package
from offsite.artefacts.round import Round
from offsite.console import say
from offsite.inspection.thing import Thing, read_plain
from offsite.inspection.words import adapter_words, ends, fact, facts, quoted, rows, shown, when
from offsite.tasks.task import told as told_task
from offsite.tensors import TensorSpec

_FILES_AGREE = "every file agrees with the manifest"


def show(thing: Thing) -> dict[str, object]:
    """A package, bundle or round is told; return its digest and sizes.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    artefact = inspect_artefact(thing.path)
    if isinstance(artefact, Bundle):
        told = _bundle(thing, artefact)
    else:
        told = _package(thing, artefact) if isinstance(artefact, Package) else _round(thing, artefact)
    rows("files", ["name", "bytes", "sha256"], [
        [name, f"{entry.bytes:,}", entry.sha256.removeprefix("sha256:")[:16]]
        for name, entry in artefact.manifest.files.items()
    ])  # fmt: skip
    if thing.tensors:
        listed = [[name, spec.dtype, "x".join(map(str, spec.shape))] for name, spec in tensors_of(artefact).items()]
        rows("tensors", ["name", "dtype", "shape"], listed)
    return {**told, "digest": artefact.digest, "bytes": artefact.num_bytes, "verified": True, "checked": _FILES_AGREE}


def _package(thing: Thing, package: Package) -> dict[str, object]:
    manifest, layout = package.manifest, package.layout
    say(f"package {thing.name}: {_FILES_AGREE}")
    settings = ", ".join(f"{name} {value}" for name, value in manifest.method.settings.items())
    num = len(layout.adaptable_middle)
    in_middle = f"and {num} modules of each middle block" if num else "only"
    facts(
        {
            "format": manifest.format,
            "digest": package.digest,
            "base model": manifest.base_digest,
            "architecture": f"{layout.model_type}: {_blocks(layout)}",
            "middle": f"{manifest.method.name}{f' ({settings})' if settings else ''}",
            "stored otherwise": _encodings(package),
            "adapters": f"on the ends {in_middle}",
        }
    )
    facts({name: f"{value:,.6g}" for name, value in manifest.figures.items()})  # apart: its names are the sender's
    facts(
        {
            "licence": manifest.licence or "none stated",
            "terms": f"{len(manifest.terms)} characters, in offsite.json" if manifest.terms else None,
        }
    )
    parts = _by_role(package.block_tensors())
    total = _num_parameters(manifest.tensors)
    counted = [[role, f"{count:,}"] for role, count in parts.items()]
    rows("parameters", ["part", "number"], [*counted, ["embeddings, norms, head", f"{total - sum(parts.values()):,}"]])
    told = {"kind": "package", "parameters": total, "middle_parameters": parts.get("middle", 0)}
    return {**told, "encoded_tensors": len(manifest.encodings)} if manifest.encodings else told


def _blocks(layout: Layout) -> str:
    """Return how many blocks of each role there are, of an encoder-decoder in either stack."""
    stacks: dict[str, Layout | EncoderLayout] = {"": layout}
    if layout.encoder is not None:
        stacks = {"encoder ": layout.encoder, "decoder ": layout}
    words = [
        f"{stack}{one.num_bottom} bottom + {one.num_middle} middle + {one.num_top} top" for stack, one in stacks.items()
    ]
    return ", ".join(words)


def _encodings(package: Package) -> str | None:
    """Return which tensors are stored as factors or packed, in words; None where none is."""
    counts = Counter(_encoding(one) for one in package.manifest.encodings.values())
    return ", ".join(f"{num} tensors {words}" for words, num in sorted(counts.items())) or None


def _encoding(one: Encoding) -> str:
    if one.kind != "low-rank":
        return f"packed as {one.kind} in groups of {one.group}"
    packed = f", packed as {one.factors} in groups of {one.group}" if one.factors else ""
    return f"as factors of rank {one.rank}{packed}"


def _bundle(thing: Thing, bundle: Bundle) -> dict[str, object]:
    manifest = bundle.manifest
    say(f"bundle {thing.name}: {_FILES_AGREE}")
    disclosed = ", ".join(f"{name} {value:g}" for name, value in manifest.disclosed.items())
    facts(
        {
            "format": manifest.format,
            "digest": bundle.digest,
            "package": manifest.package_digest,
            "base model": manifest.base_digest,
            "round": manifest.round_digest,
            "task": manifest.task_digest,
            "adapter": adapter_words(manifest.adapter, has_rank="lora_A" in " ".join(manifest.tensors)),
            "disclosed": disclosed or "nothing beyond shapes",
        }
    )
    parts = _by_role(manifest.tensors)
    rows("parameters", ["part", "number"], [[role, f"{count:,}"] for role, count in parts.items()])
    return {"kind": "bundle", "parameters": _num_parameters(manifest.tensors)}


def _round(thing: Thing, found: Round) -> dict[str, object]:
    manifest = found.manifest
    say(f"round {thing.name}: {_FILES_AGREE}")
    rate = manifest.learning_rate
    facts(
        {
            "format": manifest.format,
            "digest": found.digest,
            "federation": manifest.federation_id,
            "round": f"{manifest.round} of {manifest.num_rounds}: {manifest.task}",
            "package": manifest.package_digest,
            "base model": manifest.base_digest,
            "asks for": f"{manifest.adapter.kind} on {manifest.adapter.placement}, {manifest.steps} steps",
            "rate": "the client's own" if rate is None else f"{rate:g}",
            "answered by": "a part of a secure sum" if manifest.secure is not None else "a bundle",
        }
    )
    parts = _by_role(manifest.update)
    rows("numbers that earlier rounds added", ["part", "number"], [[role, f"{n:,}"] for role, n in parts.items()])
    return {"kind": "round", "parameters": _num_parameters(manifest.update)}


def show_job(thing: Thing) -> dict[str, object]:
    """A job is told: who, what, until when, how much.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    is_file = thing.path.is_file()
    opened = parse_job(read_plain(thing.path, JOB_LIMIT_BYTES)) if is_file else read_job(thing.path)
    job = opened.job
    checked = "its form alone; a plain job carries no signature, offsite open checks those of the sealed one"
    say(f"job {thing.name}; checked: {checked}")
    advised = "none advised: the client's own" if job.learning_rate is None else f"{job.learning_rate:g} advised"
    facts(
        {
            "job": job.job_id,
            "digest": opened.digest,
            "owner": thing.names.told(job.owner),
            "client": thing.names.told(job.client),
            "created": when(job.created, thing.now),
            "expires": ends(job.expires, thing.now),
            "adapter": adapter_words(job.adapter),
            "rounds": job.rounds,
            "rate": advised,
            "cap": f"a module's update at most {job.policy.max_relative_frobenius:g} times the weight's Frobenius norm "
            f"and {job.policy.max_relative_spectral:g} times its largest singular value"
            + (f"; the head's Frobenius norm at most {job.policy.max_head_norm:g}" if job.adapter.head else ""),
            "package": job.package_digest,
            "base model": job.base_digest,
        }
    )
    if job.task is not None:
        facts({name: shown(value) for name, value in told_task(job.task)})
        quoted("the task in words", job.task.description)
        for number, prompt in enumerate(job.task.prompts, 1):
            quoted(f"prompt {number}", prompt)
    if job.terms:
        quoted("terms", job.terms)
    else:
        fact("terms", "none in words")
    stated = job.model_dump(mode="json", exclude={"format"})
    told = {"kind": "job", "digest": opened.digest, "expired": thing.now > job.expires}
    return {**stated, **told, "verified": False, "checked": checked}


def show_owner(thing: Thing) -> dict[str, object]:
    """The owner's record of a package is told, but for what it keeps secret: which blocks and channels were kept.

    Raises:
        ArtefactError: when it is no such record.
    """
    record = read_owner_record(thing.path)
    say(f"owner's record {thing.name}: stays with the owner; nobody else may have it")
    facts(
        {
            "package": record.package_digest,
            "base model": record.base_digest,
            "maps": f"{len(record.kept)} blocks of the package onto {record.num_blocks} of the full model "
            f"({shown(record.layout.model_type)}); which, is not shown",
        }
    )
    if record.dial is not None:
        dial = record.dial
        for name, found in (("predicted", dial.predicted), ("measured", dial.measured)):
            facts(
                {
                    f"{name} for {shown(dial.target)}={dial.value:g}": f"recovery {found.recovery:.2f}, withheld "
                    f"{found.withheld:.2f} nats, gap {found.gap:.2f}, {found.num_bytes:,} bytes"
                }
            )
    checked = "its form alone; it is not signed"
    return {
        "kind": "owner",
        "package_digest": record.package_digest,
        "base_digest": record.base_digest,
        "num_blocks": record.num_blocks,
        "verified": False,
        "checked": checked,
    }


def _by_role(tensors: Mapping[str, TensorSpec]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, spec in tensors.items():
        counts[name.split(".", 1)[0]] += prod(spec.shape)
    return dict(counts)


def _num_parameters(tensors: Mapping[str, TensorSpec]) -> int:
    return sum(prod(spec.shape) for spec in tensors.values())
