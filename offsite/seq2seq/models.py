"""Encoder-decoders: models of two block stacks, an encoder that reads a prompt and a decoder that writes the answer.

They are held whole, with their head over the vocabulary, as transformers' own class for sequence-to-sequence text.
Those of `MODEL_TYPES` are seen by tests to be cut, tuned and plugged in right; others are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offsite.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPES = ("t5", "bart")


def states_seq2seq(stated: Mapping[str, object]) -> bool:
    """Say whether the content of a ``config.json`` is of an encoder-decoder that can be cut; a decoder alone is not."""
    is_alone = stated.get("is_decoder") or stated.get("is_encoder_decoder") is False
    return stated.get("model_type") in MODEL_TYPES and not is_alone


def is_seq2seq_config(config: PreTrainedConfig) -> bool:
    """Say the same of a configuration."""
    keys = ("model_type", "is_decoder", "is_encoder_decoder")
    return states_seq2seq({key: getattr(config, key, None) for key in keys})


def is_seq2seq(model: nn.Module) -> bool:
    """Say whether `model` is such an encoder-decoder, with its head."""
    config: Any = getattr(model, "config", None)
    return config is not None and is_seq2seq_config(config) and type(model) is seq2seq_class(type(config))


def seq2seq_class(config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Return the class of the model that an encoder-decoder's class of configurations describes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    found: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[config]
    return found  # type: ignore[no-any-return]


def empty_seq2seq(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that `config` describes, its weights as its class makes them."""
    return seq2seq_class(type(config))(config)


def start_token(config: PreTrainedConfig) -> int:
    """Return the token that every answer begins behind: the configuration's, or its padding token, as T5 has it.

    Raises:
        UnsupportedModel: when it states neither.
    """
    stated = getattr(config, "decoder_start_token_id", None)
    found = config.pad_token_id if stated is None else stated
    if not isinstance(found, int):
        raise UnsupportedModel(
            f"the {config.model_type} model states no token that an answer begins behind", hint=_START
        )
    return found


def require_start(model: PreTrainedModel) -> None:
    """Return only if answers are written behind the token that they are learnt behind.

    Raises:
        UnsupportedModel: when the model's settings for writing name another than its configuration, or none is named.
    """
    stated = getattr(model.generation_config, "decoder_start_token_id", None)
    if stated is not None and stated != start_token(model.config):
        raise UnsupportedModel(
            f"{type(model).__name__} writes answers behind token {stated} by its generation_config.json and learns "
            f"them behind token {start_token(model.config)} by its config.json",
            hint=_START,
        )


_START = "state decoder_start_token_id in its config.json"


def untie(model: PreTrainedModel, names: Mapping[str, object]) -> None:
    """Tensors of `names` that the class ties to others have storage of their own from now on, not filled yet.

    T5's class says that its head is its embedding whatever a checkpoint holds; of v1.1 and Flan it is another matrix.
    """
    import torch

    tied: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    for target, origin in list(tied.items()):
        if target in names and origin in names:
            place, _, key = target.rpartition(".")
            own = torch.empty_like(model.get_parameter(target))
            setattr(model.get_submodule(place), key, torch.nn.Parameter(own))
            del tied[target]
