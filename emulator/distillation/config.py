"""Settings of ``offsite distill``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from emulator.compression.methods import METHODS
from offsite.text.config import TextSettings


class DistillConfig(TextSettings):
    """Settings of ``offsite distill MODEL --public TEXT -o PACKAGE``."""

    verb: ClassVar[str] = "distill"

    model: str = Field(
        description="full model: a folder, a hub id, or a fetched name", json_schema_extra={"positional": True}
    )
    output: Path = Field(description="package folder to write", json_schema_extra={"short": "-o"})
    public: Path | None = Field(
        None, description="public text to choose and distil on: .txt, .jsonl, .json or .csv, each optionally .gz"
    )

    method: str = Field(
        "width",
        description="how the middle is made smaller: 'width' keeps every block and some of its MLP channels, "
        "'drop' keeps some blocks whole, 'keep-all' keeps the middle as it is (for references only)",
    )
    width: float = Field(0.33, gt=0, le=1, description="width: share of the MLP channels that each middle block keeps")
    channels: Literal["obs", "activation"] = Field(
        "obs",
        description="width: leave out channels one by one, each time the one that the others best make up for (optimal "
        "brain surgeon), or keep those of the largest activation times outgoing norm",
    )
    refit: bool = Field(
        True, description="width: fit the kept channels' outgoing weights to the whole MLP's output on public text"
    )
    blocks: int | None = Field(
        None, ge=1, description="drop: number of middle blocks kept, its first and last included"
    )
    choice: Literal["uniform", "influence"] = Field(
        "uniform",
        description="drop: keep evenly spaced blocks, or those that turn the hidden state most on public text",
    )
    bottom: int = Field(2, ge=0, description="blocks in the bottom end")
    top: int = Field(2, ge=1, description="blocks in the top end")
    calibration_tokens: int = Field(
        32768, ge=1, description="tokens of public text on which blocks or channels are chosen"
    )

    steps: int = Field(300, ge=0, description="optimiser steps; 0 for the training-free package")
    batch_size: int = Field(4, ge=1, description="blocks of text in one forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes per optimiser step")
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate of AdamW")
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up before the cosine")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip_norm: float = Field(1.0, ge=0, description="largest L2 norm of a step's gradient; 0 for no clipping")
    hidden_weight: float = Field(1.0, ge=0, description="weight of the hidden states' relative squared error")
    kl_weight: float = Field(
        1.0, ge=0, description="weight of KL(full || emulator) through the frozen top end, per nat"
    )
    kl_share: float = Field(
        0.25, gt=0, le=1, description="share of token positions, drawn anew each step, at which KL is computed"
    )
    holdout: float = Field(0.05, gt=0, lt=1, description="share of the public documents held out to measure fidelity")
    evaluation_tokens: int = Field(8192, ge=1, description="held-out tokens per measurement of fidelity, at most")
    evaluate_every: int = Field(0, ge=0, description="steps between measurements of fidelity; 0 for one at the end")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints in OUTPUT.work")
    resume: bool = Field(False, description="go on from the newest checkpoint in OUTPUT.work")
    seed: int = Field(0, ge=0, description="seed of the data order and of the drawn positions")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="arithmetic of the forward pass: bf16 autocast or fp32; auto: bf16 where it is fast"
    )
    device: str = Field("auto", description="cpu, cuda, or auto for an accelerator if there is one")
    launch: int = Field(0, ge=0, description="processes that share the work and the weights (FSDP2); 0 or 1 for none")
    tensorboard: Path | None = Field(None, description="folder for TensorBoard's curves; none by default")

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of the package's weights; auto: the full model's"
    )
    licence: str = Field("", max_length=200, description="licence of the package, stated in its manifest")
    terms: Path | None = Field(None, description="text file with terms of use, put into the package's manifest")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raise ValueError with every contradiction between settings."""
        problems = [*self._method_problems(), *self._text_problems()]
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
        takes = {"blocks": "drop", "choice": "drop", "width": "width", "channels": "width", "refit": "width"}
        for field, method in takes.items():
            if field in given and self.method in {*takes.values(), "keep-all"} and self.method != method:
                found.append(f"--{field} belongs to method {method}, not to {self.method}")
        return found

    def _text_problems(self) -> list[str]:
        found = []
        if self.public is None:
            reasons = {
                "--steps above 0": self.steps > 0,
                "method width": self.method == "width",
                "--choice influence": self.choice == "influence",
            }
            needed = [reason for reason, holds in reasons.items() if holds]
            if needed:
                verb = "needs" if len(needed) == 1 else "need"
                found.append(f"--public is missing: {' and '.join(needed)} {verb} public text")
        if self.resume and self.steps == 0 and self.method != "width":
            found.append(f"--resume: nothing to resume with --method {self.method} --steps 0")
        if self.steps > 0 and self.accumulate > self.batch_size:
            found.append(f"--accumulate {self.accumulate}: a batch of {self.batch_size} cannot be cut into more parts")
        if self.hidden_weight == 0 and self.kl_weight == 0 and self.steps > 0:
            found.append("--hidden-weight and --kl-weight are both 0, which leaves nothing to learn")
        return found
