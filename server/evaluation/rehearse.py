"""``offsite rehearse``: the owner plays the client once, on text of its own, before a package goes out.

A client chooses its learning rate by its loss on the emulator, which need not be the rate that does best in the full
model. The owner can see what a client cannot: how each rate, and each share of the update, does there. ``tune`` runs
as a process of its own, as a client runs it; what it left is then measured as ``evaluate`` measures.

With ``--reference``, LoRA is tuned on the full model, too, on the same text at the same rates: what plugging in
recovers of its gain stands beside every trial.

The pair that did best was chosen on the very text that it is shown for, so its figure is a little too good. It is as
good as the text is like the clients'.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.settings import ADAPTER_FIELDS
from adapters.targets import require_carried
from offsite.artefacts.owner import OwnerRecord, owner_record_path, read_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.config import flag_name
from offsite.console import say, say_next, table
from offsite.digests import joined_digest, model_digest, sha256_file
from offsite.errors import BadSchema, ConfigError, DataError, RunFailed
from offsite.evaluation.figures import recovery, recovery_nats, withheld
from offsite.evaluation.rehearsal import Reference, Rehearsal, Trial
from offsite.modelling.dtypes import cast_model
from offsite.modelling.load import load_model, load_tokenizer
from offsite.stages import Stage, play
from offsite.staging import refuse_existing, remove, staged_file
from offsite.text.records import Record, read_files, require_files, split_by_document
from offsite.text.writing import write_by_shape
from offsite.training.devices import choose_device
from offsite.training.precision import PRECISION_NOTE, settled
from offsite.vision.reader import tokenizer_in
from server.evaluation.candidates import Candidates, open_candidates
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import ONCE, Ruler, data_of, held_out, measure_emulator
from server.evaluation.rehearseconfig import LEAST_SCALE, RehearseConfig
from server.evaluation.summary import reproduce, versions
from server.plugging.fit import fit, plugged, require_base
from server.plugging.shares import taken
from server.plugging.sparing import public_text
from server.plugging.ways import Way

STAGES = "stages"
LOW_RANK = ("lora", "rslora", "dora")


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
    require_files(config.spare)
    package = open_package(config.package)
    package.require_text("rehearse")
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
    names = _write_known(work, known)
    device = choose_device(config.device)
    arithmetic = settled(config.precision, device, note=work / STAGES / PRECISION_NOTE)  # one for all that is compared
    config = config.model_copy(update={"precision": arithmetic})
    bundles = _tuned(config, config.package, package.digest, work, names)
    kept = _reference_package(config, record, work)
    compared = {} if kept is None else _compared(config, kept, work, names)
    candidates = open_candidates(_measuring(config, _named(bundles)))
    references = None if kept is None else open_candidates(_measuring(config, _named(compared), package=kept.path))
    played = _played(config, candidates, references, ruler, digest)
    settings, command = reproduce(config)
    found = Rehearsal(
        model=Path(config.model).name,
        base_digest=digest,
        package_digest=package.digest,
        adapter=spec,
        data_sha256=joined_digest(digests),
        data_files=tuple(digests) if len(digests) > 1 else (),
        heldout=data_of(config.heldout or config.data, records, encoded, examples),
        zero_shot=played.zero_shot,
        emulator_zero_shot=played.emulator_zero_shot,
        withheld_zero_shot=withheld(played.emulator_zero_shot, played.zero_shot),
        reference=played.reference,
        trials=played.trials,
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
        "way": str(Way.stated(best.scale, best.way)),
        "zero_shot": found.zero_shot,
        "emulator_zero_shot": found.emulator_zero_shot,
        "emulator_tuned": best.emulator_tuned,
        "plugged_in": best.plugged_in,
        "gap": best.emulator_tuned / best.plugged_in,
        "withheld_after_tuning": best.withheld_after_tuning,
        "withheld_zero_shot": found.withheld_zero_shot,
        **_recovered(found),
        "seconds": found.seconds,
    }


def _recovered(found: Rehearsal) -> dict[str, object]:
    """Return what is told of the reference, if one was run."""
    if found.reference is None:
        return {}
    best = found.best
    return {"lora_full": found.reference.perplexity, "recovery": best.recovery, "recovery_nats": best.recovery_nats}


def _named(bundles: Mapping[str, Path]) -> list[str]:
    return [f"{name}={path}" for name, path in bundles.items()]


def _measuring(config: RehearseConfig, bundles: list[str], *, package: Path | None = None) -> EvaluateConfig:
    """Return the settings of an evaluation of these bundles on the held-out text."""
    return EvaluateConfig(
        model=config.model,
        output=config.output,
        package=package or config.package,
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
    try:
        (work / STAGES).mkdir(parents=True, exist_ok=True)
        return write_by_shape(work, "known", known)
    except OSError as error:
        raise RunFailed(f"cannot write {work.name!r}: {(error.strerror or 'i/o error').lower()}") from None


def _tuned(
    config: RehearseConfig, package: Path, package_digest: str, work: Path, names: Sequence[str], label: str = ""
) -> dict[str, Path]:
    """Return a bundle for every rate that can be tuned, by the rate's name; those that stand are not made again.

    Raises:
        RunFailed: when none can be.
    """
    inputs = {"package": package_digest, "data": joined_digest([sha256_file(work / name) for name in names])}
    found = {}
    for rate in config.rates:
        name = f"{label}{rate:g}"
        words = ["tune", str(package.resolve()), *(word for file in names for word in ("--data", file))]
        words += ["-o", name]
        words += ["--learning-rate", f"{rate:g}", *_settings(config)]
        try:
            play([Stage(f"tune-{name}", work, words, work / name, inputs)], work / STAGES)
        except RunFailed as error:
            say(f"warning: {label.replace('-', ' ')}rate {rate:g} is left out: {error}")
        else:
            found[f"{rate:g}"] = work / name
    if not found:
        raise RunFailed("no rate could be tuned", hint="why is said above; try a lower --learning-rate")
    return found


def _reference_package(config: RehearseConfig, record: OwnerRecord, work: Path) -> Package | None:
    """Return the package that keeps all of the model, made now if none was named; None where no reference is asked for.

    Raises:
        ConfigError: when the one that was named does not keep all, or is of another model.
        RunFailed: when none can be made.
    """
    if not config.reference and config.reference_package is None:
        return None
    path = config.reference_package
    if path is None:
        path = work / "keep-all"
        model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
        words = ["distill", model, "--method", "keep-all", "--steps", "0", "-o", path.name]
        words += ["--bottom", str(record.layout.num_bottom), "--top", str(record.layout.num_top)]
        if not owner_record_path(path).exists():
            remove(path)  # of a run that broke off between the two
        play([Stage("keep-all", work, words, path, {"model": record.base_digest})], work / STAGES)
    kept = read_owner_record(owner_record_path(path))
    if kept.base_digest != record.base_digest:
        raise ConfigError(f"--reference-package {path.name!r} belongs to another base model than the package")
    if kept.kept != tuple(range(kept.num_blocks)) or kept.channels or kept.experts:
        raise ConfigError(
            f"--reference-package {path.name!r} does not keep all of the model",
            hint="make one with: offsite distill MODEL --method keep-all --steps 0",
        )
    return open_package(path)


def _reference_config(config: RehearseConfig) -> RehearseConfig:
    """Return the settings of the reference's runs: low-rank adapters on every block, at the client's rates.

    Of a client's adapter that is not low-rank the reference is LoRA at its own usual rates.
    """
    if config.adapter in LOW_RANK:
        return config.model_copy(update={"placement": "all"})
    changed = {"adapter": "lora", "placement": "all", "targets": "all-linear", "learning_rate": ()}
    return config.model_copy(update=changed)


def _compared(config: RehearseConfig, kept: Package, work: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the reference's bundles, by the rate's name."""
    changed = _reference_config(config)
    require_carried(kept, changed.spec())
    return _tuned(changed, kept.path, kept.digest, work, names, "reference-")


def _settings(config: RehearseConfig) -> list[str]:
    words = ["--adapter", config.adapter, "--placement", config.placement, "--targets", config.targets]
    words += ["--rank", str(config.rank), "--alpha", str(config.alpha), "--dropout", str(config.dropout)]
    words += ["--adapter-dtype", config.adapter_dtype, "--steps", str(config.steps)]
    words += ["--batch-size", str(config.batch_size), "--block-tokens", str(config.block_tokens)]
    words += ["--validation", str(config.validation)]
    words += ["--runs", str(config.runs), *(["--mean", "cut"] if config.runs > 1 and "lora" in config.adapter else [])]
    return [*words, "--precision", config.precision, "--seed", str(config.seed), "--device", config.device]


@dataclass(frozen=True)
class _Played:
    """Every trial that gave a number, the reference, and the perplexities of both models as they are."""

    trials: tuple[Trial, ...]
    reference: Reference | None
    zero_shot: float
    emulator_zero_shot: float


def _played(
    config: RehearseConfig, candidates: Candidates, references: Candidates | None, ruler: Ruler, digest: str
) -> _Played:
    """Return what was measured, one model in memory at a time.

    Raises:
        RunFailed: when no trial, or no run of the reference, gave a number.
    """
    device = choose_device(config.device)
    zero_shot, scores, compared = _in_full(config, candidates, references, ruler, digest)
    reference = None if references is None else _reference(references, compared)
    emulator = candidates.package.load_model(dtype="float32", device=str(device))
    tuned = measure_emulator(emulator, candidates, ruler)
    against = reference.perplexity if reference is not None else None
    trials = []
    for (name, way), score in scores.items():
        left = tuned["emulator_tuned"][name]["perplexity"]
        trials.append(
            Trial(
                learning_rate=float(name),
                scale=way.scale,
                way=way.word,
                plugged_in=score,
                emulator_tuned=left,
                withheld_after_tuning=withheld(left, zero_shot),
                recovery=recovery(score, zero_shot, against),
                recovery_nats=recovery_nats(score, zero_shot, against),
            )
        )
    return _Played(tuple(trials), reference, zero_shot, tuned["emulator_zero_shot"][ONCE]["perplexity"])


def _in_full(
    config: RehearseConfig, candidates: Candidates, references: Candidates | None, ruler: Ruler, digest: str
) -> tuple[float, dict[tuple[str, Way], float], dict[str, float]]:
    """Return perplexities of the full model: as it is, by the client's rate and way in, by the reference's rate.

    Raises:
        ConfigError: when a way names nothing that the adapter changes.
        RunFailed: when no rate and way gave a number.
    """
    model = load_model(config.model)
    cast_model(model, ruler.dtype)
    model.to(choose_device(config.device))  # type: ignore[arg-type]

    public = []
    if config.spare:
        public = public_text(config.spare, tokenizer_in(ruler.tokenizer), limit_tokens=config.spare_tokens)[0]

    def scored(found: Candidates, name: str, way: Way, label: str) -> float | None:
        candidate = found.bundles[name]
        fitted = fit(model, candidate.verified, candidate.record, base_digest=digest)
        try:
            with plugged(model, taken(model, fitted, way, public), mix=way.mix) as adapted:
                return ruler.score(adapted, label)["perplexity"]
        except RunFailed as error:
            say(f"warning: {label} is left out: {error}")
        return None

    zero_shot = ruler.score(model, "zero-shot")["perplexity"]
    tried = {
        (name, way): scored(candidates, name, way, f"{way} of rate {name}")
        for name in candidates.bundles
        for way in config.ways
    }
    scores = {key: score for key, score in tried.items() if score is not None}
    if not scores:
        raise RunFailed("no rate and share gave a number in the full model", hint="try a lower --learning-rate")
    name, way = min(scores, key=scores.__getitem__)
    if config.tries_less and way == Way(min(config.scales)):
        say(f"{way} did best of the usual shares: {LEAST_SCALE:g} of rate {name} is tried, too")
        if (score := scored(candidates, name, Way(LEAST_SCALE), f"{LEAST_SCALE:g} of rate {name}")) is not None:
            scores[name, Way(LEAST_SCALE)] = score
    compared: dict[str, float] = {}
    if references is not None:
        for name in references.bundles:
            if (score := scored(references, name, Way(), f"reference, rate {name}")) is not None:
                compared[name] = score
    return zero_shot, scores, compared


def _reference(references: Candidates, compared: Mapping[str, float]) -> Reference:
    """Return the reference: the rate whose whole update did best in the full model.

    Raises:
        RunFailed: when none gave a number.
    """
    if not compared:
        raise RunFailed("no rate of the reference gave a number", hint="try a lower --learning-rate")
    best = min(compared, key=compared.__getitem__)
    return Reference(
        package_digest=references.package.digest,
        adapter=references.bundles[best].bundle.manifest.adapter,
        learning_rate=float(best),
        perplexity=compared[best],
    )


def _show(config: RehearseConfig, found: Rehearsal) -> None:
    """The table and what to do next are on stderr."""
    best, reference = found.best, found.reference
    columns = ["rate", "share", "emulator-tuned", "withheld", "plugged in", "recovery", "in nats", ""]
    lines = [
        [f"{one.learning_rate:g}", str(Way.stated(one.scale, one.way)), f"{one.emulator_tuned:,.2f}",
         f"{withheld(one.emulator_tuned, found.zero_shot):.2f}", f"{one.plugged_in:,.2f}",
         *("" if share is None else f"{share:.2f}" for share in (one.recovery, one.recovery_nats)),
         "best" if one is best else ""]
        for one in found.trials
    ]  # fmt: skip
    if reference is None:
        columns, *lines = [[*row[:5], row[7]] for row in (columns, *lines)]
    title = f"{found.heldout.name}, {found.heldout.num_tokens:,} tokens; zero-shot {found.zero_shot:.2f}, "
    title += f"emulator zero-shot {found.emulator_zero_shot:,.2f}"
    if reference is not None:
        title += f", LoRA on the full model {reference.perplexity:.2f}"
    table(title, columns, lines)
    if best.plugged_in >= found.zero_shot:
        say("warning: no rate and share made the full model better on this text; the package does not carry over to it")
        return
    way = Way.stated(best.scale, best.way)
    if way == Way(LEAST_SCALE) and config.tries_less:
        say(f"warning: the smallest share that was tried did best, {best.scale:g}; a smaller one may do better")
    if not way.is_plain:
        share = str(replace(way, spare=None, mix=1.0))
        words = [] if share == "1" else [f"--scale {share}"]
        words += [] if way.spare is None else [f"--spare TEXT --spare-half {way.spare:g}"]
        words += [] if way.mix == 1 else [f"and serve it with --mix {way.mix:g}"]
        say(f"plug in what comes back with {' '.join(words)}")
    spec = {flag_name(name): getattr(config, name) for name in ADAPTER_FIELDS if name in config.model_fields_set}
    shape = [word for pair in spec.items() for word in pair]
    say_next("offsite", "job", "create", config.package, "--client", "FINGERPRINT", "--registry", "registry", *shape,
             "--learning-rate", f"{best.learning_rate:g}", "-o", "job")  # fmt: skip
