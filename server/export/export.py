"""``offsite export``: an adapted folder in the form that another server loads, held to that server's rules first.

vLLM reads PEFT folders of LoRA, llama.cpp a GGUF file of one (``server/export/gguffile.py``). Neither knows DoRA or
whole blocks, and vLLM serves ranks up to 512. The scale (share, alpha, rsLoRA's root) is folded into the factors B, in
float32, and what is written says a scale of 1, which every reader understands alike. It is read again and compared
before it stands.

Source: vLLM's documentation of LoRA adapters; ``max_lora_rank`` is one of `RANKS`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import Tensor

from adapters.norms import modules_of, scale_of
from offsite.console import say
from offsite.digests import model_digest
from offsite.errors import RunFailed, UnsupportedModel
from offsite.modelling.load import load_model
from offsite.staging import make_readable, refuse_existing, staged_file, staged_folder
from offsite.tensors import read_tensors, spec_of, write_tensors
from server.export.config import ExportConfig, Target
from server.export.gguffile import architecture_of, gguf_tensors, write_gguf
from server.plugging.adapted import (
    PEFT_CONFIG_FILE,
    PEFT_TENSOR_FILE,
    AdaptedManifest,
    open_adapted,
    read_stored,
    stored_names,
)
from server.plugging.fit import Fitted, module_names, require_base
from server.plugging.fullmodel import found as found_model

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``--max-lora-rank`` that vLLM takes."""


def run(config: ExportConfig) -> dict[str, object]:
    """Run the verb: open, check against the rules, fold, write, read back.

    Raises:
        ConfigError: when the output exists, or the full model is not found.
        ArtefactError: when the folder was rejected, or the full model is another one.
        UnsupportedModel: when the other server cannot load such an adapter.
        RunFailed: when what was written reads back as something else.
    """
    refuse_existing(config.output)
    manifest = open_adapted(config.lora)
    require_loadable(manifest, config.lora.name, config.to)
    adapter = read_stored(config.lora, manifest)
    written = _to_vllm(config, manifest, adapter) if config.to == "vllm" else _to_gguf(config, manifest, adapter)
    return {
        "exported": config.output.name,
        "to": config.to,
        "rank": manifest.adapter.rank,
        "scale": scale_of(manifest.adapter),
        "base_digest": manifest.base_digest,
        **written,
    }


def require_loadable(manifest: AdaptedManifest, name: str, to: Target) -> None:
    """Return only if vLLM, or llama.cpp, can load an adapter of that form, kind and rank.

    Raises:
        UnsupportedModel: saying why not, and what can be done instead.
    """
    kind, rank, who = manifest.adapter.kind, manifest.adapter.rank, {"vllm": "vLLM", "gguf": "llama.cpp"}[to]
    merge = "plug in with --merge" if to == "vllm" else "plug in with --merge, and convert the checkpoint"
    if manifest.form == "merged" and to == "vllm":
        raise UnsupportedModel(f"{name!r} is a merged checkpoint: vLLM loads it as it is", hint=f"vllm serve {name}")
    if manifest.form == "merged":
        raise UnsupportedModel(
            f"{name!r} is a merged checkpoint, no adapter", hint=f"convert it whole: convert_hf_to_gguf.py {name}"
        )
    if manifest.adapter.head is not None:
        raise UnsupportedModel(f"{who} loads adapters for text, this one is for {manifest.adapter.task}", hint=merge)
    if kind not in ("lora", "rslora"):
        raise UnsupportedModel(f"{who} loads no {kind} adapter, only lora and rslora", hint=merge)
    if to == "vllm" and rank > RANKS[-1]:
        raise UnsupportedModel(f"vLLM loads ranks up to {RANKS[-1]}, this one has {rank}", hint=merge)


def _to_vllm(config: ExportConfig, manifest: AdaptedManifest, adapter: Fitted) -> dict[str, object]:
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
    return {"max_lora_rank": least, "num_tensors": len(tensors)}


def _to_gguf(config: ExportConfig, manifest: AdaptedManifest, adapter: Fitted) -> dict[str, object]:
    source = config.base or found_model(
        config.lora, base=manifest.base, kind=manifest.base_kind, digest=manifest.base_digest
    )
    model = load_model(source)
    architecture = architecture_of(model.config)  # before the model is hashed, which takes long
    require_base(model, model_digest(model), manifest.base_digest, f"adapter {config.lora.name!r}")
    tensors = gguf_tensors(model, architecture, Fitted(adapter.spec, folded(adapter), adapter.sites))
    with staged_file(config.output) as stage:
        write_gguf(stage, tensors, architecture=architecture, rank=manifest.adapter.rank, base=manifest.base)
    say(f"{config.output.name}: LoRA of rank {manifest.adapter.rank}, its scale in its factors")
    say(f"llama-server -m MODEL.gguf --lora {config.output}")
    return {"architecture": architecture.name, "num_tensors": len(tensors)}


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
