"""The bundle: what a client sends back. Read this file to know what crosses and what is checked on arrival.

A bundle is a folder of two files: ``offsite.json``, the manifest, and ``adapter.safetensors``, the adapter's tensors
under canonical names (``top.1.mlp.up_proj.weight``, ``bottom.0.self_attn.q_proj.lora_A``, ``head.weight``). It binds
the package it was tuned on, in a federation the round that it answers, and the task of its job if that carries one.
Beyond shapes, and the names of a head's labels, it discloses only the figures the client named; by default none.

On arrival, in this order: manifest size, format, schema; exact set of files; sizes and digests; the package and base
model it is bound to; the exact set of tensors that its adapter has, with shapes and dtypes; finite values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from offsite.artefacts.manifest import FileEntry, check_files, entries, read_manifest, write_manifest
from offsite.digests import DIGEST_PATTERN
from offsite.encoders.trunk import MODEL_TYPES
from offsite.errors import ConfigError, WrongBinding, WrongNames
from offsite.staging import staged_folder
from offsite.strictjson import SHOWN, Sparse, require_seen
from offsite.tensors import (
    Name,
    TensorSpec,
    check_exact,
    check_finite,
    read_header,
    read_tensors,
    spec_of,
    torch_dtype,
    write_tensors,
)

if TYPE_CHECKING:
    import torch

    from offsite.artefacts.package import Package

BUNDLE_FORMAT = "offsite/bundle/1"
TENSOR_FILE = "adapter.safetensors"
DISCLOSABLE = ("num_records", "num_tokens", "steps", "validation_loss")

FILE_NAMES = re.compile(re.escape(TENSOR_FILE))


MAX_LABELS = 1024
LABELLED = ("classify", "tag")
"""Tasks of heads that tell labels apart."""

ENCODER_TASKS = ("classify", "regress", "tag")
"""Tasks of heads that an encoder may have."""

Label = Annotated[str, Field(min_length=1, max_length=100, pattern=rf"^{SHOWN}+$"), AfterValidator(require_seen)]

HeadTask = Literal["reward", "classify", "regress", "tag"]


class Head(Sparse):
    """What an adapter answers in place of a next token: one number of a text, or one of each label.

    ``task`` is ``reward``, ``classify``, ``regress`` (a value of a text) or ``tag`` (a label of each of its tokens, on
    an encoder); an adapter without a head is one for text (``causal-lm``). ``labels`` are the names of a classifier's
    classes or of tags, in the order of the head's rows; a reward or a value has none. ``hidden`` is the size of
    the state that is read. Its tensors and the place that it reads are told in ``adapters/heads.py``. ``encoder`` is
    the architecture of an encoder's head, whose form that decides; empty for a causal language model's.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"encoder"})

    task: HeadTask
    labels: tuple[Label, ...] = Field((), max_length=MAX_LABELS)
    hidden: int = Field(ge=1, le=2**20)
    encoder: str = Field("", pattern=rf"^({'|'.join(MODEL_TYPES)})?$")

    @model_validator(mode="after")
    def _names_classes(self) -> Head:
        if self.task not in ENCODER_TASKS and self.encoder:
            raise ValueError("an encoder has no reward head")
        if self.task == "reward" and self.labels:
            raise ValueError("a reward model has no labels")
        if self.task == "regress" and self.labels:
            raise ValueError("a value has no labels")
        if self.task == "tag" and not self.encoder:
            raise ValueError("tags are of an encoder")
        if self.task in LABELLED and len(self.labels) < 2:
            raise ValueError("a classifier has two labels or more")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label is named twice")
        return self

    @property
    def num_labels(self) -> int:
        """Rows of the head: one for a reward or a value, one for each label of a classifier."""
        return len(self.labels) or 1


class AdapterSpec(Sparse):
    """Which adapter, where it sits and how large it is; with a head, what it answers."""

    optional: ClassVar[frozenset[str]] = frozenset({"head"})

    kind: str = Field("blocks", pattern=r"^[a-z][a-z0-9-]{0,31}$")
    placement: str = Field("2+2", pattern=r"^(all|top|last:[1-9][0-9]{0,3}|[0-9]{1,4}\+[0-9]{1,4})$")
    targets: Literal["all-linear", "attention", "mlp"] = "all-linear"
    rank: int = Field(8, ge=1, le=4096)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    head: Head | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> AdapterSpec:
        if self.counts == (0, 0):
            raise ValueError("placement 0+0 leaves no block to train")
        return self

    @property
    def counts(self) -> tuple[int, int] | None:
        """Blocks of the bottom and top end that carry the adapter, counted from the outside.

        None for ``all`` and ``last:N``, which may take in blocks of the middle, and for ``top``, all of the top end.
        """
        if self.placement in ("all", "top") or self.last is not None:
            return None
        bottom, top = self.placement.split("+")
        return int(bottom), int(top)

    @property
    def task(self) -> Literal["causal-lm"] | HeadTask:
        """What the adapter is for."""
        return "causal-lm" if self.head is None else self.head.task

    @property
    def last(self) -> int | None:
        """How many blocks carry the adapter, the package's last ones, of ``last:N``; None for the other placements."""
        return int(self.placement.removeprefix("last:")) if self.placement.startswith("last:") else None


class BundleManifest(Sparse):
    """The content of a bundle's ``offsite.json``. ``task_digest`` is of the task that its job carries, if it does."""

    optional: ClassVar[frozenset[str]] = frozenset({"task_digest"})

    format: str
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    round_digest: str | None = Field(None, pattern=DIGEST_PATTERN)
    task_digest: str | None = Field(None, pattern=DIGEST_PATTERN)
    adapter: AdapterSpec
    tensors: dict[Name, TensorSpec]
    disclosed: dict[Literal["num_records", "num_tokens", "steps", "validation_loss"], float] = {}
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files all agreed with its manifest when it was opened."""

    path: Path
    manifest: BundleManifest
    digest: str

    @property
    def num_bytes(self) -> int:
        """Bytes that cross the wire: the tensor file; the manifest is not counted."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def bind(self, *, package_digest: str, base_digest: str) -> None:
        """Return only if the bundle was tuned on that package of that base model.

        Raises:
            WrongBinding: naming which of the two differs.
        """
        what = f"bundle {self.path.name!r}"
        if self.manifest.package_digest != package_digest:
            raise WrongBinding(
                f"{what} was tuned on package {self.manifest.package_digest[:19]}, not {package_digest[:19]}"
            )
        if self.manifest.base_digest != base_digest:
            raise WrongBinding(f"{what} belongs to base model {self.manifest.base_digest[:19]}, not {base_digest[:19]}")

    def load_tensors(self, expected: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors on the CPU, exactly the expected ones, all finite.

        Raises:
            WrongNames, WrongShape, NotFinite: when they are not.
        """
        check_exact(f"bundle {self.path.name!r}", self.manifest.tensors, expected)
        return read_tensors(self.path / TENSOR_FILE, expected)


def open_bundle(path: Path) -> Bundle:
    """Return the bundle at `path` once its files agree with the manifest; no tensor is read.

    Raises:
        ArtefactError: with the subclass of the check that failed, in the order the module's docstring gives.
    """
    manifest, digest = read_manifest(path, BundleManifest, BUNDLE_FORMAT)
    check_files(path, manifest.files, FILE_NAMES)
    if set(manifest.files) != {TENSOR_FILE}:
        raise WrongNames(f"bundle {path.name!r} binds no {TENSOR_FILE}")
    check_exact(f"bundle {path.name!r}", read_header(path / TENSOR_FILE), manifest.tensors)
    return Bundle(path, manifest, digest)


def write_bundle(
    out: Path,
    *,
    package: Package,
    spec: AdapterSpec,
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, TensorSpec],
    round_digest: str | None = None,
    task_digest: str | None = None,
    figures: Mapping[str, float] | None = None,
    disclose: tuple[str, ...] = (),
    before: Callable[[Path, str], None] | None = None,
) -> Bundle:
    """Write the bundle folder `out`, whole or not at all: the expected tensors and the figures named in `disclose`.

    Args:
        round_digest: of the federation's round that it answers, from whose weights the adapter was tuned.
        task_digest: of the task that the job carries, by which its rows were read.
        before: called with the finished folder under another name, and the bundle's digest, before it stands at `out`;
            what it raises keeps the bundle from standing there.

    Raises:
        ConfigError: when `out` exists, or `disclose` names a figure that may not be disclosed or is not in `figures`
            as a finite number.
        WrongNames, WrongShape, NotFinite: when `tensors` are not the expected, finite ones.
        RunFailed: when the disk is full.
    """
    unknown = sorted(set(disclose) - set(DISCLOSABLE))
    if unknown:
        raise ConfigError(f"--disclose: {unknown[0]!r} is not one of {', '.join(DISCLOSABLE)}")
    disclosed = {name: float((figures or {}).get(name, math.nan)) for name in disclose}
    for name, value in disclosed.items():
        if not math.isfinite(value):
            raise ConfigError(f"--disclose: this run has no finite figure {name!r}")
    dtypes = {name: torch_dtype(expected[name].dtype if name in expected else spec.dtype) for name in tensors}
    cast = {name: tensor.detach().to(dtypes[name]) for name, tensor in tensors.items()}
    check_exact("the adapter", {name: spec_of(tensor) for name, tensor in cast.items()}, expected)
    check_finite("the adapter", cast)
    with staged_folder(out) as stage:
        write_tensors(stage / TENSOR_FILE, cast)
        manifest = BundleManifest(
            format=BUNDLE_FORMAT,
            package_digest=package.digest,
            base_digest=package.manifest.base_digest,
            round_digest=round_digest,
            task_digest=task_digest,
            adapter=spec,
            tensors=dict(expected),
            disclosed=disclosed,  # type: ignore[arg-type]
            files=entries(stage, [TENSOR_FILE]),
        )
        digest = write_manifest(stage, manifest)
        if before is not None:
            before(stage, digest)
    return open_bundle(out)
