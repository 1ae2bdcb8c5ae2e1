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

On arrival, in this order: manifest size, format, schema; exact set of files; sizes and digests; configuration keys;
exact set of tensors with shapes and dtypes; finite values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from offsite.digests import DIGEST_PATTERN
from offsite.errors import BadSchema, UnsupportedModel, WrongNames, WrongShape
from offsite.manifest import FileEntry, Strict, check_files, entries, read_manifest, write_manifest
from offsite.staging import staged_folder
from offsite.tensors import TensorSpec, check_exact, read_header, read_tensors, spec_of, torch_dtype, write_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_FORMAT = "offsite/package/1"
SHARD_LIMIT_BYTES = 4 * 2**30

_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja"
    r"|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
)
_TOKENIZER_KEYS = frozenset(
    "add_bos_token add_eos_token add_prefix_space additional_special_tokens bos_token clean_up_tokenization_spaces "
    "cls_token eos_token extra_special_tokens mask_token model_input_names model_max_length pad_token padding_side "
    "sep_token split_special_tokens truncation_side unk_token".split()
)


class Layout(Strict):
    """How the package's model is laid out, in the package's own numbering.

    ``linears`` maps ``bottom.0.self_attn.q_proj`` and the like to (inputs, outputs); ``mlp_linears`` lists those that
    belong to a feed-forward part. ``adaptable_middle`` lists the modules inside a middle block on which an adapter
    can be lifted into the full model; ``middle_whole`` says that every middle block is the full model's, unshrunk.
    """

    model_type: str
    stack: str
    num_bottom: int = Field(ge=0)
    num_middle: int = Field(ge=1)
    num_top: int = Field(ge=0)
    linears: dict[str, tuple[int, int]]
    mlp_linears: tuple[str, ...] = ()
    adaptable_middle: tuple[str, ...] = ()
    middle_whole: bool = False

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
    linears, feed_forward = {}, []
    for canonical, block in zip(layout.blocks, block_list(model, stack), strict=True):
        feed_forward += [f"{canonical}.{name}" for name in mlp_linears(block)]
        linears.update({f"{canonical}.{name}": linear_dims(block.get_submodule(name)) for name in linear_names(block)})
    return layout.model_copy(update={"linears": linears, "mlp_linears": tuple(feed_forward)})


class Method(Strict):
    """How the middle was compressed: a registered name and its public settings."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    settings: dict[str, float | int | str] = {}


class PackageManifest(Strict):
    """The content of a package's ``offsite.json``."""

    format: str
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    layout: Layout
    tensors: dict[str, TensorSpec]
    method: Method
    figures: dict[str, float] = {}
    licence: str = Field("", max_length=200)
    terms: str = Field("", max_length=20_000)
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
        return _load_model(self, dtype, device)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, built from ``tokenizer.json``; no class is looked up by name."""
        return _load_tokenizer(self.path)

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
    check_files(path, manifest.files, _FILES)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if name not in manifest.files:
            raise WrongNames(f"package {path.name!r} binds no {name}")
    for name, spec in manifest.tensors.items():
        torch_dtype_name_check(name, spec)
    check_exact(f"package {path.name!r}", _headers(path, manifest), manifest.tensors)
    return Package(path, manifest, digest)


def torch_dtype_name_check(name: str, spec: TensorSpec) -> None:
    """Return only if the declared dtype is one an artefact may hold.

    Raises:
        BadSchema: naming the tensor.
    """
    if spec.dtype not in {"float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "float64"}:
        raise BadSchema(f"tensor {name!r} declares dtype {spec.dtype!r}, which artefacts may not hold")


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
        dtype: dtype of floating tensors in the file.

    Raises:
        ConfigError: when `out` exists.
        UnsupportedModel: when the tokenizer has no fast form that encodes alike.
        RunFailed: when the disk is full.
    """
    with staged_folder(out) as stage:
        _write_json(stage / "config.json", allowed_config(model.config, dtype))
        write_tokenizer(stage, tokenizer)
        tensors = saved_tensors(model)
        specs = {
            name: spec_of(tensor, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }
        _write_shards(stage, tensors, specs)
        manifest = PackageManifest(
            format=PACKAGE_FORMAT,
            base_digest=base_digest,
            layout=layout,
            tensors=specs,
            method=method,
            figures=dict(figures or {}),
            licence=licence,
            terms=terms,
            files=entries(stage, [path.name for path in stage.iterdir()]),
        )
        write_manifest(stage, manifest)
    return open_package(out)


def saved_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name, tied ones once under their first name; storage is shared."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first[id(parameter)] = name
    keep = set(first.values()) | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in keep}


def allowed_config(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """Return the architecture's settings: only fields that its configuration class declares itself."""
    found = config.to_dict()
    allowed = _config_keys(type(config))
    kept = {key: value for key, value in found.items() if key in allowed}
    return {**kept, "model_type": config.model_type, "dtype": dtype, "architectures": found.get("architectures")}


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
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if key in _TOKENIZER_KEYS}
    settings.update({key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)})
    settings["model_max_length"] = min(int(tokenizer.model_max_length), 2**40)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    plain = {key: value if not hasattr(value, "content") else value.content for key, value in settings.items()}
    _write_json(folder / "tokenizer_config.json", plain)
    if isinstance(tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    probe = "The quick brown fox: 3.5 mg/day\n\n  jumps (over) the lazy dog's café."
    if _load_tokenizer(folder)(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        raise UnsupportedModel("the tokenizer rebuilt from tokenizer.json encodes a probe text differently")


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise BadSchema(f"tokenizer_config.json of {folder.name!r} is not JSON") from None
    extra = set(settings) - _TOKENIZER_KEYS - {"tokenizer_class"}
    if extra:
        raise BadSchema(f"tokenizer_config.json of {folder.name!r} holds keys that a package may not hold")
    settings.pop("tokenizer_class", None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)
    template = folder / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _config_keys(cls: type[PreTrainedConfig]) -> set[str]:
    refused = {"auto_map", "quantization_config", "transformers_version", "name_or_path"}
    return {key for key in cls().to_dict() if not key.startswith("_") and key not in refused}


def _load_model(package: Package, dtype: str, device: str) -> PreTrainedModel:
    model = _empty_model(package)
    declared = package.manifest.tensors
    _widen(model, package.layout)
    expected = {name: spec_of(tensor) for name, tensor in saved_tensors(model).items()}
    what = f"package {package.path.name!r}"
    check_exact(what, {n: s.model_copy(update={"dtype": ""}) for n, s in declared.items()}, _without_dtype(expected))
    for name, spec in declared.items():
        if torch_dtype(spec.dtype).is_floating_point != torch_dtype(expected[name].dtype).is_floating_point:
            raise WrongShape(
                f"{what}: tensor {name!r} declares dtype {spec.dtype}, the architecture has {expected[name].dtype}"
            )
    tensors: dict[str, torch.Tensor] = {}
    for shard, specs in _shards(package.path, package.manifest).items():
        tensors.update(read_tensors(package.path / shard, specs))
    target = torch_dtype(dtype)
    cast = {name: tensor.to(target) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model.load_state_dict(cast, strict=False, assign=True)  # names were matched exactly above; tied ones follow
    model.tie_weights()
    _check_linears(model, package)
    model.eval()
    model.to(device)  # type: ignore[arg-type]
    return model


def _without_dtype(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: spec.model_copy(update={"dtype": ""}) for name, spec in specs.items()}


def _empty_model(package: Package) -> PreTrainedModel:
    """Return the architecture with storage that nothing has written to yet, looked up by ``model_type``."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    what = f"config.json of {package.path.name!r}"
    try:
        stated = json.loads((package.path / "config.json").read_text(encoding="utf-8"))
        cls = CONFIG_MAPPING[stated["model_type"]]
    except (ValueError, KeyError, TypeError):
        raise BadSchema(f"{what} names no architecture that transformers knows") from None
    if stated["model_type"] != package.layout.model_type:
        raise BadSchema(f"{what} and the manifest name different architectures")
    extra = set(stated) - _config_keys(cls) - {"model_type", "dtype", "architectures"}
    if extra:
        raise BadSchema(f"{what} holds {len(extra)} key(s) that {stated['model_type']} does not declare")
    settings = {key: value for key, value in stated.items() if key not in {"dtype", "architectures", "model_type"}}
    try:
        config = cls(**settings)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise BadSchema(f"{what} does not describe a working {stated['model_type']}") from error
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def _widen(model: PreTrainedModel, layout: Layout) -> None:
    """Give each middle block's MLP the declared number of channels; nothing else may differ from the architecture."""
    from offsite.blocks import find_mlp, linear_dims, resize_mlp

    for canonical, module in layout.blocks.items():
        try:
            block = model.get_submodule(module)
        except AttributeError:
            raise BadSchema(
                f"the manifest's layout names block {module!r}, which the architecture does not have"
            ) from None
        if not canonical.startswith("middle."):
            continue
        dims = {name: layout.linears.get(f"{canonical}.{name}") for name, _ in block.named_modules() if name}
        if all(dim is None or dim == linear_dims(block.get_submodule(name)) for name, dim in dims.items()):
            continue
        mlp = find_mlp(block)
        stated = dims[mlp.output]
        if stated is None or not 1 <= stated[0] <= mlp.num_channels:
            raise WrongShape(f"{canonical}: the stated MLP width is not between 1 and {mlp.num_channels}")
        resize_mlp(block, stated[0])


def _check_linears(model: PreTrainedModel, package: Package) -> None:
    from offsite.blocks import linear_dims

    for name, dims in package.layout.linears.items():
        role, number, inner = name.split(".", 2)
        module = model.get_submodule(f"{package.layout.blocks[f'{role}.{number}']}.{inner}")
        if linear_dims(module) != dims:
            raise WrongShape(
                f"package {package.path.name!r}: {name!r} is {linear_dims(module)}, the layout says {dims}"
            )


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
        write_tensors(folder / file, {name: tensors[name].to(torch_dtype(specs[name].dtype)) for name in names})
    if len(files) > 1:
        index = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        total = sum(spec.num_bytes for spec in specs.values())
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _shards(folder: Path, manifest: PackageManifest) -> dict[str, dict[str, TensorSpec]]:
    return {name: read_header(folder / name) for name in manifest.files if name.endswith(".safetensors")}


def _headers(folder: Path, manifest: PackageManifest) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for name, specs in _shards(folder, manifest).items():
        if found.keys() & specs.keys():
            raise WrongNames(f"package {folder.name!r}: {name!r} repeats a tensor of another shard")
        found.update(specs)
    return found
