"""Settings that describe an adapter, declared once for every verb that takes them. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from adapters.rates import LEARNING_RATES
from offsite.artefacts.bundle import AdapterSpec
from offsite.config import ADAPTER, TRAINING, VerbConfig
from offsite.errors import ConfigError
from offsite.problems import meant
from offsite.text.config import TextSettings
from offsite.training.config import TrainingSettings

__all__ = ["ADAPTER_FIELDS", "AdapterSettings", "AdapterShape", "TuningSettings"]

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


class AdapterShape(VerbConfig):
    """What an adapter is, but for its rank: a federation has another setting of that name."""

    adapter: str = Field(
        "blocks", description="kind of adapter: blocks, lora, rslora, dora or bitfit", json_schema_extra=ADAPTER
    )
    placement: str = Field(
        "2+2",
        description="blocks that carry it: of the bottom and top end, as 2+2 or 0+2; the last ones, as last:8; or all",
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
                problems.append(f"--placement {self.placement}: expected BOTTOM+TOP, as 2+2 or 0+2, last:N, or all")
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
