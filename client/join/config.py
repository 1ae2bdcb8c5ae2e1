"""Settings of ``offsite join``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from client.audit.config import RetuningSettings
from client.exchange.config import VerdictSettings
from client.tuning.config import EvalSettings, PrivateTextSettings, TuneConfig
from offsite.audits.config import LeakageSettings
from offsite.config import KEYS, POSITIONAL, PRIVACY, USUAL, build
from offsite.errors import ConfigError
from offsite.keys.config import IdentityConfig, NewKeysConfig
from offsite.text.config import ColumnSettings
from offsite.training.config import DeviceSettings, SeedSettings

_DECIDED = {
    **dict.fromkeys(("package", "job", "output", "resume"), "join decides it"),
    **dict.fromkeys(("data", "eval", "fields", "device", "seed"), "it is given beside --tune"),
    "canaries": "--canaries says how many are planted",
    "round": "offsite federate join takes part in rounds",
    "launch": "join tunes in one process",
    "disclose": "nothing but the adapter leaves",
}
WORK = Path("joined")


class InvitedConfig(
    IdentityConfig,
    NewKeysConfig,
    LeakageSettings,
    PrivateTextSettings,
    EvalSettings,
    ColumnSettings,
    VerdictSettings,
    RetuningSettings,
    DeviceSettings,
    SeedSettings,
):
    """Settings of ``offsite join INVITATION --data FILE``."""

    verb: ClassVar[str] = "join"

    invitation: Path = Field(description="the invitation that the owner sent", json_schema_extra=POSITIONAL)
    work: Path = Field(
        WORK,
        description="folder for all that is opened and made; the same command goes on from what is there",
        json_schema_extra=USUAL,
    )
    round: int = Field(
        1,
        ge=1,
        description="round of the job that the bundle is for; what another round made is left as it is",
        json_schema_extra=USUAL,
    )
    yes: bool = Field(
        False,
        description="answer yes where join would ask; neither a fingerprint nor a gate that did not pass is",
        json_schema_extra=USUAL,
    )
    tune: dict[str, Any] = Field(
        {}, description="settings of offsite tune, as steps=200,batch_size=8", json_schema_extra=USUAL
    )
    canaries: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description="made-up texts that are planted, to see what tuning gives away; default: one for every ten rows, "
        "1000 with dp; 0: none, and no secrets",
        json_schema_extra=PRIVACY,
    )
    fingerprint: str | None = Field(
        None,
        description="the owner's fingerprint, as they told it over another channel; default: asked for",
        json_schema_extra=KEYS,
    )

    @field_validator("tune")
    @classmethod
    def _leaves_the_rest(cls, tune: dict[str, Any]) -> dict[str, Any]:
        """Raise ValueError with the settings that are not for --tune."""
        found = [f"{name} ({_DECIDED[name]})" for name in sorted(tune) if name in _DECIDED]
        unknown = sorted({name.split(".")[0] for name in tune} - TuneConfig.model_fields.keys() - _DECIDED.keys())
        found += [f"{name} (offsite tune has no such setting)" for name in unknown]
        if found:
            raise ValueError(f"not to be given: {', '.join(found)}")
        return tune

    @property
    def is_private(self) -> bool:
        """Whether tuning is to be differentially private."""
        return any(name.split(".")[0] == "dp" for name in self.tune)

    def tune_words(self, more: Mapping[str, object]) -> list[str]:
        """Return ``key=value`` words that say these settings to ``offsite tune``, sorted; `more` stands below them."""
        stated: dict[str, object] = {"sealed_off": "true", **more, **self.tune, "device": self.device}
        stated["seed"] = self.seed
        words = []
        for name, value in sorted(stated.items()):
            inner = value.items() if isinstance(value, dict) else [("", value)]
            words += [f"{name}.{key}={_text(one)}" if key else f"{name}={_text(one)}" for key, one in inner]
        return words + [f"fields.{name}={column}" for name, column in sorted(self.fields.items())]

    def tuning(self, package: Path, job: Path, output: Path, more: Mapping[str, object]) -> TuneConfig:
        """Return the settings of ``offsite tune`` that `tune_words` say.

        Raises:
            ConfigError: naming what is wrong with them.
        """
        flags = {"package": str(package), "job": str(job), "output": str(output)}
        flags_of_data: dict[str, object] = {**flags, "data": [str(path) for path in self.data], "resume": True}
        flags_of_data |= {"eval": [str(path) for path in self.eval]} if self.eval else {}
        try:
            return build(TuneConfig, overrides=self.tune_words(more), flags=flags_of_data)
        except ConfigError as error:
            raise ConfigError(f"--tune: {error}", hint="offsite tune --help lists its settings") from None


def _text(value: object) -> str:
    """Return a value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)
