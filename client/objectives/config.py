"""Settings of what a client tunes towards, beside its text's own loss: experiments of the frontier benchmark.

An adapter learns two things of an emulator: the text, and how to mend the emulator's faults. The second is of no use in
the full model. These settings leave less room for it; by default none is on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from offsite.audits.record import Objective
from offsite.config import TRAINING, VerbConfig, flag_name

_ALL = ("objective", "spin_beta", "anchor", "anchor_weight", "channel_dropout")


class ObjectiveSettings(VerbConfig):
    """Base of verbs that say what is minimised."""

    objective: Literal["next-token", "dft", "spin"] = Field(
        "next-token",
        description="loss: next-token; dft: times each token's probability; spin: answers before the emulator's own",
        json_schema_extra=TRAINING,
    )
    spin_beta: float = Field(
        0.1,
        gt=0,
        description="spin: how sharply an answer is to be told from the emulator's",
        json_schema_extra=TRAINING,
    )
    anchor: Path | None = Field(
        None,
        description="public text on which the tuned emulator is held to the untuned one, read like --data",
        json_schema_extra=TRAINING,
    )
    anchor_weight: float = Field(
        1.0, gt=0, description="anchor: weight of its divergence, in nats per token", json_schema_extra=TRAINING
    )
    channel_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="chance of each MLP channel of the middle to be left out of a step",
        json_schema_extra=TRAINING,
    )

    def objective_problems(self, *, round_: bool, dp: bool, launch: bool, packed: bool) -> list[str]:
        """Return what these settings cannot go together with, a line each.

        Args:
            round_: a federation's round says what is done.
            dp: the run is private.
            launch: it runs in several processes.
            packed: blocks are filled across rows, by wish.
        """
        given = [name for name in _ALL if getattr(self, name) != type(self).model_fields[name].default]
        spin, anchor = self.objective == "spin", self.anchor is not None
        problems: list[str] = []
        if round_:
            problems += [f"{flag_name(name)}: a federation's round says what its members learn by" for name in given]
        if "spin_beta" in self.model_fields_set and not spin:
            problems.append("--spin-beta: is of --objective spin")
        if "anchor_weight" in self.model_fields_set and not anchor:
            problems.append("--anchor-weight: there is no --anchor")
        if packed and spin:
            problems.append("--pack: --objective spin compares answers, each in a row of its own")
        if dp:
            problems += ["--objective spin: --dp has no clipped gradient of pairs"] if spin else []
            problems += ["--anchor: --dp trains with nothing beside the clipped gradients"] if anchor else []
            problems += ["--channel-dropout: --dp draws from no seed"] if self.channel_dropout else []
        if launch:
            problems += ["--launch: --objective spin is tuned in one process"] if spin else []
            problems += ["--launch: --anchor is tuned in one process"] if anchor else []
        return problems

    def is_usual(self) -> bool:
        """Tell whether nothing but the next token's loss is minimised, with every channel."""
        return self.objective == "next-token" and self.anchor is None and self.channel_dropout == 0

    def stated(self, anchor_sha256: str | None) -> Objective | None:
        """Return what a run's record says of these settings; None where they are the usual ones.

        Args:
            anchor_sha256: digest of the anchor's file, where there is one.
        """
        if self.is_usual():
            return None
        return Objective(
            loss=self.objective,
            spin_beta=self.spin_beta if self.objective == "spin" else None,
            anchor_sha256=anchor_sha256,
            anchor_weight=None if self.anchor is None else self.anchor_weight,
            channel_dropout=self.channel_dropout or None,
        )
