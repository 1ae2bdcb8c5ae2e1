"""Load the model and tokenizer a person names: a fetched name, a local folder, or a hub id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offsite.console import say
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.checkpoint import (
    folder_of,
    refuse_adapted,
    refuse_unusable,
    require_shards,
    require_sound_tokenizer,
    require_whole,
    split_unexpected,
)
from offsite.modelling.locate import HINT, Place, locate, quiet_libraries, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What constructors are seen to raise on settings that make no sense.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError)


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Return the causal language model called `name`, in evaluation mode; weights are mapped shard by shard.

    Args:
        name: a name `offsite fetch` knows, a folder with a transformers checkpoint, or a hub id.
        dtype: ``auto`` keeps the checkpoint's; otherwise a torch dtype's name.

    Raises:
        ConfigError: when nothing is found under that name, or weights are missing, unreadable or without a place.
        UnsupportedModel: when the checkpoint brings code of its own, pickled or quantised weights, an adapter, or is
            of another kind.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    place = locate(name)
    refuse_unusable(place)
    require_shards(place)
    try:
        with quiet_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place.source,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                local_files_only=place.is_cached,
            )
    except OSError as error:
        require_whole(place)
        raise ConfigError(f"no usable model under {shown(name)}: {_first_line(error, place)}", hint=HINT) from None
    except (ImportError, ValueError) as error:
        require_whole(place)
        raise UnsupportedModel(f"model {shown(name)}: {_first_line(error, place)}") from None
    except (RuntimeError, SafetensorError):
        require_whole(place)
        raise ConfigError(
            f"the weights of model {shown(name)} are not those its config.json describes",
            hint="the two are of different models, or config.json was edited; copy the model's folder anew",
        ) from None
    except (*_MALFORMED, StrictDataclassError) as error:
        raise UnsupportedModel(
            f"the config.json of model {shown(name)} does not describe a model that transformers can build: "
            f"{_first_line(error, place)}"
        ) from None
    model, found = loaded
    refuse_adapted(model, name)
    _require_same_names(name, found["missing_keys"], found["unexpected_keys"], place)
    return model.eval().to(device)  # type: ignore[no-any-return]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that stands with the model called `name`.

    Of several named chat templates it has the one called ``default``, and no other: all that is tokenised, sent and
    served then goes by one template.

    Raises:
        ConfigError: when there is none.
    """
    from transformers import AutoTokenizer

    place = locate(name, "tokenizer")
    try:
        with quiet_libraries():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                place.source, trust_remote_code=False, local_files_only=place.is_cached
            )
    except (ImportError, OSError, ValueError, *_MALFORMED) as error:
        require_sound_tokenizer(place)
        raise ConfigError(f"no usable tokenizer under {shown(name)}: {_first_line(error, place)}", hint=HINT) from None
    named: Any = tokenizer.chat_template
    tokenizer.chat_template = one_template(tokenizer)
    if named and tokenizer.chat_template is None:
        say(
            f"the tokenizer of {shown(name)} has {len(named)} chat templates and none is called default, so that none "
            "is used: save the one you want as chat_template.jinja in the model's folder"
        )
    return tokenizer


def one_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template that is used: the only one, or of several named ones that called ``default``."""
    found: Any = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _require_same_names(name: str, missing: set[str], unexpected: set[str], place: Place) -> None:
    """Return only if every weight of the model was in the checkpoint, and every weight of that has its place."""
    if missing:  # transformers would go on with random numbers in their place
        raise ConfigError(f"model {shown(name)} lacks {len(missing)} of its weights, such as {min(missing)!r}")
    weights, constants = split_unexpected(unexpected, folder_of(place))
    if weights:  # transformers would go on without them
        few = ", ".join(map(repr, weights[:3])) + (f" and {len(weights) - 3} more" if len(weights) > 3 else "")
        raise ConfigError(
            f"the checkpoint of model {shown(name)} holds {len(weights)} tensor(s) that its config.json has no place "
            f"for: {few}",
            hint="the configuration is another model's, or lacks a setting such as a bias; correct config.json",
        )
    if constants:
        say(
            f"model {shown(name)}: {len(constants)} tensor(s) of the checkpoint, such as {constants[0]!r}, "
            "are constants that the model derives itself; they are left out"
        )


def _first_line(error: Exception, place: Place) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(place.source, shown(place.source).strip("'"))[:160].rstrip(".")
