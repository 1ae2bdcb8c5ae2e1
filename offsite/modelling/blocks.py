"""Facts about architectures: where a model's stack of blocks is, and the linears in a block.

A model is read by its structure, never by its class. A *stack* is an ``nn.ModuleList`` whose items are all
``transformers.modeling_layers.GradientCheckpointingLayer``. The naming facts that no structure shows (which
configuration fields depend on depth) are the tables in this module; how the configuration is edited with them is in
``offsite.modelling.depth``, what a block's MLPs are in ``offsite.modelling.mlps``.

Shape letters: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from offsite.encoders.trunk import is_encoder
from offsite.errors import ConfigError, UnsupportedModel
from offsite.seq2seq.models import is_seq2seq

# Configuration fields that may hold the number of blocks, the likeliest first; a stack whose name says encoder or
# decoder is looked up in that side's own fields before.
DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks", "depth", "layers")
SIDE_DEPTH_KEYS = {
    "encoder": ("encoder_layers", "num_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}

# Fields that list the numbers of the blocks with some property.
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers")
# Fields "the first k blocks are different".
PREFIX_COUNTS = (
    "first_k_dense_replace", "first_k_dense", "max_window_layers", "num_dense_layers", "moe_layer_start_index"
)  # fmt: skip
# Fields of an architecture by which something runs behind the first block alone, outside of it.
AFTER_FIRST = {"deberta-v2": "conv_kernel_size"}
# Rules "every k-th block is different" and the field that, where a model has it, says the same block by block.
PERIODS = {
    "decoder_sparse_step": "mlp_only_layers",
    "interleave_moe_layer_step": "moe_layers",
    "encoder_sparse_step": None,
    "attn_layer_period": None,
    "expert_layer_period": None,
    "moe_layer_interval": None,
    "cross_layer_interval": None,
    "cross_attention_frequency": None,
    "rescale_every": None,
}
# A list as long as the stack has one entry per block when its name matches the first pattern, never when it matches
# the second. Lists of block numbers match the third.
PER_BLOCK = re.compile(r"layer|block|_types$|_pattern$|_windows?$|^swiglu_limits|^intermediate_size$")
NEVER_PER_BLOCK = re.compile(r"token|architectures|label|section")
BLOCK_NUMBERS = re.compile(r"layer|block|_(ind(ex|ic)es|idxs|ids)$")
# Attributes that hold a block's own number.
BLOCK_NUMBER = re.compile(r"^(layer|block)_?(idx|id|index|number|num)$")

# Routers and experts, which carry no adapter; attention.
EXPERTS = re.compile(r"(^|\.)([a-z_]*experts?|router|gate|shared_expert_gate)(\.|$)")
ATTENTION = re.compile(r"(^|\.)[A-Za-z_]*([Aa]ttention|attn)(\.|$)")


@dataclass(frozen=True)
class Stack:
    """One run of blocks inside a model.

    Attributes:
        name: dotted name of the ``ModuleList``, such as ``model.layers``.
        num_blocks: its length.
        config_path: attributes that lead from the model's configuration to the one this stack was built from.
        depth_key: the field of that configuration which holds ``num_blocks``, after its ``attribute_map``.
    """

    name: str
    num_blocks: int
    config_path: tuple[str, ...]
    depth_key: str


def find_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """Return every block stack of `model`, in the order of its modules.

    Raises:
        UnsupportedModel: there is none, or no configuration field holds the depth of any.
    """
    lists = list(_block_lists(model))
    stacks = [stack for name, blocks in lists if (stack := _stack(model, name, len(blocks))) is not None]
    if stacks:
        return tuple(stacks)
    kind = type(model).__name__
    if lists:
        found = ", ".join(f"{name} of {len(blocks)}" for name, blocks in lists)
        raise UnsupportedModel(f"no configuration field of {kind} holds the depth of its block stacks: {found}")
    raise UnsupportedModel(f"no block stack found in {kind}; expected a list of gradient-checkpointing layers")


def decoder_stack(model: PreTrainedModel) -> Stack:
    """Return the one stack of a causal language model.

    Raises:
        UnsupportedModel: no stack, several of them, or a model that does not generate text.
    """
    stacks = find_stacks(model)
    kind = type(model).__name__
    if len(stacks) > 1:
        names = ", ".join(stack.name for stack in stacks)
        raise UnsupportedModel(f"{kind} has several block stacks ({names}); expected a causal language model with one")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModel(f"{kind} is no causal language model: it has no head that generates text")
    return stacks[0]


def text_stack(model: PreTrainedModel) -> Stack:
    """Return the one stack of a model that packages are made of: a causal language model, or an encoder's trunk.

    Raises:
        UnsupportedModel: as `decoder_stack`; or an encoder with no stack or several.
    """
    if not is_encoder(model):
        return decoder_stack(model)
    stacks = find_stacks(model)
    if len(stacks) > 1:
        raise UnsupportedModel(f"{type(model).__name__} has several block stacks; expected an encoder with one")
    return stacks[0]


def text_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """Return the stacks that a package of the model cuts: the one, or an encoder-decoder's two, the encoder's first.

    Raises:
        UnsupportedModel: as `text_stack`; or an encoder-decoder without just the two.
    """
    if not is_seq2seq(model):
        return (text_stack(model),)
    stacks = find_stacks(model)
    sides = [[side for side in ("encoder", "decoder") if side in stack.name.split(".")] for stack in stacks]
    if sides != [["encoder"], ["decoder"]]:
        names = ", ".join(stack.name for stack in stacks)
        raise UnsupportedModel(
            f"{type(model).__name__} has block stacks {names}; expected an encoder's and a decoder's"
        )
    return stacks


def depths_of(config: PreTrainedConfig) -> set[int]:
    """Return every number of blocks that a field of the configuration, or of a part of it, says."""
    fields = config.to_dict()
    keys = [config.attribute_map.get(key, key) for key in DEPTH_KEYS]
    keys += [key for side in SIDE_DEPTH_KEYS.values() for key in side]
    found = {fields[key] for key in keys if isinstance(fields.get(key), int)}
    parts = [getattr(config, key, None) for key in config.sub_configs]
    return found.union(*(depths_of(part) for part in parts if isinstance(part, PreTrainedConfig)))


def block_list(model: PreTrainedModel, stack: Stack) -> nn.ModuleList:
    """Return the module list that `stack` names, itself and not a copy."""
    blocks = model.get_submodule(stack.name)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != stack.num_blocks:
        raise ConfigError(f"{stack.name} of {type(model).__name__} does not have the {stack.num_blocks} blocks planned")
    return blocks


def stack_config(config: PreTrainedConfig, stack: Stack) -> PreTrainedConfig:
    """Return the part of `config` that `stack` was built from, itself and not a copy."""
    for key in stack.config_path:
        config = getattr(config, key)
    return config


def hidden_of(output: object) -> Tensor:
    """Return the hidden states (B, T, D) in what a block returned: a tensor, or a tuple that starts with it."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise UnsupportedModel(f"a block returned {type(output).__name__}; expected a tensor or a tuple of tensors")
    return hidden


def refuse_uncuttable(model: PreTrainedModel, stack: Stack) -> None:
    """Return only if no rule known to tie the blocks of `stack` to their depth or to each other is in force.

    What construction shows (a block that would come out differently at another depth) is found without a table by
    ``offsite.modelling.depth.refuse_depth_rules``.

    Raises:
        UnsupportedModel: naming the rule.
    """
    kind = type(model).__name__
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{kind} is quantised; cut the model in its full precision")
    fields = stack_config(model.config, stack).to_dict()
    for reason in _fixed_rules(fields):
        raise UnsupportedModel(f"{kind} cannot be cut: {reason}")
    seen: dict[int, int] = {}
    for number, block in enumerate(block_list(model, stack)):
        for name, parameter in block.named_parameters():
            first = seen.setdefault(id(parameter), number)
            if first != number:
                raise UnsupportedModel(f"{kind} cannot be cut: blocks {first} and {number} share the weight {name}")


def linear_names(block: nn.Module) -> tuple[str, ...]:
    """Return the dotted names inside `block` of its linears; routers and experts are left out."""
    return tuple(
        name for name, module in block.named_modules() if is_linear(module) and name and not EXPERTS.search(name)
    )


def attention_linears(block: nn.Module) -> tuple[str, ...]:
    """Return those of ``linear_names(block)`` that lie in an attention module."""
    return tuple(name for name in linear_names(block) if ATTENTION.search(name))


def is_linear(module: nn.Module) -> bool:
    """Say whether `module` is a linear, ``nn.Linear`` or GPT-2's."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_conv1d(module: nn.Module) -> bool:
    """Say whether `module` is GPT-2's linear, whose weight is (in, out) where ``nn.Linear`` has (out, in)."""
    return isinstance(module, Conv1D)


def linear_dims(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear of either kind, from its weight's shape."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise ConfigError(f"{type(module).__name__} is no linear; expected Linear or Conv1D")
    rows, columns = module.weight.shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    inside: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(f"{outer}." for outer in inside)):
            continue
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if all(isinstance(block, GradientCheckpointingLayer) for block in module):
            inside.append(name)
            yield name, module


def _stack(model: PreTrainedModel, name: str, num_blocks: int) -> Stack | None:
    """Return the stack with the configuration and the field it was built from, or None."""
    place, owner = name, None
    while place and owner is None:
        place = place.rpartition(".")[0]
        owner = getattr(model.get_submodule(place), "config", None)
    path = _path_to(model.config, owner)
    config = stack_config(model.config, Stack(name, num_blocks, path, ""))
    fields = config.to_dict()
    sides = [key for side in name.split(".") for key in SIDE_DEPTH_KEYS.get(side, ()) if key in fields]
    for key in sides or [config.attribute_map.get(key, key) for key in DEPTH_KEYS]:
        if fields.get(key) == num_blocks:
            return Stack(name, num_blocks, path, key)
    return None


def _path_to(config: PreTrainedConfig, wanted: object) -> tuple[str, ...]:
    """Return the attributes from `config` to `wanted`; () where the owner holds a copy of the whole (T5)."""
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            if part is wanted or type(part) is type(wanted):
                return (key,)
            if deeper := _path_to(part, wanted):
                return (key, *deeper)
    return ()


def _fixed_rules(fields: dict[str, Any]) -> Iterator[str]:
    """Yield every rule that a configuration shows and that a smaller model could not follow."""
    if fields.get("num_kv_shared_layers"):
        yield f"its last {fields['num_kv_shared_layers']} blocks reuse keys and values of others (num_kv_shared_layers)"
    if fields.get("kv_source_layers"):
        yield "blocks reuse keys and values of others (kv_source_layers)"
    if "shared" in (fields.get("indexer_types") or ()):
        yield "blocks reuse the token choice of others (indexer_types)"
    if fields.get("scale_attn_by_inverse_layer_idx"):
        yield "attention is scaled by the block's depth (scale_attn_by_inverse_layer_idx)"
    for key, explicit in PERIODS.items():
        step = fields.get(key)
        if isinstance(step, int) and step > 1 and (explicit is None or fields.get(explicit) is None):
            yield f"one block in {step} is of another kind ({key}) and no list says which"
