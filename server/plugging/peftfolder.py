"""The standard PEFT folder of a low-rank adapter: what vanilla peft, transformers and vLLM open.

``adapter_config.json`` is written from an allow-list of fields. Its targets must reach exactly the adapted modules:
peft loads an adapter on the wrong blocks in silence, so the folder is opened by peft itself before it is published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from adapters.lowrank import quiet_peft
from offsite.artefacts.bundle import AdapterSpec
from offsite.modelling.blocks import is_conv1d
from offsite.tensors import write_tensors
from server.plugging.adapted import PEFT_CONFIG_FILE, PEFT_TENSOR_FILE, stored_names
from server.plugging.fit import Fitted, module_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_peft_folder(folder: Path, model: nn.Module, adapter: Fitted, *, base: str) -> None:
    """Write configuration and tensors into `folder`.

    Args:
        model: the full model without the adapter, to choose targets that reach exactly the adapted modules.
        base: what the full model is called, for tools that look for it by that.
    """
    names = stored_names("peft", adapter.sites, adapter.tensors)
    write_tensors(folder / PEFT_TENSOR_FILE, {names[name]: tensor for name, tensor in adapter.tensors.items()})
    config = peft_config(model, adapter.spec, module_names(adapter.tensors, adapter.sites), base)
    text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / PEFT_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def peft_config(model: nn.Module, spec: AdapterSpec, modules: list[str], base: str) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.kind == "rslora",
        "use_dora": spec.kind == "dora",
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(path)) for path in modules),
        "bias": "none",
        **targets(model, modules),
    }


def targets(model: nn.Module, modules: list[str]) -> dict[str, Any]:
    """Return peft's settings that reach exactly these modules, in the plainest form that does.

    That is names such as ``q_proj`` with ``layers_to_transform``, which vLLM reads too, or the names inside a block,
    or full names.
    """
    wanted = set(modules)
    stacks = {_split(path)[0] for path in modules}
    pattern = stacks.pop().rpartition(".")[2] if len(stacks) == 1 else ""
    numbers = sorted({_split(path)[1] for path in modules})
    last = sorted({path.rpartition(".")[2] for path in modules})
    inner = sorted({_split(path)[2] for path in modules})
    for suffixes in (last, inner):
        if pattern and _reached(model, suffixes, pattern, numbers) == wanted:
            return {"target_modules": suffixes, "layers_to_transform": numbers, "layers_pattern": pattern}
    return {"target_modules": sorted(wanted), "layers_to_transform": None, "layers_pattern": None}


def _reached(model: nn.Module, suffixes: list[str], pattern: str, numbers: list[int]) -> set[str]:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=suffixes, layers_to_transform=numbers, layers_pattern=pattern)
    return {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)}


def _split(path: str) -> tuple[str, int, str]:
    """Return (stack, block number, name inside the block) of ``model.layers.3.self_attn.q_proj``."""
    parts = path.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])


def open_with_peft(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `model` with the folder's adapter on it, as vanilla peft loads it, in evaluation mode."""
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(model, folder).eval().get_base_model()  # type: ignore[no-any-return,return-value]
