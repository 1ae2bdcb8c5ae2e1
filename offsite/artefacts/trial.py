"""The package's model as a client will build it, tried by the owner before anything leaves or is even trained.

A client builds the model from the settings that cross, and from those alone. Modelling code also reads settings that
its configuration class does not declare; whoever needs one that does not cross is told so here, by the owner's own
machine, and not by the client's.

Shapes: B = 1 text, T = tokens, V = vocabulary, or an encoder's hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from offsite.artefacts import rebuild
from offsite.artefacts.layout import Layout, saved_tensors, without_code
from offsite.errors import ArtefactError, UnsupportedModel
from offsite.tensors import spec_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

NUM_TOKENS = 8


def require_rebuildable(
    folder: Path, model: PreTrainedModel, layout: Layout, compute: torch.dtype | None = None
) -> None:
    """Return only if the ``config.json`` in `folder` makes a model that computes what `model` does, from its tensors.

    Nothing is copied: the second model is given the first one's tensors, and each runs block by block.

    Args:
        compute: dtype that both compute in; None for that of their tensors.

    Raises:
        UnsupportedModel: saying what a client would not get, and which settings do not cross.
    """
    tensors = saved_tensors(model)
    what = f"{type(model).__name__} cannot be sent"
    hint = _hint(model, folder)
    try:
        declared = {name: spec_of(tensor) for name, tensor in tensors.items()}
        other = rebuild.empty_model(folder, layout, declared)
        rebuild.check_tensors("its package", declared, other)
    except ArtefactError as error:
        raise UnsupportedModel(f"{what}: a client could not build it: {error}", hint=hint) from None
    rebuild.fill(other, tensors)
    other.to(model.device)  # type: ignore[arg-type]
    other.eval()
    was_training = model.training
    model.eval()
    try:
        wanted_BTV, found_BTV = _scores(model, compute), _scores(other, compute)
    finally:
        model.train(was_training)
    if not _alike(found_BTV, wanted_BTV):
        raise UnsupportedModel(f"{what}: a client would build a model that computes something else", hint=hint)


def _scores(model: PreTrainedModel, compute: torch.dtype | None) -> Tensor:
    import torch

    from offsite.blockwise import block_by_block
    from offsite.encoders.outputs import made_up_ids, outputs
    from offsite.modelling.context import context_of

    ids_BT = made_up_ids(model, 1, min(NUM_TOKENS, context_of(model) or NUM_TOKENS))
    with torch.no_grad(), block_by_block(model, compute):
        return outputs(model, ids_BT)


def _alike(found_BTV: Tensor, wanted_BTV: Tensor) -> bool:
    """Say whether they agree but for one rounding: constants that models derive may be held in another dtype."""
    import torch

    if torch.equal(found_BTV, wanted_BTV):
        return True
    slack = torch.finfo(wanted_BTV.dtype).eps * wanted_BTV.nan_to_num().abs().max()
    difference = (found_BTV.nan_to_num() - wanted_BTV.nan_to_num()).abs().max()
    return bool(difference <= slack)


def _hint(model: PreTrainedModel, folder: Path) -> str | None:
    """Return which settings of the model do not cross, where it has such."""
    from offsite.artefacts.layout import read_json

    stated = without_code(model.config.to_dict())
    left = sorted(stated.keys() - read_json(folder / "config.json").keys() - {"transformers_version", "dtype"})
    if not left:
        return None
    return f"settings of its config.json that do not cross, as its class does not declare them: {', '.join(left[:6])}"
