"""Whether a model that generates is causal: whether what it says of a position leaves later tokens alone.

An encoder with a language-modelling head generates too, and next-token loss on it is a fraud: every position sees the
answer that it is asked for.

Shapes: B = the two texts, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offsite.blockwise import block_by_block
from offsite.encoders.outputs import outputs
from offsite.encoders.trunk import MODEL_TYPES, is_encoder
from offsite.errors import UnsupportedModel
from offsite.modelling.context import context_of
from offsite.seq2seq.models import is_seq2seq
from offsite.vision.models import reads_images

NUM_TOKENS = 8


def refuse_uncausal(model: PreTrainedModel, compute: torch.dtype | None = None) -> None:
    """Return only if another last token leaves the scores of earlier positions alone; an encoder need but run.

    Args:
        compute: dtype in which that is tried, one block at a time; None for that of the model.

    Raises:
        UnsupportedModel: saying that the model reads ahead, and what may be done; or that it does not run at all.
    """
    try:
        is_ahead = reads_ahead(model, compute)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
        raise UnsupportedModel(f"{type(model).__name__} does not run on a short text: {reason}") from error
    if is_ahead and not is_encoder(model):
        raise UnsupportedModel(
            f"{type(model).__name__} is not causal: what it says of a token depends on the tokens behind it, so that "
            "next-token text cannot be learnt on it",
            hint="an encoder that was made for it becomes a decoder by is_decoder=true in its config.json; as encoders "
            f"{', '.join(MODEL_TYPES)} are taken",
        )


def reads_ahead(model: PreTrainedModel, compute: torch.dtype | None = None) -> bool:
    """Say whether earlier positions depend on the last token, tried on two short texts that differ in it alone.

    A difference of the scores may be rounding: experts that are handed other tokens multiply in other shapes. Then the
    gradient decides, which is exactly zero wherever nothing is read.
    """
    if reads_images(model):
        return _sees(model, compute)
    ids_BT = _two_texts(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), block_by_block(model, compute):
            one_TV, other_TV = _scores(model, ids_BT)
        return not _same(one_TV, other_TV) and _has_gradient(model, ids_BT[:1])
    finally:
        model.train(was_training)


def _sees(model: PreTrainedModel, compute: torch.dtype | None) -> bool:
    """Return True, once the model has run on an image: it sees all of it at once."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), block_by_block(model, compute):
            outputs(model, torch.zeros((1, 1), dtype=torch.long))
    finally:
        model.train(was_training)
    return True


def _two_texts(model: PreTrainedModel) -> Tensor:
    """Return (2, tokens) int64 that differ in the last token."""
    table: Any = model.get_input_embeddings()
    vocabulary = int(table.weight.shape[0])
    num_tokens = max(2, min(NUM_TOKENS, context_of(model) or NUM_TOKENS))
    first = min(vocabulary - 1, 5)  # padding and other special tokens come first, and are treated apart by some
    generator = torch.Generator().manual_seed(0)
    text_T = first + torch.randint(max(1, vocabulary - first), (num_tokens,), generator=generator)
    other_T = text_T.clone()
    other_T[-1] = first + (int(text_T[-1]) - first + 1) % max(1, vocabulary - first)
    return torch.stack([text_T, other_T]).to(table.weight.device)


def _scores(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the scores (B, T - 1, V) of all positions but the last; an encoder's hidden states."""
    return outputs(model, ids_BT, torch.ones_like(ids_BT))[:, :-1]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())  # what is not finite is found elsewhere, and said so


def _has_gradient(model: PreTrainedModel, ids_BT: Tensor) -> bool:
    """Say whether the embedding of the last token moves the scores of any earlier position."""
    seen: list[Tensor] = []

    def watch(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    part: Any = model.get_decoder() if is_seq2seq(model) else model
    handle = part.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            scores_BTV = _scores(model, ids_BT).float()
            weights_BTV = torch.rand(scores_BTV.shape, generator=torch.Generator().manual_seed(0)).to(scores_BTV.device)
            found_BTD = torch.autograd.grad((scores_BTV * weights_BTV).sum(), seen[0])[0]
    finally:
        handle.remove()
    return bool(found_BTD[:, -1].count_nonzero())
