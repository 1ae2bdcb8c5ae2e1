"""Settings of ``offsite federate serve`` and of what a federation asks of its clients."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from offsite.artefacts.round import MAX_STEPS
from offsite.config import COMBINING, MEASURING, NETWORK, OUTPUT, PRIVACY, REPEATED, ROUNDS, USUAL
from offsite.keys.config import NAME_PATTERN
from offsite.modelling.config import ModelFlag
from offsite.text.config import BlockSettings, TextFiles
from server.exchange.config import ServeExchangeConfig
from server.plugging.config import ScaleSettings
from server.registry.config import OwnRegistryConfig

Rule = Literal["mean", "trimmed-mean", "median", "krum", "multi-krum"]

_FIXED = (
    "mode", "rounds", "steps", "learning_rate", "proximal", "fraction", "rule", "num_byzantine", "trim",
    "keep", "max_norm", "rank", "share_a", "noise_multiplier", "clip", "delta", "realign_every", "realign_steps",
    "realign_rank", "secure", "threshold", "server_learning_rate",
)  # fmt: skip
"""What may not change between the first round and the last."""


class RoundsConfig(ModelFlag, BlockSettings, ScaleSettings):
    """What an owner asks of clients over rounds, and what becomes of their answers.

    ``scale`` is of the end alone: of what is measured and written in the full model. Rounds go on from the whole sum.
    """

    name: str = Field(
        "federation",
        pattern=NAME_PATTERN,
        description="name of the run; the same goes on where it was",
        json_schema_extra=ROUNDS,
    )
    package: Path = Field(description="package folder that the jobs are about")
    output: Path = Field(description="folder for results.json and the adapted model", json_schema_extra=OUTPUT)

    mode: Literal["shared", "personal"] = Field(
        "shared",
        description="one adapter of all, or one for each client, which no other client's data reaches",
        json_schema_extra=USUAL,
    )
    rounds: int = Field(3, ge=1, le=10_000, description="rounds; the jobs must allow as many", json_schema_extra=USUAL)
    steps: int = Field(
        40, ge=1, le=MAX_STEPS, description="optimiser steps of a client in a round", json_schema_extra=USUAL
    )
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="peak rate; default: the client's own", json_schema_extra=ROUNDS
    )
    proximal: float = Field(
        0.0, ge=0, le=1e6, description="FedProx's mu, on the effective update; 0 for none", json_schema_extra=ROUNDS
    )
    share_a: bool = Field(
        False,
        description="LoRA: all clients share one frozen A in a round, drawn by the owner",
        json_schema_extra=ROUNDS,
    )

    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the clients that a round is asked of, drawn anew",
        json_schema_extra=ROUNDS,
    )
    min_clients: int = Field(
        2, ge=1, description="answers without which a round stops and changes nothing", json_schema_extra=USUAL
    )
    deadline_seconds: float = Field(
        3600.0, gt=0, description="seconds after which a round goes on with what came", json_schema_extra=ROUNDS
    )

    stage_seconds: float = Field(
        300.0, gt=0, description="secure: seconds to wait for each of a round's messages", json_schema_extra=PRIVACY
    )

    rule: Rule = Field("mean", description="how effective updates are put together", json_schema_extra=COMBINING)
    num_byzantine: int = Field(
        0, ge=0, description="clients that may be bad: krum, multi-krum, median", json_schema_extra=COMBINING
    )
    trim: float = Field(
        0.2,
        gt=0,
        lt=0.5,
        description="trimmed-mean: share cut off at each end of every coordinate",
        json_schema_extra=COMBINING,
    )
    keep: int = Field(1, ge=1, description="multi-krum: how many updates are averaged", json_schema_extra=COMBINING)
    server_learning_rate: float = Field(
        1.0,
        gt=0,
        le=10,
        description="what the updates put together are multiplied by before they are added (FedOpt)",
        json_schema_extra=COMBINING,
    )
    max_norm: float | None = Field(
        None,
        gt=0,
        description="largest Frobenius norm of a client's update; larger: scaled",
        json_schema_extra=COMBINING,
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="cut the sum of all rounds back to this rank; its error is told",
        json_schema_extra=COMBINING,
    )

    secure: bool = Field(
        False,
        description="secure aggregation: the owner learns the sum of a round's updates alone",
        json_schema_extra=USUAL,
    )
    threshold: int | None = Field(
        None,
        ge=2,
        description="secure: clients without whom a round ends; default: two thirds of those asked, and one",
        json_schema_extra=PRIVACY,
    )

    noise_multiplier: float | None = Field(
        None,
        ge=0.2,
        le=128,
        description="central differential privacy: noise over --clip, of each client's part",
        json_schema_extra=PRIVACY,
    )
    clip: float = Field(
        1.0,
        gt=0,
        description="largest Frobenius norm of a client's part: central privacy, secure sums",
        json_schema_extra=PRIVACY,
    )
    delta: float = Field(
        1e-5, gt=0, lt=1, description="central privacy: delta of the guarantee", json_schema_extra=PRIVACY
    )

    realign_every: int = Field(
        0,
        ge=0,
        description="rounds after which the emulator is realigned (FedBiOT); 0: never",
        json_schema_extra=ROUNDS,
    )
    realign_steps: int = Field(
        40, ge=1, description="optimiser steps of one realignment, on --public", json_schema_extra=ROUNDS
    )
    realign_rank: int | None = Field(
        None, ge=1, description="cut a realignment's difference to this rank", json_schema_extra=ROUNDS
    )
    public: TextFiles = Field(
        (),
        description="public text on which the emulator is realigned; may be repeated",
        json_schema_extra=ROUNDS | REPEATED,
    )

    heldout: dict[str, str] = Field(
        {},
        description="held-out text that the owner has, as NAME=FILE, measured each round",
        json_schema_extra=MEASURING,
    )
    heldout_tokens: int = Field(
        8192, ge=1, description="most tokens of each held-out text that count", json_schema_extra=MEASURING
    )
    watch_every: int = Field(
        1,
        ge=0,
        description="rounds between two measurements of held-out text; 0: at the end",
        json_schema_extra=MEASURING,
    )
    merge: bool = Field(
        True,
        description="write the shared result as a merged model, which offsite serve opens",
        json_schema_extra=ROUNDS,
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = []
        if self.mode == "personal" and (self.rule != "mean" or self.rank or self.noise_multiplier or self.max_norm):
            problems.append("--mode personal: nothing is put together, so no rule, rank, norm or noise goes with it")
        if self.mode == "personal" and self.server_learning_rate != 1:
            problems.append("--mode personal: nothing is put together, so no --server-learning-rate goes with it")
        if self.noise_multiplier is not None and (self.rule != "mean" or self.max_norm or self.rank):
            problems.append(
                "--noise-multiplier: central privacy clips and averages by itself; leave --rule mean, no norm"
            )
        if self.secure and (self.mode == "personal" or self.rule != "mean" or self.max_norm or self.noise_multiplier):
            problems.append("--secure: the owner sees no single update, so no rule, norm or central noise goes with it")
        if self.secure and self.threshold is not None and self.threshold < self.min_clients:
            problems.append(f"--threshold {self.threshold}: below --min-clients {self.min_clients}")
        if self.realign_every and (not self.public or self.mode == "personal"):
            problems.append("--realign-every: needs --public, and one shared model to realign with")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def fixed(self) -> dict[str, object]:
        """Return what may not change between the first round and the last."""
        return self.model_dump(mode="json", include=set(_FIXED))


class FederationConfig(RoundsConfig, OwnRegistryConfig):
    """The same, and this owner's keys, registry and jobs."""

    verb: ClassVar[str] = "federate serve"

    jobs: tuple[str, ...] = Field(
        (),
        description="jobs by the beginning of their id; default: every job of the package that has not expired",
        json_schema_extra=ROUNDS,
    )


class FederateServeConfig(FederationConfig, ServeExchangeConfig):
    """Settings of ``offsite federate serve``: a federation over this owner's exchange."""

    verb: ClassVar[str] = "federate serve"

    linger_seconds: float = Field(
        30.0, ge=0, description="seconds to stay after the end, for clients to hear of it", json_schema_extra=NETWORK
    )
