"""``offsite rehearse``: the owner plays the client once, on text of its own, before a package goes out.

A client chooses its learning rate by its loss on the emulator, which need not be the rate that does best in the full
model. The owner can see what a client cannot: how each rate, and each share of the update, does there. ``tune`` runs
as a process of its own, as a client runs it; what it left is then measured as ``evaluate`` measures.

The pair that did best was chosen on the very text that it is shown for, so its figure is a little too good. It is as
good as the text is like the clients'.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from adapters.settings import ADAPTER_FIELDS
from adapters.targets import require_carried
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.config import flag_name
from offsite.console import say, say_next, table
from offsite.digests import DIGEST_PATTERN, joined_digest, model_digest, sha256_file
from offsite.errors import BadSchema, ConfigError, DataError, RunFailed
from offsite.evaluation.results import Data
from offsite.modelling.dtypes import cast_model
from offsite.modelling.load import load_model, load_tokenizer
from offsite.stages import Stage, play
from offsite.staging import refuse_existing, staged_file
from offsite.strictjson import Sparse, Strict
from offsite.text.records import Record, read_files, require_files, split_by_document, write_records
from offsite.training.devices import choose_device
from server.evaluation.candidates import Candidates, open_candidates
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import ONCE, Ruler, data_of, held_out, measure_emulator
from server.evaluation.rehearseconfig import RehearseConfig
from server.evaluation.summary import reproduce, versions
from server.plugging.fit import fit, plugged, require_base

STAGES = "stages"


class Trial(Strict):
    """One rate and one share of the update: perplexities on the held-out text."""

    learning_rate: float = Field(gt=0, le=1)
    scale: float = Field(gt=0, le=1)
    plugged_in: float = Field(gt=0, allow_inf_nan=False)
    emulator_tuned: float = Field(gt=0, allow_inf_nan=False)


class Rehearsal(Sparse):
    """The content of the file. Perplexities are of the held-out text; ``trials`` stand in the order they were run.

    ``data_files`` are the digests of several files, ``data_sha256`` is one over them then.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"data_files"})

    format: Literal["offsite/rehearsal/1"] = "offsite/rehearsal/1"
    model: str
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    package_digest: str = Field(pattern=DIGEST_PATTERN)
    adapter: AdapterSpec
    data_sha256: str = Field(pattern=DIGEST_PATTERN)
    data_files: tuple[str, ...] = ()
    heldout: Data
    zero_shot: float = Field(gt=0, allow_inf_nan=False)
    emulator_zero_shot: float = Field(gt=0, allow_inf_nan=False)
    trials: tuple[Trial, ...] = Field(min_length=1)
    config: dict[str, Any]
    command: str
    versions: dict[str, str]
    seconds: float = Field(ge=0, allow_inf_nan=False)

    @property
    def best(self) -> Trial:
        """The trial with the lowest perplexity of the full model; the first of several."""
        return min(self.trials, key=lambda trial: trial.plugged_in)


def run(config: RehearseConfig) -> dict[str, object]:
    """Run the verb: measure the full model, tune at every rate, measure every share, write the file, say what is best.

    Raises:
        ConfigError, DataError: from `_texts`, when the package cannot carry the adapter, when the output or another
            run's work stands in the way, or the model is not found.
        ArtefactError: when the package is rejected, or belongs to another model.
        RunFailed: when no rate could be tuned; what ended well is kept in ``OUTPUT.work`` and not run again.
    """
    began = time.monotonic()
    refuse_existing(config.output)
    require_files(config.data)
    require_files(config.heldout)
    package = open_package(config.package)
    record = read_owner_record(owner_record_path(config.package))
    if record.package_digest != package.digest:
        raise BadSchema(f"the owner's record beside {config.package.name!r} is of another package")
    spec = config.spec()
    require_carried(package, spec)
    known, records = _texts(config)
    digests = [sha256_file(path) for path in config.data]
    work = config.output.parent / f"{config.output.name}.work"
    _require_own(work)
    tokenizer = load_tokenizer(config.model)
    measuring = _measuring(config, ["none"])
    encoded, examples = held_out(records, tokenizer, measuring)
    ruler = Ruler(tokenizer, examples, batch_size=measuring.batch_size)
    model = load_model(config.model)
    digest = model_digest(model)
    require_base(model, digest, record.base_digest, f"package {config.package.name!r}")
    del model  # while clients are played, theirs is the memory
    bundles = _tuned(config, known, package.digest, work)
    measuring = _measuring(config, [f"{name}={path}" for name, path in bundles.items()])
    candidates = open_candidates(measuring)
    trials, zero_shot, emulator_zero_shot = _trials(config, candidates, ruler, digest)
    settings, command = reproduce(config)
    found = Rehearsal(
        model=Path(config.model).name,
        base_digest=digest,
        package_digest=package.digest,
        adapter=spec,
        data_sha256=joined_digest(digests),
        data_files=tuple(digests) if len(digests) > 1 else (),
        heldout=data_of(config.heldout or config.data, records, encoded, examples),
        zero_shot=zero_shot,
        emulator_zero_shot=emulator_zero_shot,
        trials=trials,
        config=settings,
        command=command,
        versions=versions(),
        seconds=round(time.monotonic() - began, 1),
    )
    with staged_file(config.output) as stage:
        stage.write_text(json.dumps(found.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    _show(config, found)
    best = found.best
    return {
        "rehearsal": config.output.name,
        "learning_rate": best.learning_rate,
        "scale": best.scale,
        "zero_shot": zero_shot,
        "emulator_zero_shot": emulator_zero_shot,
        "emulator_tuned": best.emulator_tuned,
        "plugged_in": best.plugged_in,
        "gap": best.emulator_tuned / best.plugged_in,
        "seconds": found.seconds,
    }


def _measuring(config: RehearseConfig, bundles: list[str]) -> EvaluateConfig:
    """Return the settings of an evaluation of these bundles on the held-out text."""
    return EvaluateConfig(
        model=config.model,
        output=config.output,
        package=config.package,
        bundle=tuple(bundles),
        data=config.heldout or config.data,
        block_tokens=config.block_tokens,
        limit_tokens=config.limit_tokens,
        device=config.device,
    )


def _texts(config: RehearseConfig) -> tuple[list[Record], list[Record]]:
    """Return the rows to tune on and those to measure on.

    Raises:
        ConfigError, DataError: when a file is not as needed, or has too few documents to share out.
    """

    def read(paths: Sequence[Path]) -> list[Record]:
        return read_files(paths, fields=config.fields, document_field=config.document_field, separator=config.separator)

    known, held = read(config.data), read(config.heldout) if config.heldout else []
    if not config.heldout:
        known, held = split_by_document(known, fraction=config.heldout_share, seed=config.seed, purpose="rehearsal")
    if (found := len({record.document for record in known})) < 2:
        raise DataError(f"--data: {found} document(s) to tune on, expected at least two: one chooses the checkpoint")
    return known, held


def _require_own(work: Path) -> None:
    """Return only if the work folder is free, or an earlier rehearsal's.

    Raises:
        ConfigError: when something else is in it.
    """
    if work.exists() and not (work / STAGES).is_dir() and not (work.is_dir() and not any(work.iterdir())):
        raise ConfigError(f"work folder {work.name!r} is another run's", hint="choose another name with -o")


def _write_known(work: Path, known: Sequence[Record]) -> list[str]:
    """The rows to tune on are in `work`, those of one shape in one file. Returns the files' names."""
    shapes: dict[tuple[bool, int], list[Record]] = {}
    for record in known:
        shapes.setdefault((bool(record.messages), len(record.segments)), []).append(record)
    names = [f"known{number}.jsonl" if number > 1 else "known.jsonl" for number in range(1, len(shapes) + 1)]
    for name, records in zip(names, shapes.values(), strict=True):
        write_records(work / name, records)
    return names


def _tuned(config: RehearseConfig, known: list[Record], package_digest: str, work: Path) -> dict[str, Path]:
    """Return a bundle for every rate that can be tuned, by the rate's name; those that stand are not made again.

    Raises:
        RunFailed: when none can be.
    """
    try:
        (work / STAGES).mkdir(parents=True, exist_ok=True)
        names = _write_known(work, known)
    except OSError as error:
        raise RunFailed(f"cannot write {work.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    inputs = {"package": package_digest, "data": joined_digest([sha256_file(work / name) for name in names])}
    found = {}
    for rate in config.rates:
        name = f"{rate:g}"
        words = ["tune", str(config.package.resolve()), *(word for file in names for word in ("--data", file))]
        words += ["-o", name]
        words += ["--learning-rate", name, *_settings(config)]
        try:
            play([Stage(f"tune-{name}", work, words, work / name, inputs)], work / STAGES)
        except RunFailed as error:
            say(f"warning: rate {name} is left out: {error}")
        else:
            found[name] = work / name
    if not found:
        raise RunFailed("no rate could be tuned", hint="why is said above; try a lower --learning-rate")
    return found


def _settings(config: RehearseConfig) -> list[str]:
    words = ["--adapter", config.adapter, "--placement", config.placement, "--targets", config.targets]
    words += ["--rank", str(config.rank), "--alpha", str(config.alpha), "--dropout", str(config.dropout)]
    words += ["--adapter-dtype", config.adapter_dtype, "--steps", str(config.steps)]
    words += ["--batch-size", str(config.batch_size), "--block-tokens", str(config.block_tokens)]
    words += ["--validation", str(config.validation)]
    words += ["--runs", str(config.runs), *(["--mean", "cut"] if config.runs > 1 and "lora" in config.adapter else [])]
    return [*words, "--precision", config.precision, "--seed", str(config.seed), "--device", config.device]


def _trials(
    config: RehearseConfig, candidates: Candidates, ruler: Ruler, digest: str
) -> tuple[tuple[Trial, ...], float, float]:
    """Return every trial that gave a number, and the perplexities of the full model and of the emulator as they are.

    Raises:
        RunFailed: when none did.
    """
    device = choose_device(config.device)
    model = load_model(config.model)
    cast_model(model, ruler.dtype)
    model.to(device)  # type: ignore[arg-type]
    zero_shot = ruler.score(model, "zero-shot")["perplexity"]
    scores: dict[tuple[str, float], float] = {}
    for name, candidate in candidates.bundles.items():
        for scale in config.scales:
            adapter = fit(model, candidate.verified, candidate.record, base_digest=digest, scale=scale)
            try:
                with plugged(model, adapter) as adapted:
                    scores[name, scale] = ruler.score(adapted, f"{scale:g} of rate {name}")["perplexity"]
            except RunFailed as error:
                say(f"warning: {scale:g} of rate {name} is left out: {error}")
    del model
    if not scores:
        raise RunFailed("no rate and share gave a number in the full model", hint="try a lower --learning-rate")
    emulator = candidates.package.load_model(dtype="float32", device=str(device))
    tuned = measure_emulator(emulator, candidates, ruler)
    trials = tuple(
        Trial(
            learning_rate=float(name),
            scale=scale,
            plugged_in=score,
            emulator_tuned=tuned["emulator_tuned"][name]["perplexity"],
        )
        for (name, scale), score in scores.items()
    )
    return trials, zero_shot, tuned["emulator_zero_shot"][ONCE]["perplexity"]


def _show(config: RehearseConfig, found: Rehearsal) -> None:
    """The table and what to do next are on stderr."""
    lines = [
        [f"{one.learning_rate:g}", f"{one.scale:g}", f"{one.emulator_tuned:,.2f}", f"{one.plugged_in:,.2f}",
         "best" if one is found.best else ""]
        for one in found.trials
    ]  # fmt: skip
    title = f"{found.heldout.name}, {found.heldout.num_tokens:,} tokens; zero-shot {found.zero_shot:.2f}, "
    title += f"emulator zero-shot {found.emulator_zero_shot:,.2f}"
    table(title, ["rate", "share", "emulator-tuned", "plugged in", ""], lines)
    best = found.best
    if best.plugged_in >= found.zero_shot:
        say("warning: no rate and share made the full model better on this text; the package does not carry over to it")
        return
    if best.scale != 1:
        say(f"plug in what comes back with --scale {best.scale:g}")
    spec = {flag_name(name): getattr(config, name) for name in ADAPTER_FIELDS if name in config.model_fields_set}
    shape = [word for pair in spec.items() for word in pair]
    say_next("offsite", "job", "create", config.package, "--client", "FINGERPRINT", "--registry", "registry", *shape,
             "--learning-rate", f"{best.learning_rate:g}", "-o", "job")  # fmt: skip
