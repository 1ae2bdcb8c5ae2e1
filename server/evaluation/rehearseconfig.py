"""Settings of ``offsite rehearse``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from adapters.rates import LEARNING_RATES
from adapters.settings import TuningSettings
from offsite.config import MEASURING, OUTPUT, PLUGGING, REPEATED, USUAL
from offsite.errors import ConfigError
from offsite.modelling.config import ModelWord
from offsite.problems import meant
from offsite.text.config import TextFiles
from server.plugging.config import SpareSettings
from server.plugging.ways import Way

SCALES = (1.0, 0.75, 0.5)
LEAST_SCALE = 0.35
"""Shares of the update that are tried, and the one that is tried besides where the smallest of them did best."""


class RehearseConfig(ModelWord, TuningSettings, SpareSettings):
    """Settings of ``offsite rehearse MODEL --package PACKAGE --data TEXT -o REHEARSAL.json``."""

    verb: ClassVar[str] = "rehearse"

    output: Path = Field(description="JSON file to write", json_schema_extra=OUTPUT)
    package: Path = Field(description="package folder that a client would tune on")
    data: TextFiles = Field(
        min_length=1,
        description="text like the clients', that you may tune on: a file as tune reads; may be repeated",
        json_schema_extra=REPEATED,
    )
    heldout: TextFiles = Field(
        (),
        description="more of it to measure on; default: --heldout-share of --data; may be repeated",
        json_schema_extra=USUAL | REPEATED,
    )
    heldout_share: float = Field(
        0.2, gt=0, lt=1, description="share of the documents that is not tuned on then", json_schema_extra=MEASURING
    )
    limit_tokens: int = Field(
        20_000, ge=0, description="tokens of held-out text, at most; 0 for all", json_schema_extra=MEASURING
    )

    learning_rate: tuple[float, ...] = Field(
        (),
        description="peak rate to try; repeat it for others; default: half, once and twice the kind's",
        json_schema_extra=USUAL | REPEATED,
    )
    scale: tuple[float, ...] = Field(
        (),
        description="share of the update to try; repeat it for others; "
        f"default: {', '.join(f'{s:g}' for s in SCALES)}, and {LEAST_SCALE:g} where {SCALES[-1]:g} does best",
        json_schema_extra=PLUGGING | REPEATED,
    )
    way: tuple[str, ...] = Field(
        (),
        description="another way to plug in to try beside the shares, as attention=0.5,mlp=0.75 or 0.75,spare=1 or "
        "1,mix=0.7; may be repeated",
        json_schema_extra=PLUGGING | REPEATED,
    )
    steps: int = Field(
        100,
        ge=1,
        description="optimiser steps of each run, about as many as clients will take",
        json_schema_extra=USUAL,
    )

    reference: bool = Field(
        False,
        description="tune LoRA on the full model, too, and state what plugging in recovers of its gain",
        json_schema_extra=USUAL,
    )
    reference_package: Path | None = Field(
        None,
        description="package that keeps all of the model, for --reference; made on the way by default",
        json_schema_extra=MEASURING,
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = []
        if self.adapter not in LEARNING_RATES:
            problems.append(
                f"--adapter: no kind {self.adapter!r}, expected one of {', '.join(LEARNING_RATES)}"
                f"{meant(self.adapter, LEARNING_RATES)}"
            )
        for flag, values in {"--learning-rate": self.learning_rate, "--scale": self.scale}.items():
            if any(not 0 < value <= 1 for value in values):
                problems.append(f"{flag}: expected more than 0 and at most 1")
            if len({f"{value:g}" for value in values}) != len(values):
                problems.append(f"{flag}: one value is given twice")
        if self.adapter == "dora" and any(scale != 1 for scale in self.scale):
            problems.append("--scale: a dora adapter is plugged in whole or not")
        problems += self._way_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _way_problems(self) -> list[str]:
        found, ways = [], []
        for word in self.way:
            try:
                way = Way.read(word)
            except ConfigError as error:
                found.append(f"--way {word[:80]}: {error}")
                continue
            if way in ways or way in map(Way, self.scales):
                found.append(f"--way {word}: tried already")
            if way.spare is not None and not self.spare:
                found.append(f"--way {word}: --spare is missing, which names public text")
            if self.adapter == "dora" and replace(way, mix=1.0) != Way():
                found.append(f"--way {word}: a dora adapter is plugged in whole or not")
            ways.append(way)
        if self.spare and all(way.spare is None for way in ways) and not found:
            found.append("--spare: no --way spares anything, as 0.75,spare=1 does")
        return found

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that are tried, from the lowest."""
        usual = LEARNING_RATES[self.adapter]
        return tuple(sorted(self.learning_rate)) or (usual / 2, usual, usual * 2)

    @property
    def scales(self) -> tuple[float, ...]:
        """Shares of the update that are tried, from the largest."""
        return tuple(sorted(self.scale, reverse=True)) or ((1.0,) if self.adapter == "dora" else SCALES)

    @property
    def ways(self) -> tuple[Way, ...]:
        """Ways to plug in that are tried: the shares, then the others."""
        return (*map(Way, self.scales), *(Way.read(word) for word in self.way))

    @property
    def tries_less(self) -> bool:
        """Whether a smaller share than the usual ones is tried where the smallest of them did best."""
        return self.scales == SCALES and not self.scale
