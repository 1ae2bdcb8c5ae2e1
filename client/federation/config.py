"""Settings of a data owner's part in a federation: the same over an exchange, in one process, and under Flower."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from client.audit.config import AuditBundleConfig
from client.exchange.config import ExchangeConfig
from client.tuning.config import PrivateTextSettings, TuneConfig
from offsite.audits.config import LeakageSettings
from offsite.audits.gates import MIN_NONMEMBERS
from offsite.config import LIMITS, NETWORK, PRIVACY, USUAL, build
from offsite.errors import ConfigError
from offsite.keys.config import IdentityConfig

_GIVEN = ("package", "job", "round", "data", "output", "resume")
_ROUNDS_OWN = ("steps", "epochs", "learning_rate", "adapter", "placement", "targets", "rank", "alpha", "dropout")
_NOT_HERE = ("canaries", "launch", "disclose", "eval")


class _Part(PrivateTextSettings, LeakageSettings):
    """What a client brings to every round."""

    package: Path = Field(description="opened package folder")
    job: Path = Field(description="opened job folder")
    work: Path = Field(description="folder for rounds, checkpoints and bundles; made if there is none")
    tune: dict[str, Any] = Field(
        {}, description="settings of offsite tune, as tune.batch_size=8 or a block in YAML", json_schema_extra=USUAL
    )
    audit: bool = Field(
        False,
        description="measure each round's bundle before it goes; the first that fails a gate stays, and ends it",
        json_schema_extra=USUAL,
    )
    audit_rows: int = Field(
        2000,
        ge=1,
        description="rows trained on, and rows not, that such an audit scores at most",
        json_schema_extra=PRIVACY,
    )
    colluders: int = Field(
        0,
        ge=0,
        description="secure rounds: clients you reckon to be in league with the owner",
        json_schema_extra=PRIVACY,
    )
    secure_only: bool = Field(
        False,
        description="refuse a round that asks for the bundle itself, not for a part of a sum",
        json_schema_extra=PRIVACY,
    )
    limit_steps: int = Field(10_000, ge=1, description="most steps that a round may ask for", json_schema_extra=LIMITS)
    limit_bytes: int = Field(
        2**36, ge=1, description="largest sealed round to take, in bytes", json_schema_extra=LIMITS
    )


class MemberConfig(_Part, IdentityConfig):
    """A client's own settings, read from a file on its machine by ``client/federation/flower.py``."""

    verb: ClassVar[str] = "federate join"

    def tuning(self, round_: Path, output: Path, *, resume: bool) -> TuneConfig:
        """Return the settings of one round's tuning.

        Raises:
            ConfigError: when ``tune`` holds what the round, the job or these settings decide, or what is unknown.
        """
        given = {"package": self.package, "job": self.job, "round": round_, "output": output}
        flags = {**{k: str(v) for k, v in given.items()}, "data": [str(path) for path in self.data], "resume": resume}
        return build(TuneConfig, flags={**self.tune, **flags})

    def auditing(self, round_: Path, bundle: Path, output: Path) -> AuditBundleConfig:
        """Return the settings of the audit of one round's bundle."""
        return AuditBundleConfig(
            package=self.package,
            bundle=bundle,
            data=self.data,
            output=output,
            round=round_,
            rows=self.audit_rows,
            device=str(self.tune.get("device", "auto")),
        )

    def check(self) -> None:
        """Return only if every round could be tuned with these settings, and its bundle let go.

        Raises:
            ConfigError: naming what stands in the way.
        """
        for names, why in (
            (_GIVEN, "it is given beside tune"),
            (_ROUNDS_OWN, "the owner's round and job say it"),
            (_NOT_HERE, "a federation's rounds do not go with it"),
        ):
            if found := sorted(set(names) & self.tune.keys()):
                raise ConfigError(f"tune.{found[0]}: {why}")
        if unknown := sorted(self.tune.keys() - TuneConfig.model_fields.keys()):
            raise ConfigError(f"tune.{unknown[0]}: offsite tune has no such setting", hint="offsite tune --help")
        self.tuning(Path("round"), Path("bundle"), resume=False)
        if self.audit and "dp" not in self.tune:
            self._require_measurable()
        if not self.accept_leakage:
            raise ConfigError(
                "each round sends a bundle on which not all was measured: rounds have no canaries",
                hint="--accept-leakage lets them go; tune.dp bounds what they give away, --audit measures each round",
            )

    def _require_measurable(self) -> None:
        if not self.tune.get("audit_share"):
            raise ConfigError(
                "--audit compares rows that a round reads with rows that none reads, and none are set aside",
                hint=f"tune.audit_share=0.3, or so much that {MIN_NONMEMBERS:,} rows are",
            )
        if self.audit_rows < MIN_NONMEMBERS:
            raise ConfigError(f"--audit-rows {self.audit_rows}: with fewer than {MIN_NONMEMBERS:,} no gate could fail")


class JoinConfig(_Part, ExchangeConfig):
    """Settings of ``offsite federate join URL``."""

    verb: ClassVar[str] = "federate join"

    poll_seconds: float = Field(
        2.0, gt=0, description="seconds between two looks at what the owner asks", json_schema_extra=NETWORK
    )
    idle_seconds: float = Field(
        86_400.0, gt=0, description="seconds without a round after which to give up", json_schema_extra=NETWORK
    )

    def member(self) -> MemberConfig:
        """Return the part of the settings that does not depend on the way."""
        return MemberConfig(**{name: getattr(self, name) for name in MemberConfig.model_fields})
