"""The standard PEFT folder of a low-rank adapter: what vanilla peft, transformers and vLLM open.

``adapter_config.json`` is written from an allow-list of fields. Its targets must reach exactly the adapted modules:
peft loads an adapter on the wrong blocks in silence, so the folder is opened by peft itself before it is published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.lowrank import quiet_peft
from adapters.targets import peft_targets
from offsite.artefacts.bundle import AdapterSpec
from offsite.modelling.blocks import is_conv1d
from offsite.tensors import write_tensors
from server.plugging.adapted import PEFT_CONFIG_FILE, PEFT_TENSOR_FILE, stored_names
from server.plugging.fit import Fitted, module_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_peft_folder(folder: Path, model: PreTrainedModel, adapter: Fitted, *, base: str) -> None:
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


def peft_config(model: PreTrainedModel, spec: AdapterSpec, modules: list[str], base: str) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``.

    Raises:
        UnsupportedModel: when no such file reaches exactly these modules.
    """
    targets = peft_targets(model, modules, dora=spec.kind == "dora")
    by_weight = "target_parameters" in targets  # where peft knows no dropout, and it says nothing of an adapter in use
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        "lora_dropout": 0.0 if by_weight else spec.dropout,
        "use_rslora": spec.kind == "rslora",
        "use_dora": spec.kind == "dora",
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(path)) for path in modules),
        "bias": "none",
        **targets,
    }


def open_with_peft(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `model` with the folder's adapter on it, as vanilla peft loads it, in evaluation mode."""
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(model, folder).eval().get_base_model()  # type: ignore[no-any-return,return-value]
