"""Low-rank adapters through peft: LoRA, rsLoRA and DoRA on named linear modules.

Source: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353. peft loads adapters on the wrong blocks
in silence when a name is off, and for mixtures of experts it rewrites the list of targets. So no list is matched: peft
is given the keys of the adapter's tensors, which name its modules exactly, and the set that was really reached is
compared with the set that was meant.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from adapters.kinds import Attached, register_kind
from adapters.place import placed_linears
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import is_conv1d, linear_dims
from offsite.tensors import TensorSpec

PARTS = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
MAGNITUDE = {"magnitude": "lora_magnitude_vector.default.weight"}

_NOTHING = r"(?!)"  # a pattern that no module's name matches


def declare(spec: AdapterSpec, layout: Layout, block_tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return, per linear module, ``lora_A`` (rank, in), ``lora_B`` (out, rank) and for DoRA ``magnitude`` (out)."""
    found = {}
    for name, (inputs, outputs) in placed_linears(spec, layout, same_size_only=spec.kind == "dora").items():
        found[f"{name}.lora_A"] = TensorSpec(shape=(spec.rank, inputs), dtype=spec.dtype)
        found[f"{name}.lora_B"] = TensorSpec(shape=(outputs, spec.rank), dtype=spec.dtype)
        if spec.kind == "dora":
            found[f"{name}.magnitude"] = TensorSpec(shape=(outputs,), dtype=spec.dtype)
    return found


def attach(model: nn.Module, spec: AdapterSpec, sites: Mapping[str, str], names: tuple[str, ...]) -> Attached:
    """Wrap exactly the named modules with peft; B starts at zero, so the model's output is unchanged."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    modules = {canonical: _path(canonical, sites) for canonical in dict.fromkeys(n.rsplit(".", 1)[0] for n in names)}
    _check_linears(model, modules)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=DUMMY_TARGET_MODULES,
        use_rslora=spec.kind == "rslora",
        use_dora=spec.kind == "dora",
        fan_in_fan_out=any(is_conv1d(model.get_submodule(path)) for path in modules.values()),
        bias="none",
    )
    try:
        with quiet_peft():
            wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
            config.target_modules = _NOTHING
            keys = {f"{path}.lora_A.weight": None for path in modules.values()}
            wrapped.base_model.inject_adapter(model, "default", state_dict=keys)
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UnsupportedModel(f"peft cannot put {spec.kind} on this architecture: {reason}") from None
    parts = PARTS | (MAGNITUDE if spec.kind == "dora" else {})
    found = dict(wrapped.named_parameters())
    trainable, missing = {}, []
    for canonical, path in modules.items():
        for part, suffix in parts.items():
            parameter = found.get(f"base_model.model.{path}.{suffix}")
            if parameter is None:
                missing.append(path)
            else:
                if parameter.dtype in (torch.float16, torch.bfloat16):  # small steps would be lost
                    parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                trainable[f"{canonical}.{part}"] = parameter
    reached = sum("lora_A" in name for name in found)
    if missing or reached != len(modules):
        first = f", {missing[0]!r} not among them" if missing else ""
        raise UnsupportedModel(f"peft put LoRA on {reached} modules, expected exactly {len(modules)}{first}")
    return Attached(wrapped, trainable)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence the notice that every peft call draws from transformers about a renamed property."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # said when peft rewrites the targets, which is found by looking at what it reached
        warnings.filterwarnings("ignore", message=".*_pattern.*did not match", category=RuntimeWarning)
        # said where the tensors' keys and not a list of targets tell peft what to reach
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters", category=RuntimeWarning)
        yield


def _check_linears(model: nn.Module, modules: Mapping[str, str]) -> None:
    for canonical, path in modules.items():
        try:
            linear_dims(model.get_submodule(path))
        except (AttributeError, ConfigError):
            raise UnsupportedModel(f"{canonical!r} is not a linear module of the model at {path!r}") from None


def _path(canonical: str, sites: Mapping[str, str]) -> str:
    role, number, inner = canonical.split(".", 2)
    return f"{sites[f'{role}.{number}']}.{inner}"


register_kind("lora", declare, attach)
register_kind("rslora", declare, attach)
register_kind("dora", declare, attach)
