"""``offsite export``: an adapted folder in the form that another server loads, held to that server's rules first.

vLLM reads PEFT folders of LoRA. It knows no DoRA and no whole blocks, and serves ranks up to 512. The scale (share,
alpha, rsLoRA's root) is folded into the factors B, in float32, and the folder says a scale of 1, which every reader
understands alike. What is written is read again and compared before it stands.

Source: vLLM's documentation of LoRA adapters; ``max_lora_rank`` is one of `RANKS`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import Tensor

from adapters.norms import modules_of, scale_of
from offsite.console import say
from offsite.errors import RunFailed, UnsupportedModel
from offsite.staging import make_readable, refuse_existing, staged_folder
from offsite.tensors import read_tensors, spec_of, write_tensors
from server.plugging.adapted import (
    PEFT_CONFIG_FILE,
    PEFT_TENSOR_FILE,
    AdaptedManifest,
    open_adapted,
    read_stored,
    stored_names,
)
from server.plugging.exportconfig import ExportConfig
from server.plugging.fit import Fitted, module_names

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank`` that vLLM takes."""


def run(config: ExportConfig) -> dict[str, object]:
    """Run the verb: open, check against the rules, fold, write, read back.

    Raises:
        ConfigError: when the output exists.
        ArtefactError: when the folder was rejected.
        UnsupportedModel: when the other server cannot load such an adapter.
        RunFailed: when what was written reads back as something else.
    """
    refuse_existing(config.output)
    manifest = open_adapted(config.lora)
    require_vllm(manifest, config.lora.name)
    adapter = read_stored(config.lora, manifest)
    names = stored_names("peft", adapter.sites, adapter.tensors)
    tensors = {names[name]: tensor for name, tensor in folded(adapter).items()}
    settings = peft_settings(manifest, adapter)
    with staged_folder(config.output) as stage:
        write_tensors(stage / PEFT_TENSOR_FILE, tensors)
        text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False)
        (stage / PEFT_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        _require_same(stage, tensors)
        make_readable(stage)
    least = next(rank for rank in RANKS if rank >= manifest.adapter.rank)
    say(f"{config.output.name}: LoRA of rank {manifest.adapter.rank}, its scale in its factors")
    say(f"vllm serve MODEL --enable-lora --max-lora-rank {least} --lora-modules NAME={config.output}")
    return {
        "exported": config.output.name,
        "to": config.to,
        "rank": manifest.adapter.rank,
        "max_lora_rank": least,
        "scale": scale_of(manifest.adapter),
        "num_tensors": len(tensors),
        "base_digest": manifest.base_digest,
    }


def require_vllm(manifest: AdaptedManifest, name: str) -> None:
    """Return only if vLLM can load the adapter.

    Raises:
        UnsupportedModel: saying why not, and what can be done instead.
    """
    kind = manifest.adapter.kind
    if manifest.form == "merged":
        raise UnsupportedModel(f"{name!r} is a merged checkpoint: vLLM loads it as it is", hint=f"vllm serve {name}")
    if kind not in ("lora", "rslora"):
        raise UnsupportedModel(f"vLLM loads no {kind} adapter, only lora and rslora", hint="plug in with --merge")
    if manifest.adapter.rank > RANKS[-1]:
        raise UnsupportedModel(
            f"vLLM loads ranks up to {RANKS[-1]}, this one has {manifest.adapter.rank}", hint="plug in with --merge"
        )


def folded(adapter: Fitted) -> dict[str, Tensor]:
    """Return a low-rank adapter's tensors, float32, whose product is the update as it is, without a scale."""
    scale = scale_of(adapter.spec)
    found: dict[str, Tensor] = {}
    for module in modules_of(adapter.tensors):
        found[f"{module}.lora_A"] = adapter.tensors[f"{module}.lora_A"].float()
        found[f"{module}.lora_B"] = adapter.tensors[f"{module}.lora_B"].float() * scale
    return found


def peft_settings(manifest: AdaptedManifest, adapter: Fitted) -> dict[str, object]:
    """Return the content of ``adapter_config.json``: names of modules, and a scale of 1."""
    modules = module_names(adapter.tensors, adapter.sites)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.base,
        "inference_mode": True,
        "r": manifest.adapter.rank,
        "lora_alpha": manifest.adapter.rank,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        **_targets(modules),
    }


def _targets(modules: list[str]) -> dict[str, object]:
    """Return names such as ``q_proj`` with the blocks' numbers where these name just the modules, else full names."""
    places = [re.fullmatch(r"(.+?)\.([0-9]+)\.(.+)", path) for path in modules]
    found = [place.groups() for place in places if place is not None]
    stacks, numbers = {stack for stack, _, _ in found}, {int(number) for _, number, _ in found}
    names = {inner.rpartition(".")[2] for _, _, inner in found}
    if len(found) == len(modules) == len(names) * len(numbers) and len(stacks) == 1:
        pattern = stacks.pop().rpartition(".")[2]
        return {"target_modules": sorted(names), "layers_to_transform": sorted(numbers), "layers_pattern": pattern}
    return {"target_modules": sorted(modules)}


def _require_same(folder: Path, tensors: dict[str, Tensor]) -> None:
    found = read_tensors(folder / PEFT_TENSOR_FILE, {name: spec_of(tensor) for name, tensor in tensors.items()})
    if any(not found[name].equal(tensor) for name, tensor in tensors.items()):
        raise RunFailed("the exported adapter reads back as other tensors than were written")
