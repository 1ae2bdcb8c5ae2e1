"""What a package states of itself: layout, tensors, method, and the reading of its settings files.

`offsite.artefacts.package` checks a folder against it, `offsite.artefacts.rebuild` makes a model of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from offsite.artefacts.encodings import EXPANSION_LIMIT, Encoding
from offsite.artefacts.manifest import FileEntry
from offsite.digests import DIGEST_PATTERN
from offsite.errors import BadSchema, TooLarge, WrongNames
from offsite.strictjson import SHOWN, Sparse, Strict, require_seen
from offsite.tensors import Name, TensorSpec, check_dtype, no_duplicates, read_header
from offsite.vision.pixels import PixelSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

JSON_LIMIT_BYTES = 32 * 2**20
MAX_BLOCKS = 4096

_REFUSED_KEYS = frozenset({"auto_map", "quantization_config", "transformers_version", "name_or_path"})
UNDECLARED: Mapping[str, type | frozenset[str]] = {
    "_remove_final_layer_norm": bool,
    "attention_head_size": int,
    "conv_act": frozenset({"gelu", "relu", "tanh"}),
    "conv_groups": int,
    "conv_kernel_size": int,
    "decoder_start_token_id": int,
    "head_dim": int,
    "norm_rel_ebd": frozenset({"layer_norm", "none"}),
    "position_buckets": int,
    "share_att_key": bool,
    "sliding_window": int,
}
"""Settings that modelling code reads by name although its configuration class may not declare them, and their type.

Each is a plain number, a yes or no, or one of a few words; nothing that names code, a class or a file may ever stand
here.
"""
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
TOKENIZER_KEYS = frozenset(
    "add_bos_token add_eos_token add_prefix_space additional_special_tokens bos_token clean_up_tokenization_spaces "
    "cls_token eos_token extra_special_tokens mask_token model_input_names model_max_length pad_token padding_side "
    "sep_token split_special_tokens truncation_side unk_token".split()
)


# Whatever is shown to a person is a plain word or printable: no escape sequences reach a terminal, and nothing that
# is not seen turns the order of what is.
Key = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Line = Annotated[str, Field(max_length=200, pattern=rf"^{SHOWN}*$"), AfterValidator(require_seen)]
Text = Annotated[str, Field(max_length=20_000, pattern=rf"^(?:[\t\n]|{SHOWN})*$"), AfterValidator(require_seen)]


ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,127}$")]
Blocks = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]


class EncoderLayout(Strict):
    """Where the encoder of an encoder-decoder is cut; one that is not cut has no middle."""

    stack: ModuleName
    num_bottom: Blocks
    num_middle: Blocks
    num_top: Blocks


class Layout(Sparse):
    """How the package's model is laid out, in the package's own numbering.

    ``linears`` maps ``bottom.0.self_attn.q_proj`` and the like to (inputs, outputs); ``mlp_linears`` lists those that
    belong to a feed-forward part. ``adaptable_middle`` lists the modules inside a middle block on which an adapter
    can be lifted into the full model; ``middle_whole`` says that every middle block is the full model's, unshrunk.
    ``buffers`` lists the tensors of blocks that are not parameters, such as a router's correction: nothing trains them.
    ``stand_ins`` says that the middle's linears have the full model's shapes but are of lower rank: sizes that are
    learnt on them (DoRA's magnitudes) are not the full model's. ``encoder`` is there of an encoder-decoder, the rest
    of whose stack and counts are then the decoder's; roles are numbered on from its blocks to the decoder's.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"stand_ins", "encoder"})

    model_type: str = Field(pattern=r"^[a-z0-9_-]{1,64}$")
    stack: ModuleName
    num_bottom: Blocks
    num_middle: Blocks
    num_top: Blocks
    linears: dict[Name, tuple[int, int]]
    mlp_linears: tuple[Name, ...] = ()
    adaptable_middle: tuple[Name, ...] = ()
    middle_whole: bool = False
    buffers: tuple[Name, ...] = ()
    stand_ins: bool = False
    encoder: EncoderLayout | None = None

    @model_validator(mode="after")
    def _has_middle(self) -> Self:
        """Raise ValueError where no stack has a middle."""
        if not self.num_middle and (self.encoder is None or not self.encoder.num_middle):
            raise ValueError("no block is of the middle")
        return self

    @property
    def blocks(self) -> dict[str, str]:
        """Map ``bottom.0 ... middle.0 ... top.0 ...`` to module names of the package's model, stack by stack."""
        return {name: module for side in self.sides for name, module in side.items()}

    @property
    def sides(self) -> tuple[dict[str, str], ...]:
        """The same of each stack, the encoder's first; of a model with one stack, of that."""
        stacks = (self,) if self.encoder is None else (self.encoder, self)
        begun = {"bottom": 0, "middle": 0, "top": 0}
        found = []
        for one in stacks:
            counts = {"bottom": one.num_bottom, "middle": one.num_middle, "top": one.num_top}
            names = [f"{role}.{begun[role] + number}" for role, count in counts.items() for number in range(count)]
            found.append({name: f"{one.stack}.{index}" for index, name in enumerate(names)})
            begun = {role: begun[role] + count for role, count in counts.items()}
        return tuple(found)


def describe_layout(
    model: PreTrainedModel,
    *,
    num_bottom: int,
    num_top: int,
    encoder_ends: tuple[int, int] = (0, 0),
    adaptable_middle: tuple[str, ...] = (),
    middle_whole: bool = False,
    stand_ins: bool = False,
) -> Layout:
    """Return the layout of a package's model (ends and emulator in one), read off the model itself.

    Args:
        encoder_ends: blocks of the bottom and of the top end of an encoder-decoder's encoder.

    Raises:
        UnsupportedModel: when the model has no single stack of blocks, and is no encoder-decoder.
    """
    from offsite.modelling.blocks import block_list, linear_dims, linear_names, text_stacks
    from offsite.modelling.mlps import mlp_linears

    stacks = text_stacks(model)
    stack = stacks[-1]
    bottom, top = encoder_ends
    layout = Layout(
        model_type=model.config.model_type,
        stack=stack.name,
        num_bottom=num_bottom,
        num_middle=stack.num_blocks - num_bottom - num_top,
        num_top=num_top,
        linears={},
        adaptable_middle=adaptable_middle,
        middle_whole=middle_whole,
        stand_ins=stand_ins,
        encoder=EncoderLayout(
            stack=stacks[0].name,
            num_bottom=bottom,
            num_middle=stacks[0].num_blocks - bottom - top,
            num_top=top,
        )
        if len(stacks) > 1
        else None,
    )
    linears, feed_forward, buffers = {}, [], []
    blocks = [block for one in stacks for block in block_list(model, one)]
    for canonical, block in zip(layout.blocks, blocks, strict=True):
        feed_forward += [f"{canonical}.{name}" for name in mlp_linears(block)]
        linears.update({f"{canonical}.{name}": linear_dims(block.get_submodule(name)) for name in linear_names(block)})
        buffers += [f"{canonical}.{name}" for name, _ in block.named_buffers() if name in block.state_dict()]
    return layout.model_copy(update={"linears": linears, "mlp_linears": tuple(feed_forward), "buffers": tuple(buffers)})


class Method(Strict):
    """How the middle was compressed: a registered name and its public settings."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    settings: dict[Key, float | int | Line] = {}


class PackageManifest(Sparse):
    """The content of a package's ``offsite.json``.

    ``tensors`` declares the model's tensors; ``encodings`` says which of them are stored otherwise, and how. A manifest
    without any is written as before there were such packages. ``pixels`` is there of a vision encoder, and says how an
    image becomes what it reads.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"encodings", "pixels"})

    format: str
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    layout: Layout
    tensors: dict[Name, TensorSpec]
    encodings: dict[Name, Encoding] = {}
    method: Method
    figures: dict[Key, float] = {}
    licence: Line = ""
    terms: Text = ""
    pixels: PixelSettings | None = None
    files: dict[str, FileEntry]


def stored_tensors(what: str, manifest: PackageManifest) -> dict[str, TensorSpec]:
    """Return the tensors that the package's files hold: those declared, the encoded ones by their parts.

    Raises:
        BadSchema: when an encoding is of no declared tensor, or a tensor of a dtype that artefacts may not hold.
        WrongShape: when a tensor cannot be stored as is stated.
        WrongNames: when a part would have another tensor's name.
    """
    if extra := manifest.encodings.keys() - manifest.tensors.keys():
        raise BadSchema(f"{what} encodes {len(extra)} tensor(s) that it does not declare")
    found: dict[str, TensorSpec] = {}
    for name, spec in manifest.tensors.items():
        check_dtype(name, spec)
        encoding = manifest.encodings.get(name)
        parts = {name: spec}
        if encoding is not None:
            parts = {f"{name}.{suffix}": part for suffix, part in encoding.parts(name, spec).items()}
        if found.keys() & parts.keys():
            raise WrongNames(f"{what}: a part of {name!r} has another tensor's name")
        found.update(parts)
    return found


def require_modest(what: str, manifest: PackageManifest, stored: Mapping[str, TensorSpec]) -> None:
    """Return only if the declared tensors come to at most `EXPANSION_LIMIT` times the bytes that are stored.

    Raises:
        TooLarge: with both sizes.
    """
    declared, held = (sum(one.num_bytes for one in specs.values()) for specs in (manifest.tensors, stored))
    if declared > EXPANSION_LIMIT * held:
        raise TooLarge(
            f"{what} declares tensors of {declared:,} bytes and stores {held:,}, expected at least one byte for every "
            f"{EXPANSION_LIMIT}"
        )


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


def saved_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name, tied ones once under their first name; storage is shared."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first[id(parameter)] = name
    keep = set(first.values()) | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in keep}


def config_keys(cls: type[PreTrainedConfig]) -> set[str]:
    """Return the fields that the configuration class declares and that an artefact may hold."""
    return set(without_code(cls().to_dict()))


def undeclared(settings: Mapping[str, Any]) -> set[str]:
    """Return the settings of `UNDECLARED` that are stated in the one form that each has."""
    stated = {key: settings[key] for key in UNDECLARED if key in settings}
    return {key for key, value in stated.items() if _is_of(value, UNDECLARED[key])}


def _is_of(value: object, kind: type | frozenset[str]) -> bool:
    return type(value) is kind if isinstance(kind, type) else isinstance(value, str) and value in kind


def without_code(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, nested ones too, without private keys and those that name code, a path or a version."""
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not isinstance(key, str) or key in UNDECLARED or not (key.startswith("_") or key in _REFUSED_KEYS)
    }


def shard_headers(folder: Path, manifest: PackageManifest) -> dict[str, dict[str, TensorSpec]]:
    """Return the declarations that each of the package's tensor files holds."""
    return {name: read_header(folder / name) for name in manifest.files if name.endswith(".safetensors")}
