"""Settings of ``offsite keygen`` and ``offsite trust``, and the two that every verb using keys shares."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator

from offsite.config import FROM_PROJECT, KEYS, OUTPUT, POSITIONAL, USUAL, VerbConfig, project_folders

DEFAULT_KEYS = Path("~/.offsite/keys")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$"


def home_expanded(path: object, info: ValidationInfo) -> object:
    """Return the path with ``~`` replaced, as text where settings are read from JSON and so expected as text."""
    if not isinstance(path, str | Path):
        return path
    found = Path(path).expanduser()
    return str(found) if info.mode == "json" else found


class KeysConfig(VerbConfig):
    """Base of verbs that use this party's keys folder."""

    keys: Path = Field(
        DEFAULT_KEYS,
        description="this party's keys folder; else offsite.toml's",
        json_schema_extra=KEYS | FROM_PROJECT,
        validate_default=True,
    )

    @field_validator("keys", mode="before")
    @classmethod
    def _home(cls, path: object, info: ValidationInfo) -> object:
        return home_expanded(path, info)

    def key_words(self, *, opens: bool = True) -> list[str]:
        """Return the flags by which another command uses the same keys; none for the usual ones.

        Args:
            opens: whether that command signs or decrypts.
        """
        usual = self.keys in (DEFAULT_KEYS.expanduser(), project_folders().get("keys"))
        return [] if usual else ["--keys", str(self.keys)]


class PassphraseConfig(VerbConfig):
    """Base of verbs that need the passphrase."""

    passphrase_file: Path | None = Field(
        None,
        description="file with the passphrase, mode 0600; default: the environment variable OFFSITE_PASSPHRASE, "
        "else it is asked for",
        json_schema_extra=KEYS,
    )


class IdentityConfig(PassphraseConfig, KeysConfig):
    """Base of verbs that sign or decrypt with this party's keys."""

    def key_words(self, *, opens: bool = True) -> list[str]:
        """Return the flags by which another command uses the same keys, and if it `opens` them, the same passphrase."""
        file = self.passphrase_file if opens else None
        return super().key_words() + ([] if file is None else ["--passphrase-file", str(file)])


class NewKeysConfig(PassphraseConfig):
    """Base of verbs that make keys."""

    name: str = Field(
        "unnamed",
        pattern=NAME_PATTERN,
        description="name on the public card: letters, digits, spaces, '.', '_', '-'",
        json_schema_extra=USUAL,
    )
    days: int = Field(
        365, ge=1, le=3650, description="days until others stop trusting these keys", json_schema_extra=USUAL
    )


class KeygenConfig(NewKeysConfig):
    """Settings of ``offsite keygen -o KEYS``."""

    verb: ClassVar[str] = "keygen"

    output: Path = Field(
        DEFAULT_KEYS, description="keys folder to write", json_schema_extra=USUAL | OUTPUT, validate_default=True
    )

    @field_validator("output", mode="before")
    @classmethod
    def _home(cls, path: object, info: ValidationInfo) -> object:
        return home_expanded(path, info)


class InitConfig(NewKeysConfig):
    """Settings of ``offsite init``."""

    verb: ClassVar[str] = "init"

    folder: Path = Field(
        Path(), description="folder of the project, here by default", json_schema_extra=USUAL | POSITIONAL
    )


class TrustAddConfig(KeysConfig):
    """Settings of ``offsite trust add CARD --fingerprint FINGERPRINT``."""

    verb: ClassVar[str] = "trust add"

    card: Path = Field(description="the other party's card.json", json_schema_extra=POSITIONAL)
    fingerprint: str | None = Field(
        None,
        description="the fingerprint the other party told you over another channel; default: asked for",
        json_schema_extra=USUAL,
    )


class TrustListConfig(KeysConfig):
    """Settings of ``offsite trust list``."""

    verb: ClassVar[str] = "trust list"


class TrustRevokeConfig(KeysConfig):
    """Settings of ``offsite trust revoke FINGERPRINT``."""

    verb: ClassVar[str] = "trust revoke"

    fingerprint: str = Field(description="fingerprint or name, as trust list shows them", json_schema_extra=POSITIONAL)
