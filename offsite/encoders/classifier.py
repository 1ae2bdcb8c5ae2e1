"""Transformers' own classifiers of an encoder, of texts, tokens or images: their names for a head's tensors, and one
made of trunk and head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite.encoders.head import EncoderHead, VisionHead, parts_of
from offsite.encoders.trunk import trunk_class
from offsite.errors import UnsupportedModel
from offsite.vision.models import VISION_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def classifier_name(family: str, name: str, task: str) -> str:
    """Return what transformers' classifier of the family for that task calls a head's tensor."""
    place, _, last = name.rpartition(".")
    return f"{parts_of(family, task)[place]}.{last}"


def trunk_prefix(family: str) -> str:
    """Return the name of the module that is the trunk in the family's classifiers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family == "clip_vision_model":  # as CLIP's own classifier calls its image tower
        return "vision_model"
    return str(trunk_class(CONFIG_MAPPING[family]).base_model_prefix)


def head_modules(family: str, task: str) -> list[str]:
    """Return the last names of the modules that make up the head of the family's classifier, each once."""
    places = (place.removeprefix(f"{trunk_prefix(family)}.") for place in parts_of(family, task).values())
    return list(dict.fromkeys(place.partition(".")[0] for place in places))


def classifier_class(config: PreTrainedConfig, task: str) -> Any:
    """Return transformers' classifier of texts, tokens or images for a trunk of this configuration, if it has one.

    Args:
        task: as `offsite.artefacts.bundle.Head` names it: ``tag`` is of tokens.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as OF_IMAGES
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as OF_TEXTS
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING as OF_TOKENS
    from transformers import CLIPConfig

    if config.model_type not in VISION_TYPES:
        return (OF_TOKENS if task == "tag" else OF_TEXTS).get(type(config), None)
    return OF_IMAGES.get(CLIPConfig if config.model_type == "clip_vision_model" else type(config), None)


def classifier_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the classifier of a trunk of that one: the same, but where it holds the trunk's."""
    from transformers import CLIPConfig

    if config.model_type != "clip_vision_model":
        return config
    found = CLIPConfig(vision_config=config.to_dict())  # its text tower is described, and not there
    for key in ("num_labels", "id2label", "label2id", "problem_type", "dtype"):
        setattr(found, key, getattr(config, key))
    return found


def as_encoder_classifier(
    trunk: PreTrainedModel, head: EncoderHead | VisionHead, config: PreTrainedConfig
) -> PreTrainedModel:
    """Return transformers' classifier of `trunk`, whose parameters it shares, with a copy of `head`.

    Args:
        config: the trunk's, with the labels.

    Raises:
        UnsupportedModel: when it has other tensors than these.
    """
    task = "tag" if isinstance(head, EncoderHead) and head.reads_tokens else "classify"
    family: Any = config.model_type
    with torch.device("meta"):
        make: Any = classifier_class(config, task)
        found: Any = make(classifier_config(config))
    prefix = trunk_prefix(family)
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
