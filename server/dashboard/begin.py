"""``offsite owner init MODEL``: what an owner needs stands in this folder, and one file says where.

Each step is left out where it was done, and the table in ``offsite.toml`` is written last: called again, a run that
broke off goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from offsite.config import PROJECT_NAME, project_folders, project_table
from offsite.console import say, say_next
from offsite.errors import ConfigError
from offsite.keys.config import InitConfig
from offsite.keys.files import check_folder, read_limited
from offsite.keys.identity import CARD_LIMIT_BYTES, CARD_NAME, read_card
from offsite.keys.start import run as begin_project
from offsite.modelling.locate import locate
from offsite.staging import staged_file
from server.dashboard.access import has_token, make_token
from server.dashboard.config import INVITATIONS, WITHDRAWALS
from server.http.certificates import CERTIFICATE_NAME, PRIVATE_KEY_NAME, write_certificate
from server.registry.registry import Registry

if TYPE_CHECKING:
    from server.dashboard.config import OwnerInitConfig

OUTBOX, TLS = "outbox", "tls"
_OWN_NAMES = ("127.0.0.1", "localhost", "::1")
_PORT = 8443
_CERTIFICATE_DAYS = 365


def run(config: OwnerInitConfig) -> dict[str, object]:
    """Carry out ``offsite owner init``, in this folder.

    Raises:
        ConfigError: when an owner's project is here already, the model cannot be found, or as ``offsite init``.
        ArtefactError: when keys, or a registry, that are there are damaged or open to others.
        RunFailed: when something cannot be written.
    """
    here = Path.cwd()
    path = here / PROJECT_NAME
    if path.exists() and project_table("owner", here)[1]:
        raise ConfigError(f"{PROJECT_NAME} says already what an owner needs here", hint="offsite owner up")
    model, (host, port) = _model(config.model), _place(config.url)
    if path.exists() or path.is_symlink():
        _refuse_new_keys(config)
    else:
        given = {name: getattr(config, name) for name in config.model_fields_set & InitConfig.model_fields.keys()}
        begin_project(InitConfig(**given))
    folders = project_folders(here)
    if missing := {"keys", "registry"} - folders.keys():
        raise ConfigError(f"{PROJECT_NAME} does not name {' and '.join(sorted(missing))}", hint='as: keys = "keys"')
    keys, registry = folders["keys"], folders["registry"]
    check_folder(keys)
    Registry.open(registry, keys, create=True).close()
    for name in (OUTBOX, INVITATIONS, WITHDRAWALS):
        (here / name).mkdir(mode=0o700, exist_ok=True)
    if not (here / TLS).exists():
        names = dict.fromkeys([*_OWN_NAMES, *([host] if host else [])])
        write_certificate(here / TLS, tuple(names), days=_CERTIFICATE_DAYS)
    settings: dict[str, object] = {
        "model": model,
        "home": ".",
        "outbox": OUTBOX,
        "certificate": f"{TLS}/{CERTIFICATE_NAME}",
        "certificate_key": f"{TLS}/{PRIVATE_KEY_NAME}",
        "url": config.url or f"https://127.0.0.1:{_PORT}",
        "host": "0.0.0.0" if host else "127.0.0.1",  # noqa: S104 - asked for by naming an address for clients
        "port": port,
    }
    _add_table(path, settings)
    if not has_token(keys):
        tell_token(make_token(keys))
    public = read_card(read_limited(keys / CARD_NAME, CARD_LIMIT_BYTES, what="card"))
    say(f"the exchange will be at {settings['url']}, the dashboard for this machine alone")
    say_next("offsite", "owner", "up")
    return {
        "project": str(path),
        "fingerprint": public.fingerprint,
        "name": public.name,
        "model": model,
        "url": settings["url"],
    }


def tell_token(token: str) -> None:
    """The token is on the terminal, this once: nothing on the disk can say it again."""
    say(f"the dashboard's token, shown this once: {token}")
    say("keep it where you keep passphrases; offsite owner up --new-token makes another")


def _model(word: str) -> str:
    """Return the model as every folder's commands find it.

    Raises:
        ConfigError: when it is no folder of a model, no name that was fetched, and no hub id that is known to be there.
    """
    locate(word)
    return str(Path(word).absolute()) if Path(word).is_dir() else word


def _refuse_new_keys(config: OwnerInitConfig) -> None:
    """Raises ConfigError when settings of new keys are given where the project has its keys."""
    if given := {"name", "days"} & config.model_fields_set:
        flags = ", ".join(f"--{name}" for name in sorted(given))
        raise ConfigError(f"{flags}: {PROJECT_NAME} names keys already", hint="leave it out to keep them")


def _place(url: str | None) -> tuple[str, int]:
    """Return host and port of an address for clients, no host where there is none.

    Raises:
        ConfigError: when it is no address.
    """
    if url is None:
        return "", _PORT
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:
        host = ""
    if not host:
        raise ConfigError(f"--url {url!r} names no host", hint="as https://owner.example:8443")
    return host, port


def _add_table(path: Path, settings: dict[str, object]) -> None:
    """The project's file holds the table ``[owner]`` behind what it held."""
    before = path.read_text(encoding="utf-8")
    lines = "".join(f"{name} = {json.dumps(value, ensure_ascii=True)}\n" for name, value in settings.items())
    about = "# what offsite owner up serves, and where; every setting of its --help may stand here"
    with staged_file(path, replace=True) as stage:
        stage.write_text(f"{before.rstrip()}\n\n{about}\n[owner]\n{lines}", encoding="utf-8")
        stage.chmod(0o644)
    say(f"{PROJECT_NAME} says now what offsite owner up serves")
