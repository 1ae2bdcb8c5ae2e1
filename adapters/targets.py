"""How a PEFT folder names the modules that carry a low-rank adapter, so that vanilla peft reaches those and no other.

Names are no order to peft. They are matched as endings, and on mixtures of experts names that end as an expert's
projection once did (``gate_proj``, ``down_proj``) are rewritten into the experts' fused tensors, whatever module they
name in full. So each form of naming is tried on a copy without memory, and what peft reached is read off it. Modules
that peft will not reach by name are named by their weight (``target_parameters``), which is not rewritten.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adapters.heads import without_head
from adapters.kinds import attach, declared
from adapters.lowrank import quiet_peft
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.package import Package
from offsite.encoders.trunk import build_like
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import is_conv1d

PEFT_KINDS = ("lora", "rslora", "dora")

_REACHED = ".lora_A.default.weight"


def require_carried(package: Package, spec: AdapterSpec) -> int:
    """Return how many tensors such an adapter has, once it is seen to go on the package's model and into its form.

    The owner's question before a job is made of it: what the client's `attach` and a PEFT folder would refuse is
    refused here, on a model without memory. Asked again in one process of the same package's content, it is not tried
    again: a federation's jobs differ in their client alone.

    Raises:
        ConfigError: when the package cannot carry the adapter in that place.
        UnsupportedModel: when it cannot be put on this architecture, or not be written for peft; the hint says what
            can.
        ArtefactError: when the package's settings do not make its model.
    """
    try:
        return _carried(package, spec)
    except UnsupportedModel as error:
        others = [targets for targets in ("attention", "mlp") if spec.targets == "all-linear"]
        ways = [targets for targets in others if _is_carried(package, spec.model_copy(update={"targets": targets}))]
        hint = " or ".join(f"--targets {targets}" for targets in ways)
        if spec.kind == "dora" and _is_carried(package, spec.model_copy(update={"kind": "lora"})):
            hint += f"{', or ' if hint else ''}--adapter lora"
        raise UnsupportedModel(str(error), hint=hint or None) from error


def _is_carried(package: Package, spec: AdapterSpec) -> bool:
    try:
        _carried(package, spec)
    except (ConfigError, UnsupportedModel):
        return False
    return True


@dataclass(frozen=True)
class _Question:
    """An adapter on a package's content, wherever that lies."""

    digest: str
    spec: AdapterSpec
    package: Package = field(compare=False)


def _carried(package: Package, spec: AdapterSpec) -> int:
    return _answer(_Question(package.digest, spec, package))


@lru_cache(maxsize=16)  # what is refused is raised, so not kept
def _answer(question: _Question) -> int:
    package, spec = question.package, question.spec
    names = declared(spec, package.layout, package.block_tensors())
    model, blocks = package.empty_model(), package.layout.blocks
    if spec.kind in PEFT_KINDS:
        parts = [name.rpartition(".")[0].split(".", 2) for name in without_head(names)]
        modules = {f"{blocks[f'{role}.{number}']}.{inner}" for role, number, inner in parts}
        peft_targets(model, modules, dora=spec.kind == "dora")
    attach(model, spec, blocks, names)
    return len(names)


def peft_targets(model: PreTrainedModel, modules: Iterable[str], *, dora: bool = False) -> dict[str, Any]:
    """Return peft's settings that reach exactly these modules, in the plainest form that does.

    That is names such as ``q_proj`` with ``layers_to_transform``, which vLLM reads too, or the names inside a block,
    or full names; ``target_parameters`` is there only where it is needed.

    Args:
        model: without an adapter; only its class and its configuration are used.
        dora: the adapter is one, which peft puts on modules and never on a weight.

    Raises:
        UnsupportedModel: when no form does.
    """
    wanted = sorted(set(modules))
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # saving a model leaves its name there, which some architectures do not take
    with torch.device("meta"):
        shell = build_like(model, config)
    for settings in _by_name(wanted):
        if _reached(shell, settings) == set(wanted):
            return settings
    by_name = sorted(_safe(shell, wanted))
    by_weight = sorted(set(wanted) - set(by_name))
    weights = {"target_parameters": [f"{path}.weight" for path in by_weight]}
    if by_weight and not dora:
        for settings in _by_name(by_name):
            if _reached(shell, settings | weights) == set(wanted):
                return settings | weights
    kind = "dora" if dora else "lora"
    raise UnsupportedModel(
        f"a PEFT folder of {kind} cannot name {(by_weight or wanted)[0]!r} of {type(model).__name__}: peft takes it "
        "for an expert's"
    )


def _by_name(modules: list[str]) -> Iterator[dict[str, Any]]:
    if not modules:
        yield {"target_modules": [], "layers_to_transform": None, "layers_pattern": None}
        return
    places = [_split(path) for path in modules]
    stacks = {stack for stack, _, _ in places}
    numbers = sorted({number for _, number, _ in places})
    last = sorted({path.rpartition(".")[2] for path in modules})
    inner = sorted({name for _, _, name in places})
    if len(stacks) == 1 and (pattern := stacks.pop().rpartition(".")[2]):
        for suffixes in (last, inner):
            yield {"target_modules": suffixes, "layers_to_transform": numbers, "layers_pattern": pattern}
    yield {"target_modules": modules, "layers_to_transform": None, "layers_pattern": None}


def _safe(shell: PreTrainedModel, modules: list[str]) -> set[str]:
    """Return the modules that peft reaches by their full names, tried together by what they are called."""
    found: set[str] = set()
    for last in {path.rpartition(".")[2] for path in modules}:
        alike = {path for path in modules if path.rpartition(".")[2] == last}
        if _reached(shell, {"target_modules": sorted(alike)}) == alike:
            found |= alike
    return found


def _reached(shell: PreTrainedModel, settings: Mapping[str, Any]) -> set[str]:
    """Return the modules on which peft puts LoRA when told so; none where it refuses."""
    from peft import LoraConfig, get_peft_model

    try:
        with quiet_peft():
            # a copy: peft edits its configuration and the model in place
            wrapped: nn.Module = get_peft_model(
                copy.deepcopy(shell),
                LoraConfig(r=1, fan_in_fan_out=any(map(is_conv1d, shell.modules())), **copy.deepcopy(dict(settings))),
                low_cpu_mem_usage=True,
            )
    except ValueError:
        return set()
    names = [name for name, _ in wrapped.named_parameters() if name.endswith(_REACHED)]
    return {name.removeprefix("base_model.model.").removesuffix(_REACHED) for name in names}


def _split(path: str) -> tuple[str, int, str]:
    """Return (stack, block number, name inside the block) of ``model.layers.3.self_attn.q_proj``."""
    parts = path.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])
