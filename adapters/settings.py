"""Settings that describe an adapter, declared once for every verb that takes them. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from adapters.rates import LEARNING_RATES
from offsite.artefacts.bundle import LABELLED, MAX_LABELS, AdapterSpec, Head, Label
from offsite.config import ADAPTER, TRAINING, USUAL, VerbConfig
from offsite.errors import ConfigError
from offsite.problems import meant
from offsite.text.config import TextSettings
from offsite.training.config import TrainingSettings

__all__ = [
    "ADAPTER_FIELDS",
    "AdapterSettings",
    "AdapterShape",
    "LabelSettings",
    "TuningSettings",
    "head_of",
    "head_problems",
]

ADAPTER_FIELDS = {
    "adapter": "kind",
    "placement": "placement",
    "targets": "targets",
    "rank": "rank",
    "alpha": "alpha",
    "dropout": "dropout",
    "adapter_dtype": "dtype",
}
"""Name of each setting, and of the field of `AdapterSpec` that it fills."""


def head_of(task: str, labels: Sequence[str], hidden: int, encoder: str = "") -> Head:
    """Return the head of that task, with these labels, on states of `hidden` numbers.

    Args:
        encoder: architecture of the encoder that it is on; empty for a causal language model.

    Raises:
        ConfigError: when there is none such.
    """
    try:
        return Head(task=task, labels=tuple(labels), hidden=hidden, encoder=encoder)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError("; ".join(head_problems(task, labels)) or str(error.errors()[0]["msg"])) from None


def head_problems(task: str, labels: Sequence[str]) -> list[str]:
    """Return what is wrong with the labels of a head of that task, a line each."""
    problems: list[str] = []
    if task not in LABELLED:
        what = "a reward model" if task == "reward" else "a value"
        return [f"--labels: {what} has none"] if labels else []
    if len(labels) < 2:
        problems.append(f"--labels: {len(labels)} given, a classifier has two or more")
    if len(labels) > MAX_LABELS:
        problems.append(f"--labels: {len(labels)} given, at most {MAX_LABELS} are taken")
    if len(set(labels)) != len(labels):
        problems.append("--labels: one is named twice")
    for label in labels:
        try:
            TypeAdapter(Label).validate_python(label)
        except ValidationError:
            problems.append(f"--labels: label {labels.index(label) + 1} is not one line of 1 to 100 characters")
    return problems


class LabelSettings(VerbConfig):
    """Base of verbs that say which labels a classifier tells apart."""

    labels: tuple[str, ...] = Field(
        (),
        description="classify, tag: names of the labels, as yes,no or O,B-X,I-X; all that the client's rows have; with "
        "--job the job's",
        json_schema_extra=USUAL,
    )


class AdapterShape(VerbConfig):
    """What an adapter is, but for its rank: a federation has another setting of that name."""

    adapter: str = Field(
        "blocks", description="kind of adapter: blocks, lora, rslora, dora or bitfit", json_schema_extra=ADAPTER
    )
    placement: str = Field(
        "2+2",
        description="blocks that carry it: of the bottom and top end, as 2+2 or 0+2; top; the last, as last:8; or all",
        json_schema_extra=ADAPTER,
    )
    targets: Literal["all-linear", "attention", "mlp"] = Field(
        "all-linear", description="LoRA: modules that carry it", json_schema_extra=ADAPTER
    )
    alpha: float = Field(
        16.0, gt=0, description="LoRA: scale, divided by the rank (rsLoRA: by its root)", json_schema_extra=ADAPTER
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA: dropout before the adapter", json_schema_extra=ADAPTER)
    adapter_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="dtype of the bundle's tensors", json_schema_extra=ADAPTER
    )


class AdapterSettings(AdapterShape):
    """Base of verbs that describe an adapter."""

    rank: int = Field(8, ge=1, le=4096, description="LoRA: rank", json_schema_extra=ADAPTER)

    def spec(self) -> AdapterSpec:
        """Return the adapter these settings describe.

        Raises:
            ConfigError: when there is none such.
        """
        try:
            return AdapterSpec(**{field: getattr(self, name) for name, field in ADAPTER_FIELDS.items()})
        except ValidationError as error:
            wrong = {part for item in error.errors() for part in item["loc"]}
            problems = []
            if "kind" in wrong:
                kinds = ", ".join(LEARNING_RATES)
                problems.append(
                    f"--adapter {self.adapter}: expected one of {kinds}{meant(self.adapter, LEARNING_RATES)}"
                )
            if "placement" in wrong:
                problems.append(
                    f"--placement {self.placement}: expected BOTTOM+TOP, as 2+2 or 0+2, top, last:N, or all"
                )
            raise ConfigError(
                "; ".join(problems) or f"--placement {self.placement}: no block is left to train",
                hint="BOTTOM and TOP count the blocks that carry the adapter, from the outside",
            ) from None


class TuningSettings(AdapterSettings, TextSettings, TrainingSettings):
    """Base of verbs that tune an adapter on text: a client's, and its owner's rehearsal of one."""

    validation: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="share of the documents held out to choose the checkpoint",
        json_schema_extra=TRAINING,
    )
    runs: int = Field(
        1,
        ge=1,
        le=64,
        description="runs from other starts, on other batches, whose mean is the adapter; as many times slower",
        json_schema_extra=TRAINING,
    )

    @model_validator(mode="after")
    def _has_mean(self) -> Self:
        """Raise ValueError where several runs of that adapter have no mean."""
        if self.runs > 1 and self.adapter == "dora":
            raise ValueError(
                "--runs: several runs of dora have no mean, its update depends on the weight it is put on; "
                "--adapter lora, rslora, blocks and bitfit have one"
            )
        return self
