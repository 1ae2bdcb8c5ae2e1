"""Making the middle smaller, before any training: from the full model to an emulator, by a method's name.

A method is a function registered under a name. To add one, write a module with such a function in this folder, and
let it refuse what it cannot do with `ConfigError` or `UnsupportedModel`. For ``--method``, name it in ``methods.py``
too, and import the module in ``emulator/distillation/distill.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch
from emulator.compression.choose import by_influence, measure_influences, uniform
from emulator.compression.finished import FinishedBlocks
from emulator.compression.methods import METHODS
from emulator.compression.width import activities, eliminate, narrow, num_kept, refit, strongest
from offsite.console import progress
from offsite.errors import ConfigError
from offsite.modelling.blocks import find_mlp, linear_names
from offsite.modelling.split import Plan, extract


@dataclass(frozen=True)
class Recipe:
    """What a method may be told; each reads what concerns it.

    Attributes:
        blocks: number of middle blocks that ``drop`` keeps.
        choice: ``uniform`` or ``influence``, how ``drop`` chooses them.
        width: share of the MLP channels that ``width`` keeps in each block.
        channels: ``obs`` or ``activation``, how ``width`` chooses them.
        refit: whether ``width`` fits the kept channels' outgoing weights to the whole MLP's output.
        calibration: public text, ``input_ids`` and ``attention_mask`` of (batch, tokens) int64 each.
        finished: where ``width`` keeps each block that it is done with, and finds those of a broken run.
    """

    blocks: int | None = None
    choice: str = "uniform"
    width: float = 1.0
    channels: str = "obs"
    refit: bool = True
    calibration: Sequence[Batch] = field(default=(), repr=False)
    finished: FinishedBlocks = field(default=FinishedBlocks(None, ""), repr=False)


@dataclass(frozen=True)
class Compressed:
    """An emulator with the ends around it, and how its blocks correspond to the full model's.

    Attributes:
        model: same class as the full model. What was not changed shares storage with it.
        kept: full-model number of every block of `model`, ends included, ascending.
        channels: kept MLP channels by block (``middle.3``), ascending; absent where all were kept.
        adaptable_middle: names inside a middle block of linears on which an adapter lifts into the full model.
        settings: what the package may state of the method: nothing of the full model's numbering.
        middle_whole: the middle is the full model's own, block for block.
    """

    model: PreTrainedModel
    kept: tuple[int, ...]
    channels: Mapping[str, tuple[int, ...]]
    adaptable_middle: tuple[str, ...]
    settings: Mapping[str, float | int | str]
    middle_whole: bool = False


Compressor = Callable[[PreTrainedModel, Plan, Recipe], Compressed]

_COMPRESSORS: dict[str, Compressor] = {}


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
    return _COMPRESSORS[method](model, plan, recipe or Recipe())


@register_compressor("keep-all")
def keep_all(model: PreTrainedModel, plan: Plan, _recipe: Recipe) -> Compressed:
    """The middle as it is: the reference that other emulators are measured against; never to be sent out."""
    kept = (*plan.bottom, *plan.middle, *plan.top)
    emulator = extract(model, {plan.stack.name: kept})
    return Compressed(emulator, kept, {}, adaptable(middle_blocks(emulator, plan)), {}, middle_whole=True)


@register_compressor("drop")
def drop(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> Compressed:
    """Some blocks of the middle whole, its first and last among them. Source: arXiv:2302.04870."""
    if recipe.blocks is None:
        raise ConfigError("method drop needs the number of middle blocks to keep")
    if recipe.choice == "uniform":
        chosen = uniform(plan.num_middle, recipe.blocks)
    elif recipe.choice == "influence":
        chosen = by_influence(measure_influences(model, middle_blocks(model, plan), recipe.calibration), recipe.blocks)
    else:
        raise ConfigError(f"unknown choice {recipe.choice!r} of blocks, expected uniform or influence")
    kept = (*plan.bottom, *(plan.middle[i] for i in chosen), *plan.top)
    return Compressed(extract(model, {plan.stack.name: kept}), kept, {}, (), {"blocks": recipe.blocks})


@register_compressor("width")
def width(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> Compressed:
    """Every block with fewer MLP channels, those that do most on public text. Source: arXiv:2404.11536."""
    choices = {"obs": eliminate, "activation": strongest}
    if recipe.channels not in choices:
        raise ConfigError(f"unknown choice {recipe.channels!r} of channels, expected {' or '.join(choices)}")
    full_blocks = middle_blocks(model, plan)
    wanted = [num_kept(find_mlp(block).num_channels, recipe.width) for block in full_blocks]
    kept = (*plan.bottom, *plan.middle, *plan.top)
    emulator = extract(model, {plan.stack.name: kept})
    blocks = middle_blocks(emulator, plan)
    channels = {}
    products = (recipe.refit or recipe.channels == "obs") and recipe.width < 1
    narrower = [i for i, num in enumerate(wanted) if num < find_mlp(full_blocks[i]).num_channels]
    before = {i: known for i in narrower if (known := recipe.finished.channels(i)) is not None}
    left = [i for i in narrower if i not in before]
    for number, kept_before in before.items():
        narrow(blocks[number], kept_before)
        recipe.finished.restore(number, blocks[number])
        channels[f"middle.{number}"] = kept_before
    with progress(len(narrower), "choosing channels, blocks", start=len(before)) as bar:
        if before:
            bar.update(len(before))
        found = activities(model, [full_blocks[i] for i in left], recipe.calibration, products=products) if left else ()
        for done, (number, activity) in enumerate(zip(left, found, strict=True), start=len(before) + 1):
            block, full_block = blocks[number], full_blocks[number]
            chosen = choices[recipe.channels](full_block, activity, wanted[number])
            narrow(block, chosen)
            if recipe.refit:
                refit(block, full_block, chosen, activity)
            recipe.finished.keep(number, chosen, block, full_block)
            channels[f"middle.{number}"] = tuple(chosen)
            bar.update(done)
    return Compressed(emulator, kept, channels, adaptable(blocks), {"width": recipe.width}, middle_whole=not channels)


def middle_blocks(model: PreTrainedModel, plan: Plan) -> list[nn.Module]:
    """Return the middle's blocks of the full model or of an emulator of it, between the plan's ends."""
    blocks = list(model.get_submodule(plan.stack.name).children())
    return blocks[plan.num_bottom : len(blocks) - plan.num_top]


def adaptable(blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Return the linears that every one of these blocks has, in the first one's order."""
    common = set.intersection(*(set(linear_names(block)) for block in blocks))
    return tuple(name for name in linear_names(blocks[0]) if name in common)
