"""What learns of a package's model on public text, when an attack heals it or a client is played, and by which loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.kinds import attach, declared
from emulator.compression.activations import Batch, on_device
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout
from offsite.artefacts.package import Package
from offsite.modelling.blocks import block_list, decoder_stack, linear_dims, linear_names
from offsite.modelling.head import CrossEntropy, values_at
from offsite.tensors import TensorSpec
from offsite.text.batches import IGNORED

LORA = AdapterSpec(kind="lora", rank=8, alpha=16.0, placement="all", dtype="float32")
"""The adapter by which ``lora`` heals: on every linear of every block."""


def healing(model: PreTrainedModel, heal: str, *, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return `model`, changed in place, made ready to learn, and what learns of it.

    Args:
        model: in float32, no parameter of which requires a gradient.
        heal: ``lora``, or ``all``: every parameter but the embeddings and the head.

    Raises:
        UnsupportedModel: when peft cannot treat the architecture.
    """
    if heal == "all":
        frozen = {id(weight) for weight in _embeddings(model)}
        trainable = {name: one for name, one in model.named_parameters() if id(one) not in frozen}
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        return model, trainable
    stack = decoder_stack(model)
    sites = {f"middle.{number}": f"{stack.name}.{number}" for number in range(stack.num_blocks)}
    names = {}
    for site, block in zip(sites, block_list(model, stack), strict=True):
        for linear in linear_names(block):
            inputs, outputs = linear_dims(block.get_submodule(linear))
            names[f"{site}.{linear}.lora_A"] = TensorSpec(shape=(LORA.rank, inputs), dtype=LORA.dtype)
            names[f"{site}.{linear}.lora_B"] = TensorSpec(shape=(outputs, LORA.rank), dtype=LORA.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attached = attach(model, LORA, sites, names)
    return attached.model, attached.trainable


def usual_adapter(layout: Layout) -> AdapterSpec:
    """Return the adapter of a client of usual settings: low-rank, on every linear that this package lets it use."""
    if layout.adaptable_middle:
        return LORA
    return LORA.model_copy(update={"placement": f"{layout.num_bottom}+{layout.num_top}"})


def tuning(model: PreTrainedModel, package: Package, *, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return `model`, changed in place, with the adapter of a client of usual settings on it, and what learns of it.

    Args:
        model: the package's, in float32.

    Raises:
        ConfigError, UnsupportedModel: when the package cannot carry it.
    """
    spec = usual_adapter(package.layout)
    names = declared(spec, package.layout, package.block_tensors())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attached = attach(model, spec, package.layout.blocks, names)
    return attached.model, attached.trainable


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy in nats over labels that count, and their number."""
    targets_BT = batch["labels"][:, 1:]
    counted_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counted_BT[:, :-1] = targets_BT != IGNORED
    losses_N = values_at(model, batch, counted_BT, CrossEntropy(targets_BT[targets_BT != IGNORED]))
    return losses_N.sum(), counted_BT.sum()


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the loss in nats per token over batches, each token weighing the same."""
    device = next(model.parameters()).device
    sums = [0.0, 0.0]
    for batch in batches:
        loss, num = next_token_loss(model, on_device(batch, device))
        sums = [sums[0] + float(loss), sums[1] + float(num)]
    return sums[0] / sums[1]


def _embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [weight for module in modules if isinstance(module, nn.Module) for weight in module.parameters()]
