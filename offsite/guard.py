"""Refuse to run when another distribution owns one of our top-level folders.

``adapters``, ``client`` and ``server`` are common names: two wheels that install one folder overwrite each
other in silence. The guard looks for each package beside ``offsite/`` and for our marker in it, without
importing it.
"""

from __future__ import annotations

import re
from importlib.machinery import PathFinder
from pathlib import Path

from offsite.errors import ConfigError

ROLES = ("adapters", "client", "emulator", "server")

_MARKER = re.compile(r'^OFFSITE_ROLE = "([a-z]+)"$', re.MULTILINE)


def check_install(home: Path | None = None) -> None:
    """Return only if every role package stands beside ``offsite/`` and is ours.

    Args:
        home: the folder that holds ``offsite/``; by default the one this file is in.

    Raises:
        ConfigError: naming the first package that is missing, foreign, or found elsewhere.
    """
    home = home or Path(__file__).resolve().parent.parent
    for role in ROLES:
        found = PathFinder.find_spec(role)
        origin = Path(found.origin).resolve() if found and found.origin else None
        ours = home / role / "__init__.py"
        hint = "install offsite-tuning in a virtual environment of its own"
        if not ours.is_file():
            raise ConfigError(f"package {role!r} of offsite-tuning is missing", hint=hint)
        marker = _MARKER.search(ours.read_text(encoding="utf-8"))
        if marker is None or marker.group(1) != role:
            raise ConfigError(f"package {role!r} belongs to another distribution, not to offsite-tuning", hint=hint)
        if origin is not None and origin != ours:
            raise ConfigError(f"another package named {role!r} hides the one of offsite-tuning", hint=hint)
