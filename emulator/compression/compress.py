"""Making the middle smaller, before any training: from the full model to an emulator, by a method's name.

A method is a function registered under a name. To add one, write a module with such a function in this folder, and
let it refuse what it cannot do with `ConfigError` or `UnsupportedModel`. For ``--method``, name it in ``methods.py``
too, and import the module in ``emulator/distillation/distill.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch
from emulator.compression.choose import by_clusters, by_influence, measure_influences, measure_similarities, uniform
from emulator.compression.finished import FinishedBlocks, Kept, of_its_own
from emulator.compression.gradients import require_dense
from emulator.compression.gradot import gradient_keeping, scored, sensitivities
from emulator.compression.jacobian import backwards, weighed
from emulator.compression.methods import METHODS
from emulator.compression.passage import Passage
from emulator.compression.unequal import favour
from emulator.compression.width import (
    MULTIPLE,
    Activity,
    Unit,
    activities,
    eliminate,
    narrow,
    num_kept,
    refit,
    strongest,
)
from offsite.artefacts.encodings import Encoded
from offsite.console import progress
from offsite.errors import ConfigError
from offsite.mapped import let_go
from offsite.modelling.blocks import Stack, linear_names
from offsite.modelling.mlps import Experts, Mlp, Part, find_mlps, mlp_linears
from offsite.modelling.split import Plan, extract


@dataclass(frozen=True)
class Recipe:
    """What a method may be told; each reads what concerns it.

    Attributes:
        blocks: number of middle blocks that ``drop`` keeps.
        choice: ``uniform``, ``influence`` or ``crash``, how ``drop`` chooses them.
        width: share of the MLP channels that ``width`` keeps in each block.
        wider: other shares, by number of the full model's block.
        channels: ``obs``, ``activation`` or ``gradot``, how ``width`` chooses them.
        gradot_lambda: what the loss that a channel's going adds counts for its going, with ``gradot``.
        variant: which of many choices ``width`` makes; 0 for the best by what it measures.
        variant_noise: how far the others stray: standard deviation of the log of each channel's cost.
        refit: whether ``width`` fits the kept channels' outgoing weights to the whole MLP's output.
        refit_jacobian: what the gradient that ``width`` hands on counts against its output; 0 for the output alone.
        seed: of the random directions that this takes.
        calibration: public text, ``input_ids`` and ``attention_mask`` of (batch, tokens) int64 each.
        rank_share: share of its numbers that the two factors of a linear hold under ``low-rank``.
        packing: what ``packed`` packs the linears into: a key of `offsite.artefacts.encodings.BITS`.
        finished: where ``width``, ``low-rank`` and ``packed`` keep each block that is done, and find those of a broken
            run.
        compute: dtype that the model computes in, block by block; None for that of its weights.
        decoded: the emulator holds what its encoded tensors decode to. Without, it holds the full model's in their
            place: enough to write it, and no memory.
    """

    blocks: int | None = None
    choice: str = "uniform"
    width: float = 1.0
    wider: Mapping[int, float] = field(default_factory=dict)
    channels: str = "obs"
    gradot_lambda: float = 0.1
    variant: int = 0
    variant_noise: float = 0.5
    refit: bool = True
    refit_jacobian: float = 0.0
    seed: int = 0
    rank_share: float = 1.0
    packing: str = ""
    calibration: Sequence[Batch] = field(default=(), repr=False)
    finished: FinishedBlocks = field(default=FinishedBlocks(None, ""), repr=False)
    compute: torch.dtype | None = None
    decoded: bool = True

    def of(self, plan: Plan) -> Recipe:
        """Return the recipe for one stack of an encoder-decoder: what is finished of the two is kept apart."""
        return replace(self, finished=self.finished.within(plan.stack.name))

    @property
    def compute_name(self) -> str | None:
        """The name of the dtype that the model computes in, as artefacts spell it."""
        return None if self.compute is None else str(self.compute).removeprefix("torch.")

    def passage(self, model: PreTrainedModel, stack: Stack | None = None) -> Passage:
        """Return the calibration text's way through `model`, of an encoder-decoder through that stack."""
        folder = self.finished.place("carried")
        return Passage(model, self.calibration, stack=stack, folder=folder, compute=self.compute)


@dataclass(frozen=True)
class Compressed:
    """An emulator with the ends around it, and how its blocks correspond to the full model's.

    Attributes:
        model: same class as the full model. What was not changed shares storage with it.
        kept: full-model number of every block of `model`, ends included, ascending; of an encoder-decoder the
            encoder's, then the decoder's.
        channels: kept MLP channels by block (``middle.3``), ascending; absent where all were kept.
        experts: kept channels of MLPs that carry no adapter, by name (``middle.3.mlp.experts``): a list per expert.
        adaptable_middle: names inside a middle block of linears on which an adapter lifts into the full model.
        settings: what the package may state of the method: nothing of the full model's numbering.
        middle_whole: the middle is the full model's own, block for block.
        variant: as in the recipe, for the owner's record.
        encoded: tensors of `model` that are stored otherwise than as they stand, by name.
        figures: what was measured while compressing, for the owner alone.
        compute: dtype that `model` is to compute in; None for that of its tensors, which then is one.
    """

    model: PreTrainedModel
    kept: tuple[int, ...]
    channels: Mapping[str, tuple[int, ...]]
    adaptable_middle: tuple[str, ...]
    settings: Mapping[str, float | int | str]
    middle_whole: bool = False
    experts: Mapping[str, Kept] = field(default_factory=dict)
    variant: int = 0
    encoded: Mapping[str, Encoded] = field(default_factory=dict, repr=False)
    figures: Mapping[str, float] = field(default_factory=dict)
    compute: torch.dtype | None = None


Compressor = Callable[[PreTrainedModel, Plan, Recipe], Compressed]

_COMPRESSORS: dict[str, Compressor] = {}
_CHOICES = {"obs": eliminate, "activation": strongest, "gradot": gradient_keeping}


def register_compressor(name: str) -> Callable[[Compressor], Compressor]:
    """Make the decorated function the method called `name`, for `compress` and for ``--method``.

    Raises:
        ConfigError: when another function has that name.
    """

    def register(compressor: Compressor) -> Compressor:
        if _COMPRESSORS.setdefault(name, compressor) is not compressor:
            raise ConfigError(f"a compressor named {name!r} is registered already")
        METHODS.add(name)
        return compressor

    return register


def compress(model: PreTrainedModel, plan: Plan, method: str, recipe: Recipe | None = None) -> Compressed:
    """Return an emulator of the middle of `model`, training-free; `model` is not modified.

    Raises:
        ConfigError: an unknown method, or a recipe that does not fit the model.
        UnsupportedModel: when the method cannot treat this architecture.
    """
    if method not in _COMPRESSORS:
        raise ConfigError(f"unknown method {method!r}, expected one of {', '.join(sorted(_COMPRESSORS))}")
    recipe = recipe or Recipe()
    if plan.encoder is None:
        return replace(_COMPRESSORS[method](model, plan, recipe), compute=recipe.compute)
    parts = [_COMPRESSORS[method](model, side, recipe.of(side)) for side in plan.sides if side.num_middle]
    return replace(_joined(model, plan, parts), compute=recipe.compute)


def _joined(model: PreTrainedModel, plan: Plan, parts: Sequence[Compressed]) -> Compressed:
    """Return the emulator whose stacks are those of `parts`, in the plan's order; one that has no middle is whole."""
    left = iter(parts)
    found = [next(left) if side.num_middle else _as_it_is(model, side) for side in plan.sides]
    keep = {side.stack.name: part.kept for side, part in zip(plan.sides, found, strict=True)}
    emulator = extract(model, keep)
    channels: dict[str, tuple[int, ...]] = {}
    begun = 0
    for side, part in zip(plan.sides, found, strict=True):
        place, _, last = side.stack.name.rpartition(".")
        setattr(emulator.get_submodule(place), last, part.model.get_submodule(side.stack.name))
        for name, kept in part.channels.items():
            channels[f"middle.{begun + int(name.partition('.')[2])}"] = kept
        begun += len(part.kept) - side.num_bottom - side.num_top
    return Compressed(
        emulator,
        tuple(number for part in found for number in part.kept),
        channels,
        tuple(dict.fromkeys(name for part in parts for name in part.adaptable_middle)),
        parts[0].settings,
        middle_whole=all(part.middle_whole for part in parts),
        variant=parts[0].variant,
    )


def _as_it_is(model: PreTrainedModel, plan: Plan) -> Compressed:
    """Return the model with a stack that has no middle, as it is."""
    kept = tuple(range(plan.stack.num_blocks))
    return Compressed(extract(model, {plan.stack.name: kept}), kept, {}, (), {}, middle_whole=True)


@register_compressor("keep-all")
def keep_all(model: PreTrainedModel, plan: Plan, _recipe: Recipe) -> Compressed:
    """The middle as it is: the reference that other emulators are measured against; never to be sent out."""
    kept = (*plan.bottom, *plan.middle, *plan.top)
    emulator = extract(model, {plan.stack.name: kept})
    return Compressed(emulator, kept, {}, adaptable(middle_blocks(emulator, plan)), {}, middle_whole=True)


@register_compressor("drop")
def drop(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> Compressed:
    """Some blocks of the middle whole, usually its first and last among them. Source: arXiv:2302.04870.

    An adapter on a kept block is one on the full model's own (FedProxy, arXiv:2604.19015).
    """
    if recipe.blocks is None:
        raise ConfigError("method drop needs the number of middle blocks to keep")
    read = (model, middle_blocks(model, plan), recipe.calibration)
    if recipe.choice == "uniform":
        chosen = uniform(plan.num_middle, recipe.blocks)
    elif recipe.choice == "influence":
        chosen = by_influence(measure_influences(*read, passage=recipe.passage(model)), recipe.blocks)
    elif recipe.choice == "crash":
        chosen = by_clusters(measure_similarities(*read, passage=recipe.passage(model)), recipe.blocks)
    else:
        raise ConfigError(f"unknown choice {recipe.choice!r} of blocks, expected uniform, influence or crash")
    kept = (*plan.bottom, *(plan.middle[i] for i in chosen), *plan.top)
    emulator = extract(model, {plan.stack.name: kept})
    return Compressed(emulator, kept, {}, adaptable(middle_blocks(emulator, plan)), {"blocks": recipe.blocks})


@register_compressor("width")
def width(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> Compressed:
    """Every block with fewer MLP channels, those that do most on public text. Source: arXiv:2404.11536."""
    if recipe.channels not in _CHOICES:
        raise ConfigError(f"unknown choice {recipe.channels!r} of channels, expected {', '.join(_CHOICES)}")
    full_blocks = middle_blocks(model, plan)
    if recipe.refit_jacobian or recipe.channels == "gradot":
        require_dense(full_blocks)
    parts = [find_mlps(block) for block in full_blocks]
    kept = (*plan.bottom, *plan.middle, *plan.top)
    emulator = extract(model, {plan.stack.name: kept})
    blocks = middle_blocks(emulator, plan)
    nums = {(i, part.place): _num(part, share) for i, share in enumerate(_shares(plan, recipe)) for part in parts[i]}
    narrower = [i for i, own in enumerate(parts) if any(nums[i, part.place] < part.num_channels for part in own)]
    before = {i: known for i in narrower if (known := recipe.finished.channels(i)) is not None}
    left = [i for i in narrower if i not in before]
    for number, known in before.items():
        for part in parts[number]:
            if part.place in known:
                narrow(blocks[number], part, known[part.place])
        recipe.finished.restore(number, blocks[number])
    chosen = dict(before)
    products = (recipe.refit or recipe.channels == "obs") and recipe.width < 1
    with progress(len(narrower), "choosing channels, blocks", start=len(before)) as bar:
        if before:
            bar.update(len(before))
        to_read = [full_blocks[i] for i in left]
        found: Iterator[Activity] = iter(())
        if left:
            way = recipe.passage(model, plan.stack)
            found = activities(model, to_read, recipe.calibration, products=products, passage=way)
        if recipe.refit_jacobian and left:
            backward = backwards(model, to_read, recipe.calibration, seed=recipe.seed)
            found = weighed(found, backward, recipe.refit_jacobian)
        if recipe.channels == "gradot" and left:
            found = scored(found, sensitivities(model, to_read, recipe.calibration, recipe.gradot_lambda))
        for done, number in enumerate(left, start=len(before) + 1):
            chosen[number] = {}
            for part in parts[number]:
                seen = [next(found) for _ in range(part.num_experts)]
                if (num := nums[number, part.place]) < part.num_channels:
                    seen = _favoured(seen, recipe, f"{number}.{part.place}")
                    chosen[number][part.place] = _narrowed(blocks[number], full_blocks[number], part, seen, num, recipe)
            recipe.finished.keep(number, chosen[number], blocks[number], full_blocks[number])
            let_go(full_blocks[number].parameters())
            bar.update(done)
    channels, experts = _by_adapter(full_blocks, parts, chosen)
    return Compressed(
        emulator,
        kept,
        channels,
        adaptable(blocks),
        {"width": _average(parts, nums) if recipe.wider else recipe.width},
        middle_whole=not chosen,
        experts=experts,
        variant=recipe.variant,
    )


def _shares(plan: Plan, recipe: Recipe) -> list[float]:
    """Return the share of channels that each block of the middle keeps."""
    if outside := sorted(recipe.wider.keys() - set(plan.middle)):
        raise ConfigError(
            f"--wider names block {outside[0]}, expected blocks of the middle: {plan.middle[0]} to {plan.middle[-1]}",
            hint="blocks count from 0 through the full model, as in its checkpoint",
        )
    return [recipe.wider.get(number, recipe.width) for number in plan.middle]


def _average(parts: Sequence[Sequence[Part]], nums: Mapping[tuple[int, str], int]) -> float:
    """Return which share of all MLP channels of the middle is kept, to four digits."""
    every = [(part.num_experts, part.num_channels, nums[i, part.place]) for i, own in enumerate(parts) for part in own]
    return round(sum(e * num for e, _, num in every) / sum(e * num for e, num, _ in every), 4)


def _favoured(seen: Sequence[Activity], recipe: Recipe, place: str) -> list[Activity]:
    """Return the activities with what the recipe's variant favours; those of variant 0 as they are."""
    if not recipe.variant:
        return list(seen)
    return [
        replace(one, favour=favour(recipe.variant, recipe.variant_noise, f"{place}.{number}", len(one.mean)))
        for number, one in enumerate(seen)
    ]


def _num(part: Part, share: float) -> int:
    """Return how many channels the part keeps: of experts in one tensor never fewer than a tile.

    What multiplies those takes no rows of other lengths.
    """
    num = num_kept(part.num_channels, share)
    return min(part.num_channels, max(MULTIPLE, num)) if isinstance(part, Experts) and not part.members else num


def _narrowed(
    block: nn.Module, full_block: nn.Module, part: Part, seen: Sequence[Activity], num: int, recipe: Recipe
) -> Kept:
    """Narrow one MLP of `block`, or every expert, and return the channels kept: by expert, ascending."""
    whole = [Unit(full_block, part, number) for number in range(part.num_experts)]
    choose = _CHOICES[recipe.channels]
    chosen = [choose(unit, activity, num) for unit, activity in zip(whole, seen, strict=True)]
    narrowed = narrow(block, part, chosen)
    if recipe.compute is not None:
        for parameter in of_its_own(block, full_block).values():
            parameter.data = parameter.data.to(recipe.compute if parameter.is_floating_point() else parameter.dtype)
    if recipe.refit:
        for number, (unit, kept, activity) in enumerate(zip(whole, chosen, seen, strict=True)):
            refit(Unit(block, narrowed, number), unit, kept, activity)
    return tuple(map(tuple, chosen))


def _by_adapter(
    full_blocks: Sequence[nn.Module], parts: Sequence[Sequence[Part]], chosen: Mapping[int, Mapping[str, Kept]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Kept]]:
    """Return the kept channels of MLPs that can carry an adapter, by block, and those of all others, by name."""
    channels: dict[str, tuple[int, ...]] = {}
    experts: dict[str, Kept] = {}
    for number in sorted(chosen):
        carries = set(mlp_linears(full_blocks[number]))
        for part in parts[number]:
            if part.place not in chosen[number]:
                continue
            if isinstance(part, Mlp) and part.output in carries:
                [channels[f"middle.{number}"]] = chosen[number][part.place]
            else:
                experts[f"middle.{number}.{part.place}"] = chosen[number][part.place]
    return channels, experts


def middle_blocks(model: PreTrainedModel, plan: Plan) -> list[nn.Module]:
    """Return the middle's blocks of the full model or of an emulator of it, between the plan's ends, of all stacks."""
    found: list[nn.Module] = []
    for side in plan.sides:
        blocks = list(model.get_submodule(side.stack.name).children())
        found += blocks[side.num_bottom : len(blocks) - side.num_top]
    return found


def adaptable(blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Return the linears that every one of these blocks has, in the first one's order."""
    common = set.intersection(*(set(linear_names(block)) for block in blocks))
    return tuple(name for name in linear_names(blocks[0]) if name in common)
