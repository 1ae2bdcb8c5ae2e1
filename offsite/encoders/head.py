"""The heads of encoders: what transformers' classifiers of each family have behind the blocks, in one form.

A head of a text pools the last hidden states (the first token's, or with ModernBERT's ``classifier_pooling`` their
mean), passes them through one linear of the hidden size with an activation, with ModernBERT a norm, and then through
the linear that has a row for each label. A head of tags has the last linear alone, of ModernBERT the other parts, too,
and reads every token. Families differ in names; `parts_of` has what each calls the parts. No dropout is applied.
That of a vision encoder is the one linear, on the first place's state (ViT), the mean of the patches' (CLIP), or both
side by side (DINOv2).

Shapes: B rows, T tokens, D hidden, L labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite.errors import UnsupportedModel
from offsite.vision.models import VISION_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_POOLED = {"dense": "classifier.dense", "": "classifier.out_proj"}
_NAMES: dict[str, dict[str, str]] = {
    "bert": {"dense": "bert.pooler.dense", "": "classifier"},
    "roberta": _POOLED,
    "xlm-roberta": _POOLED,
    "distilbert": {"dense": "pre_classifier", "": "classifier"},
    "modernbert": {"dense": "head.dense", "norm": "head.norm", "": "classifier"},
    "deberta-v2": {"dense": "pooler.dense", "": "classifier"},
    "vit": {"": "classifier"},
    "dinov2": {"": "classifier"},
    "clip_vision_model": {"": "classifier"},
}
"""By family, where its sequence classifier has the parts of an `EncoderHead`; the last linear is the head's own."""


def parts_of(family: str, task: str) -> dict[str, str]:
    """Return where transformers' classifier of the family for that task has the parts of an `EncoderHead`.

    Args:
        task: as `offsite.artefacts.bundle.Head` names it: ``tag`` reads tokens, the others a text.
    """
    found = _NAMES[family]
    return {"": "classifier"} if task == "tag" and "norm" not in found else found


_ACTIVATIONS = {"bert": "tanh", "roberta": "tanh", "xlm-roberta": "tanh", "distilbert": "relu"}
_ACTIVATION_KEYS = {"modernbert": "classifier_activation", "deberta-v2": "pooler_hidden_act"}


class EncoderHead(nn.Module):
    """A head on an encoder's last hidden states; its last linear begins at zero, the one before it at random.

    Args:
        config: the encoder's.
        task: ``tag`` for one that reads every token; others read a text.

    Raises:
        UnsupportedModel: when the family's classifier would have other parts under this configuration.
    """

    def __init__(self, config: PreTrainedConfig, num_labels: int, task: str) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        family: Any = config.model_type
        size = int(config.hidden_size)
        parts = parts_of(family, task)
        if family == "deberta-v2" and "dense" in parts and config.pooler_hidden_size != size:
            raise UnsupportedModel(f"{family} with a pooler of another size than its states takes no head")
        if family == "modernbert" and (config.classifier_bias or config.norm_bias):
            raise UnsupportedModel(f"{family} with classifier_bias or norm_bias takes no head")
        if "dense" in parts:
            self.dense = nn.Linear(size, size, bias=family != "modernbert")
            nn.init.normal_(self.dense.weight, 0.0, config.initializer_range)
            if self.dense.bias is not None:
                nn.init.zeros_(self.dense.bias)
            self.activation = ACT2FN[_ACTIVATIONS.get(family) or getattr(config, _ACTIVATION_KEYS[family])]
        if "norm" in parts:
            self.norm = nn.LayerNorm(size, eps=config.norm_eps, bias=False)
        self.weight = nn.Parameter(torch.zeros(num_labels, size))
        self.bias = nn.Parameter(torch.zeros(num_labels))
        self.reads_tokens = task == "tag"
        self._takes_mean = getattr(config, "classifier_pooling", "cls") == "mean"

    def forward(self, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the scores (B, L) of rows of last hidden states, (B, T, L) of tags.

        Args:
            mask_BT: 1 where a token is no padding.
        """
        inner = states_BTD if self.reads_tokens else states_BTD[:, 0]
        if self._takes_mean and not self.reads_tokens:
            inner = (states_BTD * mask_BT.unsqueeze(-1)).sum(1) / mask_BT.sum(1, keepdim=True)
        if hasattr(self, "dense"):
            inner = self.activation(self.dense(inner))
        if hasattr(self, "norm"):
            inner = self.norm(inner)
        return nn.functional.linear(inner, self.weight, self.bias)


class VisionHead(nn.Module):
    """A head on a vision encoder's last hidden states: one linear, which begins at zero.

    Args:
        config: the encoder's.
    """

    def __init__(self, config: PreTrainedConfig, num_labels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_labels, head_size(config)))
        self.bias = nn.Parameter(torch.zeros(num_labels))
        self._family: Any = config.model_type

    def forward(self, states_BTD: Tensor) -> Tensor:
        """Return the scores (B, L) of images, by their last hidden states."""
        first_BD, mean_BD = states_BTD[:, 0], states_BTD[:, 1:].mean(1)
        both_BD = torch.cat([first_BD, mean_BD], 1)
        read_BD = {"vit": first_BD, "clip_vision_model": mean_BD, "dinov2": both_BD}[self._family]
        return nn.functional.linear(read_BD, self.weight, self.bias)


def make_head(config: PreTrainedConfig, num_labels: int, task: str) -> EncoderHead | VisionHead:
    """Return an untrained head of the form that the family's classifier for that task has.

    Raises:
        UnsupportedModel: as `EncoderHead`.
    """
    is_vision = config.model_type in VISION_TYPES
    return VisionHead(config, num_labels) if is_vision else EncoderHead(config, num_labels, task)


def head_size(config: PreTrainedConfig) -> int:
    """Return how many numbers the head of an encoder with this configuration reads."""
    return int(config.hidden_size) * (2 if config.model_type == "dinov2" else 1)


def head_shapes(family: str, num_labels: int, hidden: int, task: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of such a head, by name."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (num_labels, hidden), "bias": (num_labels,)}
    if "dense" in (parts := parts_of(family, task)):
        shapes["dense.weight"] = (hidden, hidden)
        shapes |= {"norm.weight": (hidden,)} if "norm" in parts else {"dense.bias": (hidden,)}
    return shapes
