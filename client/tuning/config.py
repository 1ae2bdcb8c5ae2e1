"""Settings of ``offsite tune``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from adapters.rates import LEARNING_RATES, SAMPLED_SHARE
from adapters.settings import ADAPTER_FIELDS, TuningSettings, head_problems
from client.objectives.config import ObjectiveSettings
from client.privacy.config import DPSettings
from offsite.artefacts.bundle import DISCLOSABLE, LABELLED, AdapterSpec
from offsite.artefacts.job import Job
from offsite.artefacts.round import RoundManifest
from offsite.config import DATA, MACHINE, OUTPUT, POSITIONAL, PRIVACY, REPEATED, TRAINING, USUAL, VerbConfig, flag_name
from offsite.errors import ConfigError
from offsite.problems import meant
from offsite.text.config import PackedTextSettings, TextFiles
from offsite.training.config import CacheSettings, LoopSettings, Schedule

_FAR = 5  # times a kind's rate, past which an owner's advice is worth a second look


class PrivateTextSettings(VerbConfig):
    """Base of verbs that tune on the client's own text."""

    data: TextFiles = Field(
        min_length=1,
        description="private text: .txt, .jsonl, .json, .csv or .tsv, or those as .gz, or .parquet, or a folder of "
        "such files; may be repeated",
        json_schema_extra=REPEATED,
    )


class EvalSettings(VerbConfig):
    """Base of verbs that choose weights by text in files of its own, or audit a run that did."""

    eval: TextFiles = Field(
        (),
        description="held-out text in files of its own, like --data, or a folder of them: validated on in place of a "
        "share of --data, never trained on; may be repeated",
        json_schema_extra=DATA | REPEATED,
    )


class TuneConfig(
    PrivateTextSettings,
    EvalSettings,
    TuningSettings,
    PackedTextSettings,
    ObjectiveSettings,
    CacheSettings,
    LoopSettings,
):
    """Settings of ``offsite tune PACKAGE --data FILE -o BUNDLE``."""

    model_config = ConfigDict(allow_inf_nan=False)
    verb: ClassVar[str] = "tune"

    package: Path = Field(description="package folder from the owner", json_schema_extra=POSITIONAL)
    job: Path | None = Field(
        None,
        description="opened job folder: its adapter is the one that is tuned, for the package it names",
        json_schema_extra=USUAL,
    )
    task: Path | None = Field(
        None,
        description="task.yaml by whose prompts rows of its fields and answers are read; default: the job's, if any",
        json_schema_extra=USUAL,
    )
    round: Path | None = Field(
        None,
        description="opened round folder of a federation: tuning goes on from its weights, as it says",
        json_schema_extra=TRAINING,
    )
    output: Path = Field(description="bundle folder to write", json_schema_extra=OUTPUT)

    on_long: Literal["truncate", "error"] = Field(
        "truncate", description="rows longer than the context: cut, or refuse", json_schema_extra=DATA
    )
    audit_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the documents set aside at random, neither trained nor validated on",
        json_schema_extra=PRIVACY,
    )
    canaries: Path | None = Field(
        None,
        description="folder of offsite canaries: its made-up rows are trained on too, for audits; one bundle each",
        json_schema_extra=PRIVACY,
    )

    epochs: float = Field(
        3.0, gt=0, description="passes over the data, unless --steps says otherwise", json_schema_extra=USUAL
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of --epochs", json_schema_extra=USUAL)
    learning_rate: float | None = Field(
        None, gt=0, description="peak rate of AdamW; default: by kind of adapter", json_schema_extra=USUAL
    )
    warmup_steps: int = Field(
        10, ge=0, description="steps over which the rate rises; at most a tenth of all", json_schema_extra=TRAINING
    )
    schedule: Schedule = Field("cosine", description="how the rate falls", json_schema_extra=TRAINING)
    mean: Literal["auto", "exact", "cut"] = Field(
        "auto",
        description="the mean of several --runs of LoRA: of their summed rank, or cut to --rank; auto: cut for a job",
        json_schema_extra=TRAINING,
    )
    parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="of several --runs, how many at once in processes of their own, where memory and cores allow",
        json_schema_extra=MACHINE,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="save memory by computing activations twice; by itself where a step does not fit into free memory, "
        "with --no-gradient-checkpointing never",
        json_schema_extra=MACHINE,
    )
    evaluate_every: int = Field(
        0,
        ge=0,
        description="steps between validations; 0: three to ten times per run, by what they cost",
        json_schema_extra=TRAINING,
    )
    patience: int = Field(
        0,
        ge=0,
        description="validations in a row without a lower loss after which a run ends; 0: it takes all its steps",
        json_schema_extra=TRAINING,
    )
    sealed_off: bool = Field(
        False, description="deny connections, other processes and writes beside the output", json_schema_extra=PRIVACY
    )
    dp: DPSettings | None = Field(
        None,
        description="tune with differential privacy, as epsilon=8,clip=1.0; needs the extra privacy",
        json_schema_extra=PRIVACY,
    )
    disclose: tuple[str, ...] = Field(
        (), description=f"figures to put into the bundle: {', '.join(DISCLOSABLE)}", json_schema_extra=PRIVACY
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raise ValueError with every contradiction between settings."""
        problems = [
            f"--disclose: {name!r} is not one of {', '.join(DISCLOSABLE)}"
            for name in self.disclose
            if name not in DISCLOSABLE
        ]
        if self.adapter not in LEARNING_RATES and self.learning_rate is None:
            problems.append(
                f"--adapter: no kind {self.adapter!r}, expected one of {', '.join(LEARNING_RATES)}"
                f"{meant(self.adapter, LEARNING_RATES)}"
            )
        parts = self.accumulate * max(1, self.launch)
        if parts > self.batch_size:
            shared = f" in each of {self.launch} processes" if self.launch > 1 else ""
            problems.append(
                f"--accumulate {self.accumulate}{shared}: a batch of {self.batch_size} cannot be cut into {parts}"
            )
        if self.round is not None and self.launch > 1:
            problems.append("--launch: a federation's round is tuned in one process")
        if self.round is not None and self.patience:
            problems.append("--patience: a federation's round takes the steps that its owner asks for")
        if self.round is not None and self.adapter == "dora":
            problems.append("--adapter dora: no federation adds up its updates")
        if self.sealed_off and self.launch > 1:
            problems.append("--launch: --sealed-off runs in one process, several must connect to each other")
        if self.sealed_off and "wandb" in self.report_to:
            problems.append(
                "--report-to wandb: it starts a process, which --sealed-off denies; tensorboard and mlflow do not"
            )
        if self.task is not None and (self.compares_answers or self.samples_answers or self.has_head):
            problems.append(
                f"--task: its rows are prompts and answers, --objective {self.objective} learns from others"
            )
        if self.eval and "validation" in self.model_fields_set:
            problems.append("--validation: a share of --data is held out, or --eval is: leave one of the two out")
        if self.eval and self.round is not None:
            problems.append("--eval: a federation's round is validated on a share of --data")
        if self.task is not None and self.separator is not None:
            problems.append("--separator: rows of a task have fields, plain text has none")
        problems += self._averaging_problems()
        problems += self._private_problems()
        problems += self.objective_problems(
            round_=self.round is not None,
            dp=self.dp is not None,
            launch=self.launch > 1,
            packed=self.pack and "pack" in self.model_fields_set,
            canaries=self.canaries is not None,
            several=self.runs > 1,
        )
        try:
            self.spec()
        except ConfigError as error:
            problems.append(str(error))
        if self.has_head and (self.labels or (self.job is None and self.objective in LABELLED)):
            problems += head_problems(self.objective, self.labels)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _averaging_problems(self) -> list[str]:
        """Return what several runs cannot go together with, a line each."""
        problems: list[str] = []
        if self.runs == 1:
            problems += ["--mean: there is one run; --runs 2 or more have a mean"] if self.mean != "auto" else []
            problems += ["--parallel: there is one run; --runs 2 or more can go side by side"] * (self.parallel > 1)
            return problems
        if self.launch > 1:
            problems.append(
                "--launch: several --runs do not share a model's shards; --parallel trains them side by side"
            )
        if self.parallel > 1 and self.sealed_off:
            problems.append("--parallel: --sealed-off denies other processes; leave one of the two out")
        if self.parallel > 1 and self.dp is not None:
            problems.append("--parallel: --dp charges and tunes one run after the other; leave one of the two out")
        named = self.job is not None or self.round is not None
        if self.mean != "auto" and self.adapter in ("blocks", "bitfit") and not named:
            problems.append(f"--mean: {self.adapter} has no rank, its mean is exact")
        if self.mean == "exact" and (self.job is not None or self.round is not None):
            given = "--job" if self.round is None else "--round"
            problems.append(
                f"--mean exact: {given} says the rank of the adapter; leave --mean out, and it is cut to that"
            )
        return problems

    @property
    def is_cut(self) -> bool:
        """Whether the mean of several runs is brought back to the rank of one."""
        named = self.job is not None or self.round is not None
        return self.runs > 1 and (self.mean == "cut" or (self.mean == "auto" and named))

    def _private_problems(self) -> list[str]:
        """Return what --dp cannot go together with, a line each."""
        problems: list[str] = []
        dp = self.dp
        if dp is None:
            return problems
        if (dp.epsilon is None) == (dp.noise_multiplier is None):
            problems.append("--dp: give epsilon or noise_multiplier, one of the two")
        if (dp.unit == "user") != (dp.user_field is not None):
            problems.append("--dp: unit=user and user_field go together")
        if dp.user_field is not None and self.document_field not in (None, dp.user_field):
            problems.append("--document-field: with --dp unit=user the documents are the users")
        if dp.unit == "user" and dp.engine in ("hooks", "ghost"):
            problems.append(f"--dp: engine {dp.engine} clips examples, unit=user needs one-by-one")
        if self.pack and "pack" in self.model_fields_set:
            problems.append("--pack: a sequence would hold several examples, --dp hides one")
        if self.accumulate > 1:
            problems.append("--accumulate: --dp cuts a step's rows into parts by itself (rows_at_once)")
        if self.launch > 1:
            problems.append("--launch: --dp runs in one process")
        if self.evaluate_every:
            problems.append("--evaluate-every: --dp chooses no checkpoint by private text; it is validated at the end")
        if self.patience:
            problems.append("--patience: when a run ends would depend on private text, --dp counts steps beforehand")
        problems += [
            f"--disclose {name}: --dp does not cover it, it is a function of the private text"
            for name in self.disclose
            if name in DISCLOSABLE and name != "steps"
        ]
        return problems

    @property
    def held_out_share(self) -> float:
        """What share of the documents is validated on: none where that is in files of its own."""
        return 0.0 if self.eval else self.validation

    @property
    def packed(self) -> bool:
        """Whether sequences are filled across rows: as `pack` says; not with --dp, of pairs, prompts, or for a head."""
        each = self.compares_answers or self.samples_answers or self.has_head
        return self.pack and self.dp is None and not each

    @property
    def rows_each(self) -> int:
        """How many rows go through the model for one of the text's."""
        return 2 if self.compares_answers else self.rloo_samples if self.samples_answers else 1

    @property
    def num_new(self) -> int | None:
        """How many tokens may follow a prompt, where the model answers some; None where rows are read as they are."""
        return self.max_new_tokens if self.samples_answers else None

    @property
    def by_user(self) -> bool:
        """Whether documents stand for users, who are the same in every file."""
        return self.dp is not None and self.dp.unit == "user"

    def under(self, adapter: AdapterSpec) -> TuneConfig:
        """Return these settings with the adapter of a job.

        Raises:
            ConfigError: when a setting was given and is not the job's.
        """
        wanted = {name: getattr(adapter, field) for name, field in ADAPTER_FIELDS.items()}
        other = [name for name in wanted if name in self.model_fields_set and getattr(self, name) != wanted[name]]
        if other:
            raise ConfigError(
                "; ".join(
                    f"{flag_name(name)} {getattr(self, name)}: the job says {wanted[name]}" for name in sorted(other)
                ),
                hint="leave the adapter's settings to the job, or ask the owner for another job",
            )
        return self.model_copy(update=wanted | self._labels_of(adapter))

    def _labels_of(self, adapter: AdapterSpec) -> dict[str, object]:
        """Return the labels of a job's head.

        Raises:
            ConfigError: when the job is for another task than `objective`, or names other labels than were given.
        """
        if adapter.head is None and not self.has_head:
            return {}
        if adapter.head is None:
            raise ConfigError(
                f"--objective {self.objective}: the job asks for an adapter for text, without a head",
                hint=f"ask the owner for another job: offsite job create --head {self.objective}",
            )
        if adapter.task != self.objective:
            raise ConfigError(
                f"--objective {self.objective}: the job asks for --objective {adapter.task}",
                hint=f"tune with --objective {adapter.task}, or ask the owner for another job",
            )
        if self.labels and self.labels != adapter.head.labels:
            raise ConfigError(
                "--labels: they are not the job's, or in another order", hint="leave --labels out to take the job's"
            )
        return {"labels": adapter.head.labels}

    def advised(self, job: Job) -> TuneConfig:
        """Return these settings with the learning rate that the job advises, where nothing else says one.

        A rate that was given, or that a federation's round names, stands; and no owner has tried one with ``--dp``.
        """
        if job.learning_rate is None or self.learning_rate is not None or self.dp is not None or self.samples_answers:
            return self
        return self.model_copy(update={"learning_rate": job.learning_rate})

    def is_far_beyond_usual(self) -> bool:
        """Tell whether the rate is far beyond what this kind of adapter is tuned with."""
        usual = LEARNING_RATES.get(self.adapter)  # of a kind that was registered from outside none is known
        return usual is not None and self.rate() > _FAR * usual

    def within(self, manifest: RoundManifest) -> TuneConfig:
        """Return these settings with what a federation's round asks for: adapter, steps, rate.

        Raises:
            ConfigError: when a setting was given and the round says otherwise.
        """
        config = self.under(manifest.adapter)
        asked: dict[str, object] = {"steps": manifest.steps}
        if manifest.learning_rate is not None:
            asked["learning_rate"] = manifest.learning_rate
        for name, value in asked.items():
            if name in self.model_fields_set and getattr(self, name) not in (None, value):
                raise ConfigError(
                    f"{flag_name(name)} {getattr(self, name)}: the round says {value}",
                    hint="leave it to the round, or ask the owner for another",
                )
        if "epochs" in self.model_fields_set:
            raise ConfigError(f"--epochs: the round says {manifest.steps} steps", hint="leave it to the round")
        return config.model_copy(update=asked)

    def rate(self) -> float:
        """Return the peak learning rate: the one given, or the kind's; of sampled answers a share of that."""
        usual = LEARNING_RATES[self.adapter] * (SAMPLED_SHARE if self.samples_answers else 1)
        return usual if self.learning_rate is None else self.learning_rate
