"""Where the model that a person names is: a fetched name, a local folder, or a hub id, told apart without loading.

Nothing is asked of a hub before the name has the form of a hub id, and then one short question: whoever mistypes a
name, or has no network, hears so within seconds and in one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from offsite.errors import ConfigError

HINT = "give a folder with config.json and safetensors weights, a hub id, or run: offsite fetch smollm2-135m"
HUB_TIMEOUT_SECONDS = 5.0
"""How long the hub may take to say whether a model is there; downloads take as long as they take."""

_NO_MODELS = {
    "offsite.json:offsite/package/": (
        "an offsite package",
        "give the folder that the package was made of; a package holds the ends whole and the middle reduced",
    ),
    "offsite.json:offsite/bundle/": ("an offsite bundle", "give the folder of the model that its package was made of"),
    "manifest.json:offsite/sealed/": ("a sealed folder", "offsite open shows what was sealed; give the full model"),
}
"""Folders of offsite's that are at times given for a full model: by a file and the format in it, what to say."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class Place:
    """What transformers is to open, and the folder in which the model's small files can be read.

    Attributes:
        source: a folder's path or a hub id.
        is_cached: the hub is not to be asked: it cannot be reached, and the model is in the hub's cache.
    """

    source: str
    is_cached: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder of this machine."""
        return Path(self.source).is_dir()


def locate(name: str, what: str = "model") -> Place:
    """Return where the `what` called `name` is: a folder, or a hub id that is known to be there.

    Raises:
        ConfigError: when it is none of a folder with a configuration, a fetched name, and a hub id that the hub or its
            cache knows.
    """
    from offsite.modelling.fetch import fetched_folder, known

    path = Path(name)
    if path.is_dir():
        _require_configuration(path)
        return Place(str(path))
    if name in known():
        folder = fetched_folder(name)
        if folder is None:
            raise ConfigError(f"model {name!r} has not been fetched yet", hint=f"offsite fetch {name}")
        return Place(str(folder))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(f"no model folder {shown(name)}", hint=HINT)
    if not _HUB_ID.fullmatch(name):
        near = get_close_matches(name, [*known(), *_folders_here()], n=1)
        raise ConfigError(
            f"no model named {shown(name)}: no folder, no name that fetch knows, no hub id of the form ORG/NAME",
            hint=f"did you mean {near[0]}? otherwise {HINT}" if near else HINT,
        )
    return _on_hub(name, what)


def shown(name: str) -> str:
    """Return the name as messages show it: of an absolute path the last part alone."""
    return repr(Path(name).name if Path(name).is_absolute() else name)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, transformers and the hub's client say nothing below an error: what matters is said in our own words."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    before = logging.get_verbosity(), hub.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        hub.set_verbosity(before[1])


def _require_configuration(folder: Path) -> None:
    for marker, (kind, hint) in _NO_MODELS.items():
        file, _, stated = marker.partition(":")
        if _format_of(folder / file).startswith(stated):
            raise ConfigError(f"folder {folder.name!r} is {kind}, not the full model", hint=hint)
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"folder {folder.name!r} holds a PEFT adapter, no model: it has an adapter_config.json and no config.json",
            hint="merge the adapter into its base model first, and name the folder of the merged checkpoint",
        )
    raise ConfigError(f"folder {folder.name!r} holds no config.json", hint=HINT)


def _format_of(file: Path) -> str:
    """Return the format that a JSON file states; empty when there is none, or no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return ""
    stated = found.get("format") if isinstance(found, dict) else None
    return stated if isinstance(stated, str) else ""


def _folders_here() -> list[str]:
    return [path.name for path in Path().iterdir() if (path / "config.json").is_file()]


def _on_hub(name: str, what: str) -> Place:
    """Return the place of a model that the hub has, or that its cache has while the hub cannot be reached."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        with quiet_libraries():
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_SECONDS)
        return Place(name)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            reasons = {404: "has it not", 403: "does not let you read it"}
            reason = reasons.get(status, "has it not, or keeps it closed")
            raise ConfigError(
                f"no usable {what} under {shown(name)}: the hub {reason}",
                hint=f"check the spelling, or sign in to the hub; else {HINT}",
            ) from None
    except (HTTPError, OfflineModeIsEnabled, OSError):
        pass
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return Place(name, is_cached=True)
    raise ConfigError(
        f"no usable {what} under {shown(name)}: it is no folder here, the hub cannot be reached and has not been asked "
        "for it before",
        hint=HINT,
    )
