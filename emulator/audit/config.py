"""Settings of ``offsite audit package``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from adapters.rates import LEARNING_RATES
from emulator.distillation.config import OwnPackageSettings
from offsite.audits.config import PackageGates
from offsite.config import ATTACK, DATA, MEASURING, OUTPUT, REPEATED, USUAL, flag_name
from offsite.evaluation.config import HeldoutSettings
from offsite.text.config import TextFiles
from offsite.training.config import CheckpointSettings

ATTACKS = tuple(
    f"{start}_{heal}"
    for start in ("as_is", "refill", "duplicate", "interpolate", "regrow", "split")
    for heal in ("lora", "all")
)
"""START_HEAL. ``refill`` is the best start that gives the model its full size; the four after it are those starts."""

DEFAULT_ATTACKS = ("as_is_lora", "as_is_all", "refill_lora", "refill_all")

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AuditPackageConfig(OwnPackageSettings, HeldoutSettings, CheckpointSettings, PackageGates):
    """Settings of ``offsite audit package PACKAGE --model MODEL --heldout FILE -o AUDIT``."""

    verb: ClassVar[str] = "audit package"

    output: Path = Field(description="audit folder to write", json_schema_extra=OUTPUT)
    heldout: TextFiles = Field(
        min_length=1,
        description="measured on: .txt, .jsonl, .json, .csv or .tsv, or those as .gz, or .parquet; may be repeated",
        json_schema_extra=REPEATED,
    )
    results: Path | None = Field(
        None,
        description="folder that evaluate wrote for this package and text: the client's and the owner's figures",
        json_schema_extra=USUAL,
    )
    similarity_tokens: int = Field(
        1024,
        ge=16,
        description="held-out tokens whose hidden states are compared, at most",
        json_schema_extra=MEASURING,
    )

    public: TextFiles = Field(
        (),
        description="public text that an attacker heals the emulator on; may be repeated; none: no attack",
        json_schema_extra=USUAL | REPEATED,
    )
    public_fields: dict[str, str] = Field(
        {}, description="columns of the public text under other names, as text=body", json_schema_extra=DATA
    )
    public_document_field: str | None = Field(
        None, description="column that tells the public text's documents apart", json_schema_extra=DATA
    )
    public_separator: str | None = Field(
        None, description="public plain text: what stands between documents", json_schema_extra=DATA
    )
    recovery_tokens: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (50_000, 150_000),
        description="tokens that the attacks train on, ascending; 0 is always measured",
        json_schema_extra=ATTACK,
    )
    attack: tuple[str, ...] = Field(
        DEFAULT_ATTACKS,
        description="attacks as START_HEAL, by comma: START as_is, refill (the best of the others), duplicate, "
        "interpolate, regrow or split; HEAL lora (rank 8, every linear) or all (every weight but the embeddings)",
        json_schema_extra=ATTACK,
    )
    lora_rates: tuple[Rate, ...] = Field(
        (2e-3, 8e-3),
        min_length=1,
        description="learning rates tried for lora; after the first mark the best and those next to it",
        json_schema_extra=ATTACK,
    )
    all_rates: tuple[Rate, ...] = Field(
        (3e-4, 1e-3),
        min_length=1,
        description="learning rates tried for all; after the first mark the best and those next to it",
        json_schema_extra=ATTACK,
    )
    holdout: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="share of public documents by which the attacker chooses",
        json_schema_extra=ATTACK,
    )

    field_text: TextFiles = Field(
        (),
        description="text of the clients' field, read as --heldout is, that a client is played on; may be repeated; "
        "default: the public text",
        json_schema_extra=USUAL | REPEATED,
    )
    client_steps: int = Field(
        40,
        ge=0,
        description="steps of the client that is played (lora of rank 8 on every linear), to measure what is withheld "
        "after tuning; 0: none is",
        json_schema_extra=MEASURING,
    )
    client_rates: tuple[Rate, ...] = Field(
        (LEARNING_RATES["lora"], 8e-3),
        min_length=1,
        description="its learning rates; the best on field text held out counts",
        json_schema_extra=MEASURING,
    )

    earlier: tuple[Path, ...] = Field(
        (),
        description="another package of the same model, its owner's record beside it; repeat it for others: what all "
        "hold together is reported",
        json_schema_extra=USUAL | REPEATED,
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raise ValueError with every contradiction between settings."""
        problems = []
        if any(a >= b for a, b in pairwise(self.recovery_tokens)):
            problems.append("--recovery-tokens: expected ascending numbers")
        if unknown := [name for name in self.attack if name not in ATTACKS]:
            problems.append(f"--attack: found {unknown[0]!r}, expected one of {', '.join(ATTACKS)}")
        attacks, both = {"recovery_tokens", "attack", "lora_rates", "all_rates"}, {"holdout", "resume"}
        if not self.public:
            needing = attacks if self.field_text else attacks | both
            if given := sorted(needing & self.model_fields_set):
                problems.append(f"{_flags(given)}: attacks need public text, and --public is missing")
        client = {"client_steps", "client_rates"} & self.model_fields_set
        if client and not (self.public or self.field_text or self.client_steps == 0):
            problems.append(f"{_flags(sorted(client))}: a client is played on --field-text or --public, give one")
        if self.field_text and not self.client_steps:
            problems.append("--field-text: no client is played on it with --client-steps 0")
        if self.max_union is not None and not self.earlier:
            problems.append("--max-union: nothing to unite, --earlier is missing")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _flags(names: Sequence[str]) -> str:
    return ", ".join(map(flag_name, names))
