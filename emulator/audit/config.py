"""Settings of ``offsite audit package``."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from offsite.config import VerbConfig

ATTACKS = tuple(
    f"{start}_{heal}"
    for start in ("as_is", "refill", "duplicate", "interpolate", "regrow", "split")
    for heal in ("lora", "all")
)
"""START_HEAL. ``refill`` is the best start that gives the model its full size; the four after it are those starts."""

DEFAULT_ATTACKS = ("as_is_lora", "as_is_all", "refill_lora", "refill_all")

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AuditPackageConfig(VerbConfig):
    """Settings of ``offsite audit package PACKAGE --model MODEL --heldout FILE -o AUDIT``."""

    verb: ClassVar[str] = "audit package"

    package: Path = Field(
        description="package folder, its owner's record beside it", json_schema_extra={"positional": True}
    )
    output: Path = Field(description="audit folder to write", json_schema_extra={"short": "-o"})
    model: str = Field(description="full model the package was made of: a folder, a hub id, or a fetched name")

    heldout: Path = Field(description="text to measure on: .txt, .jsonl, .json or .csv, each optionally .gz")
    fields: dict[str, str] = Field(
        {}, description="its columns under other names, as prompt=question,completion=answer"
    )
    document_field: str | None = Field(None, description="its column that tells documents apart")
    separator: str | None = Field(None, description="plain text: what stands between documents; default: blank lines")
    pack: bool = Field(True, description="fill blocks of held-out tokens across rows; otherwise one row per sequence")
    block_tokens: int = Field(256, ge=2, description="context: tokens per block, and the most of one row")
    limit_tokens: int = Field(0, ge=0, description="tokens of held-out text measured on, at most; 0 for all")
    task: tuple[Path, ...] = Field(
        (),
        description="multiple-choice rows (question, choices, answer) in .jsonl, or a harness task in .yaml; repeat it "
        "for others; needs the eval extra",
        json_schema_extra={"repeated": True},
    )
    task_limit: int = Field(0, ge=0, description="rows of each task, from the first; 0 for all")
    results: Path | None = Field(
        None, description="folder that evaluate wrote for this package and text: the client's and the owner's figures"
    )
    similarity_tokens: int = Field(1024, ge=16, description="held-out tokens whose hidden states are compared, at most")

    public: Path | None = Field(None, description="public text that an attacker heals the emulator on; none: no attack")
    public_fields: dict[str, str] = Field({}, description="columns of the public text under other names, as text=body")
    public_document_field: str | None = Field(None, description="column that tells the public text's documents apart")
    public_separator: str | None = Field(None, description="public plain text: what stands between documents")
    recovery_tokens: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (50_000, 150_000), description="tokens that the attacks train on, ascending; 0 is always measured"
    )
    attack: tuple[str, ...] = Field(
        DEFAULT_ATTACKS,
        description="attacks as START_HEAL, by comma: START as_is, refill (the best of the others), duplicate, "
        "interpolate, regrow or split; HEAL lora (rank 8, every linear) or all (every weight but the embeddings)",
    )
    lora_rates: tuple[Rate, ...] = Field(
        (2e-3, 8e-3),
        min_length=1,
        description="learning rates tried for lora; after the first mark the best and those next to it",
    )
    all_rates: tuple[Rate, ...] = Field(
        (3e-4, 1e-3),
        min_length=1,
        description="learning rates tried for all; after the first mark the best and those next to it",
    )
    holdout: float = Field(0.05, gt=0, lt=1, description="share of public documents by which the attacker chooses")
    batch_size: int = Field(4, ge=1, description="sequences in one forward pass")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints in OUTPUT.work")
    resume: bool = Field(False, description="go on with the attacks from what is in OUTPUT.work")
    seed: int = Field(0, ge=0, description="seed of the attacks: data order and starts")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="arithmetic of the attacks; auto: bf16 where it is fast. Figures are measured in fp32"
    )
    device: str = Field("auto", description="cpu, cuda, or auto for an accelerator if there is one")

    earlier: tuple[Path, ...] = Field(
        (),
        description="another package of the same model, its owner's record beside it; repeat it for others: what all "
        "hold together is reported",
        json_schema_extra={"repeated": True},
    )
    max_capability: float | None = Field(
        None, description="largest share of the full model's skill the emulator may have: for the verdict"
    )
    max_recovery: float | None = Field(
        None, description="largest share of lost capability an attack may have regained: for the verdict"
    )
    max_union: float | None = Field(
        None, ge=0, le=1, description="largest share of the middle in all packages together: for the verdict"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raise ValueError with every contradiction between settings."""
        problems = []
        if any(a >= b for a, b in pairwise(self.recovery_tokens)):
            problems.append("--recovery-tokens: expected ascending numbers")
        if unknown := [name for name in self.attack if name not in ATTACKS]:
            problems.append(f"--attack: found {unknown[0]!r}, expected one of {', '.join(ATTACKS)}")
        attacks = {"recovery_tokens", "attack", "lora_rates", "all_rates", "holdout", "resume"}
        if self.public is None and (given := sorted(attacks & self.model_fields_set)):
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            problems.append(f"{flags}: attacks need public text, and --public is missing")
        if self.max_union is not None and not self.earlier:
            problems.append("--max-union: nothing to unite, --earlier is missing")
        if problems:
            raise ValueError("; ".join(problems))
        return self
