"""The package: what the owner sends. Read this file to know what crosses and what is checked on arrival.

A package is a folder:

- ``offsite.json``: the manifest. It binds every other file by size and SHA-256, declares every tensor by name,
  shape and dtype, and says which blocks are *bottom*, *middle* and *top*. Its own SHA-256 is the package's digest.
- ``config.json``: the architecture's own settings, from an allow-list (the fields its configuration class declares).
- ``model.safetensors`` (or numbered shards): ends and emulator under transformers' names in the package's own block
  numbering. The numbers of the owner's blocks and channels are not in it.
- ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``: text in, text out.

When whole blocks were dropped, or all kept, ``AutoModelForCausalLM.from_pretrained`` opens the folder. A middle of
another width is rebuilt here, from declared shapes. Nothing in a package names code, a class or a path: the
architecture is looked up by ``model_type`` in transformers' own table, and the tokenizer is always the fast one.

On arrival, in this order: manifest size, format, schema; exact set of files; sizes and digests; keys of the
configuration files; exact set of tensors with shapes and dtypes; a layout that fits them. Then, when the model is
rebuilt (``offsite/rebuild.py``): only settings the architecture declares; exactly its tensors; finite values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from offsite.digests import DIGEST_PATTERN
from offsite.errors import BadSchema, ConfigError, TooLarge, UnsupportedModel, WrongNames, WrongShape
from offsite.manifest import FileEntry, Strict, check_files, entries, read_manifest, write_manifest
from offsite.staging import staged_folder
from offsite.tensors import (
    TensorSpec,
    check_dtype,
    check_exact,
    check_finite,
    no_duplicates,
    read_header,
    spec_of,
    torch_dtype,
    write_tensors,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_FORMAT = "offsite/package/1"
SHARD_LIMIT_BYTES = 4 * 2**30
JSON_LIMIT_BYTES = 32 * 2**20
MAX_BLOCKS = 4096

_INDEX = "model.safetensors.index.json"
FILE_NAMES = re.compile(
    r"config\.json|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja"
    r"|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
)
_REFUSED_KEYS = frozenset({"auto_map", "quantization_config", "transformers_version", "name_or_path"})
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
TOKENIZER_KEYS = frozenset(
    "add_bos_token add_eos_token add_prefix_space additional_special_tokens bos_token clean_up_tokenization_spaces "
    "cls_token eos_token extra_special_tokens mask_token model_input_names model_max_length pad_token padding_side "
    "sep_token split_special_tokens truncation_side unk_token".split()
)


class Layout(Strict):
    """How the package's model is laid out, in the package's own numbering.

    ``linears`` maps ``bottom.0.self_attn.q_proj`` and the like to (inputs, outputs); ``mlp_linears`` lists those that
    belong to a feed-forward part. ``adaptable_middle`` lists the modules inside a middle block on which an adapter
    can be lifted into the full model; ``middle_whole`` says that every middle block is the full model's, unshrunk.
    ``buffers`` lists the tensors of blocks that are not parameters, such as a router's correction: nothing trains them.
    """

    model_type: str = Field(pattern=r"^[a-z0-9_-]{1,64}$")
    stack: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,127}$")
    num_bottom: int = Field(ge=0, le=MAX_BLOCKS)
    num_middle: int = Field(ge=1, le=MAX_BLOCKS)
    num_top: int = Field(ge=0, le=MAX_BLOCKS)
    linears: dict[str, tuple[int, int]]
    mlp_linears: tuple[str, ...] = ()
    adaptable_middle: tuple[str, ...] = ()
    middle_whole: bool = False
    buffers: tuple[str, ...] = ()

    @property
    def blocks(self) -> dict[str, str]:
        """Map ``bottom.0 ... middle.0 ... top.0 ...`` to module names of the package's model."""
        roles = [("bottom", self.num_bottom), ("middle", self.num_middle), ("top", self.num_top)]
        names = [f"{role}.{number}" for role, count in roles for number in range(count)]
        return {name: f"{self.stack}.{index}" for index, name in enumerate(names)}


def describe_layout(
    model: PreTrainedModel,
    *,
    num_bottom: int,
    num_top: int,
    adaptable_middle: tuple[str, ...] = (),
    middle_whole: bool = False,
) -> Layout:
    """Return the layout of a package's model (ends and emulator in one), read off the model itself.

    Raises:
        UnsupportedModel: when the model has no single stack of blocks.
    """
    from offsite.blocks import block_list, decoder_stack, linear_dims, linear_names, mlp_linears

    stack = decoder_stack(model)
    layout = Layout(
        model_type=model.config.model_type,
        stack=stack.name,
        num_bottom=num_bottom,
        num_middle=stack.num_blocks - num_bottom - num_top,
        num_top=num_top,
        linears={},
        adaptable_middle=adaptable_middle,
        middle_whole=middle_whole,
    )
    linears, feed_forward, buffers = {}, [], []
    for canonical, block in zip(layout.blocks, block_list(model, stack), strict=True):
        feed_forward += [f"{canonical}.{name}" for name in mlp_linears(block)]
        linears.update({f"{canonical}.{name}": linear_dims(block.get_submodule(name)) for name in linear_names(block)})
        buffers += [f"{canonical}.{name}" for name, _ in block.named_buffers() if name in block.state_dict()]
    return layout.model_copy(update={"linears": linears, "mlp_linears": tuple(feed_forward), "buffers": tuple(buffers)})


# Whatever is shown to a person is a plain word or printable: no escape sequences reach a terminal.
Key = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Line = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Text = Annotated[str, Field(max_length=20_000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")]


class Method(Strict):
    """How the middle was compressed: a registered name and its public settings."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    settings: dict[Key, float | int | Line] = {}


class PackageManifest(Strict):
    """The content of a package's ``offsite.json``."""

    format: str
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    layout: Layout
    tensors: dict[str, TensorSpec]
    method: Method
    figures: dict[Key, float] = {}
    licence: Line = ""
    terms: Text = ""
    files: dict[str, FileEntry]


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

    def load_model(self, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        """Return the ends and emulator as one model, in evaluation mode, rebuilt from declared shapes.

        Args:
            dtype: dtype of the floating tensors in memory, whatever the file holds.

        Raises:
            BadSchema: when ``config.json`` holds a key or value that the architecture does not declare.
            WrongNames, WrongShape, NotFinite: when the tensors are not the declared, finite ones.
        """
        from offsite.rebuild import load_model

        return load_model(self, dtype, device)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, built from ``tokenizer.json``; no class is looked up by name.

        Raises:
            BadSchema: when its files do not describe a working tokenizer.
        """
        from offsite.rebuild import load_tokenizer

        return load_tokenizer(self.path)

    def block_tensors(self) -> dict[str, TensorSpec]:
        """Return the declared tensors of all blocks under canonical names (``bottom.0.mlp.up_proj.weight``)."""
        found = {}
        for canonical, module in self.layout.blocks.items():
            for name, spec in self.manifest.tensors.items():
                if name.startswith(module + "."):
                    found[canonical + name[len(module) :]] = spec
        return found


def open_package(path: Path) -> Package:
    """Return the package at `path` once every file agrees with the manifest; no tensor is read.

    Raises:
        ArtefactError: with the subclass of the check that failed, in the order the module's docstring gives.
    """
    manifest, digest = read_manifest(path, PackageManifest, PACKAGE_FORMAT)
    check_files(path, manifest.files, FILE_NAMES)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if name not in manifest.files:
            raise WrongNames(f"package {path.name!r} binds no {name}")
    _check_settings(path, manifest)
    for name, spec in manifest.tensors.items():
        check_dtype(name, spec)
    check_exact(f"package {path.name!r}", _headers(path, manifest), manifest.tensors)
    _check_layout(f"package {path.name!r}", manifest)
    return Package(path, manifest, digest)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of an artefact.

    Raises:
        TooLarge: when the file is over `JSON_LIMIT_BYTES`.
        BadSchema: when it is not a JSON object in UTF-8 with distinct keys.
    """
    what = f"{path.name} of {path.parent.name!r}"
    if path.stat().st_size > JSON_LIMIT_BYTES:
        raise TooLarge(f"{what}: over {JSON_LIMIT_BYTES} bytes")
    try:
        found = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError):
        raise BadSchema(f"{what} is not JSON with distinct keys") from None
    if not isinstance(found, dict):
        raise BadSchema(f"{what} is not a JSON object")
    return found


def _check_settings(path: Path, manifest: PackageManifest) -> None:
    """Return only if no configuration file names code, a class or a path, and the index names the shards."""
    config = read_json(path / "config.json")
    if config.get("model_type") != manifest.layout.model_type:
        raise BadSchema(f"config.json of {path.name!r} and the manifest name different architectures")
    if _cleaned(config) != config:
        raise BadSchema(f"config.json of {path.name!r} holds keys that a package may not hold")
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
    prefix = f"{layout.stack}."
    numbers = {name.removeprefix(prefix).split(".")[0] for name in manifest.tensors if name.startswith(prefix)}
    blocks = layout.blocks
    if numbers != {str(number) for number in range(len(blocks))}:
        raise BadSchema(f"{what}: the layout counts {len(blocks)} blocks, the tensors make up {len(numbers)}")
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
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    base_digest: str,
    method: Method,
    figures: Mapping[str, float] | None = None,
    licence: str = "",
    terms: str = "",
    dtype: str = "bfloat16",
) -> Package:
    """Write the package folder `out`, whole or not at all, from allow-lists only.

    Args:
        model: ends and emulator in the package's numbering; read, not changed.
        figures: for whoever receives the package; those that are not finite numbers are left out.
        dtype: dtype of floating tensors in the file.

    Raises:
        ConfigError: when `out` exists, or the licence, terms or a figure's name cannot be stated.
        UnsupportedModel: when the tokenizer has no fast form that encodes alike.
        NotFinite: when a tensor holds NaN or infinity, or would in `dtype`.
        RunFailed: when the disk is full.
    """
    with staged_folder(out) as stage:
        _write_json(stage / "config.json", allowed_config(model, dtype))
        write_tokenizer(stage, tokenizer)
        tensors = saved_tensors(model)
        specs = {
            name: spec_of(tensor, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }
        _write_shards(stage, tensors, specs)
        try:
            manifest = PackageManifest(
                format=PACKAGE_FORMAT,
                base_digest=base_digest,
                layout=layout,
                tensors=specs,
                method=method,
                figures={name: value for name, value in (figures or {}).items() if math.isfinite(value)},
                licence=licence,
                terms=terms,
                files=entries(stage, [path.name for path in stage.iterdir()]),
            )
        except ValidationError as error:
            problems = [f"{item['loc'][0]}: {item['msg'].lower()}" for item in error.errors(include_url=False)]
            raise ConfigError(f"the package cannot state this: {'; '.join(problems)}") from None
        write_manifest(stage, manifest)
    return open_package(out)


def saved_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name, tied ones once under their first name; storage is shared."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first[id(parameter)] = name
    keep = set(first.values()) | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in keep}


def allowed_config(model: PreTrainedModel, dtype: str) -> dict[str, Any]:
    """Return the architecture's settings: only fields that its configuration class declares itself.

    Nothing depends on whether the model was built, loaded or saved before.
    """
    config = model.config
    found = config.to_dict()
    allowed = config_keys(type(config))
    kept = _cleaned({key: value for key, value in found.items() if key in allowed})
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
    settings.update({key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)})
    settings["model_max_length"] = min(int(tokenizer.model_max_length), 2**40)
    settings["tokenizer_class"] = TOKENIZER_CLASS
    plain = {key: value if not hasattr(value, "content") else value.content for key, value in settings.items()}
    _write_json(folder / "tokenizer_config.json", plain)
    if isinstance(tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    from offsite.rebuild import load_tokenizer

    probe = "The quick brown fox: 3.5 mg/day\n\n  jumps (over) the lazy dog's café."
    if load_tokenizer(folder)(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        raise UnsupportedModel("the tokenizer rebuilt from tokenizer.json encodes a probe text differently")


def config_keys(cls: type[PreTrainedConfig]) -> set[str]:
    """Return the fields that the configuration class declares and that an artefact may hold."""
    return set(_cleaned(cls().to_dict()))


def _cleaned(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, nested ones too, without private keys and those that name code, a path or a version."""
    return {
        key: _cleaned(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not (isinstance(key, str) and (key.startswith("_") or key in _REFUSED_KEYS))
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Write the tensors in files of at most `SHARD_LIMIT_BYTES`, casting one shard at a time."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.num_bytes > SHARD_LIMIT_BYTES:
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
        cast = {name: tensors[name].detach().to(torch_dtype(specs[name].dtype)) for name in names}
        check_finite("the package's model", cast)
        write_tensors(folder / file, cast)
    if len(files) > 1:
        index = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        total = sum(spec.num_bytes for spec in specs.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def shard_headers(folder: Path, manifest: PackageManifest) -> dict[str, dict[str, TensorSpec]]:
    """Return the declarations that each of the package's tensor files holds."""
    return {name: read_header(folder / name) for name in manifest.files if name.endswith(".safetensors")}


def _headers(folder: Path, manifest: PackageManifest) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for name, specs in shard_headers(folder, manifest).items():
        if found.keys() & specs.keys():
            raise WrongNames(f"package {folder.name!r}: {name!r} repeats a tensor of another shard")
        found.update(specs)
    return found
