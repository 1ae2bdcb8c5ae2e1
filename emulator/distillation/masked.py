"""Distilling an encoder: public text with tokens masked as BERT's was, and what both models say of the masked ones.

An encoder is held as its trunk, which has no scores. Where its checkpoint has the head that it was pretrained with,
both trunks go through that one, frozen, at the masked positions: KL(full || emulator) of the masked token. Hidden
states are compared at every position of the same text; of images there is nothing else to compare. The head is the
owner's, and no part of the package.

Shapes: B rows, T tokens, V vocabulary, N chosen positions, D width.

Source: Devlin et al., arXiv:1810.04805 (15 % of the tokens; of them 80 % are the mask, 10 % another token, 10 % as they
were), drawn anew for every batch as in Liu et al., arXiv:1907.11692.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emulator.compression.activations import Batch, real_tokens
from emulator.distillation.config import DistillConfig
from offsite.console import say
from offsite.encoders.outputs import outputs_of
from offsite.encoders.trunk import is_encoder
from offsite.modelling.head import Before
from offsite.modelling.load import load_masked_head
from offsite.text.batches import Batches, Example
from offsite.vision.reader import ImageReader, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASKED = "masked"
"""Key of a batch: (B, T) bool, true where the model is to say which token stood."""

SHARE = 0.15
_MASK_SHARE, _OTHER_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """Which tokens are masked, as a function of a seed and a batch's name alone."""

    mask_id: int
    special_ids: tuple[int, ...]
    num_tokens: int
    """Tokens that may stand in another's place are those below this number, special ones apart."""
    seed: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, seed: int) -> Masking | None:
        """Return how text of this model is masked; None where its tokenizer has no mask."""
        if tokenizer.mask_token_id is None:
            return None
        num_known = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index, union-attr, arg-type]
        special = tuple(sorted(tokenizer.all_special_ids))
        return cls(int(tokenizer.mask_token_id), special, min(len(tokenizer), num_known), seed)

    def masked(self, batch: Batch, name: str) -> dict[str, Tensor]:
        """Return the batch with some tokens changed, and which (`MASKED`): in every row one at least, none special."""
        label = f"offsite/v1/masking/{self.seed}/{name}".encode()
        seed = int.from_bytes(hashlib.blake2b(label, digest_size=8).digest(), "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        ids_BT, real_BT = batch["input_ids"], real_tokens(batch)
        open_BT = real_BT & ~torch.isin(ids_BT, torch.tensor(self.special_ids))
        open_BT |= real_BT & ~open_BT.any(1, keepdim=True)  # a row of nothing but special tokens
        drawn_BT = torch.rand(ids_BT.shape, generator=generator).masked_fill(~open_BT, 2.0)
        masked_BT = drawn_BT < SHARE
        masked_BT |= open_BT & ~masked_BT.any(1, keepdim=True) & (drawn_BT == drawn_BT.amin(1, keepdim=True))
        how_BT = torch.rand(ids_BT.shape, generator=generator)
        others_BT = self._plain[torch.randint(len(self._plain), ids_BT.shape, generator=generator)]
        changed_BT = torch.where(how_BT < _MASK_SHARE, torch.full_like(ids_BT, self.mask_id), others_BT)
        changes_BT = masked_BT & (how_BT < _MASK_SHARE + _OTHER_SHARE)
        return {**batch, "input_ids": torch.where(changes_BT, changed_BT, ids_BT), MASKED: masked_BT}

    @cached_property
    def _plain(self) -> Tensor:
        """Tokens that may stand in another's place."""
        special = set(self.special_ids)
        return torch.tensor([token for token in range(self.num_tokens) if token not in special])

    @property
    def digest(self) -> str:
        """Names what the masks of any batch follow from."""
        whole = f"{self.mask_id} {self.special_ids} {self.num_tokens} {self.seed} {SHARE} {_MASK_SHARE} {_OTHER_SHARE}"
        return hashlib.sha256(whole.encode()).hexdigest()


class MaskedBatches(Batches):
    """Batches of which every one is masked, anew in every step."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        pad_id: int,
        masking: Masking,
        first_step: int = 0,
    ) -> None:
        super().__init__(examples, batch_size=batch_size, seed=seed, pad_id=pad_id, first_step=first_step)
        self._masking = masking

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the collated batch of `step`, counted from 0, masked."""
        return self._masking.masked(super().batch(step), f"train/{self._first_step + step}")


class MaskedHead:
    """What transformers' masked-token model of an encoder does with the states of its trunk, which is let go.

    Args:
        model: that model, whole; changed in place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._given = _Given(model.base_model)
        setattr(model, model.base_model_prefix, self._given)
        self.model = model.requires_grad_(False).eval()
        self.num_scores = int(model.config.vocab_size)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Return the scores (N, V) of last hidden states."""
        self._given.states = hidden_ND.unsqueeze(0)
        try:
            scores: Tensor = self.model(input_ids=torch.zeros(1, len(hidden_ND), dtype=torch.long)).logits.squeeze(0)
        finally:
            self._given.states = None
        return scores


@dataclass(frozen=True)
class Masks:
    """How an encoder's text is masked, and the head that tells what stood there."""

    masking: Masking
    head: MaskedHead


def masks_for(config: DistillConfig, full: PreTrainedModel, tokenizer: Reader) -> Masks | None:
    """Return them for the encoder that is distilled; None, and what is lacking is said, where it has not both."""
    if isinstance(tokenizer, ImageReader):
        say("distill: hidden states alone are matched: the model reads images")
        return None
    masking = Masking.of(tokenizer, full, seed=config.seed)
    model = None if masking is None else load_masked_head(config.model)
    if masking is None or model is None:
        what = "tokenizer has no mask" if masking is None else "checkpoint has no masked-token head"
        say(f"distill: hidden states alone are matched: the {what}")
        return None
    return Masks(masking, MaskedHead(model))


class _Given(nn.Module):
    """Stands where a trunk stood, and returns what it is given; some heads read the trunk's table of embeddings."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = trunk.get_input_embeddings()
        self.states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.states)  # type: ignore[arg-type]


@contextmanager
def scored(masks: Masks | None, models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """While inside, `offsite.modelling.head.before_head` of these encoders is their trunk and that head.

    Without one there are states alone, and nothing may ask for scores. Models that are no encoders stay as they are.

    Args:
        masks: with the head, which is moved to where the first of the models is, and to its dtype.
    """
    encoders = [model for model in models if is_encoder(model)]
    head = None if masks is None else masks.head
    if head is not None and encoders:
        head.model.to(device=encoders[0].device, dtype=encoders[0].dtype)  # type: ignore[call-arg]
    for model in encoders:
        model.before_head = _before(model, head)
    try:
        yield
    finally:
        for model in encoders:
            del model.before_head


def _before(trunk: PreTrainedModel, head: MaskedHead | None) -> Any:
    def before(batch: Mapping[str, Tensor], chosen_BT: Tensor) -> Before:
        states_BTD = outputs_of(trunk, batch)
        hidden_ND = states_BTD[chosen_BT]
        if head is None:
            return Before(hidden_ND, _no_scores, 1, learns=False)
        return Before(hidden_ND, head, head.num_scores, learns=False)

    return before


def _no_scores(_: Tensor) -> Tensor:
    raise AssertionError("an encoder without its masked-token head was asked for scores")
