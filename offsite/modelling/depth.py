"""A configuration for fewer blocks, and the check that every kept block is built as it was.

Depth shows in a configuration in five ways: the depth itself, lists with one entry per block, lists of block
numbers, "the first k blocks" counters, and per-block overrides. All are edited together on a copy. Rules that no
field lists (every k-th block, a scale by depth) cannot be edited; they are found by building the smaller model
without memory (meta device) and comparing each block with the one it came from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from offsite.encoders.trunk import build_like
from offsite.errors import UnsupportedModel
from offsite.modelling.blocks import (
    AFTER_FIRST,
    BLOCK_NUMBER,
    BLOCK_NUMBERS,
    INDEX_LISTS,
    NEVER_PER_BLOCK,
    PER_BLOCK,
    PREFIX_COUNTS,
    Stack,
    block_list,
    stack_config,
)

_BACKBONE = frozenset({"stage_names", "out_features", "out_indices"})
"""Fields that name each block's output, for a model that is a detector's backbone; of a trunk the last one is asked."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size, list, tuple, set, dict)


def smaller_config(config: PreTrainedConfig, keep: Mapping[Stack, Sequence[int]]) -> PreTrainedConfig:
    """Return a copy of `config` for a model that has only the kept blocks of each stack.

    Args:
        config: the whole model's configuration; not modified.
        keep: per stack the numbers of its kept blocks, strictly increasing.

    Raises:
        UnsupportedModel: a field depends on depth in a way that cannot be edited, or the edited configuration
            does not read back from JSON as it was written.
    """
    edited = copy.deepcopy(config)
    edited.name_or_path = ""
    for stack, kept in keep.items():
        part = stack_config(edited, stack)
        try:
            _apply(part, _edits(part.to_dict(), stack, kept))
        except (AttributeError, ValueError, TypeError, StrictDataclassError) as error:
            raise UnsupportedModel(f"the configuration {type(part).__name__} cannot be edited: {error}") from error
    _require_round_trip(edited)
    return edited


def build_empty(model: PreTrainedModel, keep: Mapping[Stack, Sequence[int]]) -> PreTrainedModel:
    """Return a model of the same class for the kept blocks, every tensor on the meta device.

    Raises:
        UnsupportedModel: see ``smaller_config``; a kept block would be built differently at its new depth; or
            another tensor's shape follows the number of blocks.
    """
    config = smaller_config(model.config, keep)
    with torch.device("meta"):
        small = build_like(model, config)
    for stack, kept in keep.items():
        fresh = small.get_submodule(stack.name)
        if not isinstance(fresh, nn.ModuleList) or len(fresh) != len(kept):
            raise UnsupportedModel(f"{stack.name} of {type(model).__name__} does not follow {stack.depth_key}")
        blocks = block_list(model, stack)
        for new, old in enumerate(kept):
            if reason := _difference(blocks[old], fresh[new], depths=(len(blocks), len(kept))):
                raise UnsupportedModel(
                    f"{type(model).__name__} cannot be cut: block {old} of {stack.name} depends on its depth: "
                    f"{reason} as block {new} of {len(kept)}"
                )
    _require_counterparts(model, small, keep)
    return small


def source_name(name: str, keep: Mapping[Stack, Sequence[int]]) -> str:
    """Return the full model's name of what the smaller model calls `name`."""
    for stack, kept in keep.items():
        if name.startswith(f"{stack.name}."):
            number, dot, rest = name.removeprefix(f"{stack.name}.").partition(".")
            return f"{stack.name}.{kept[int(number)]}{dot}{rest}"
    return name


def refuse_depth_rules(model: PreTrainedModel, stack: Stack) -> None:
    """Return only if blocks behind a gap are built as before, tried by leaving out block 1 on the meta device.

    Raises:
        UnsupportedModel: naming what would change.
    """
    if stack.num_blocks > 2:
        build_empty(model, {stack: [0, *range(2, stack.num_blocks)]})


def _edits(fields: dict[str, Any], stack: Stack, kept: Sequence[int]) -> dict[str, Any]:
    """Return every field to set, the depth first."""
    if kept[0] and fields.get(rule := AFTER_FIRST.get(fields.get("model_type", ""), "")):
        raise UnsupportedModel(
            f"block {kept[0]} cannot be the first: what runs behind block 0 alone ({rule}) would move"
        )
    places = {old: new for new, old in enumerate(kept)}
    edits: dict[str, Any] = {stack.depth_key: len(kept)}
    for key, value in fields.items():
        if key in _BACKBONE and fields.keys() >= _BACKBONE:
            continue  # names of a backbone's outputs, which it makes of its depth
        if key in INDEX_LISTS:
            if value is not None:
                edits[key] = [places[old] for old in _listed(key, fields, stack) if old in places]
        elif key in PREFIX_COUNTS:
            if isinstance(value, int) and value < stack.num_blocks:
                edits[key] = sum(old < value for old in kept)
        elif isinstance(value, (list, tuple)) and not NEVER_PER_BLOCK.search(key):
            if len(value) != stack.num_blocks:
                _require_no_numbers(key, value, stack)
            elif PER_BLOCK.search(key):
                edits[key] = type(value)(value[old] for old in kept)
            else:
                raise UnsupportedModel(f"cannot tell whether the field {key} has one entry per block")
    if "mlp_only_layers" in edits and "decoder_sparse_step" in fields:
        edits["decoder_sparse_step"] = 1
    if fields.keys() >= _BACKBONE:
        names = ["stem", *(f"stage{number}" for number in range(1, len(kept) + 1))]
        edits |= {"stage_names": names, "_out_features": names[-1:], "_out_indices": [len(kept)]}
    if overrides := fields.get("per_layer_config"):
        edits["per_layer_config"] = {places[int(old)]: o for old, o in overrides.items() if int(old) in places}
    return edits


def _require_no_numbers(key: str, value: Sequence[object], stack: Stack) -> None:
    """Raise when a list that no table names looks like numbers of blocks."""
    numbers = [item for item in value if isinstance(item, int) and 0 <= item < stack.num_blocks]
    if numbers and len(numbers) == len(value) and BLOCK_NUMBERS.search(key):
        raise UnsupportedModel(f"cannot tell whether the field {key} lists numbers of blocks: {numbers}")


def _listed(key: str, fields: dict[str, Any], stack: Stack) -> list[int]:
    """Return the block numbers a list stands for, a periodic rule beside it included."""
    listed = set(fields[key])
    step = fields.get("decoder_sparse_step")
    if key == "mlp_only_layers" and isinstance(step, int):
        # the rule makes block i sparse where (i + 1) % step == 0; said block by block, it survives renumbering
        listed |= {i for i in range(stack.num_blocks) if (i + 1) % step}
    return sorted(listed)


def _apply(config: PreTrainedConfig, edits: dict[str, Any]) -> None:
    overrides = edits.pop("per_layer_config", None)
    if overrides is not None:
        config.per_layer_config = None
    for key, value in edits.items():
        setattr(config, key, value)
    if overrides is not None:
        config.per_layer_config = overrides


def _require_round_trip(config: PreTrainedConfig) -> None:
    """Raise unless the file this configuration is saved to gives the same one back."""
    kind = type(config).__name__
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        try:
            config.to_json_file(file, use_diff=True)
            again = type(config).from_json_file(file)
        except (AttributeError, ValueError, TypeError, StrictDataclassError) as error:
            raise UnsupportedModel(f"the edited {kind} does not validate: {error}") from error
    old, new = config.to_dict(), again.to_dict()
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        raise UnsupportedModel(f"the edited {kind} reads back differently in {', '.join(changed)}")


def _require_counterparts(model: PreTrainedModel, small: PreTrainedModel, keep: Mapping[Stack, Sequence[int]]) -> None:
    """Raise unless every tensor a checkpoint of `small` would hold is one of `model`, of the same shape."""
    source, kind = model.state_dict(), type(model).__name__
    for name, tensor in small.state_dict().items():
        old = source_name(name, keep)
        if old not in source:
            raise UnsupportedModel(f"{kind} has no tensor for {name} of the smaller model")
        if tensor.shape != source[old].shape:
            shapes = f"{tuple(tensor.shape)} in the smaller model, not {tuple(source[old].shape)}"
            raise UnsupportedModel(f"{kind} cannot be cut: {old} follows the number of blocks: its shape is {shapes}")


def _difference(old: nn.Module, new: nn.Module, depths: tuple[int, int]) -> str:
    """Return how a block differs from the one built for its new place, or an empty string.

    Args:
        old: a block of the full model.
        new: the block that is to take its tensors.
        depths: blocks in the full stack and in the smaller one.
    """
    before, after = dict(old.named_modules()), dict(new.named_modules())
    for name in sorted(before.keys() ^ after.keys()):
        return f"{name} is {'missing' if name in before else 'added'}"
    for name, module in before.items():
        if type(module) is not type(after[name]):
            return f"{name or 'it'} is {type(after[name]).__name__}, not {type(module).__name__}"
        if reason := _attribute_difference(vars(module), vars(after[name]), depths):
            return f"{name}.{reason}".lstrip(".")
    return _shape_difference(old, new)


def _attribute_difference(old: Mapping[str, Any], new: Mapping[str, Any], depths: tuple[int, int]) -> str:
    for key in old.keys() & new.keys():
        if key.startswith("_") or key in ("training", "gradient_checkpointing") or BLOCK_NUMBER.match(key):
            continue
        pair = old[key], new[key]
        if all(isinstance(value, (list, tuple)) for value in pair) and tuple(map(len, pair)) == depths:
            continue  # a copy of a list with one entry per block, which the configuration's edits cover
        if all(isinstance(value, _PLAIN) for value in pair) and pair[0] != pair[1]:
            return f"{key} is {new[key]!r}, not {old[key]!r}"
    return ""


def _shape_difference(old: nn.Module, new: nn.Module) -> str:
    before, after = ({name: tuple(t.shape) for name, t in block.state_dict().items()} for block in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            return f"{name} has shape {after.get(name)}, not {before.get(name)}"
    return ""
