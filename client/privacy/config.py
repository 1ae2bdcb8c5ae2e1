"""Settings of ``--dp``: what a differentially private run may spend, and on whose behalf."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DPSettings(BaseModel):
    """Settings of ``--dp``: differential privacy for the data that is tuned on."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    epsilon: float | None = Field(
        None, gt=0, description="most that the run, or all --runs together, may spend; sets the noise"
    )
    noise_multiplier: float | None = Field(
        None, ge=0.2, le=128, description="noise over clipping norm, instead of epsilon"
    )
    delta: float | None = Field(None, gt=0, lt=1, description="at most, and by default, 1/N^1.1 of N units")
    clip: float = Field(1.0, gt=0, description="largest L2 norm of one unit's gradient")
    unit: Literal["example", "user"] = Field("example", description="whose presence is hidden: a row's, or a user's")
    user_field: str | None = Field(None, description="column that names the user, for unit=user")
    rows_per_user: int = Field(4, ge=1, description="rows of a user that are trained on; further ones are left out")
    sample_rate: float | None = Field(
        None, gt=0, le=1, description="chance of a unit to be in a step; default: --batch-size over the units' number"
    )
    budget: float | None = Field(
        None, gt=0, description="most epsilon this data may ever spend; the first run sets it, by default to its own"
    )
    engine: Literal["auto", "hooks", "ghost", "one-by-one"] = Field(
        "auto", description="how gradients are clipped; auto: by memory"
    )
    rows_at_once: int | None = Field(
        None, ge=1, description="rows that go through the model at once; default: by memory"
    )
    ledger: Path = Field(Path("~/.offsite/privacy"), description="folder of the budget ledger")
