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
from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.encoders.classifier import head_modules, trunk_prefix
from offsite.evaluation.heads import SCORE
from offsite.modelling.blocks import is_conv1d
from offsite.seq2seq.models import is_seq2seq
from offsite.tensors import write_tensors
from offsite.vision.models import VISION_TYPES
from server.plugging.adapted import PEFT_CONFIG_FILE, PEFT_TENSOR_FILE, encoder_in, stored_names
from server.plugging.fit import Fitted, module_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_peft_folder(folder: Path, model: PreTrainedModel, adapter: Fitted, *, base: str) -> None:
    """Write configuration and tensors into `folder`; a head is a module that peft saves with the adapter.

    Args:
        model: the full model without the adapter, to choose targets that reach exactly the adapted modules; of an
            encoder, its classifier.
        base: what the full model is called, for tools that look for it by that.
    """
    tensors = {**adapter.tensors, **adapter.head}
    encoder = encoder_in(adapter.spec)
    names = stored_names("peft", adapter.sites, tensors, adapter.spec.head)
    write_tensors(folder / PEFT_TENSOR_FILE, {names[name]: tensor for name, tensor in tensors.items()})
    inside = f"{trunk_prefix(encoder)}." if encoder else ""
    modules = [f"{inside}{path}" for path in module_names(adapter.tensors, adapter.sites)]
    config = peft_config(model, adapter.spec, modules, base)
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
        "task_type": _task_type(model, spec),
        **({} if spec.head is None else {"modules_to_save": _saved_whole(spec.head)}),
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


def _task_type(model: PreTrainedModel, spec: AdapterSpec) -> str | None:
    """Return what peft calls models of that kind; None of images, for which it has no word."""
    if encoder_in(spec) in VISION_TYPES:
        return None
    if spec.head is not None:
        return "TOKEN_CLS" if spec.head.task == "tag" else "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if is_seq2seq(model) else "CAUSAL_LM"


def _saved_whole(head: Head) -> list[str]:
    """Return the last names of the modules that peft keeps with the adapter and does not adapt."""
    return head_modules(head.encoder, head.task) if head.encoder else [SCORE]


def open_with_peft(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `model` with the folder's adapter on it, as vanilla peft loads it, in evaluation mode."""
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(model, folder).eval().get_base_model()  # type: ignore[no-any-return,return-value]
