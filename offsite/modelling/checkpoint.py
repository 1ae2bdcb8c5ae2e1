"""What a checkpoint's own small files say, read before any library loads it, and what it is refused for.

Every reason is named here: what transformers would meet later, inside a quantiser, a PEFT adapter or a class of the
checkpoint's own, tells the person less or nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.locate import Place, quiet_libraries, shown

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_QUANTISER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}

_INDEX = "model.safetensors.index.json"
_AGAIN = "copy or download that file again"
_LFS_POINTER = b"version https://git-lfs"

# Tensors that older versions of an architecture saved and newer ones derive: constants, no weights.
_DERIVED = re.compile(r"(^|\.)(inv_freq|original_inv_freq|masked_bias|position_ids|token_type_ids|causal_mask)$")
# The causal mask of GPT-2's family, told from a bias by its four dimensions.
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


def refuse_unusable(place: Place) -> None:
    """Return only if the checkpoint's own files tell of nothing that is never loaded.

    Raises:
        ConfigError: when ``config.json`` is not JSON.
        UnsupportedModel: code of its own, pickled weights, quantised weights, or an adapter beside the model.
    """
    folder, name = _folder(place), shown(place.source)
    if folder is None:
        return
    stated = read_object(folder / "config.json", f"config.json of model {name}")
    if place.is_folder and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UnsupportedModel(
            f"model {name} has pickled weights, which can run code", hint="save it as safetensors first"
        )
    if "auto_map" in stated:
        raise UnsupportedModel(f"model {name} brings code of its own (auto_map), which is never run")
    if method := quantiser(stated, folder):
        raise UnsupportedModel(
            f"the checkpoint of model {name} is quantised ({method}); a model is cut in its full precision",
            hint="give the original that was quantised, or dequantise it and save it in bfloat16 first",
        )
    if (folder / "adapter_config.json").is_file():
        kind = read_object(folder / "adapter_config.json", f"adapter_config.json of model {name}").get("peft_type")
        raise UnsupportedModel(
            f"a PEFT adapter lies in the folder of model {name} (adapter_config.json: {_word(kind)}) and would be put "
            "on it",
            hint="merge it into the model and save that, or move adapter_config.json and its weights elsewhere",
        )


def require_whole(place: Place) -> None:
    """Return only if every weight file of the checkpoint can be opened: its header fits its length.

    Raises:
        ConfigError: naming the file that is cut short, damaged, or stands for one that was never fetched.
    """
    from safetensors import SafetensorError, safe_open

    folder, name = folder_of(place), shown(place.source)
    for file in [] if folder is None else sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                continue
        except (OSError, SafetensorError, ValueError):
            pass
        if _starts_with(file, _LFS_POINTER):
            raise ConfigError(
                f"{file.name} of model {name} is a Git LFS pointer, not the weights themselves",
                hint="git lfs pull in that folder brings them",
            )
        raise ConfigError(f"{file.name} of model {name} is cut short or damaged", hint=_AGAIN)


def require_shards(place: Place) -> None:
    """Return only if every file that the checkpoint's index names is there, so that this is told before any work.

    Raises:
        ConfigError: naming the first that is missing, or when the index is not JSON or names something else.
    """
    folder, name = folder_of(place), shown(place.source)
    if folder is None or not place.is_folder or not (folder / _INDEX).is_file():
        return
    stated = read_object(folder / _INDEX, f"{_INDEX} of model {name}").get("weight_map")
    files = sorted({str(file) for file in stated.values()}) if isinstance(stated, Mapping) else []
    if not files or any(Path(file).name != file for file in files):
        raise ConfigError(f"{_INDEX} of model {name} does not say which files hold its weights", hint=_AGAIN)
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ConfigError(
            f"the checkpoint of model {name} lacks {len(missing)} of its {len(files)} weight files, such as "
            f"{missing[0]!r}",
            hint="copy or download it anew: a model cannot be made of some of its weights",
        )


def require_sound_tokenizer(place: Place) -> None:
    """Return only if the small files that a tokenizer is read from are JSON, as far as they are there.

    Raises:
        ConfigError: naming the file that is not.
    """
    folder, name = folder_of(place), shown(place.source)
    for file in _TOKENIZER_FILES:
        if folder is not None and (folder / file).is_file():
            read_object(folder / file, f"{file} of model {name}")


def refuse_adapted(model: object, name: str) -> None:
    """Return only if loading put no PEFT adapter on the model, as it does with a hub id's.

    Raises:
        UnsupportedModel: naming the adapter's kind.
    """
    found = getattr(model, "peft_config", None)
    if isinstance(found, Mapping) and found:
        kinds = sorted({_word(str(getattr(one, "peft_type", "")).rpartition(".")[2]) for one in found.values()})
        raise UnsupportedModel(
            f"model {shown(name)} comes with a PEFT adapter ({', '.join(kinds)})",
            hint="merge it into its base model, save that, and name its folder",
        )


def quantiser(stated: Mapping[str, Any], folder: Path | None = None) -> str:
    """Return the method by which the checkpoint is quantised, by its configuration or a file beside it; or nothing.

    Args:
        stated: the content of ``config.json``.
    """
    parts = [stated, *(part for part in stated.values() if isinstance(part, Mapping))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if isinstance(found, Mapping):
                is_by_flags = any(str(flag).startswith(("load_in_", "_load_in_", "bnb_")) for flag in found)
                return _word(found.get("quant_method") or ("bitsandbytes" if is_by_flags else None))
            if found:
                return _word(found)
    for file, method in _QUANTISER_FILES.items():
        if folder is not None and (folder / file).is_file():
            return f"{method}, by its {file}"
    return ""


def split_unexpected(names: Iterable[str], folder: Path | None) -> tuple[list[str], list[str]]:
    """Return the tensors of a checkpoint that its model has no place for: weights, then constants it derives itself.

    Args:
        folder: where the checkpoint's files are, to look at shapes; none when that is not known.
    """
    weights: list[str] = []
    constants: list[str] = []
    for name in sorted(names):
        is_constant = _DERIVED.search(name) or (_MASK.search(name) and _dimensions(folder, name) == 4)
        (constants if is_constant else weights).append(name)
    return weights, constants


def folder_of(place: Place) -> Path | None:
    """Return the folder that holds the checkpoint's files once they are on this machine, or None."""
    if place.is_folder:
        return Path(place.source)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def small_file(place: Place, name: str) -> Path | None:
    """Return the file of that name that stands with the model; of a hub id it is brought to the hub's cache."""
    if place.is_folder or place.is_cached:
        folder = folder_of(place)
        return folder / name if folder is not None and (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        with quiet_libraries():
            return Path(hf_hub_download(place.source, name))
    except (HTTPError, OSError):
        return None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in one of the checkpoint's own files.

    Raises:
        ConfigError: when it is none.
    """
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ConfigError(f"{what} is not JSON", hint=_AGAIN) from None
    if not isinstance(stated, dict):
        raise ConfigError(f"{what} is not a JSON object", hint=_AGAIN)
    return stated


def _starts_with(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError:
        return False


def _folder(place: Place) -> Path | None:
    """Return the folder with the checkpoint's small files; of a hub id they are brought to the hub's cache."""
    if place.is_folder or place.is_cached:
        return folder_of(place)
    found = small_file(place, "config.json")  # where there is none, loading says what is wrong
    return None if found is None else found.parent


def _dimensions(folder: Path | None, name: str) -> int:
    from safetensors import SafetensorError, safe_open

    for file in [] if folder is None else sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118 - no mapping
                    return len(opened.get_slice(name).get_shape())
        except (OSError, SafetensorError):
            continue
    return 0


def _word(found: object) -> str:
    return found if isinstance(found, str) and _WORD.fullmatch(found) else "of an unknown kind"
