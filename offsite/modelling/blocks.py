"""Facts about architectures: where a model's stack of blocks is, the linears in a block, its MLP.

A model is read by its structure, never by its class. A *stack* is an ``nn.ModuleList`` whose items are all
``transformers.modeling_layers.GradientCheckpointingLayer``. The naming facts that no structure shows (which
linears make up an MLP, which configuration fields depend on depth) are the tables in this module; how the
configuration is edited with them is in ``offsite.modelling.depth``.

Shape letters: B batch, T tokens, D hidden, C MLP channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from offsite.errors import ConfigError, UnsupportedModel

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
PREFIX_COUNTS = ("first_k_dense_replace", "first_k_dense", "max_window_layers", "num_dense_layers")
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

# How MLPs name their linears: inputs (gate, up) and output, below one module of the block or in the block itself.
# "fused" means that one linear holds the gate's channels, then those of the up projection.
MLP_NAMES: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("gate_proj", "up_proj"), "down_proj", False),  # llama, mistral, qwen, gemma, olmo2, granite, smollm3
    (("gate_up_proj",), "down_proj", True),  # phi3
    (("fc1",), "fc2", False),  # phi, opt, vit, clip
    (("c_fc",), "c_proj", False),  # gpt2
    (("dense_h_to_4h",), "dense_4h_to_h", False),  # gpt_neox, bloom, falcon
    (("fc_in",), "fc_out", False),  # gptj
    (("wi_0", "wi_1"), "wo", False),  # t5 with gated activation
    (("wi",), "wo", False),  # t5
    (("intermediate.dense",), "output.dense", False),  # bert
)
_EXPERTS = re.compile(r"(^|\.)([a-z_]*experts?|router|gate|shared_expert_gate)(\.|$)")
_ATTENTION = re.compile(r"(^|\.)[A-Za-z_]*([Aa]ttention|attn)(\.|$)")


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


@dataclass(frozen=True)
class Mlp:
    """The linears of a block's MLP.

    The input of ``output`` is the (B, T, C) tensor of channel activations: what a method that chooses channels
    scores, with the norms of the columns of ``outgoing_weight``.

    Attributes:
        inputs: names of the gate and up projections inside the block, gate first.
        output: name of the down projection inside the block.
        num_channels: C.
        fused: the only input holds 2 C outputs, the gate's first.
    """

    inputs: tuple[str, ...]
    output: str
    num_channels: int
    fused: bool


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
        name
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name and not _EXPERTS.search(name)
    )


def attention_linears(block: nn.Module) -> tuple[str, ...]:
    """Return those of ``linear_names(block)`` that lie in an attention module."""
    return tuple(name for name in linear_names(block) if _ATTENTION.search(name))


def mlp_linears(block: nn.Module) -> tuple[str, ...]:
    """Return those of ``linear_names(block)`` that make up an MLP by ``MLP_NAMES``; empty where none does."""
    found = {name for mlp in _mlps(block) for name in (*mlp.inputs, mlp.output)}
    return tuple(name for name in linear_names(block) if name in found)


def is_conv1d(module: nn.Module) -> bool:
    """Say whether `module` is GPT-2's linear, whose weight is (in, out) where ``nn.Linear`` has (out, in)."""
    return isinstance(module, Conv1D)


def linear_dims(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear of either kind, from its weight's shape."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise ConfigError(f"{type(module).__name__} is no linear; expected Linear or Conv1D")
    rows, columns = module.weight.shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def find_mlp(block: nn.Module) -> Mlp:
    """Return the one MLP of `block`.

    Raises:
        UnsupportedModel: a mixture of experts, no MLP or several by ``MLP_NAMES``, linears whose shapes do not
            fit together, or other weights along the channels.
    """
    for name, _ in block.named_modules():
        if _EXPERTS.search(name):
            raise UnsupportedModel(f"the MLP of {type(block).__name__} is a mixture of experts ({name})")
    mlps = _mlps(block)
    if len(mlps) != 1:
        raise UnsupportedModel(f"found {len(mlps)} MLPs in {type(block).__name__}; expected one named as in MLP_NAMES")
    mlp = mlps[0]
    wanted = mlp.num_channels * (2 if mlp.fused else 1)
    for name in mlp.inputs:
        if (width := linear_dims(block.get_submodule(name))[1]) != wanted:
            raise UnsupportedModel(f"{name} of {type(block).__name__} has {width} outputs; {mlp.output} needs {wanted}")
    linears = (*mlp.inputs, mlp.output)
    place, *others = {name.rpartition(".")[0] for name in linears}
    if place and not others:  # a module of its own: a norm in it would run along the channels
        for name, _ in block.get_submodule(place).named_parameters(prefix=place):
            if name.rpartition(".")[0] not in linears:
                raise UnsupportedModel(f"the MLP of {type(block).__name__} has a weight that is not a linear's: {name}")
    return mlp


def outgoing_weight(block: nn.Module, mlp: Mlp) -> Tensor:
    """Return the weight (D, C) by which each channel reaches the hidden state; storage is shared."""
    return _linear_tensors(block, mlp.output)[0]


@torch.no_grad()
def resize_mlp(block: nn.Module, num_channels: int) -> None:
    """Give the MLP of `block` new, uninitialised weights for `num_channels` channels; other weights stay.

    Dtype, device and ``requires_grad`` are kept, and the modules' own size attributes are edited.

    Raises:
        ConfigError: `num_channels` is below 1.
        UnsupportedModel: see ``find_mlp``.
    """
    mlp = find_mlp(block)
    if num_channels < 1:
        raise ConfigError(f"an MLP was given {num_channels} channels; expected at least 1")
    for name in mlp.inputs:
        module = block.get_submodule(name)
        _set_linear(module, linear_dims(module)[0], num_channels * (2 if mlp.fused else 1))
    module = block.get_submodule(mlp.output)
    _set_linear(module, num_channels, linear_dims(module)[1])
    _rename_size(block.get_submodule(mlp.output.rpartition(".")[0]), mlp.num_channels, num_channels)


@torch.no_grad()
def slice_mlp(block: nn.Module, mlp: Mlp, channels: Tensor) -> None:
    """Keep only `channels` of the MLP, in that order, as compact copies; the output's bias stays as it is.

    Args:
        block: changed in place; tensors it shared with another model are left untouched there.
        mlp: ``find_mlp(block)``.
        channels: distinct channel numbers, int64, 1 to C of them.

    Raises:
        ConfigError: `channels` is empty, repeats a number, or leaves [0, C).
    """
    channels = _checked(channels, mlp)
    rows = torch.cat([channels, channels + mlp.num_channels]) if mlp.fused else channels
    inputs = [_linear_tensors(block, name) for name in mlp.inputs]
    outgoing = outgoing_weight(block, mlp)
    resize_mlp(block, len(channels))
    for name, (weight, bias) in zip(mlp.inputs, inputs, strict=True):
        new_weight, new_bias = _linear_tensors(block, name)
        new_weight.copy_(weight[rows.to(weight.device)])
        if bias is not None and new_bias is not None:
            new_bias.copy_(bias[rows.to(bias.device)])
    outgoing_weight(block, mlp).copy_(outgoing[:, channels.to(outgoing.device)])


@torch.no_grad()
def zero_mlp_channels(block: nn.Module, mlp: Mlp, dropped: Tensor) -> None:
    """Make the channels `dropped` contribute nothing: zero weights and biases in, zero weights out.

    The changed weights are copies, so that tensors shared with another model are left untouched there.
    The full-width counterpart of ``slice_mlp``, for oracles and for telling what a width method removes.
    """
    if not len(dropped):
        return
    dropped = _checked(dropped, mlp)
    rows = torch.cat([dropped, dropped + mlp.num_channels]) if mlp.fused else dropped
    for name in (*mlp.inputs, mlp.output):
        module = block.get_submodule(name)
        for key, old in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
        weight, bias = _linear_tensors(block, name)
        if name == mlp.output:
            weight[:, dropped] = 0
        else:
            weight[rows] = 0
            if bias is not None:
                bias[rows] = 0


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


def _mlps(block: nn.Module) -> list[Mlp]:
    names = {name for name in linear_names(block) if not _ATTENTION.search(name)}
    found: list[Mlp] = []
    for inputs, output, fused in MLP_NAMES:
        for name in sorted(names):
            place = name.removesuffix(output)
            whole = (*(place + part for part in inputs), name)
            if name.endswith(output) and place[-1:] in ("", ".") and names.issuperset(whole):
                found.append(Mlp(whole[:-1], name, linear_dims(block.get_submodule(name))[0], fused))
    return found


def _checked(channels: Tensor, mlp: Mlp) -> Tensor:
    channels = channels.detach().to("cpu", torch.int64)
    numbers = channels.tolist()
    if not numbers or len(set(numbers)) < len(numbers) or not 0 <= min(numbers) <= max(numbers) < mlp.num_channels:
        raise ConfigError(f"expected distinct channel numbers from 0 to {mlp.num_channels - 1}, at least one of them")
    return channels


def _linear_tensors(block: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Return weight as (out, in) and bias of a linear of either kind; views that write through."""
    module = block.get_submodule(name)
    parameters = {key: parameter.detach() for key, parameter in module.named_parameters(recurse=False)}
    weight = parameters["weight"]
    return (weight.T if is_conv1d(module) else weight), parameters.get("bias")


def _set_linear(module: nn.Module, num_in: int, num_out: int) -> None:
    shapes = {"weight": (num_in, num_out) if is_conv1d(module) else (num_out, num_in), "bias": (num_out,)}
    for key, shape in shapes.items():
        old = getattr(module, key)
        if old is not None and tuple(old.shape) != shape:
            setattr(module, key, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
    if isinstance(module, Conv1D):
        module.nx, module.nf = num_in, num_out
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = num_in, num_out


def _rename_size(place: nn.Module, old: int, new: int) -> None:
    """Edit the size an MLP module remembers about itself, such as ``intermediate_size``."""
    for key, value in vars(place).items():
        if value == old and isinstance(value, int) and re.search(r"intermediate|ffn|inner", key):
            setattr(place, key, new)
