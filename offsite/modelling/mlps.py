"""MLPs of a block, the experts of a mixture among them: where their channels are, and leaving some of them out.

Found by structure and by what their linears are called. Experts come as a list of modules or, in transformers 5, as
one module with a tensor of three dimensions for all of them; either way they are narrowed to equally many channels
each. A router is never touched: which experts a token goes to depends on the hidden state alone.

Shape letters: B batch, T tokens, N tokens in a row, D hidden, C MLP channels, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import ATTENTION, EXPERTS, is_conv1d, is_linear, linear_dims, linear_names

# How MLPs name their linears: inputs (gate, up) and output, below one module of the block or in the block itself.
# "fused" means that one linear holds the gate's channels, then those of the up projection. Of two that fit one output
# the first counts.
MLP_NAMES: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("gate_proj", "up_proj"), "down_proj", False),  # llama, mistral, qwen, gemma, olmo2, granite, smollm3
    (("gate_up_proj",), "down_proj", True),  # phi3, glm4
    (("up_proj",), "down_proj", False),  # nemotron, apertus, mpt
    (("fc1",), "fc2", False),  # phi, opt, vit, clip
    (("c_fc",), "c_proj", False),  # gpt2, starcoder2
    (("dense_h_to_4h",), "dense_4h_to_h", False),  # gpt_neox, bloom, falcon
    (("fc_in",), "fc_out", False),  # gptj
    (("wi_0", "wi_1"), "wo", False),  # t5 with gated activation
    (("wi",), "wo", False),  # t5
    (("w1", "w3"), "w2", False),  # lfm2
    (("input_linear",), "output_linear", True),  # the shared MLP of granitemoe
    (("intermediate.dense",), "output.dense", False),  # bert, roberta, deberta
    (("lin1",), "lin2", False),  # distilbert
    (("Wi",), "Wo", True),  # modernbert
)
# The tensors of experts that are one module: the input's name, and whether it holds gate and up. Biases are called
# the same with "_bias".
FUSED_NAMES = (("gate_up_proj", 2), ("up_proj", 1))
FUSED_OUTPUT = "down_proj"

_LISTED = re.compile(r"((?:.*\.)?[a-z_]*experts)\.[0-9]+")
_CONTAINER = re.compile(r"(^|\.)[a-z_]*experts?$")


@dataclass(frozen=True)
class Mlp:
    """The linears of an MLP.

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

    @property
    def place(self) -> str:
        """Name inside the block of the module that holds the linears; empty for the block itself."""
        return self.output.rpartition(".")[0]

    @property
    def num_experts(self) -> int:
        """An MLP of its own counts as one."""
        return 1


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture: a list of MLPs, or one module that holds each weight of all of them in one tensor.

    Attributes:
        place: name inside the block of the list or the module.
        num_experts: E.
        num_channels: C, of each.
        members: the MLPs of a list; empty for one module, which the rest is about.
        inputs: name in the module of the tensor with the weights in: (E, 2 C, D), or (E, C, D) without a gate.
        output: name of the one with the weights out, (E, D, C).
        halves: 2 where the inputs hold gate and up, else 1.
        interleaved: gate and up take turns; otherwise the gate's channels come first.
        turned: the two tensors are (E, D, 2 C) and (E, C, D).
    """

    place: str
    num_experts: int
    num_channels: int
    members: tuple[Mlp, ...] = ()
    inputs: str = ""
    output: str = ""
    halves: int = 1
    interleaved: bool = False
    turned: bool = False


Part = Mlp | Experts


def find_mlp(block: nn.Module) -> Mlp:
    """Return the one MLP of a block that is no mixture of experts.

    Raises:
        UnsupportedModel: a mixture of experts, or as `find_mlps`.
    """
    for name, _ in block.named_modules():
        if EXPERTS.search(name):
            raise UnsupportedModel(f"the MLP of {type(block).__name__} is a mixture of experts ({name})")
    [mlp] = find_mlps(block)
    if not isinstance(mlp, Mlp):
        raise UnsupportedModel(f"the MLP of {type(block).__name__} is a mixture of experts ({mlp.place})")
    return mlp


def find_mlps(block: nn.Module) -> tuple[Part, ...]:
    """Return every MLP of `block`: one of its own, or a mixture's experts and what stands beside them.

    Raises:
        UnsupportedModel: no MLP or several of its own by ``MLP_NAMES``, linears whose shapes do not fit together,
            experts in a form that is not known here, or other weights along the channels.
    """
    kind = type(block).__name__
    names = [name for name, module in block.named_modules() if name and is_linear(module)]
    own, listed = [], dict[str, list[Mlp]]()
    for mlp in _named(block, names):
        _require_fits(block, mlp)
        inside = _LISTED.fullmatch(mlp.place)
        own.append(mlp) if inside is None else listed.setdefault(inside[1], []).append(mlp)
    if len([mlp for mlp in own if not EXPERTS.search(mlp.place)]) > 1:
        raise UnsupportedModel(f"found {len(own)} MLPs in {kind}; expected one named as in MLP_NAMES")
    mixtures = [_of_list(block, place, members) for place, members in listed.items()]
    mixtures += [
        _of_module(block, name, module)
        for name, module in block.named_modules()
        if _CONTAINER.search(name) and any(tensor.dim() == 3 for tensor in module.parameters(recurse=False))
    ]
    found: list[Part] = [*own, *mixtures]
    for name, _ in block.named_modules():
        if _CONTAINER.search(name) and not any(f"{part.place}.".startswith(f"{name}.") for part in found):
            raise UnsupportedModel(f"the experts {name} of {kind} are in a form that no width method knows")
    if not found:
        raise UnsupportedModel(f"found 0 MLPs in {kind}; expected one named as in MLP_NAMES")
    return tuple(found)


def mlp_linears(block: nn.Module) -> tuple[str, ...]:
    """Return those of ``linear_names(block)`` that make up an MLP by ``MLP_NAMES``; empty where none does."""
    names = linear_names(block)
    found = {name for mlp in _named(block, names) for name in (*mlp.inputs, mlp.output)}
    return tuple(name for name in names if name in found)


def incoming(block: nn.Module, part: Part, number: int = 0) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Return weight (C, D) and bias (C,) by which the hidden state reaches each channel, of gate and up apart.

    Args:
        number: which expert's.

    Returns:
        Views of the block's own tensors: what is written to them is written to the block.
    """
    if isinstance(part, Experts) and part.members:
        return incoming(block, part.members[number])
    if isinstance(part, Mlp):
        pairs = [_linear_tensors(block, name) for name in part.inputs]
        return tuple(half for pair in pairs for half in _halves(*pair, 2 if part.fused else 1))
    module = block.get_submodule(part.place)
    weight_CD, bias = weight_of(module, part.inputs)[number], bias_of(module, f"{part.inputs}_bias")
    return _halves(
        weight_CD.T if part.turned else weight_CD,
        None if bias is None else bias[number],
        part.halves,
        interleaved=part.interleaved,
    )


def outgoing_weight(block: nn.Module, part: Part, number: int = 0) -> Tensor:
    """Return the weight (D, C) by which each channel reaches the hidden state; storage is shared.

    Args:
        number: which expert's.
    """
    if isinstance(part, Experts) and part.members:
        return outgoing_weight(block, part.members[number])
    if isinstance(part, Mlp):
        return _linear_tensors(block, part.output)[0]
    weight = weight_of(block.get_submodule(part.place), part.output)[number]
    return weight.T if part.turned else weight


def outgoing_bias(block: nn.Module, part: Part, number: int = 0) -> Tensor | None:
    """Return the bias (D,) of the output, or None; storage is shared."""
    if isinstance(part, Experts) and part.members:
        return outgoing_bias(block, part.members[number])
    if isinstance(part, Mlp):
        return _linear_tensors(block, part.output)[1]
    bias = bias_of(block.get_submodule(part.place), f"{part.output}_bias")
    return None if bias is None else bias[number]


def width_name(block: nn.Module, part: Part) -> tuple[str, int]:
    """Return the name inside the block of a tensor that tells how many channels the part has, and the axis that does.

    Of experts in a list it is the first one's: all have as many.
    """
    if isinstance(part, Mlp):
        return f"{part.output}.weight", 0 if is_conv1d(block.get_submodule(part.output)) else 1
    if part.members:
        return width_name(block, part.members[0])
    return f"{part.place}.{part.output}", 1 if part.turned else 2


def matrix_channels(block: nn.Module, part: Part, number: int, channels: Tensor) -> list[tuple[str, int, Tensor]]:
    """Return every matrix of an MLP, or of one expert, with its axis of channels and the lines that `channels` are.

    Names are parameters inside the block; of one tensor for all experts, with the expert's number: ``NAME.3``.
    """
    if isinstance(part, Experts) and part.members:
        return matrix_channels(block, part.members[number], 0, channels)
    halves = (2 if part.fused else 1) if isinstance(part, Mlp) else part.halves
    lines = torch.cat([channels + half * part.num_channels for half in range(halves)])
    if isinstance(part, Mlp):
        turned = [int(is_conv1d(block.get_submodule(name))) for name in (*part.inputs, part.output)]
        found = [(f"{name}.weight", axis, lines) for name, axis in zip(part.inputs, turned, strict=False)]
        return [*found, (f"{part.output}.weight", 1 - turned[-1], channels)]
    if part.interleaved:
        lines = torch.stack([channels * halves + half for half in range(halves)], dim=1).reshape(-1)
    place = f"{part.place}."
    return [
        (f"{place}{part.inputs}.{number}", int(part.turned), lines),
        (f"{place}{part.output}.{number}", 1 - int(part.turned), channels),
    ]


@torch.no_grad()
def resize_mlp(block: nn.Module, part: Part, num_channels: int) -> None:
    """Give an MLP of `block`, or every expert, new, uninitialised weights for `num_channels` channels.

    Dtype, device and ``requires_grad`` are kept, and the modules' own size attributes are edited. Other weights stay.

    Raises:
        ConfigError: `num_channels` is below 1.
    """
    if num_channels < 1:
        raise ConfigError(f"an MLP was given {num_channels} channels; expected at least 1")
    if isinstance(part, Experts) and part.members:
        for member in part.members:
            resize_mlp(block, member, num_channels)
    elif isinstance(part, Mlp):
        for name in part.inputs:
            module = block.get_submodule(name)
            _set_linear(module, linear_dims(module)[0], num_channels * (2 if part.fused else 1))
        module = block.get_submodule(part.output)
        _set_linear(module, num_channels, linear_dims(module)[1])
        _rename_size(block.get_submodule(part.place), part.num_channels, num_channels)
    else:
        module = block.get_submodule(part.place)
        rows = num_channels * part.halves
        for name, size, axis in (
            (part.inputs, rows, 2 if part.turned else 1),
            (f"{part.inputs}_bias", rows, 1),
            (part.output, num_channels, 1 if part.turned else 2),
        ):
            old = getattr(module, name, None)
            if isinstance(old, nn.Parameter):
                shape = (*old.shape[:axis], size, *old.shape[axis + 1 :])
                setattr(module, name, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
        _rename_size(module, part.num_channels, num_channels)


@torch.no_grad()
def slice_mlp(block: nn.Module, part: Part, channels: Tensor) -> None:
    """Keep only `channels` of the MLP, in that order, as compact copies; the output's bias stays as it is.

    Args:
        block: changed in place; tensors it shared with another model are left untouched there.
        part: one of ``find_mlps(block)``.
        channels: distinct channel numbers, int64, 1 to C of them; (E, K) for experts, equally many for each.

    Raises:
        ConfigError: `channels` is empty, repeats a number, or leaves [0, C).
    """
    chosen = _checked(channels, part)
    before = [(incoming(block, part, e), outgoing_weight(block, part, e)) for e in range(part.num_experts)]
    resize_mlp(block, part, chosen.shape[1])
    new = resized(part, chosen.shape[1])
    for number, (kept, (old_in, old_out)) in enumerate(zip(chosen, before, strict=True)):
        kept = kept.to(old_out.device)
        for (weight, bias), (new_weight, new_bias) in zip(old_in, incoming(block, new, number), strict=True):
            new_weight.copy_(weight[kept])
            if bias is not None and new_bias is not None:
                new_bias.copy_(bias[kept])
        outgoing_weight(block, new, number).copy_(old_out[:, kept])


@torch.no_grad()
def zero_mlp_channels(block: nn.Module, part: Part, dropped: Tensor) -> None:
    """Make the channels `dropped` contribute nothing: zero weights and biases in, zero weights out.

    The changed weights are copies, so that tensors shared with another model are left untouched there.
    The full-width counterpart of ``slice_mlp``, for oracles and for telling what a width method removes.
    """
    if not dropped.numel():
        return
    chosen = _checked(dropped, part)
    for module in _holders(block, part):
        for key, old in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    for number, gone in enumerate(chosen):
        for weight, bias in incoming(block, part, number):
            weight[gone] = 0
            if bias is not None:
                bias[gone] = 0
        outgoing_weight(block, part, number)[:, gone] = 0


@torch.no_grad()
def own_bias(block: nn.Module, part: Part) -> None:
    """Give the output's biases storage of their own, so that writing to them leaves other models alone."""
    names = (f"{part.output}_bias",) if isinstance(part, Experts) and not part.members else ("bias",)
    for module in _holders(block, part):
        for name in names:
            if isinstance(old := getattr(module, name, None), nn.Parameter):
                old.data = old.data.clone()


def resized(part: Part, num_channels: int) -> Part:
    """Return the part as it is once it has `num_channels` channels."""
    if isinstance(part, Mlp):
        return Mlp(part.inputs, part.output, num_channels, part.fused)
    members = tuple(Mlp(one.inputs, one.output, num_channels, one.fused) for one in part.members)
    return Experts(
        part.place, part.num_experts, num_channels, members, part.inputs, part.output, part.halves,
        part.interleaved, part.turned,
    )  # fmt: skip


def _named(block: nn.Module, names: Sequence[str]) -> list[Mlp]:
    """Return the MLPs that these linears make up, each output once."""
    outside = {name for name in names if not ATTENTION.search(name)}
    found: dict[str, Mlp] = {}
    for inputs, output, fused in MLP_NAMES:
        for name in sorted(outside):
            place = name.removesuffix(output)
            whole = (*(place + part for part in inputs), name)
            if name.endswith(output) and place[-1:] in ("", ".") and outside.issuperset(whole) and name not in found:
                found[name] = Mlp(whole[:-1], name, linear_dims(block.get_submodule(name))[0], fused)
    return list(found.values())


def _require_fits(block: nn.Module, mlp: Mlp) -> None:
    wanted = mlp.num_channels * (2 if mlp.fused else 1)
    for name in mlp.inputs:
        if (width := linear_dims(block.get_submodule(name))[1]) != wanted:
            raise UnsupportedModel(f"{name} of {type(block).__name__} has {width} outputs; {mlp.output} needs {wanted}")
    linears = (*mlp.inputs, mlp.output)
    place, *others = {name.rpartition(".")[0] for name in linears}
    if place and not others:  # a module of its own: a norm in it would run along the channels
        _require_no_others(block, place, [f"{name}.{key}" for name in linears for key in ("weight", "bias")])


def _require_no_others(block: nn.Module, place: str, known: Sequence[str]) -> None:
    """Return only if the module has no weights but the known ones and single numbers, as an activation may learn."""
    for name, parameter in block.get_submodule(place).named_parameters(prefix=place):
        if name not in known and parameter.numel() > 1:
            raise UnsupportedModel(f"the MLP of {type(block).__name__} has a weight that is not a linear's: {name}")


def _of_list(block: nn.Module, place: str, members: Sequence[Mlp]) -> Experts:
    ordered = sorted(members, key=lambda mlp: int(mlp.place.rpartition(".")[2]))
    sizes = {mlp.num_channels for mlp in ordered}
    if len(sizes) > 1 or len(ordered) != len(list(block.get_submodule(place).children())):
        raise UnsupportedModel(f"the experts {place} of {type(block).__name__} are not alike")
    return Experts(place, len(ordered), ordered[0].num_channels, tuple(ordered))


def _of_module(block: nn.Module, place: str, module: nn.Module) -> Experts:
    """Return the experts that one module holds; which axis is which, their shapes tell."""
    kind = type(block).__name__
    tensors = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
    for inputs, halves in FUSED_NAMES:
        into, out = tensors.get(inputs, ()), tensors.get(FUSED_OUTPUT, ())
        if len(into) != 3 or len(out) != 3 or into[0] != out[0]:
            continue
        plain = into[2] == out[1] and into[1] == halves * out[2]
        turned = into[1] == out[2] and into[2] == halves * out[1]
        if plain and turned:  # square and without a gate: only the module itself can tell
            turned = bool(getattr(module, "is_transposed", False))
        elif not plain and not turned:
            break
        names = (inputs, FUSED_OUTPUT, f"{inputs}_bias", f"{FUSED_OUTPUT}_bias")
        _require_no_others(block, place, [f"{place}.{name}" for name in names])
        interleaved = halves == 2 and not getattr(module, "is_concatenated", True)
        num_channels = out[1] if turned else out[2]
        return Experts(place, out[0], num_channels, (), inputs, FUSED_OUTPUT, halves, interleaved, turned)
    raise UnsupportedModel(f"the experts {place} of {kind} are in a form that no width method knows")


def _halves(
    weight: Tensor, bias: Tensor | None, halves: int, *, interleaved: bool = False
) -> tuple[tuple[Tensor, Tensor | None], ...]:
    size = weight.shape[0] // halves
    found = []
    for half in range(halves):
        rows = slice(half, None, halves) if interleaved else slice(half * size, (half + 1) * size)
        found.append((weight[rows], None if bias is None else bias[rows]))
    return tuple(found)


def _holders(block: nn.Module, part: Part) -> list[nn.Module]:
    """Return the modules whose own parameters are the part's weights."""
    if isinstance(part, Mlp):
        return [block.get_submodule(name) for name in (*part.inputs, part.output)]
    if part.members:
        return [module for member in part.members for module in _holders(block, member)]
    return [block.get_submodule(part.place)]


def _checked(channels: Tensor, part: Part) -> Tensor:
    """Return the numbers as (E, K) int64 on the CPU."""
    found = channels.detach().to("cpu", torch.int64)
    found = found[None] if found.dim() == 1 and part.num_experts == 1 else found
    problem = found.dim() != 2 or len(found) != part.num_experts or not found.numel()
    for row in () if problem else found.tolist():
        problem = problem or len(set(row)) < len(row) or not 0 <= min(row) <= max(row) < part.num_channels
    if problem:
        each = "" if part.num_experts == 1 else f", equally many for each of {part.num_experts} experts"
        raise ConfigError(
            f"expected distinct channel numbers from 0 to {part.num_channels - 1}, at least one of them{each}"
        )
    return found


def _linear_tensors(block: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Return weight as (out, in) and bias of a linear of either kind; views that write through."""
    module = block.get_submodule(name)
    weight = weight_of(module, "weight")
    return (weight.T if is_conv1d(module) else weight), bias_of(module, "bias")


def weight_of(module: nn.Module, name: str) -> Tensor:
    """Return the module's own parameter of that name, detached; what is written to it is written to the module."""
    found: Tensor = module.get_parameter(name).detach()
    return found


def bias_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the same where there may be none."""
    found = getattr(module, name, None)
    return found.detach() if isinstance(found, nn.Parameter) else None


def _set_linear(module: nn.Module, num_in: int, num_out: int) -> None:
    shapes = {"weight": (num_in, num_out) if is_conv1d(module) else (num_out, num_in), "bias": (num_out,)}
    for key, shape in shapes.items():
        old = getattr(module, key)
        if old is not None and tuple(old.shape) != shape:
            setattr(module, key, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
    if is_conv1d(module):
        module.nx, module.nf = num_in, num_out  # type: ignore[assignment]
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = num_in, num_out


def _rename_size(place: nn.Module, old: int, new: int) -> None:
    """Edit the size an MLP module remembers about itself, such as ``intermediate_size``."""
    for key, value in vars(place).items():
        if value == old and isinstance(value, int) and re.search(r"intermediate|ffn|inner|expert_dim", key):
            setattr(place, key, new)
