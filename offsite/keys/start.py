"""``offsite init``: a folder becomes a party's project, with its keys and a file that says where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite.config import PROJECT_FOLDERS, PROJECT_NAME
from offsite.console import say
from offsite.errors import ConfigError
from offsite.keys.config import KeygenConfig
from offsite.keys.files import check_folder, read_limited
from offsite.keys.identity import CARD_LIMIT_BYTES, CARD_NAME, read_card
from offsite.keys.identity import run as keygen
from offsite.staging import staged_file

if TYPE_CHECKING:
    from pathlib import Path

    from offsite.keys.config import InitConfig


def run(config: InitConfig) -> dict[str, object]:
    """Carry out ``offsite init``: keys are made where the folder has none, then ``offsite.toml`` names them.

    Raises:
        ConfigError: when the folder is not there or has the file, or the passphrase is weak or missing.
        ArtefactError: when the keys that are there are damaged or open to others.
    """
    folder = config.folder.absolute()
    if not folder.is_dir():
        raise ConfigError(f"{config.folder.name!r} is no folder", hint="make it first, or leave the word out")
    path, keys = folder / PROJECT_NAME, folder / "keys"
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{PROJECT_NAME} is there already", hint="it names keys and registry of this project")
    if keys.exists() or keys.is_symlink():
        check_folder(keys)
        public = read_card(read_limited(keys / CARD_NAME, CARD_LIMIT_BYTES, what="card"))
        told: dict[str, object] = {"card": str(keys / CARD_NAME), "expires": public.expires}
        told |= {"fingerprint": public.fingerprint, "keys": str(keys), "name": public.name}
        if config.name not in ("unnamed", public.name):
            raise ConfigError(f"keys of {public.name!r} are there already", hint="leave --name out to keep them")
        if "days" in config.model_fields_set:
            raise ConfigError("--days: there are keys already, valid as their card says", hint="leave --days out")
        say(f"keys of {public.name} are there: {public.fingerprint}")
    else:
        told = keygen(
            KeygenConfig(output=keys, name=config.name, days=config.days, passphrase_file=config.passphrase_file)
        )
    write_project(path)
    return {**told, "project": str(path)}


def write_project(path: Path) -> None:
    """The project's file stands at `path`, which is new: it names the folders beside it.

    Raises:
        ConfigError: when something stands there.
        RunFailed: when it cannot be written.
    """
    lines = "".join(f'{name} = "{name}"\n' for name in PROJECT_FOLDERS)
    with staged_file(path) as stage:
        stage.write_text(
            f"# where commands that are called here, or below, find these folders\n{lines}", encoding="utf-8"
        )
        stage.chmod(0o644)
    say(f"{PROJECT_NAME} is written: no command in this folder needs {' or '.join(f'--{n}' for n in PROJECT_FOLDERS)}")
