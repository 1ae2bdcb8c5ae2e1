"""Settings of ``offsite plug-in``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from offsite.config import OUTPUT, PLUGGING, REPEATED, USUAL, VerbConfig, flag_name
from offsite.errors import ConfigError
from offsite.keys.config import IdentityConfig
from offsite.modelling.config import ModelWord
from offsite.text.config import TextFiles
from server.plugging.ways import LEAST_SPARE, MOST_SPARE, Way
from server.registry.config import RegisteredConfig


def _share(given: object) -> object:
    """Return a share as one number, or as the word of shares by module.

    Raises:
        ValueError: when it is neither.
    """
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError("expected a number, or NAME=SHARE,...")
    try:
        way = Way.read(given) if isinstance(given, str) else Way(float(given))
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("scale: ")) from None
    if way.spare is not None or way.mix != 1:
        raise ValueError("expected shares alone: what is spared or mixed has settings of its own")
    return str(way) if way.by_module else way.scale


Share = Annotated[float | str, BeforeValidator(_share)]


class ScaleSettings(VerbConfig):
    """Base of verbs that plug in an update: how much of it."""

    scale: Share = Field(
        1.0,
        description="share of the adapter's update that is plugged in: a number, or by module and part, as "
        "attention=0.5,mlp=0.75,top=0.5; not for dora",
        json_schema_extra=PLUGGING,
    )

    @property
    def way(self) -> Way:
        """How the adapter is plugged in."""
        return Way.read(str(self.scale))


class SpareSettings(VerbConfig):
    """Base of verbs that may leave some directions of the full model as they were."""

    spare: TextFiles = Field(
        (),
        description="public text: what its inputs use most is left as it was in the full model; may be repeated; not "
        "for dora and bitfit",
        json_schema_extra=PLUGGING | REPEATED,
    )
    spare_tokens: int = Field(
        20_000, ge=1, description="with --spare: tokens of the text that are read, at most", json_schema_extra=PLUGGING
    )

    @model_validator(mode="after")
    def _spare(self) -> Self:
        for name in ("spare_half", "spare_tokens"):
            field = type(self).model_fields.get(name)
            if field is not None and not self.spare and getattr(self, name) != field.default:
                raise ValueError(f"{flag_name(name)} goes with --spare, which names public text")
        return self


class WaySettings(ScaleSettings, SpareSettings):
    """Base of verbs that plug in some directions of an update, too."""

    spare_half: float = Field(
        1.0,
        ge=LEAST_SPARE,
        le=MOST_SPARE,
        description="with --spare: a direction used so often, over the mean one, keeps half; larger keeps more",
        json_schema_extra=PLUGGING,
    )

    @property
    def way(self) -> Way:
        """How the adapter is plugged in."""
        return replace(super().way, spare=self.spare_half if self.spare else None)


class MixSettings(VerbConfig):
    """Base of verbs that ask a model with an adapter on it."""

    mix: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the plugged-in model's probabilities; the rest is the full model's, by a second pass",
        json_schema_extra=PLUGGING,
    )


class BetaSettings(VerbConfig):
    """Base of verbs that move the full model's scores by an adapter that stays on the emulator (`offset`)."""

    beta: float = Field(
        0.5,
        gt=0,
        le=4,
        description="with --offset: how much of what the adapter does to the emulator's scores is added",
        json_schema_extra=PLUGGING,
    )

    @model_validator(mode="after")
    def _beta(self) -> Self:
        if not getattr(self, "offset", None) and "beta" in self.model_fields_set:
            raise ValueError("--beta goes with --offset")
        return self


class CorrectSettings(VerbConfig):
    """Base of verbs that may correct an update before it is plugged in."""

    correct: bool = Field(
        False,
        description="take the emulator's fault along the adapter's own directions out of the update, so that the full "
        "model computes on them what was tuned; lora and rslora on packages of method low-rank or packed",
        json_schema_extra=PLUGGING,
    )


class MeasuredWaySettings(WaySettings, MixSettings):
    """Base of verbs that measure an adapter plugged in, and asked, in a certain way."""

    @property
    def way(self) -> Way:
        """How the adapter is plugged in and asked."""
        return replace(super().way, mix=self.mix)


class AcceptedConfig(RegisteredConfig, ModelWord):
    """Base of verbs that put an accepted bundle into the full model."""

    package: Path | None = Field(
        None,
        description="package the bundle was tuned on; default: where it was when its job was made",
        json_schema_extra=USUAL,
    )


class PlugConfig(AcceptedConfig, WaySettings, CorrectSettings):
    """Settings of ``offsite plug-in MODEL ID --registry DIR -o ADAPTED``."""

    verb: ClassVar[str] = "plug-in"

    output: Path = Field(description="adapted folder to write", json_schema_extra=OUTPUT)
    merge: bool = Field(
        False,
        description="write a whole checkpoint with the adapter merged in, in the model's dtype",
        json_schema_extra=USUAL,
    )
    results: Path | None = Field(
        None,
        description="results folder of evaluating this bundle; its figures go into the README",
        json_schema_extra=USUAL,
    )


class WithdrawConfig(IdentityConfig, RegisteredConfig):
    """Settings of ``offsite withdraw ID --registry DIR -o WITHDRAWAL``."""

    verb: ClassVar[str] = "withdraw"

    adapted: tuple[Path, ...] = Field(
        (),
        description="adapted folder that plug-in wrote of the bundle, to be deleted; may be repeated",
        json_schema_extra=USUAL | REPEATED,
    )
    model: str | None = Field(
        None,
        description="the full model: its digest is compared with the one before anything was plugged in",
        json_schema_extra=USUAL,
    )
    output: Path = Field(description="file to write the signed statement to, for the client", json_schema_extra=OUTPUT)
