"""Transformers' own classifiers of an encoder, of texts or of tokens: their names for a head's tensors, and one made
of trunk and head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite.encoders.head import EncoderHead, parts_of
from offsite.encoders.trunk import trunk_class
from offsite.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def classifier_name(family: str, name: str, task: str) -> str:
    """Return what transformers' classifier of the family for that task calls a head's tensor."""
    place, _, last = name.rpartition(".")
    return f"{parts_of(family, task)[place]}.{last}"


def trunk_prefix(family: str) -> str:
    """Return the name of the module that is the trunk in the family's classifiers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return str(trunk_class(CONFIG_MAPPING[family]).base_model_prefix)


def head_modules(family: str, task: str) -> list[str]:
    """Return the last names of the modules that make up the head of the family's classifier, each once."""
    places = (place.removeprefix(f"{trunk_prefix(family)}.") for place in parts_of(family, task).values())
    return list(dict.fromkeys(place.partition(".")[0] for place in places))


def as_encoder_classifier(trunk: PreTrainedModel, head: EncoderHead, config: PreTrainedConfig) -> PreTrainedModel:
    """Return transformers' classifier of `trunk`, whose parameters it shares, with a copy of `head`.

    Args:
        config: the trunk's, with the labels.

    Raises:
        UnsupportedModel: when it has other tensors than these.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as OF_TEXTS
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING as OF_TOKENS

    task = "tag" if head.reads_tokens else "classify"
    family = config.model_type
    with torch.device("meta"):
        make: Any = (OF_TOKENS if head.reads_tokens else OF_TEXTS)[type(config)]
        found: Any = make(config)
    prefix = found.base_model_prefix
    tensors: dict[str, Tensor] = {
        f"{prefix}.{name}": tensor for name, tensor in trunk.named_parameters() if not name.startswith("score.")
    }
    names = {classifier_name(family, name, task): tensor for name, tensor in head.named_parameters()}
    tensors |= {name: tensor.detach().to(trunk.dtype, copy=True) for name, tensor in names.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in found.named_parameters()}:
        raise UnsupportedModel(f"{type(found).__name__} has a head of another form")
    for name, tensor in tensors.items():
        place, _, last = name.rpartition(".")
        setattr(found.get_submodule(place), last, nn.Parameter(tensor.detach(), requires_grad=False))
    for place, part in trunk.named_modules():
        for key, buffer in part.named_buffers(recurse=False):
            setattr(found.get_submodule(f"{prefix}.{place}".rstrip(".")), key, buffer)
        for key, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(found.get_submodule(f"{prefix}.{place}".rstrip(".")), key, value)
    found.eval()
    return found  # type: ignore[no-any-return]
