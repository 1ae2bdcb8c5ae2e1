"""The whole loop on a tiny model, both sides in one process: package, two steps, bundle, plug in, vanilla peft."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from adapters.kinds import attach, declared
from adapters.targets import PEFT_KINDS, require_carried
from emulator.compression.compress import Recipe, compress
from emulator.distillation.publish import publish
from offsite.artefacts.bundle import AdapterSpec, Bundle, write_bundle
from offsite.artefacts.owner import OwnerRecord, owner_record_path, read_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.digests import model_digest
from offsite.modelling.split import make_plan
from server.evaluation.candidates import read_own
from server.plugging.fit import fit, plug, plugged
from server.plugging.peftfolder import write_peft_folder
from server.plugging.plug import merge

IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits on fixed tokens, without a cache."""
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@dataclass
class Packed:
    """A package, its owner's record, and the model that was published in it."""

    full: PreTrainedModel
    package: Package
    record: OwnerRecord
    emulator: PreTrainedModel


def pack(full: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, method: str, **recipe: Any) -> Packed:
    """Publish an emulator of `full` with ends of one block, as the owner does, without training."""
    plan = make_plan(full, num_bottom=1, num_top=1)
    text = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    compressed = compress(full, plan, method, Recipe(calibration=[text], **recipe))
    publish(
        out,
        model=compressed.model,
        tokenizer=tokenizer,
        plan=plan,
        compressed=compressed,
        method=method,
        base_digest=model_digest(full),
        figures={},
        dtype="float32",
    )
    return Packed(full, open_package(out), read_owner_record(owner_record_path(out)), compressed.model)


def tune(package: Package, out: Path, spec: AdapterSpec, *, steps: int = 2) -> Bundle:
    """Train as the client does, for a few steps at a large rate, and write the bundle."""
    require_carried(package, spec)
    names = declared(spec, package.layout, package.block_tensors())
    torch.manual_seed(2)
    attached = attach(package.load_model(), spec, package.layout.blocks, names)
    optimizer = torch.optim.AdamW(attached.trainable.values(), lr=0.02)
    for _ in range(steps):
        loss = attached.model(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return write_bundle(out, package=package, spec=spec, tensors=attached.tensors(), expected=names)


@dataclass
class Plugged:
    """Logits of the full model with an adapter, three ways, and without; all but `own` are None for other kinds."""

    before: torch.Tensor
    own: torch.Tensor
    merged: torch.Tensor | None = None
    vanilla: torch.Tensor | None = None
    reached: frozenset[str] = frozenset()
    wanted: frozenset[str] = frozenset()


def plug_in(packed: Packed, bundle: Bundle, work: Path) -> Plugged:
    """Plug in as the owner does, and open the PEFT folder with vanilla peft on a vanilla model."""
    adapter = fit(packed.full, read_own(bundle, packed.record), packed.record)
    before = logits(packed.full)
    with plugged(packed.full, adapter) as model:
        found = Plugged(before, logits(model))
    if bundle.manifest.adapter.kind in PEFT_KINDS:
        found.merged = logits(merge(plug(copy.deepcopy(packed.full), adapter)))
        packed.full.save_pretrained(work / "base")
        (work / "peft").mkdir()
        write_peft_folder(work / "peft", packed.full, adapter, base=str(work / "base"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
            vanilla = PeftModel.from_pretrained(base, work / "peft").eval()
        found.vanilla = logits(vanilla)
        suffix = ".lora_A.default.weight"
        names = [name for name, _ in vanilla.named_parameters() if name.endswith(suffix)]
        found.reached = frozenset(name.removeprefix("base_model.model.").removesuffix(suffix) for name in names)
        modules = {tuple(name.rpartition(".")[0].split(".", 2)) for name in adapter.tensors}
        found.wanted = frozenset(f"{adapter.sites[f'{role}.{number}']}.{inner}" for role, number, inner in modules)
    return found
