"""The folder that plugging in writes: an adapter under the full model's own names, or a merged checkpoint.

It stays with the owner. Three forms, each with ``offsite.json``, which binds the base model and every file:

- *peft*: LoRA, rsLoRA and DoRA as a standard PEFT folder, which peft, transformers and vLLM open without offsite;
- *own*: whole blocks and BitFit as ``adapter.safetensors`` under the full model's tensor names;
- *merged*: a whole checkpoint, which needs no base.

Each holds the tokenizer and a README for others, and is fit to travel: the full model stands in it by name and digest.
On opening: manifest size, format, schema; exact set of files; sizes and digests; the base model's digest; the exact
set of tensors with shapes and dtypes; finite values. ``adapter_config.json`` is for others: nothing is read from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from adapters.heads import only_head, without_head
from offsite.artefacts.bundle import TENSOR_FILE, AdapterSpec, Head
from offsite.artefacts.manifest import FileEntry, check_files, entries, read_manifest, write_manifest
from offsite.digests import DIGEST_PATTERN, model_digest
from offsite.encoders.classifier import classifier_name, trunk_prefix
from offsite.errors import BadDigest, BadSchema, ConfigError, UnsupportedModel, WrongNames
from offsite.evaluation.heads import SCORE
from offsite.evaluation.results import SPARE_PATTERN, WAY_PATTERN
from offsite.modelling.dtypes import cast_model, finer, stored_in
from offsite.modelling.load import load_model, load_reader
from offsite.seq2seq.models import is_seq2seq
from offsite.staging import make_readable
from offsite.strictjson import Sparse
from offsite.tensors import TensorSpec, read_tensors, torch_dtype
from offsite.vision.pixels import FILE_NAME, as_preprocessor
from offsite.vision.reader import ImageReader, Reader, tokenizer_in
from server.plugging.card import CARD_NAME, Card, Form
from server.plugging.fit import Fitted, full_name, plain_model, plug, plug_mixed, require_base
from server.plugging.fullmodel import Kind
from server.plugging.fullmodel import found as found_model
from server.plugging.ways import Way
from server.registry.config import ID_PATTERN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTED_FORMAT = "offsite/adapted/1"
PEFT_TENSOR_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"

_BESIDE = r"README\.md|[A-Za-z0-9][A-Za-z0-9_.-]*\.(json|jinja|txt|model)"
_FILES = {
    "peft": re.compile(rf"adapter_model\.safetensors|{_BESIDE}", re.ASCII),
    "own": re.compile(rf"adapter\.safetensors|{_BESIDE}", re.ASCII),
    "merged": re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors|{_BESIDE}", re.ASCII),
}
_IN_PEFT = "base_model.model."
_PEFT_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


class AdaptedManifest(Sparse):
    """The content of an adapted folder's ``offsite.json``.

    ``base`` is what the full model is called, and ``base_kind`` whether that is a name or the last part of its folder's
    path; before there was a ``base_kind`` it was the folder's whole path. ``intake`` is the id of the bundle in the
    registry, ``scale`` the share of the bundle's update that was plugged in, ``corrected`` whether the emulator's fault
    was taken out of it first; ``adapter`` and the tensors are as written, with both done. ``way`` is there where more
    is to be said than a share of all modules (``server/plugging/ways.py``), and ``spare_text`` a digest of the public
    text's tokens where directions were spared. ``sites`` maps the canonical blocks that carry the adapter to the full
    model's modules, and ``tensors`` declares its tensors under canonical names, in the full model's shapes.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"way", "spare_text", "corrected"})

    format: str = ADAPTED_FORMAT
    form: Form
    base: str
    base_kind: Kind = "name"
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    bundle_digest: str = Field(pattern=DIGEST_PATTERN)
    merged_digest: str | None = Field(None, pattern=DIGEST_PATTERN)
    intake: str | None = Field(None, pattern=ID_PATTERN)
    scale: float = Field(1.0, gt=0, le=1)
    way: str = Field("", pattern=WAY_PATTERN)
    spare_text: str = Field("", pattern=SPARE_PATTERN)
    corrected: bool = False
    adapter: AdapterSpec
    sites: dict[str, str]
    tensors: dict[str, TensorSpec]
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        way = self.plugged
        if way.mix != 1 or (way.spare is not None) != bool(self.spare_text):
            raise ValueError("the way and the text that was spared do not agree")
        return self

    @property
    def plugged(self) -> Way:
        """How the adapter was plugged in.

        Raises:
            ValueError: when share and word do not agree.
        """
        try:
            return Way.stated(self.scale, self.way)
        except ConfigError as error:
            raise ValueError(str(error)) from None


def open_adapted(path: Path) -> AdaptedManifest:
    """Return the manifest of the adapted folder at `path` once every file agrees with it; no tensor is read.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    manifest, _ = read_manifest(path, AdaptedManifest, ADAPTED_FORMAT)
    check_files(path, manifest.files, _FILES[manifest.form])
    if manifest.form != "merged" and tensor_file(manifest.form) not in manifest.files:
        raise WrongNames(f"adapted folder {path.name!r} binds no {tensor_file(manifest.form)}")
    if (manifest.form == "merged") != (manifest.merged_digest is not None):
        raise BadSchema(f"adapted folder {path.name!r}: a merged_digest belongs to the merged form and to no other")
    return manifest


def load_adapted(
    path: Path,
    base: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    mix: float = 1.0,
    seq2seq: bool = False,
) -> tuple[PreTrainedModel, Reader]:
    """Return the adapted model in evaluation mode, and its tokenizer or reader of images, once every check has passed.

    One with a head carries it as `offsite.evaluation.heads` reads it; merged it is one of transformers' classes for
    sequence classification, or for tags of token classification.

    Args:
        path: a folder that ``offsite plug-in`` wrote, in any of its forms.
        base: the full model; default: what `server.plugging.fullmodel.found` finds. Not used by a merged folder.
        dtype: of the parameters but those that the model keeps finer; ``auto`` keeps the full model's.
        mix: share of the adapted model's probabilities in (0, 1]; the rest are the full model's, in a second pass.
        seq2seq: an encoder-decoder is taken too.

    Raises:
        ConfigError: when the full model is not found, or a merged folder is to be mixed, which holds none.
        WrongBinding: when it is another model than the adapter was plugged into.
        ArtefactError: with the subclass of any other check that failed.
    """
    manifest = open_adapted(path)
    if mix != 1 and manifest.form == "merged":
        raise ConfigError(
            f"--mix: {path.name!r} is a merged checkpoint: the full model is not in it", hint="plug in without --merge"
        )
    if manifest.form == "merged":
        source = str(path)
    else:
        source = base or found_model(path, base=manifest.base, kind=manifest.base_kind, digest=manifest.base_digest)
    has_head = manifest.adapter.head is not None
    task = manifest.adapter.task if manifest.form == "merged" and has_head else None
    model = load_model(source, with_head=task, encoders=has_head, seq2seq=seq2seq and not has_head)
    stay = {} if dtype == "auto" else finer(model, stored_in(model), torch_dtype(dtype))
    found = model_digest(model)
    if manifest.form == "merged":
        if found != manifest.merged_digest:
            raise BadDigest(f"the tensors of {path.name!r} are not those that were merged")
    else:
        require_base(model, found, manifest.base_digest, f"adapter {path.name!r}")
        if mix != 1 and is_seq2seq(model):
            raise ConfigError(f"--mix: {path.name!r} is for an encoder-decoder, which is not mixed")
        fitted = read_stored(path, manifest)
        model = plain_model(plug(model, fitted)) if mix == 1 else plug_mixed(model, fitted, mix)
    if dtype != "auto":
        cast_model(model, torch_dtype(dtype), stay=stay)
    model.requires_grad_(False)
    return model.eval().to(device), load_reader(source)  # type: ignore[arg-type]


def load_writer(path: Path, base: str | None, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return an adapted model that writes text, its tokenizer, and a digest of the folder.

    Raises:
        UnsupportedModel: when it has a head, which writes no text.
        ConfigError, ArtefactError: as `load_adapted`.
    """
    manifest, digest = read_manifest(path, AdaptedManifest, ADAPTED_FORMAT)
    if manifest.adapter.head is not None:
        raise UnsupportedModel(
            f"adapted folder {path.name!r} has a head for {manifest.adapter.head.task}: it writes no text",
            hint="offsite serve answers with it, offsite evaluate measures it",
        )
    model, reader = load_adapted(path, base, device=device, seq2seq=True)
    return model, tokenizer_in(reader), digest


def read_adapter(path: Path, model: PreTrainedModel, base_digest: str) -> Fitted:
    """Return the adapter in the folder at `path`, for that full model, once every check has passed.

    Args:
        path: a folder that ``offsite plug-in`` wrote, not merged.
        model: the full model without an adapter; not changed.
        base_digest: ``offsite.digests.model_digest(model)``.

    Raises:
        ConfigError: when the folder holds a merged checkpoint.
        WrongBinding: when the adapter belongs to another model.
        ArtefactError: with the subclass of any other check that failed.
    """
    manifest = open_adapted(path)
    if manifest.form == "merged":
        raise ConfigError(f"{path.name!r} is a merged checkpoint, no adapter", hint="plug in without --merge")
    require_base(model, base_digest, manifest.base_digest, f"adapter {path.name!r}")
    return read_stored(path, manifest)


def finish_folder(
    stage: Path, tokenizer: Reader, card: Card, *, sites: Mapping[str, str], **stated: Any
) -> AdaptedManifest:
    """Add tokenizer, README and manifest to the tensors in `stage`, all readable; return the manifest.

    Args:
        tokenizer: or of a vision encoder what reads images, whose numbers are written for others.
        stated: the manifest's other fields that the card does not hold.
    """
    if isinstance(tokenizer, ImageReader):
        stated_pixels = as_preprocessor(tokenizer.settings, encoder_in(card.adapter))
        (stage / FILE_NAME).write_text(json.dumps(stated_pixels, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        alone = isinstance(tokenizer.chat_template, str)
        tokenizer.save_pretrained(stage, save_jinja_files=alone)  # several templates would be a folder of files
    (stage / CARD_NAME).write_text(card.text(), encoding="utf-8")
    manifest = AdaptedManifest(
        form=card.form,
        base=card.base.name,
        base_kind=card.base.kind,
        base_digest=card.base_digest,
        scale=card.way.scale,
        way=card.way.word,
        corrected=card.corrected,
        adapter=card.adapter,
        sites=dict(sites),
        files=entries(stage, [path.name for path in stage.iterdir()]),
        **stated,
    )
    write_manifest(stage, manifest)
    make_readable(stage)
    return manifest


def tensor_file(form: Form) -> str:
    """Return the name of the tensor file of an adapter folder."""
    return PEFT_TENSOR_FILE if form == "peft" else TENSOR_FILE


def stored_names(
    form: Form, sites: Mapping[str, str], names: Iterable[str], head: Head | None = None
) -> dict[str, str]:
    """Map canonical tensor names to those in the folder's tensor file.

    Args:
        head: the adapter's. The PEFT folder of an encoder's is of a classifier, inside of which the encoder lies.

    Raises:
        BadSchema: when a name lies in no site or has no PEFT form, or two names meet.
    """
    found = {}
    encoder = "" if head is None else head.encoder
    for name in names:
        if only_head({name: None}):
            own = name.removeprefix("head.")
            inside = classifier_name(encoder, own, head.task) if head and encoder else f"{SCORE}.{own}"
            found[name] = f"{_IN_PEFT}{inside}" if form == "peft" else f"{SCORE}.{own}"
            continue
        path, part = full_name(name, sites), name.rpartition(".")[2]
        if form == "peft":
            if part not in _PEFT_PARTS:
                raise BadSchema(f"tensor {name!r} has no form in a PEFT folder")
            inside = f"{trunk_prefix(encoder)}." if encoder else ""
            path = f"{_IN_PEFT}{inside}{path.removesuffix(part)}{_PEFT_PARTS[part]}"
        found[name] = path
    if len(set(found.values())) != len(found):
        raise BadSchema("two tensors of the adapter have one place in the full model")
    return found


def encoder_in(spec: AdapterSpec) -> str:
    """Return the architecture of the encoder that an adapter's head is of; nothing of any other adapter."""
    return "" if spec.head is None else spec.head.encoder


def read_stored(path: Path, manifest: AdaptedManifest) -> Fitted:
    """Return the adapter in an adapted folder that is not merged; no model is asked whether it fits.

    Raises:
        ArtefactError: with the subclass of the check on tensors that failed.
    """
    names = stored_names(manifest.form, manifest.sites, manifest.tensors, manifest.adapter.head)
    expected = {names[name]: spec for name, spec in manifest.tensors.items()}
    stored = read_tensors(path / tensor_file(manifest.form), expected)
    tensors = {name: stored[file] for name, file in names.items()}
    return Fitted(manifest.adapter, without_head(tensors), manifest.sites, only_head(tensors))
