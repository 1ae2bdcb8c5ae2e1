"""Load the model and tokenizer a person names: a fetched name, a local folder, or a hub id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offsite.console import say
from offsite.encoders.trunk import belongs_to_head, states_encoder, trunk_class, without_pooler
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.checkpoint import (
    folder_of,
    read_object,
    refuse_adapted,
    refuse_unusable,
    require_shards,
    require_sound_tokenizer,
    require_whole,
    small_file,
    split_unexpected,
)
from offsite.modelling.locate import HINT, Place, locate, quiet_libraries, shown
from offsite.seq2seq.models import seq2seq_class, states_seq2seq
from offsite.seq2seq.refusals import not_taken
from offsite.vision.models import as_tower, states_vision
from offsite.vision.pixels import FILE_NAME, read_settings
from offsite.vision.reader import ImageReader, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What constructors are seen to raise on settings that make no sense.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    with_head: str | None = None,
    encoders: bool = False,
    seq2seq: bool = False,
) -> PreTrainedModel:
    """Return the causal language model called `name`, in evaluation mode; weights are mapped shard by shard.

    Args:
        name: a name `offsite fetch` knows, a folder with a transformers checkpoint, or a hub id.
        dtype: ``auto`` keeps the checkpoint's; otherwise a torch dtype's name.
        with_head: task of the head that it has, a checkpoint that ``offsite plug-in --merge`` wrote: of a ``tag`` it is
            transformers' token classifier, of others the sequence classifier; None for a model without one.
        encoders: an encoder is taken too, as its trunk (`offsite.encoders.trunk`): without a pooler and whatever
            head the checkpoint has.
        seq2seq: an encoder-decoder is taken too (`offsite.seq2seq.models`).

    Raises:
        ConfigError: when nothing is found under that name, or weights are missing, unreadable or without a place.
        UnsupportedModel: when the checkpoint brings code of its own, pickled or quantised weights, an adapter, or is
            of another kind.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    place = locate(name)
    refuse_unusable(place)
    stated = _stated(place)
    is_trunk = states_encoder(stated) and not with_head
    if is_trunk and not encoders:
        raise _no_encoder(name)
    is_pair = states_seq2seq(stated) and not with_head
    if is_pair and not seq2seq:
        raise not_taken(f"model {shown(name)}")
    require_shards(place)
    try:
        with quiet_libraries():
            auto: Any = AutoModelForSequenceClassification if with_head else AutoModelForCausalLM
            auto = AutoModelForTokenClassification if with_head == "tag" else auto
            auto = AutoModelForImageClassification if with_head and states_vision(stated) else auto
            auto = trunk_class(CONFIG_MAPPING[stated["model_type"]]) if is_trunk else auto
            auto = seq2seq_class(CONFIG_MAPPING[stated["model_type"]]) if is_pair else auto
            loaded: Any = auto.from_pretrained(
                place.source,
                **(without_pooler(auto) if is_trunk else {}),
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
    heads = {key for key in found["unexpected_keys"] if is_trunk and belongs_to_head(key, model)}
    if heads:
        say(
            f"encoder {shown(name)}: {len(heads)} tensor(s) of a pooler or a head, such as {min(heads)!r}, are left out"
        )
    _require_same_names(name, found["missing_keys"], found["unexpected_keys"] - heads, place)
    return model.eval().to(device)  # type: ignore[no-any-return]


def load_masked_head(name: str) -> PreTrainedModel | None:
    """Return the encoder called `name` with the masked-token head of its checkpoint; None where that lacks any of it.

    It is a second copy, in evaluation mode, in the checkpoint's dtype, of what `load_model` has loaded before.
    """
    from transformers import AutoModelForMaskedLM

    place = locate(name)
    with quiet_libraries():
        model, found = AutoModelForMaskedLM.from_pretrained(
            place.source,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            local_files_only=place.is_cached,
        )
    return None if found["missing_keys"] else model.eval()


def require_weights(name: str) -> None:
    """Return only if the files of the model called `name` are all there and can be used; no tensor is read.

    Raises:
        ConfigError, UnsupportedModel: as `load_model`, before any work was done.
    """
    place = locate(name)
    refuse_unusable(place)
    require_shards(place)


def is_encoder_name(name: str) -> bool:
    """Say whether the model called `name` is an encoder, by its ``config.json`` alone.

    Raises:
        ConfigError, UnsupportedModel: as `load_model`, before any weight is read.
    """
    place = locate(name)
    refuse_unusable(place)
    return states_encoder(_stated(place))


def is_seq2seq_name(name: str) -> bool:
    """Say whether the model called `name` is an encoder-decoder, by its ``config.json`` alone.

    Raises:
        ConfigError, UnsupportedModel: as `load_model`, before any weight is read.
    """
    place = locate(name)
    refuse_unusable(place)
    return states_seq2seq(_stated(place))


def is_vision_name(name: str) -> bool:
    """Say whether the model called `name` is a vision encoder, or holds one, by its ``config.json`` alone.

    Raises:
        ConfigError, UnsupportedModel: as `load_model`, before any weight is read.
    """
    place = locate(name)
    refuse_unusable(place)
    return states_vision(_stated(place))


def refuse_encoder(name: str) -> None:
    """Return only if the model called `name` is no encoder, and no encoder-decoder.

    Raises:
        UnsupportedModel: saying what can be done with one. ConfigError: as `load_model`.
    """
    if is_encoder_name(name):
        raise _no_encoder(name)
    if is_seq2seq_name(name):
        raise not_taken(f"model {shown(name)}")


def load_reader(name: str) -> Reader:
    """Return what turns rows into examples for the model called `name`: its tokenizer, or what reads images.

    Raises:
        ConfigError: when it does not stand with the model, or does not say enough.
        UnsupportedModel: when the model does not read images of the size that it says.
    """
    from transformers import AutoConfig

    place = locate(name)
    if not states_vision(_stated(place)):
        return load_tokenizer(name)
    file = small_file(place, FILE_NAME)
    if file is None:
        raise ConfigError(f"no {FILE_NAME} stands with model {shown(name)}", hint="copy the model's folder whole")
    with quiet_libraries():
        config: Any = AutoConfig.from_pretrained(
            place.source, trust_remote_code=False, local_files_only=place.is_cached
        )
    tower = getattr(config, "vision_config", config).to_dict()
    what = f"{FILE_NAME} of model {shown(name)}"
    return ImageReader.of(tower, read_settings(read_object(file, what), tower["model_type"], what))


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


def _stated(place: Place) -> dict[str, Any]:
    folder = folder_of(place)
    if folder is None:
        return {}
    return as_tower(read_object(folder / "config.json", f"config.json of model {shown(place.source)}"))


def _no_encoder(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"model {shown(name)} is an encoder: it writes no text, and next-token text cannot be learnt on it",
        hint="encoders go through distill, tune --objective classify, plug-in, evaluate and serve; a checkpoint "
        "that was trained as a decoder says is_decoder=true in its config.json",
    )


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
