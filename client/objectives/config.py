"""Settings of what a client tunes towards, beside its text's own loss.

``dpo`` learns from preferences, ``rloo`` from rewards of the emulator's own answers. ``reward``, ``classify``,
``regress`` and ``tag`` train a head beside the adapter (`client.objectives.heads`). The others are experiments of the
frontier benchmark: an adapter
learns two things of an emulator, the text, and how to mend the emulator's faults, and the second is of no use in the
full model. They leave less room for it; by default none is on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from adapters.settings import LabelSettings
from offsite.artefacts.bundle import LABELLED, HeadTask
from offsite.audits.runs import Objective, Rewarded
from offsite.config import TRAINING, flag_name
from offsite.tasks.config import RuleSettings

_OF = {
    **dict.fromkeys(("dpo_beta", "dpo_loss", "dpo_label_smoothing"), "dpo"),
    **dict.fromkeys(("rules", "rloo_beta", "rloo_samples", "max_new_tokens", "temperature"), "rloo"),
    **dict.fromkeys(("reward", "reward_weight", "kl_limit", "entropy_floor"), "rloo"),
    "spin_beta": "spin",
}
"""Which objective a setting belongs to."""

_ALL = ("objective", "labels", *_OF, "anchor", "anchor_weight", "channel_dropout")


class ObjectiveSettings(LabelSettings):
    """Base of verbs that say what is minimised."""

    objective: Literal["next-token", "dpo", "rloo", "reward", "classify", "regress", "tag", "dft", "spin"] = Field(
        "next-token",
        description="loss: next-token; dpo: of rows with a chosen and a rejected answer; rloo: rewards of sampled "
        "answers; reward: of rows as dpo's, a number for each answer; classify: of rows with a text and a label; "
        "regress: with a text and a value; tag: with tokens and tags, on an encoder; dft: times each token's "
        "probability; spin: answers before the emulator's own",
        json_schema_extra=TRAINING,
    )
    dpo_beta: float = Field(
        0.1,
        gt=0,
        description="dpo: how sharply the chosen answer is to be told from the rejected one",
        json_schema_extra=TRAINING,
    )
    dpo_loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid", description="dpo: the logistic loss, or the squared one of IPO", json_schema_extra=TRAINING
    )
    dpo_label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="dpo: chance that a preference is the wrong way round, as far as the loss goes",
        json_schema_extra=TRAINING,
    )
    rules: RuleSettings | None = Field(
        None,
        description="rloo: what answers are rewarded for, as exact=1,max_words=20,words_weight=0.5",
        json_schema_extra=TRAINING,
    )
    reward: Path | None = Field(
        None,
        description="rloo: bundle of --objective reward, tuned on the same package, that answers are rewarded by",
        json_schema_extra=TRAINING,
    )
    reward_weight: float = Field(
        1.0, gt=0, description="rloo: what the number that --reward gives counts", json_schema_extra=TRAINING
    )
    rloo_beta: float = Field(
        0.05,
        ge=0,
        description="rloo: what a nat of distance from the untuned emulator costs of the reward",
        json_schema_extra=TRAINING,
    )
    rloo_samples: int = Field(
        4, ge=2, le=64, description="rloo: answers sampled to each prompt of a step", json_schema_extra=TRAINING
    )
    max_new_tokens: int = Field(
        64, ge=1, description="rloo: most tokens of a sampled answer", json_schema_extra=TRAINING
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="rloo: what scores are divided by, in sampling and in learning",
        json_schema_extra=TRAINING,
    )
    kl_limit: float = Field(
        20.0,
        gt=0,
        description="rloo: distance from the untuned emulator past which a run ends, in nats per answer",
        json_schema_extra=TRAINING,
    )
    entropy_floor: float = Field(
        0.01,
        ge=0,
        description="rloo: mean entropy of a token below which a run ends, in nats",
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

    def objective_problems(
        self, *, round_: bool, dp: bool, launch: bool, packed: bool, canaries: bool = False, several: bool = False
    ) -> list[str]:
        """Return what these settings cannot go together with, a line each.

        Args:
            round_: a federation's round says what is done.
            dp: the run is private.
            launch: it runs in several processes.
            packed: blocks are filled across rows, by wish.
            canaries: it trains on made-up rows too.
            several: it is the mean of several runs.
        """
        given = [name for name in _ALL if getattr(self, name) != type(self).model_fields[name].default]
        pairs, anchor, head = self.compares_answers, self.anchor is not None, self.has_head
        of_pairs = f"--objective {self.objective}"
        problems: list[str] = []
        if round_:
            problems += [f"{flag_name(name)}: a federation's round says what its members learn by" for name in given]
        for name, of in _OF.items():
            if name in self.model_fields_set and self.objective != of:
                problems.append(f"{flag_name(name)}: is of --objective {of}")
        if self.dpo_loss == "ipo" and self.dpo_label_smoothing:
            problems.append("--dpo-label-smoothing: is of --dpo-loss sigmoid")
        if canaries and self.objective == "dpo":
            problems.append("--canaries: --objective dpo learns from pairs of answers, a canary is running text")
        if self.labels and self.objective not in LABELLED:
            problems.append("--labels: are of --objective classify and tag")
        if canaries and head:
            problems.append(f"--canaries: {of_pairs} trains a head, a canary is running text")
        if head and anchor:
            problems.append(f"--anchor: {of_pairs} trains a head, an anchor is of next tokens")
        if head and several:
            problems.append(f"--runs: several runs of {of_pairs} have no mean here")
        if head and self.channel_dropout:
            problems.append(f"--channel-dropout: not with {of_pairs}")
        if "anchor_weight" in self.model_fields_set and not anchor:
            problems.append("--anchor-weight: there is no --anchor")
        if packed and (pairs or head):
            what = "compares answers" if pairs else "reads texts"
            problems.append(f"--pack: {of_pairs} {what}, each in a row of its own")
        if dp:
            problems += [f"{of_pairs}: --dp has no clipped gradient of pairs"] if pairs else []
            problems += [f"{of_pairs}: --dp has no clipped gradient of a head"] if head and not pairs else []
            problems += ["--anchor: --dp trains with nothing beside the clipped gradients"] if anchor else []
            problems += ["--channel-dropout: --dp draws from no seed"] if self.channel_dropout else []
        if launch:
            problems += [f"--launch: {of_pairs} is tuned in one process"] if pairs or head else []
            problems += ["--launch: --anchor is tuned in one process"] if anchor else []
        return problems + (
            self._sampling_problems(dp=dp, launch=launch, packed=packed, canaries=canaries, several=several)
            if self.samples_answers
            else []
        )

    def _sampling_problems(self, *, dp: bool, launch: bool, packed: bool, canaries: bool, several: bool) -> list[str]:
        """Return what sampled answers cannot go together with, a line each."""
        of = "--objective rloo"
        refused = {
            f"{of}: --dp has no clipped gradient of sampled answers": dp,
            f"--launch: {of} is tuned in one process": launch,
            f"--pack: {of} reads prompts, each in a row of its own": packed,
            f"--canaries: {of} learns from answers of its own, a canary is running text": canaries,
            f"--runs: {of} has no mean of several runs": several,
            f"--anchor: {of} has its own leash, --rloo-beta": self.anchor is not None,
            f"--channel-dropout: {of} samples from the whole emulator": self.channel_dropout > 0,
        }
        found = [problem for problem, holds in refused.items() if holds]
        if "reward_weight" in self.model_fields_set and self.reward is None:
            found.append("--reward-weight: there is no --reward")
        if self.rules is None and self.reward is None:
            return [*found, f"--rules: {of} needs to know what is rewarded, as exact=1, or by a model: --reward BUNDLE"]
        return found + ([] if self.rules is None else self.rules.problems())

    @property
    def samples_answers(self) -> bool:
        """Whether the model answers prompts itself, and learns from what is said of its answers."""
        return self.objective == "rloo"

    @property
    def compares_answers(self) -> bool:
        """Whether the loss is one of pairs of answers to one prompt, each in a row of its own."""
        return self.objective in ("dpo", "reward", "spin")

    @property
    def reads_pairs(self) -> bool:
        """Whether the data are rows of a chosen and a rejected answer."""
        return self.objective in ("dpo", "reward")

    @property
    def has_head(self) -> bool:
        """Whether a head is trained beside the adapter."""
        return self.objective in get_args(HeadTask)

    def is_usual(self) -> bool:
        """Tell whether nothing but the next token's loss is minimised, with every channel."""
        return self.objective == "next-token" and self.anchor is None and self.channel_dropout == 0

    def stated(self, anchor_sha256: str | None, reward_digest: str | None = None) -> Objective | None:
        """Return what a run's record says of these settings; None where they are the usual ones.

        Args:
            anchor_sha256: digest of the anchor's file, where there is one.
            reward_digest: of the bundle that rewards, where there is one.
        """
        if self.is_usual():
            return None
        dpo = self.objective == "dpo"
        return Objective(
            loss=self.objective,
            dpo_beta=self.dpo_beta if dpo else None,
            dpo_loss=self.dpo_loss if dpo else None,
            dpo_label_smoothing=self.dpo_label_smoothing or None if dpo else None,
            rloo=self._rewarded(reward_digest),
            spin_beta=self.spin_beta if self.objective == "spin" else None,
            anchor_sha256=anchor_sha256,
            anchor_weight=None if self.anchor is None else self.anchor_weight,
            channel_dropout=self.channel_dropout or None,
        )

    def _rewarded(self, reward_digest: str | None) -> Rewarded | None:
        if not self.samples_answers:
            return None
        return Rewarded(
            beta=self.rloo_beta,
            num_samples=self.rloo_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            kl_limit=self.kl_limit,
            entropy_floor=self.entropy_floor,
            rules=() if self.rules is None else self.rules.names,
            reward_weight=None if self.reward is None else self.reward_weight,
            reward_digest=reward_digest,
        )
