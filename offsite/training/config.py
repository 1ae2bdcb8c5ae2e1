"""Settings of a run: its machine and its training loop, declared once for every verb, and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from offsite.config import MACHINE, REPEATED, TRAINING, VerbConfig

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "bf16", "fp32"]

# These change what is written along the way and never a figure of the run, so a resume may change them.
_COSMETIC = {"checkpoint_every", "tensorboard", "report"}

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class Report(BaseModel):
    """Where a run's curves go beside its log; ``epsilon`` is what a private run was charged, one of its figures."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    to: tuple[TrackerName, ...]
    folder: Path
    is_sealed: bool = False
    epsilon: float | None = None


class LoopConfig(BaseModel):
    """How long, how fast and how exactly to train; the same for the owner's distillation and the client's tuning."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    steps: int = Field(200, ge=1, description="optimizer steps")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="peak rate of AdamW, per step")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises linearly to its peak")
    schedule: Schedule = Field("cosine", description="how the rate falls from its peak to the last step")
    min_rate_share: float = Field(0.1, ge=0, le=1, description="rate of the last step, as a share of the peak")
    weight_decay: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="decay per step and unit of rate, of tensors of two or more axes"
    )
    clip_norm: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="largest global L2 norm of a step's gradient; 0 = no clipping"
    )
    accumulate: int = Field(1, ge=1, description="parts that a process cuts its rows of a step into, to save memory")
    precision: Precision = Field("auto", description="arithmetic; auto = bf16 where the device has it, else fp32")
    seed: int = Field(0, ge=0, description="seed of everything random inside a step")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints; the last step always has one")
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations; 0 = only after the last step")
    patience: int = Field(0, ge=0, description="evaluations without a lower loss that end the run; 0 = none do")
    tensorboard: Path | None = Field(None, description="folder for TensorBoard scalars; none = not written")
    report: Report | None = Field(None, description="other tools that get a few figures of each step; none = none do")

    def binding(self) -> dict[str, str | int | float]:
        """Return the settings that a resumed run must share with the run it goes on from."""
        left_out = _COSMETIC | ({"patience"} if not self.patience else set())  # checkpoints of before know of none
        return self.model_dump(mode="json", exclude=left_out)


class DeviceSettings(VerbConfig):
    """Base of verbs that put a model on a device."""

    device: str = Field(
        "auto", description="cpu, cuda, or auto for an accelerator if there is one", json_schema_extra=MACHINE
    )


class SeedSettings(VerbConfig):
    """Base of verbs that draw at random, and draw the same again."""

    seed: int = Field(0, ge=0, description="seed of everything random in the run", json_schema_extra=MACHINE)


class TrainingSettings(SeedSettings, DeviceSettings):
    """Base of verbs that train."""

    batch_size: int = Field(4, ge=1, description="sequences per optimiser step", json_schema_extra=TRAINING)
    precision: Precision = Field(
        "auto", description="arithmetic of training; auto: bf16 where it is fast", json_schema_extra=MACHINE
    )


class ResumableSettings(TrainingSettings):
    """Base of verbs whose training goes on where it was stopped."""

    resume: bool = Field(
        False, description="go on from the newest checkpoint in OUTPUT.work", json_schema_extra=MACHINE
    )


class CheckpointSettings(ResumableSettings):
    """Base of verbs that say how often their training is kept."""

    checkpoint_every: int = Field(
        50, ge=1, description="steps between checkpoints in OUTPUT.work", json_schema_extra=MACHINE
    )


class CacheSettings(VerbConfig):
    """Base of verbs that keep what a frozen part of a model computes."""

    cache_bytes: int = Field(
        8 << 30,
        ge=0,
        description="most that hidden states of frozen blocks may take in OUTPUT.work, to be computed once; 0: never",
        json_schema_extra=MACHINE,
    )


class LoopSettings(CheckpointSettings):
    """Base of verbs that are one run of the training loop."""

    accumulate: int = Field(
        1, ge=1, description="parts a step's batch is cut into, to save memory", json_schema_extra=TRAINING
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of matrices", json_schema_extra=TRAINING)
    clip_norm: float = Field(
        1.0, ge=0, description="largest L2 norm of a step's gradient; 0 for none", json_schema_extra=TRAINING
    )
    launch: int = Field(
        0, ge=0, description="processes that share the work (FSDP2); 0 or 1 for none", json_schema_extra=MACHINE
    )
    tensorboard: Path | None = Field(
        None, description="folder for TensorBoard's curves; none by default", json_schema_extra=MACHINE
    )
    report_to: tuple[TrackerName, ...] = Field(
        (),
        description="tensorboard, wandb or mlflow: losses, rate, tokens/s and steps go there, nothing else; what is "
        "kept here lies in OUTPUT.curves; may be repeated",
        json_schema_extra=MACHINE | REPEATED,
    )

    def report(self, output: Path, *, is_sealed: bool = False) -> Report | None:
        """Return where curves of the run towards `output` go; None where nowhere.

        Args:
            is_sealed: they may not leave this machine, whatever its tools are set up to do.
        """
        if not self.report_to:
            return None
        names = tuple(dict.fromkeys(self.report_to))
        return Report(to=names, folder=output.parent / f"{output.name}.curves", is_sealed=is_sealed)
