"""Cut a model's block stack into ends and middle, and build a smaller model from some of its blocks.

A smaller model is of the same class, with the configuration edited everywhere depth shows, and its tensors are the
full model's own: nothing is copied, so the full model is never held twice. Writing to one therefore writes to the
other; call ``own`` on what is to be trained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offsite.encoders.outputs import made_up_ids, outputs
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import Stack, block_list, find_stacks, hidden_of, refuse_uncuttable, text_stacks
from offsite.modelling.config import Stacks
from offsite.modelling.context import context_of
from offsite.modelling.depth import build_empty, refuse_depth_rules, source_name
from offsite.seq2seq.models import is_seq2seq


@dataclass(frozen=True)
class Plan:
    """Where a stack is cut: how many blocks are the bottom end and the top end; the middle lies between.

    Of an encoder-decoder it is the decoder's, and ``encoder`` the other one's. A stack that is not cut has no middle.
    """

    stack: Stack
    num_bottom: int
    num_top: int
    encoder: Plan | None = None

    @property
    def sides(self) -> tuple[Plan, ...]:
        """The plan of each stack, the encoder's first; of a model with one stack, that."""
        return (self,) if self.encoder is None else (self.encoder, replace(self, encoder=None))

    def by_stack(self, model: PreTrainedModel, kept: Sequence[int]) -> dict[Stack, tuple[int, ...]]:
        """Return of each stack the numbers of its kept blocks, which `kept` has one stack after the other.

        Args:
            model: with the kept blocks alone.
        """
        left, found = list(kept), {}
        for side in self.sides:
            num = len(list(model.get_submodule(side.stack.name).children()))
            found[side.stack], left = tuple(left[:num]), left[num:]
        return found

    @property
    def num_middle(self) -> int:
        """Number of blocks between the ends."""
        return self.stack.num_blocks - self.num_bottom - self.num_top

    @property
    def bottom(self) -> tuple[int, ...]:
        """Block numbers of the bottom end."""
        return tuple(range(self.num_bottom))

    @property
    def middle(self) -> tuple[int, ...]:
        """Block numbers of the middle."""
        return tuple(range(self.num_bottom, self.stack.num_blocks - self.num_top))

    @property
    def top(self) -> tuple[int, ...]:
        """Block numbers of the top end."""
        return tuple(range(self.stack.num_blocks - self.num_top, self.stack.num_blocks))


@dataclass(frozen=True)
class Parts:
    """The blocks of a model by role; the same modules, not copies."""

    bottom: tuple[nn.Module, ...]
    middle: tuple[nn.Module, ...]
    top: tuple[nn.Module, ...]


def make_plan(model: PreTrainedModel, *, num_bottom: int = 2, num_top: int = 2, stacks: Stacks = "both") -> Plan:
    """Return a plan for a causal language model, an encoder or an encoder-decoder, that is known to survive cutting.

    Args:
        model: the full model; not modified.
        num_bottom: blocks of the bottom end, 0 or more.
        num_top: blocks of the top end, 1 or more.
        stacks: of an encoder-decoder, those that are cut, with ends of so many blocks each.

    Raises:
        ConfigError: a count is out of range or no middle is left.
        UnsupportedModel: not one block stack with a text head, or a rule ties blocks to their depth.
    """
    if num_bottom < 0 or num_top < 1:
        raise ConfigError(f"found ends of {num_bottom}+{num_top} blocks; expected at least 0+1")
    sides = text_stacks(model)
    if len(sides) == 1:
        return _cut_plan(model, sides[0], num_bottom, num_top)
    encoder, decoder = (
        _cut_plan(model, stack, num_bottom, num_top)
        if stacks in ("both", name)
        else Plan(stack, min(num_bottom, stack.num_blocks), max(0, stack.num_blocks - num_bottom))
        for name, stack in zip(("encoder", "decoder"), sides, strict=True)
    )
    return replace(decoder, encoder=encoder)


def _cut_plan(model: PreTrainedModel, stack: Stack, num_bottom: int, num_top: int) -> Plan:
    if num_bottom + num_top >= stack.num_blocks:
        raise ConfigError(
            f"ends of {num_bottom}+{num_top} blocks leave no middle in {stack.name} of {stack.num_blocks} blocks",
            hint=f"choose ends that sum to at most {stack.num_blocks - 1}",
        )
    refuse_uncuttable(model, stack)
    refuse_depth_rules(model, stack)
    return Plan(stack, num_bottom, num_top)


def split(model: PreTrainedModel, plan: Plan) -> Parts:
    """Cut the block stack into bottom end, middle, top end.

    Hidden states at the cuts are (batch, tokens, hidden) in the model's dtype; the blocks are the model's own.

    Raises:
        ConfigError: the plan is for another model.

    Source: arXiv:2302.04870.
    """
    blocks = tuple(block_list(model, plan.stack))
    first, last = plan.num_bottom, plan.num_bottom + plan.num_middle
    return Parts(blocks[:first], blocks[first:last], blocks[last:])


def join(parts: Parts) -> nn.ModuleList:
    """Return the blocks in their order: what ``split`` cut, as one list of the same modules."""
    return nn.ModuleList(chain(parts.bottom, parts.middle, parts.top))


def block_names(stack_name: str, num_bottom: int, num_middle: int, num_top: int) -> dict[str, str]:
    """Map ``bottom.i``, ``middle.i``, ``top.i`` to module names in the numbering of a model with those counts."""
    counts = {"bottom": num_bottom, "middle": num_middle, "top": num_top}
    roles = [f"{role}.{i}" for role, count in counts.items() for i in range(count)]
    return {role: f"{stack_name}.{number}" for number, role in enumerate(roles)}


def extract(model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> PreTrainedModel:
    """Build a model of the same class that has only the kept blocks, renumbered, in ``eval`` mode.

    Args:
        model: any transformers model with whole, unquantised weights; not modified.
        keep: stack name to the numbers of its kept blocks, strictly increasing; other stacks stay whole.

    Returns:
        Every parameter and buffer shares storage with `model`'s; heads that were tied are tied again.

    Raises:
        ConfigError: an unknown stack, or numbers that are none, out of range or not increasing.
        UnsupportedModel: the kept blocks would not compute what they did (see ``offsite.modelling.depth``).
    """
    stacks = {stack.name: stack for stack in find_stacks(model)}
    kept = {stacks[name]: tuple(numbers) for name, numbers in _checked(keep, stacks).items()}
    for stack in kept:
        refuse_uncuttable(model, stack)
    small = build_empty(model, kept)
    _assign_saved(model, small, kept)
    _assign_unsaved(model, small, kept)
    if model.can_generate():
        small.generation_config = copy.deepcopy(model.generation_config)
    small.eval()
    return small


@torch.no_grad()
def own(module: nn.Module) -> None:
    """Give `module` tensors of its own, so that training it leaves the model it was extracted from alone."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.clone()  # in place: ties between parameters stay
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.clone())


@torch.no_grad()
def largest_deviation(
    model: PreTrainedModel, small: PreTrainedModel, keep: Mapping[str, Sequence[int]], *, num_tokens: int = 16
) -> float:
    """Return how far `small` is from `model` with the other blocks skipped, on random tokens.

    The whole-model oracle for a cut: 0 up to rounding when ``extract`` was right, run on the weights at hand.

    Returns:
        The largest absolute difference of the logits, or an encoder's last hidden states, over their largest absolute
        value.
    """
    ids_BT = made_up_ids(model, 1, min(num_tokens, context_of(model) or num_tokens))
    handles = [
        model.get_submodule(f"{name}.{number}").register_forward_hook(_skip, with_kwargs=True)
        for name, numbers in keep.items()
        for number in range(len(model.get_submodule(name)))  # type: ignore[arg-type]
        if number not in numbers
    ]
    try:
        wanted = outputs(model, ids_BT).float()
    finally:
        for handle in handles:
            handle.remove()
    found = outputs(small, ids_BT).float()
    return float((found - wanted).abs().max() / wanted.abs().max())


def _checked(keep: Mapping[str, Sequence[int]], stacks: Mapping[str, Stack]) -> Mapping[str, Sequence[int]]:
    problems = []
    for name, numbers in keep.items():
        if name not in stacks:
            problems.append(f"no block stack {name}; found {', '.join(stacks)}")
            continue
        total = stacks[name].num_blocks
        increasing = all(a < b for a, b in pairwise(numbers))
        if not numbers or not increasing or numbers[0] < 0 or numbers[-1] >= total:
            problems.append(f"kept blocks of {name} must increase from 0 to at most {total - 1}: {list(numbers)}")
    if problems:
        raise ConfigError("; ".join(problems))
    return keep


def _assign_saved(model: PreTrainedModel, small: PreTrainedModel, keep: Mapping[Stack, Sequence[int]]) -> None:
    """Put the full model's parameters and persistent buffers in place, as the same memory."""
    source = model.state_dict()
    small.load_state_dict({name: source[source_name(name, keep)] for name in small.state_dict()}, assign=True)
    _tie(model, small, keep)


def _tie(model: PreTrainedModel, small: PreTrainedModel, keep: Mapping[Stack, Sequence[int]]) -> None:
    """Make one parameter of those that are the same memory, and check that the configuration ties no others.

    What T5's class ties, but transformers found apart in the checkpoint (v1.1's head), is apart in `small`, too.
    """
    first: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for name, parameter in list(small.named_parameters(remove_duplicate=False)):
        shared = first.setdefault((parameter.data_ptr(), parameter.shape), parameter)
        place, _, key = name.rpartition(".")
        setattr(small.get_submodule(place), key, shared)
    parameters = dict(small.named_parameters(remove_duplicate=False))
    tied: dict[str, str] = getattr(small, "all_tied_weights_keys", {})
    for target, origin in list(tied.items()):
        if is_seq2seq(model) and source_name(target, keep) not in getattr(model, "all_tied_weights_keys", {}):
            del tied[target]
            continue
        if parameters.get(target) is not parameters.get(origin):
            raise UnsupportedModel(f"{target} is tied to {origin} by the configuration but not in the model")


def _assign_unsaved(model: PreTrainedModel, small: PreTrainedModel, keep: Mapping[Stack, Sequence[int]]) -> None:
    """Put buffers that no checkpoint holds in place, and check that nothing is left without memory."""
    for place, part in small.named_modules():
        old = model.get_submodule(source_name(place, keep))
        for key, value in [*part.named_buffers(recurse=False), *vars(part).items()]:
            if isinstance(value, Tensor) and value.is_meta:
                setattr(part, key, getattr(old, key))
    for name, tensor in chain(small.named_parameters(), small.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedModel(f"{name} of {type(model).__name__} has no counterpart to share")


def _skip(_block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden_of(output)
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return hidden
