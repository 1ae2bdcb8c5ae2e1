"""Settings that decide what may go: the gates of a package, and a bundle's leave without them."""

from __future__ import annotations

from pydantic import Field

from offsite.config import PRIVACY, VerbConfig


class PackageGates(VerbConfig):
    """Base of verbs that hold a package's audit against its owner's limits."""

    max_capability: float | None = Field(
        None,
        description="package audit: largest share of the full model's skill the emulator may have",
        json_schema_extra=PRIVACY,
    )
    max_recovery: float | None = Field(
        None,
        description="package audit: largest share of lost capability an attack may have regained",
        json_schema_extra=PRIVACY,
    )
    max_union: float | None = Field(
        None,
        ge=0,
        le=1,
        description="package audit: largest share of the middle in all packages together",
        json_schema_extra=PRIVACY,
    )
    min_withheld: float | None = Field(
        None,
        allow_inf_nan=False,
        description="package audit: nats per token that the tuned emulator must stay above the full model as it was, "
        "by every way of tuning measured",
        json_schema_extra=PRIVACY,
    )


class LeakageSettings(VerbConfig):
    """Base of verbs that let a bundle go."""

    accept_leakage: bool = Field(
        False,
        description="let a bundle go although a gate failed, or not all was measured on it; reports show that",
        json_schema_extra=PRIVACY,
    )
