"""Settings of ``offsite distill``, with those that let it find the size itself. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emulator.dial.sizes import LADDERS, METHOD_OF, SIZES
from emulator.dial.targets import Target, read_target
from emulator.distillation.config import DistillConfig
from offsite.config import DIAL, REPEATED, flag_name
from offsite.problems import meant

SIZED = ("method", "width", "blocks")
"""Settings that say which package is made: the dial finds that out."""

FEWEST_SIZES = 3

_OURS = ("explore_method", "explore_size", "client", "parallel")


class ClientSettings(BaseModel):
    """The client that is played on every size, as ``offsite rehearse`` takes it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    adapter: Literal["lora", "rslora", "dora", "blocks", "bitfit"] = "lora"
    placement: str = Field("all", pattern=r"^(all|[0-9]{1,4}\+[0-9]{1,4})$")
    rank: int = Field(8, ge=1, le=4096)
    alpha: float = Field(16.0, gt=0)
    learning_rate: float = Field(0.004, gt=0, le=1)
    steps: int = Field(40, ge=1)
    batch_size: int = Field(4, ge=1)
    limit_tokens: int = Field(20_000, ge=0)


class DialConfig(DistillConfig):
    """Settings of ``offsite distill MODEL --public TEXT -o PACKAGE``, with ``--target NAME=VALUE`` or ``--explore``."""

    target: str = Field(
        "",
        description="what the package is to give, and its size is found: recovery=0.8 of LoRA's gain, gap=1.5 "
        "(emulator-tuned over plugged in), withheld=0.3 (nats after tuning), at least; or bytes=60MB, at most",
        json_schema_extra=DIAL,
    )
    explore: bool = Field(
        False,
        description="try the sizes and write the page OUTPUT.explore.html, and no package",
        json_schema_extra=DIAL,
    )
    explore_method: tuple[str, ...] = Field(
        ("width",), description="method to try; repeat it for others", json_schema_extra=DIAL | REPEATED
    )
    explore_size: tuple[float, ...] = Field(
        SIZES,
        description="share of the middle to keep: MLP channels of width, blocks of drop; repeat it for others",
        json_schema_extra=DIAL | REPEATED,
    )
    client: ClientSettings = Field(
        ClientSettings(),
        description="client that is played on every size, on text of --field-text",
        json_schema_extra=DIAL,
    )
    parallel: int = Field(
        1, ge=1, le=64, description="sizes that are tried at a time, where there are cores", json_schema_extra=DIAL
    )

    @model_validator(mode="after")
    def _dial_agrees(self) -> Self:
        """Raise ValueError with every contradiction of the dial's settings."""
        problems = self._dial_problems() if self.is_dial else self._stray_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def is_dial(self) -> bool:
        """Whether the size is to be found."""
        return self.explore or "target" in self.model_fields_set

    @property
    def asked(self) -> Target | None:
        """What the package is to give, if anything is asked."""
        return read_target(self.target) if self.target else None

    def _stray_problems(self) -> list[str]:
        given = [flag_name(name) for name in _OURS if name in self.model_fields_set]
        return [f"{flag} belongs to --target or --explore" for flag in given]

    def _dial_problems(self) -> list[str]:
        given, found = self.model_fields_set, []
        if "target" in given:
            try:
                read_target(self.target)
            except ValueError as error:
                found.append(str(error))
        word = "--target" if "target" in given else "--explore"
        found += [f"{flag_name(name)}: {word} finds the size itself" for name in SIZED if name in given]
        if "steps" in given and self.steps > 0:
            found.append(f"--steps: {word} makes training-free packages, expected 0 or nothing")
        if self.launch > 1:
            found.append(f"--launch: {word} plays verbs as processes of its own, see --parallel")
        for method in self.explore_method:
            if method not in LADDERS:
                known = ", ".join(sorted(LADDERS))
                found.append(
                    f"--explore-method: no sizes are known of {method!r}, expected some of {known}"
                    f"{meant(method, LADDERS)}"
                )
        if len(set(self.explore_method)) != len(self.explore_method) or not self.explore_method:
            found.append("--explore-method: expected each method once")
        if any(not 0 < size <= 1 for size in self.explore_size):
            found.append("--explore-size: expected more than 0 and at most 1")
        if len(set(self.explore_size)) < FEWEST_SIZES:
            found.append("--explore-size: expected at least three sizes, for a line through them")
        found += [
            f"{flag_name(name)} belongs to method {method}, which is not explored"
            for name, method in METHOD_OF.items()
            if name in given and method not in self.explore_method
        ]
        if self.client.adapter in ("blocks", "bitfit") and self.client.placement == "all":
            found.append(
                f"--client adapter={self.client.adapter}: expected placement=BOTTOM+TOP with it, as "
                f"adapter={self.client.adapter},placement=2+2"
            )
        return found
