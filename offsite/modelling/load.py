"""Load the model and tokenizer a person names: a fetched name, a local folder, or a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.errors import ConfigError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Return the causal language model called `name`, in evaluation mode; weights are mapped shard by shard.

    Args:
        name: a name `offsite fetch` knows, a folder with a transformers checkpoint, or a hub id.
        dtype: ``auto`` keeps the checkpoint's; otherwise a torch dtype's name.

    Raises:
        ConfigError: when nothing is found under that name, or weights are missing or unreadable.
        UnsupportedModel: when the checkpoint brings code of its own, pickled weights, or another kind of model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    where = _locate(name)
    _refuse_code(where)
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except OSError as error:
        raise ConfigError(f"no usable model under {_shown(name)}: {_first_line(error)}", hint=_HINT) from None
    except ValueError as error:
        raise UnsupportedModel(f"model {_shown(name)}: {_first_line(error)}") from None
    except (RuntimeError, SafetensorError):
        raise ConfigError(f"the weights of model {_shown(name)} are not those its config.json describes") from None
    model, found = loaded
    if found["missing_keys"]:  # transformers would go on with random numbers in their place
        first = sorted(found["missing_keys"])[0]
        raise ConfigError(f"model {_shown(name)} lacks {len(found['missing_keys'])} of its weights, such as {first!r}")
    return model.eval().to(device)  # type: ignore[no-any-return]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that stands with the model called `name`.

    Raises:
        ConfigError: when there is none.
    """
    from transformers import AutoTokenizer

    where = _locate(name)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ConfigError(f"no usable tokenizer under {_shown(name)}: {_first_line(error)}", hint=_HINT) from None


_HINT = "give a folder with config.json and safetensors weights, a hub id, or run: offsite fetch smollm2-135m"


def _locate(name: str) -> str:
    """Return a folder for fetched names and local folders, otherwise the name as a hub id."""
    from offsite.modelling.fetch import fetched_folder, known

    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"folder {path.name!r} holds no config.json", hint=_HINT)
        return str(path)
    if name in known():
        folder = fetched_folder(name)
        if folder is None:
            raise ConfigError(f"model {name!r} has not been fetched yet", hint=f"offsite fetch {name}")
        return str(folder)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(f"no model folder {_shown(name)}", hint=_HINT)
    return name


def _refuse_code(where: str) -> None:
    folder = Path(where)
    config = folder / "config.json"
    if config.is_file():
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise UnsupportedModel(
                f"model {_shown(where)} has pickled weights, which can run code", hint="save it as safetensors first"
            )
        try:
            stated = json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise ConfigError(f"config.json of model {_shown(where)} is not JSON") from None
        if isinstance(stated, dict) and "auto_map" in stated:
            raise UnsupportedModel(f"model {_shown(where)} brings code of its own (auto_map), which is never run")


def _shown(name: str) -> str:
    return repr(Path(name).name if Path(name).is_absolute() else name)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".")
