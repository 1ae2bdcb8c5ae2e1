"""Encoders: models of one block stack that read a text in both directions, or an image, and have no head that writes.

An encoder is held as its *trunk*: embeddings, blocks and last norm, whose output is the last hidden state. Whatever a
checkpoint has beside it (a pooler, a masked-token head, a classifier) is left out, so that what is cut, sent and
compared is the same for a checkpoint of any kind. Heads are trained by clients and are put on where they are used.

Architectures are looked up in transformers' own tables by ``model_type``. Those of `MODEL_TYPES` are seen by tests to
be cut, tuned and plugged in right; others are refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offsite.vision.models import VISION_TYPES

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "deberta-v2", *VISION_TYPES)

_POOLING = "add_pooling_layer"


def is_encoder_config(config: PreTrainedConfig) -> bool:
    """Say whether the configuration is of an encoder that can be cut; one with ``is_decoder`` set is of a decoder."""
    return states_encoder({"model_type": config.model_type, "is_decoder": getattr(config, "is_decoder", False)})


def states_encoder(stated: Mapping[str, object]) -> bool:
    """Say the same of the content of a ``config.json``."""
    return stated.get("model_type") in MODEL_TYPES and not stated.get("is_decoder")


def is_encoder(model: nn.Module) -> bool:
    """Say whether `model` is the trunk of an encoder: as `offsite.modelling.load` and packages hold it."""
    config: Any = getattr(model, "config", None)
    return config is not None and is_encoder_config(config) and type(model) is trunk_class(type(config))


def trunk_class(config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Return the class of the trunk that an encoder's class of configurations describes."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    found: Any = MODEL_MAPPING[config]
    return found  # type: ignore[no-any-return]


def without_pooler(cls: type[PreTrainedModel]) -> dict[str, bool]:
    """Return what a trunk's class is told so that it makes no pooler."""
    return {_POOLING: False} if _POOLING in inspect.signature(cls.__init__).parameters else {}


def empty_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the trunk that `config` describes, its weights as its class makes them."""
    cls = trunk_class(type(config))
    return cls(config, **without_pooler(cls))


def build_like(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new model of the class of `model` for `config`; of an encoder, with a pooler if `model` has one."""
    cls = type(model)
    given = {key: getattr(model, "pooler", None) is not None for key in without_pooler(cls)}
    return cls(config, **given)


def belongs_to_head(name: str, trunk: PreTrainedModel) -> bool:
    """Say whether a checkpoint's tensor is of no part of the trunk: of a pooler or another head."""
    inner = name.removeprefix(f"{trunk.base_model_prefix}.")
    return inner.partition(".")[0] not in dict(trunk.named_children())
