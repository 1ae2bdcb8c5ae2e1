"""Settings of ``offsite distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from emulator.compression.methods import METHODS
from emulator.compression.unequal import wider_blocks
from offsite.artefacts.layout import Line
from offsite.config import COMPRESSION, DATA, MEASURING, OUTPUT, POSITIONAL, REPEATED, TRAINING, USUAL, VerbConfig
from offsite.modelling.config import ModelFlag, ModelWord, Stacks
from offsite.text.config import TextFiles, TextSettings
from offsite.training.config import CacheSettings, LoopSettings


def _several(given: Any) -> Any:
    """Return what stands between commas, of one string or of each of several."""
    each = (given,) if isinstance(given, str) else given
    if not isinstance(each, list | tuple) or not all(isinstance(one, str) for one in each):
        return given
    return tuple(part.strip() for one in each for part in one.split(","))


def _blocks(stated: tuple[str, ...]) -> tuple[str, ...]:
    """Return what is stated of blocks, only if it can be read."""
    wider_blocks(stated)
    return stated


class OwnPackageSettings(ModelFlag):
    """Base of verbs about a package that this owner made, and so has the record and the full model of."""

    package: Path = Field(description="package folder, its owner's record beside it", json_schema_extra=POSITIONAL)


class FidelitySettings(VerbConfig):
    """Base of verbs that fit an emulator on public text, and measure on some of it how well."""

    holdout: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="share of the public documents held out to measure fidelity",
        json_schema_extra=MEASURING,
    )
    evaluation_tokens: int = Field(
        8192, ge=1, description="held-out tokens per measurement of fidelity, at most", json_schema_extra=MEASURING
    )


SELF = Path("self")
"""What ``--public`` is where the model writes the text; a file of text has an ending, so none is called that."""


class OwnTextSettings(VerbConfig):
    """Base of verbs whose model can write the public text itself."""

    field: str = Field(
        "",
        max_length=500,
        description="--public self: the clients' field in words, such as 'question and answer about rare diseases'",
        json_schema_extra=DATA,
    )
    stems: Path | None = Field(
        None,
        description="--public self: file with the beginnings of questions, one a line; usual question words by default",
        json_schema_extra=DATA,
    )
    self_tokens: int = Field(
        20_000, ge=256, description="--public self: tokens that the model writes, about", json_schema_extra=DATA
    )


class DistillConfig(ModelWord, TextSettings, CacheSettings, LoopSettings, FidelitySettings, OwnTextSettings):
    """Settings of ``offsite distill MODEL --public TEXT -o PACKAGE``."""

    verb: ClassVar[str] = "distill"

    output: Path = Field(description="package folder to write", json_schema_extra=OUTPUT)
    public: TextFiles = Field(
        (),
        description="public text to distil on: .txt, .jsonl, .json, .csv or .tsv, or those as .gz, or .parquet; "
        "may be repeated; or 'self': the model writes it (--field)",
        json_schema_extra=USUAL | REPEATED,
    )
    field_text: TextFiles = Field(
        (),
        description="text of the clients' field, that you may use: KL(full || emulator) is measured on it and told; "
        "may be repeated",
        json_schema_extra=MEASURING | REPEATED,
    )

    method: str = Field(
        "width",
        description="how the middle is made smaller: 'width' keeps every block and some of its MLP channels, "
        "'drop' keeps some blocks whole, 'low-rank' replaces every linear by two factors, 'packed' keeps all in fewer "
        "bits (it withholds nothing), 'keep-all' keeps the middle as it is (for references only)",
        json_schema_extra=USUAL,
    )
    width: float = Field(
        0.33,
        gt=0,
        le=1,
        description="width: share of the MLP channels that each middle block keeps",
        json_schema_extra=USUAL,
    )
    wider: Annotated[tuple[str, ...], BeforeValidator(_several), AfterValidator(_blocks)] = Field(
        (),
        description="width: a larger share for some blocks, as 2-8:0.67, numbered from 0 through the full model as in "
        "its checkpoint; may be repeated",
        json_schema_extra=COMPRESSION | REPEATED,
    )
    variant: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="width: number of another choice of channels, for packages of one size that keep different ones; "
        "0 for the best by what is measured",
        json_schema_extra=COMPRESSION,
    )
    variant_noise: float = Field(
        0.5,
        gt=0,
        le=10,
        description="width: how far variants stray: standard deviation of the log of what a channel counts",
        json_schema_extra=COMPRESSION,
    )
    channels: Literal["obs", "activation", "gradot"] = Field(
        "obs",
        description="width: leave out channels one by one, each time the one that the others best make up for (optimal "
        "brain surgeon), or keep those of the largest activation times outgoing norm, or (gradot) leave out those "
        "whose going changes gradients least and adds most to the loss",
        json_schema_extra=COMPRESSION,
    )
    gradot_lambda: float = Field(
        0.1,
        ge=0,
        le=1e6,
        description="width with --channels gradot: what the loss that a channel's going adds counts for its going",
        json_schema_extra=COMPRESSION,
    )
    refit: bool = Field(
        True,
        description="width: fit the kept channels' outgoing weights to the whole MLP's output on public text",
        json_schema_extra=COMPRESSION,
    )
    refit_jacobian: float = Field(
        0.0,
        ge=0,
        le=100,
        description="width: choose and refit for the gradient that the MLP hands on as well, which counts this much "
        "against its output; 0 for the output alone",
        json_schema_extra=COMPRESSION,
    )
    blocks: int | None = Field(
        None,
        ge=1,
        description="drop: number of middle blocks kept",
        json_schema_extra=USUAL,
    )
    choice: Literal["uniform", "influence", "crash"] = Field(
        "uniform",
        description="drop: keep evenly spaced blocks, or those that turn the hidden state most on public text, each "
        "time with the middle's first and last; or (crash) the centres of clusters of blocks that give alike",
        json_schema_extra=COMPRESSION,
    )
    rank_share: float = Field(
        0.33,
        gt=0,
        le=1,
        description="low-rank: share of each linear's numbers that its two factors hold",
        json_schema_extra=COMPRESSION,
    )
    pack: Literal["int8", "int4", "nf4", "nf3"] | None = Field(
        None,
        description="what the middle's linears are packed into: 8, 4, 4 or 3 bits a weight, by method packed, or after "
        "any other and its distillation; it saves bytes and withholds next to nothing",
        json_schema_extra=COMPRESSION,
    )
    bottom: int = Field(2, ge=0, description="blocks in the bottom end", json_schema_extra=COMPRESSION)
    top: int = Field(2, ge=1, description="blocks in the top end", json_schema_extra=COMPRESSION)
    stacks: Stacks = Field(
        "both",
        description="of an encoder-decoder: which of its stacks has a middle that is made smaller",
        json_schema_extra=COMPRESSION,
    )
    calibration_tokens: int = Field(
        32768,
        ge=1,
        description="tokens of public text on which blocks or channels are chosen",
        json_schema_extra=COMPRESSION,
    )

    steps: int = Field(
        300, ge=0, description="optimiser steps; 0 for the training-free package", json_schema_extra=USUAL
    )
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate of AdamW", json_schema_extra=TRAINING)
    warmup_steps: int = Field(
        20, ge=0, description="steps of linear warm-up before the cosine", json_schema_extra=TRAINING
    )
    hidden_weight: float = Field(
        1.0, ge=0, description="weight of the hidden states' relative squared error", json_schema_extra=TRAINING
    )
    kl_weight: float = Field(
        1.0,
        ge=0,
        description="weight of KL(full || emulator) through the frozen top end, per nat",
        json_schema_extra=TRAINING,
    )
    kl_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="share of token positions, drawn anew each step, at which KL is computed",
        json_schema_extra=TRAINING,
    )
    elevate: float = Field(
        0.0,
        ge=0,
        le=20,
        description="after distilling: train the emulator to be worse than the full model by this many nats a token; "
        "0 for not at all",
        json_schema_extra=TRAINING,
    )
    elevate_steps: int = Field(
        25, ge=1, description="steps of --elevate, at a quarter of the learning rate", json_schema_extra=TRAINING
    )
    evaluate_every: int = Field(
        0, ge=0, description="steps between measurements of fidelity; 0 for one at the end", json_schema_extra=MEASURING
    )

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="dtype of the package's weights; auto: each tensor keeps the one it has in the full model",
        json_schema_extra=COMPRESSION,
    )
    licence: Line = Field("", description="licence of the package, stated in its manifest", json_schema_extra=USUAL)
    terms: Path | None = Field(
        None, description="text file with terms of use, put into the package's manifest", json_schema_extra=USUAL
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raise ValueError with every contradiction between settings."""
        problems = [*self._method_problems(), *self._text_problems(), *self._own_text_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _method_problems(self) -> list[str]:
        given = self.model_fields_set
        if self.method not in METHODS:
            return [f"--method: unknown method {self.method!r}, expected one of {', '.join(sorted(METHODS))}"]
        found = []
        if self.method == "drop" and self.blocks is None:
            found.append("--blocks is missing: method drop keeps that many blocks of the middle")
        if self.method == "keep-all" and self.steps > 0:
            found.append("--steps: method keep-all leaves nothing to distil, expected 0")
        if self.method == "width" and self.width == 1 and self.steps > 0:
            found.append("--steps: a width of 1 leaves nothing to distil, expected 0")
        if self.method == "width" and self.channels == "obs" and not self.refit:
            found.append(
                "--channels obs leaves out what refitting makes up for, expected --refit or --channels activation"
            )
        if self.refit_jacobian and (self.channels != "obs" or not self.refit):
            found.append("--refit-jacobian chooses and refits at once, expected --channels obs and --refit")
        if too_small := [one for one in self.wider if min(wider_blocks([one]).values()) <= self.width]:
            found.append(f"--wider {too_small[0]}: expected a share above --width {self.width:g}")
        if "gradot_lambda" in given and self.channels != "gradot":
            found.append("--gradot-lambda belongs to --channels gradot")
        if "variant_noise" in given and not self.variant:
            found.append("--variant-noise says how far a --variant strays, and there is none")
        takes = {"blocks": "drop", "choice": "drop", "width": "width", "channels": "width", "refit": "width"}
        takes |= dict.fromkeys(("wider", "variant", "variant_noise", "refit_jacobian", "gradot_lambda"), "width")
        knowing = {*takes.values(), "keep-all", "low-rank", "packed"}
        for field, method in takes.items():
            if field in given and self.method in knowing and self.method != method:
                found.append(f"--{field.replace('_', '-')} belongs to method {method}, not to {self.method}")
        return [*found, *self._encoding_problems()]

    def _encoding_problems(self) -> list[str]:
        """Return what contradicts a middle that is stored as factors, or packed."""
        found = []
        if self.method == "packed" and self.pack is None:
            found.append("--pack is missing: method packed packs the middle into int8, int4, nf4 or nf3")
        if self.method == "keep-all" and self.pack is not None:
            found.append("--pack: method keep-all keeps the middle as it is; to pack it say --method packed")
        if self.method == "packed" and self.steps > 0:
            found.append(
                "--steps: method packed leaves nothing to distil, expected 0; --method width --pack distils, then packs"
            )
        if self.method == "low-rank" and self.steps > 0:
            found.append("--steps: the factors of method low-rank are not distilled, expected 0")
        if "rank_share" in self.model_fields_set and self.method != "low-rank":
            found.append(f"--rank-share belongs to method low-rank, not to {self.method}")
        return found

    def _text_problems(self) -> list[str]:
        found = []
        if not self.public:
            reasons = {
                "--steps above 0": self.steps > 0,
                f"method {self.method}": self.method in ("width", "low-rank"),
                f"--choice {self.choice}": self.choice != "uniform",
            }
            needed = [reason for reason, holds in reasons.items() if holds]
            if needed:
                verb = "needs" if len(needed) == 1 else "need"
                found.append(f"--public is missing: {' and '.join(needed)} {verb} public text")
        if self.resume and self.steps == 0 and self.method not in ("width", "low-rank", "packed") and self.pack is None:
            found.append(f"--resume: nothing to resume with --method {self.method} --steps 0")
        if self.steps > 0 and self.accumulate > self.batch_size:
            found.append(f"--accumulate {self.accumulate}: a batch of {self.batch_size} cannot be cut into more parts")
        if self.elevate and (self.steps == 0 or self.launch > 1):
            found.append("--elevate goes on from a distillation in one process: expected --steps above 0, no --launch")
        if "elevate_steps" in self.model_fields_set and not self.elevate:
            found.append("--elevate-steps belongs to --elevate, which is 0")
        if self.hidden_weight == 0 and self.kl_weight == 0 and self.steps > 0:
            found.append("--hidden-weight and --kl-weight are both 0, which leaves nothing to learn")
        return found

    def _own_text_problems(self) -> list[str]:
        found = []
        if self.writes_itself:
            if self.public != (SELF,):
                found.append("--public self stands alone: text of the model's own, or files")
            if not self.field.strip() and self.stems is None:
                found.append("--public self needs --field or --stems: what the clients' text is about")
            if self.launch > 1:
                found.append("--public self: the model writes in one process, expected no --launch")
        else:
            for name in ("field", "stems", "self_tokens"):
                if name in self.model_fields_set:
                    flag = "--" + name.replace("_", "-")
                    found.append(f"{flag} belongs to --public self: how the model writes the text")
        if self.launch > 1 and self.field_text:
            found.append("--field-text: it is measured on in one process, expected no --launch")
        return found

    @property
    def writes_itself(self) -> bool:
        """Whether the model writes the public text."""
        return SELF in self.public
