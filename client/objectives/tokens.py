"""The loss of a text's tokens, each predicted from those before it: plain, or weighed by its own probability.

Shapes: B rows, T tokens, V vocabulary, N = B x (T - 1) predicted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from offsite.text.batches import IGNORED


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy in nats over labels that count, and their number; both scalars.

    Args:
        batch: ``input_ids``, ``labels`` and ``attention_mask``, each (rows, tokens) int64.
    """
    device = next(model.parameters()).device
    ids_BT, mask_BT = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    targets_BT = batch["labels"].to(device)[:, 1:]
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(
        logits_BTV.float().reshape(-1, logits_BTV.shape[-1]),
        targets_BT.reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return loss, (targets_BT != IGNORED).sum()


def dft_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy in nats, each token's times its own probability, summed, and how many count; scalars.

    The probability is held fixed: the gradient is that of -p; that of the next token's loss is 1/p times as large. So
    what the emulator gets badly wrong does not outweigh the rest.

    Source: dynamic fine-tuning, arXiv:2508.05629.

    Args:
        batch: ``input_ids``, ``labels`` and ``attention_mask``, each (rows, tokens) int64, on the model's device.
    """
    targets_N = batch["labels"][:, 1:].flatten()
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[
        :, :-1
    ]
    losses_N = functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_N, ignore_index=IGNORED, reduction="none"
    )
    return (losses_N * (-losses_N.detach()).exp()).sum(), (targets_N != IGNORED).sum()
