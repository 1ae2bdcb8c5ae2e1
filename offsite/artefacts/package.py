"""The package: what the owner sends. Read this file to know what crosses and what is checked on arrival.

A package is a folder:

- ``offsite.json``: the manifest. It binds every other file by size and SHA-256, declares every tensor by name,
  shape and dtype, and says which blocks are *bottom*, *middle* and *top*. Its own SHA-256 is the package's digest.
  ``encodings`` says which tensors are stored as other ones, and how (`offsite.artefacts.encodings`).
- ``config.json``: the architecture's own settings, from an allow-list: the fields its configuration class declares, and
  a few plain numbers that modelling code reads without that (`offsite.artefacts.layout.UNDECLARED`).
- ``model.safetensors`` (or numbered shards): ends and emulator under transformers' names in the package's own block
  numbering, each tensor in the dtype that it has in the full model. The numbers of the owner's blocks and channels are
  not in it.
- ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``: text in, text out; of several named chat
  templates the default one. A vision encoder's package has none of them: ``pixels`` in its manifest says, in a few
  numbers, how an image becomes what the model reads (`offsite.vision.pixels`).

When whole blocks were dropped, or all kept, ``AutoModelForCausalLM.from_pretrained`` opens the folder. A middle of
another width is rebuilt here, from declared shapes. Nothing in a package names code, a class or a path: the
architecture is looked up by ``model_type`` in transformers' own table, and the tokenizer is always the fast one.

On arrival, in this order: manifest size, format, schema; exact set of files; sizes and digests; keys of the
configuration files; exact set of tensors, or the parts they are stored as, with shapes and dtypes; a layout that fits
them. Then, when the model is rebuilt (``offsite/artefacts/rebuild.py``): only settings the architecture declares; the
layout's number of blocks, before any is built; exactly its tensors; finite values, also of what was decoded; a model
that reads nothing ahead. The owner's side tries all of
it before it writes a package (``offsite/artefacts/trial.py``). When the tokenizer is: patterns of a simple form alone
(``offsite/artefacts/patterns.py``), before the client's text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from offsite.artefacts import rebuild
from offsite.artefacts.encodings import Encoded, decode
from offsite.artefacts.known import KnownFiles
from offsite.artefacts.layout import (
    TOKENIZER_CLASS,
    TOKENIZER_KEYS,
    Layout,
    Method,
    PackageManifest,
    config_keys,
    read_json,
    require_modest,
    saved_tensors,
    shard_headers,
    stored_tensors,
    undeclared,
    without_code,
)
from offsite.artefacts.manifest import check_files, entries, read_manifest, write_manifest
from offsite.artefacts.trial import require_rebuildable
from offsite.encoders.trunk import states_encoder
from offsite.errors import BadSchema, ConfigError, UnsupportedModel, WrongNames, WrongShape
from offsite.mapped import let_go
from offsite.modelling.load import one_template
from offsite.seq2seq.refusals import not_taken
from offsite.staging import staged_folder
from offsite.tensors import (
    MAX_TENSORS,
    TensorSpec,
    check_exact,
    spec_of,
    torch_dtype,
    write_tensors,
)
from offsite.vision.models import VISION_TYPES, states_vision
from offsite.vision.pixels import PixelSettings
from offsite.vision.reader import ImageReader, Reader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_FORMAT = "offsite/package/1"
SHARD_LIMIT_BYTES = 4 * 2**30

_INDEX = "model.safetensors.index.json"
_OF_TEXT = ("tokenizer.json", "tokenizer_config.json")
FILE_NAMES = re.compile(
    r"config\.json|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja"
    r"|model\.safetensors|model-[0-9]{5}-of-[0-9]{5}\.safetensors|model\.safetensors\.index\.json"
)


@dataclass(frozen=True)
class Package:
    """A package whose files all agreed with its manifest when it was opened."""

    path: Path
    manifest: PackageManifest
    digest: str

    @property
    def layout(self) -> Layout:
        """The layout the manifest states."""
        return self.manifest.layout

    @property
    def num_bytes(self) -> int:
        """Bytes that cross the wire: the bound files; the manifest itself is not counted."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def is_encoder(self) -> bool:
        """Whether the model is an encoder, which has no next tokens to learn."""
        return states_encoder(read_json(self.path / "config.json"))

    def require_text(self, what: str, *, seq2seq: bool = False) -> None:
        """Return only if the model writes text, as `what` needs.

        Args:
            seq2seq: an encoder-decoder is taken too.

        Raises:
            UnsupportedModel: when it is an encoder, or an encoder-decoder that is not taken.
        """
        if self.is_seq2seq and not seq2seq:
            raise not_taken(f"package {self.path.name!r}")
        if self.is_encoder:
            raise UnsupportedModel(
                f"package {self.path.name!r} holds an encoder, which writes no text: {what} goes with models that do",
                hint="an encoder is tuned with --objective classify, audited as a bundle, plugged in and evaluated",
            )

    @property
    def pixels(self) -> PixelSettings | None:
        """How images are read, of a vision encoder; None of any other model."""
        return self.manifest.pixels

    @property
    def is_seq2seq(self) -> bool:
        """Whether the model is an encoder-decoder, which learns from prompts and answers."""
        return self.layout.encoder is not None

    def load_model(self, *, dtype: str = "float32", device: str = "cpu", seq2seq: bool = False) -> PreTrainedModel:
        """Return the ends and emulator as one model, in evaluation mode, rebuilt from declared shapes.

        Args:
            dtype: dtype of the floating tensors in memory, whatever the file holds.
            seq2seq: an encoder-decoder is taken too.

        Raises:
            UnsupportedModel: when it is an encoder-decoder and none is taken.
            BadSchema: when ``config.json`` holds a key or value that the architecture does not declare.
            WrongNames, WrongShape, NotFinite: when the tensors are not the declared, finite ones.
        """
        if self.is_seq2seq and not seq2seq:
            raise not_taken(f"package {self.path.name!r}")
        return rebuild.load_model(self.path, self.manifest, dtype, device)

    def empty_model(self) -> PreTrainedModel:
        """Return the model that `load_model` does, without memory: every tensor is on the meta device.

        Raises:
            BadSchema, WrongNames, WrongShape: as `load_model`.
        """
        return rebuild.meta_model(self.path, self.manifest)

    def load_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the tensors of these names, as they are declared, on the CPU; no others are read.

        Raises:
            WrongNames: when the package declares no such tensor.
            WrongShape, NotFinite, BadSchema: when a file does not hold what the package declares.
        """
        return rebuild.read_declared(self.path, self.manifest, names)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, built from ``tokenizer.json``; no class is looked up by name.

        Raises:
            BadSchema: when its files do not describe a working tokenizer.
        """
        return rebuild.load_tokenizer(self.path)

    def load_reader(self) -> Reader:
        """Return what turns the client's rows into examples: the tokenizer, or of a vision encoder what reads images.

        Raises:
            BadSchema: as `load_tokenizer`.
        """
        if self.pixels is None:
            return self.load_tokenizer()
        return ImageReader.of(read_json(self.path / "config.json"), self.pixels)

    def block_tensors(self) -> dict[str, TensorSpec]:
        """Return the declared tensors of all blocks under canonical names (``bottom.0.mlp.up_proj.weight``)."""
        found = {}
        for canonical, module in self.layout.blocks.items():
            for name, spec in self.manifest.tensors.items():
                if name.startswith(module + "."):
                    found[canonical + name[len(module) :]] = spec
        return found


def open_package(path: Path, known: KnownFiles | None = None) -> Package:
    """Return the package at `path` once every file agrees with the manifest; no tensor is read.

    Args:
        known: files hashed here before, which are not read again while they are unchanged.

    Raises:
        ArtefactError: with the subclass of the check that failed, in the order the module's docstring gives.
    """
    manifest, digest = read_manifest(path, PackageManifest, PACKAGE_FORMAT)
    check_files(path, manifest.files, FILE_NAMES, known)
    has_text = manifest.layout.model_type not in VISION_TYPES
    for name in ("config.json", *(_OF_TEXT if has_text else ())):
        if name not in manifest.files:
            raise WrongNames(f"package {path.name!r} binds no {name}")
    if not has_text and (others := manifest.files.keys() & {*_OF_TEXT, "chat_template.jinja"}):
        raise WrongNames(f"package {path.name!r} of a vision encoder binds {min(others)}")
    _check_settings(path, manifest)
    what = f"package {path.name!r}"
    stored = stored_tensors(what, manifest)
    check_exact(what, _headers(path, manifest), stored)
    require_modest(what, manifest, stored)
    _check_layout(what, manifest)
    return Package(path, manifest, digest)


def _check_settings(path: Path, manifest: PackageManifest) -> None:
    """Return only if no configuration file names code, a class or a path, and the index names the shards."""
    config = read_json(path / "config.json")
    if config.get("model_type") != manifest.layout.model_type:
        raise BadSchema(f"config.json of {path.name!r} and the manifest name different architectures")
    if without_code(config) != config:
        raise BadSchema(f"config.json of {path.name!r} holds keys that a package may not hold")
    if states_vision(config) != (manifest.pixels is not None):
        raise BadSchema(
            f"package {path.name!r}: pixels, which say how images are read, and its model do not go together"
        )
    if manifest.pixels is not None:
        try:
            ImageReader.of(config, manifest.pixels)
        except UnsupportedModel as error:
            raise BadSchema(f"package {path.name!r}: {error}") from None
    else:
        tokenizer = read_json(path / "tokenizer_config.json")
        if set(tokenizer) - TOKENIZER_KEYS != {"tokenizer_class"} or tokenizer["tokenizer_class"] != TOKENIZER_CLASS:
            raise BadSchema(f"tokenizer_config.json of {path.name!r} holds keys that a package may not hold")
    if _INDEX in manifest.files:
        stated = read_json(path / _INDEX).get("weight_map")
        if stated != {name: file for file, specs in shard_headers(path, manifest).items() for name in specs}:
            raise WrongNames(f"{_INDEX} of {path.name!r} does not name the shards that hold the tensors")


def _check_layout(what: str, manifest: PackageManifest) -> None:
    """Return only if the layout's blocks and linears are those that the declared tensors make up."""
    layout = manifest.layout
    blocks = layout.blocks
    for side in layout.sides:
        prefix = next(iter(side.values()), layout.stack).rpartition(".")[0] + "."
        numbers = {name.removeprefix(prefix).split(".")[0] for name in manifest.tensors if name.startswith(prefix)}
        if numbers != {str(number) for number in range(len(side))}:
            raise BadSchema(f"{what}: the layout counts {len(side)} blocks, the tensors make up {len(numbers)}")
    for name, dims in layout.linears.items():
        block, inner = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
        weight = manifest.tensors.get(f"{blocks[block]}.{inner}.weight") if block in blocks else None
        if weight is None:
            raise BadSchema(f"{what}: the layout names a linear module that has no weight")
        if dims not in (weight.shape, weight.shape[::-1]):
            raise WrongShape(f"{what}: the layout says {name!r} is {dims}, its weight is {weight.shape}")
    inside = {".".join(name.split(".")[2:]) for name in layout.linears if name.startswith("middle.")}
    if not set(layout.mlp_linears) <= layout.linears.keys() or not set(layout.adaptable_middle) <= inside:
        raise BadSchema(f"{what}: the layout lists a module that is not one of its linears")


def write_package(
    out: Path,
    *,
    model: PreTrainedModel,
    tokenizer: Reader,
    layout: Layout,
    base_digest: str,
    method: Method,
    figures: Mapping[str, float] | None = None,
    licence: str = "",
    terms: str = "",
    dtype: str = "bfloat16",
    dtypes: Mapping[str, str] | None = None,
    encoded: Mapping[str, Encoded] | None = None,
    compute: torch.dtype | None = None,
) -> Package:
    """Write the package folder `out`, whole or not at all, from allow-lists only.

    Args:
        model: ends and emulator in the package's numbering; read, not changed.
        tokenizer: or of a vision encoder what reads images.
        figures: for whoever receives the package; those that are not finite numbers are left out.
        dtype: dtype of floating tensors in the file, but of those that the architecture keeps finer.
        dtypes: dtypes by name, for tensors that are to have another one.
        encoded: tensors by name that are stored as these parts, in place of the model's own.
        compute: dtype in which the model is tried; None for that of its tensors.

    Raises:
        ConfigError: when `out` exists, or the licence, terms or a figure's name cannot be stated.
        ArtefactError: when a tensor cannot be stored as its parts, or so little is stored that no reader would take it.
        UnsupportedModel: when the tokenizer has no fast form that encodes alike, or a client could not build the model.
        NotFinite: when a tensor holds NaN or infinity, or would in `dtype`.
        RunFailed: when the disk is full.
    """
    with staged_folder(out) as stage:
        write_config(stage, model, dtype)
        require_rebuildable(stage, model, layout, compute)
        pixels = tokenizer.settings if isinstance(tokenizer, ImageReader) else None
        if not isinstance(tokenizer, ImageReader):
            write_tokenizer(stage, tokenizer)
        tensors = saved_tensors(model)
        specs = _stored(model, tensors, dtype, dtypes or {})
        encodings = {name: one.encoding for name, one in (encoded or {}).items()}
        _write_shards(stage, *_in_parts(tensors, specs, encoded or {}))
        try:
            manifest = PackageManifest(
                format=PACKAGE_FORMAT,
                base_digest=base_digest,
                layout=layout,
                tensors=specs,
                encodings=encodings,
                method=method,
                figures={name: value for name, value in (figures or {}).items() if math.isfinite(value)},
                licence=licence,
                terms=terms,
                pixels=pixels,
                files=entries(stage, [path.name for path in stage.iterdir()]),
            )
        except ValidationError as error:
            problems = [f"{item['loc'][0]}: {item['msg'].lower()}" for item in error.errors(include_url=False)]
            raise ConfigError(f"the package cannot state this: {'; '.join(problems)}") from None
        what = "the package"
        stored = stored_tensors(what, manifest)
        check_exact(what, _headers(stage, manifest), stored)
        require_modest(what, manifest, stored)
        write_manifest(stage, manifest)
    return open_package(out)


def _in_parts(
    tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], encoded: Mapping[str, Encoded]
) -> tuple[dict[str, torch.Tensor], dict[str, TensorSpec]]:
    """Return the tensors of the package's files and their declarations: of the encoded ones the parts."""
    held: dict[str, torch.Tensor] = {}
    declared: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        if (one := encoded.get(name)) is None:
            held[name], declared[name] = tensor, specs[name]
            continue
        decode(name, specs[name], one.encoding, one.parts)  # as whoever receives it will
        let_go(one.parts.values())
        for suffix, part in one.parts.items():
            held[f"{name}.{suffix}"], declared[f"{name}.{suffix}"] = part, spec_of(part)
    return held, declared


def _stored(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], dtype: str, dtypes: Mapping[str, str]
) -> dict[str, TensorSpec]:
    """Return the tensors as the package's files are to hold them."""
    from offsite.modelling.dtypes import kept_in_float32

    kept = dict.fromkeys(kept_in_float32(model, tensors, torch_dtype(dtype)), "float32")
    return {
        name: spec_of(tensor, dtype=dtypes.get(name, kept.get(name, dtype)) if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }


def write_config(folder: Path, model: PreTrainedModel, dtype: str) -> None:
    """Write ``config.json``: of the model's settings those that may cross."""
    _write_json(folder / "config.json", allowed_config(model, dtype))


def allowed_config(model: PreTrainedModel, dtype: str) -> dict[str, Any]:
    """Return the architecture's settings: only fields that its configuration class declares itself.

    Nothing depends on whether the model was built, loaded or saved before.
    """
    config = model.config
    found = config.to_dict()
    allowed = config_keys(type(config)) | undeclared(found)
    kept = without_code({key: value for key, value in found.items() if key in allowed})
    return {**kept, "model_type": config.model_type, "dtype": dtype, "architectures": [type(model).__name__]}


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the fast tokenizer's files from an allow-list of settings.

    Raises:
        UnsupportedModel: when there is no fast form, or the rebuilt tokenizer encodes a probe text differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(
            "the tokenizer has no fast form (tokenizer.json)", hint="convert it to a fast tokenizer first"
        )
    fresh = type(backend).from_str(backend.to_str())
    fresh.no_truncation()  # both are left over from the last call, whatever it was
    fresh.no_padding()
    (folder / "tokenizer.json").write_text(fresh.to_str(), encoding="utf-8")
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if key in TOKENIZER_KEYS}
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    settings.update({key: value for key, value in named.items() if key in TOKENIZER_KEYS})
    if (extra := _extra_tokens(tokenizer, named)) or "extra_special_tokens" in settings:
        settings["extra_special_tokens"] = extra
    settings["model_max_length"] = min(int(tokenizer.model_max_length or 2**40), 2**40)
    settings["tokenizer_class"] = TOKENIZER_CLASS
    _write_json(folder / "tokenizer_config.json", _in_json(settings))
    if template := one_template(tokenizer):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    probe = "The quick brown fox: 3.5 mg/day\n\n  jumps (over) the lazy dog's café."
    try:
        rebuilt = rebuild.load_tokenizer(folder)
    except BadSchema as error:  # what no client would open
        raise UnsupportedModel(f"the tokenizer cannot cross: {error}") from None
    if rebuilt(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        raise UnsupportedModel("the tokenizer rebuilt from tokenizer.json encodes a probe text differently")


def _extra_tokens(tokenizer: PreTrainedTokenizerBase, named: Mapping[str, str]) -> list[str]:
    """Return the special tokens beside the usual ones: an architecture may have given them names (``image_token``)."""
    beside = [token for key, token in named.items() if key not in TOKENIZER_KEYS]
    return list(dict.fromkeys([*map(str, tokenizer.extra_special_tokens), *beside]))


def _in_json(value: Any) -> Any:
    """Return the value with every token, however it is kept, as its text."""
    if isinstance(value, Mapping):
        return {str(key): _in_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_in_json(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(getattr(value, "content", value))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Write the tensors in files of at most `SHARD_LIMIT_BYTES` and `MAX_TENSORS`, one tensor at a time."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and (filled + spec.num_bytes > SHARD_LIMIT_BYTES or len(groups[-1]) == MAX_TENSORS):
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.num_bytes
    files = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    for file, names in zip(files, groups, strict=True):
        wanted = {name: specs[name] for name in names}
        write_tensors(folder / file, tensors, wanted, finite="the package's model")
    if len(files) > 1:
        index = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        total = sum(spec.num_bytes for spec in specs.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _headers(folder: Path, manifest: PackageManifest) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for name, specs in shard_headers(folder, manifest).items():
        if found.keys() & specs.keys():
            raise WrongNames(f"package {folder.name!r}: {name!r} repeats a tensor of another shard")
        found.update(specs)
    return found
