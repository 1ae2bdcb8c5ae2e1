"""`offsite tune PACKAGE --data FILE -o BUNDLE`: train an adapter against the emulator, on this machine.

Needs the package and the data and nothing else: no network, no full model, no code of the owner's.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from adapters.heads import head_norm
from adapters.kinds import declared
from client.tuning import averages
from client.tuning.config import TuneConfig
from client.tuning.ready import Ready, loop_settings, make_ready
from client.tuning.rounds import answered
from client.tuning.runrecord import loop_of, record_of
from client.tuning.sandbox import require_quiet, sealing
from client.tuning.scan import Scan, losses_in, require_clean, scan_bundle, texts_of
from client.tuning.several import mean_run
from client.tuning.tune import Done, train_run
from offsite.artefacts.bundle import Bundle, write_bundle
from offsite.audits.runs import run_path, write_run
from offsite.console import muted, say, say_next
from offsite.staging import staged_file
from offsite.tensors import TensorSpec
from offsite.training.loop import Outcome

_MOST_NATS = 700.0  # whose exponential is still a number


@sealing
def run(config: TuneConfig) -> dict[str, object]:
    """Run the verb: open, read, train, write the bundle.

    Raises:
        ConfigError, DataError, ArtefactError, PolicyError, RunFailed: as the steps it is made of.
    """
    ready = make_ready(config)
    done = train_run(ready) if ready.config.runs == 1 else mean_run(ready)
    return {} if done is None else _written(ready, done, config)


def train_one(config: TuneConfig, number: int) -> None:
    """One of the several runs of these settings is done, and kept in its folder; nothing else is written.

    Args:
        number: of the run, from 1.

    Raises:
        ConfigError, DataError, ArtefactError, PolicyError, RunFailed: as `run`.
    """
    with muted():
        ready = make_ready(config)
    train_run(ready, number)


def _written(ready: Ready, done: Done, given: TuneConfig) -> dict[str, object]:
    """The bundle stands, and its record before it. Returns the verb's result.

    Args:
        given: the settings as they were typed, with folders where those of the run have their files.
    """
    config, outcome, text = done.config, done.outcome, ready.text
    names = declared(done.spec, ready.package.layout, ready.package.block_tensors())
    kept = record_of(
        config,
        package=ready.package,
        spec=done.spec,
        data_sha256=ready.data,
        data_files=ready.digests,
        eval_files=ready.eval_digests,
        text=text,
        outcome=outcome,
        guarantee=done.guarantee,
        job_id=None if ready.job is None else ready.job.job_id,
        canaries=ready.planted.commitment,
        answered=answered(ready.round),
        anchor=ready.anchor,
        reward=ready.reward_digest,
        averaged=done.averaged,
        task=ready.task,
        loop=loop_of(loop_settings(config, text)),
    )
    figures = {
        "num_records": text.num_records,
        "num_tokens": outcome.tokens,
        "steps": outcome.steps,
        "validation_loss": math.nan if outcome.best_loss is None else outcome.best_loss,
    }
    scans: list[Scan] = []

    def before(stage: Path, digest: str) -> None:
        scans.append(_release(stage, ready, done, names, figures))
        write_run(run_path(config.output), kept.model_copy(update={"bundle_digest": digest}))

    bundle = write_bundle(
        config.output,
        package=ready.package,
        spec=done.spec,
        tensors=done.tensors,
        expected=names,
        round_digest=None if ready.round is None else ready.round.digest,
        task_digest=None if ready.job is None else ready.job.task_digest,
        figures=figures,
        disclose=config.disclose,
        before=before,
    )
    _warn_of_norm(ready, done)
    ready.planted.mark(config, bundle=bundle.digest)
    _finish(config, ready.work)
    _say_outcome(config, outcome, given)
    result = _result(bundle, ready, outcome) | {"scan": scans[0].model_dump(), **done.told}
    return result | ({} if done.guarantee is None else {"privacy": done.guarantee})


def _release(
    stage: Path, ready: Ready, done: Done, names: Mapping[str, TensorSpec], figures: Mapping[str, float]
) -> Scan:
    """Return what was read of the bundle at `stage` once nothing was found in it, and a sealed-off run was quiet.

    Raises:
        PolicyError: when the bundle may not get its name.
    """
    require_quiet()
    config = done.config
    logged = [loss for folder in _folders(config, ready.work) for loss in losses_in(folder / averages.LOG_NAME)]
    scan = scan_bundle(
        stage,
        texts=texts_of(ready.text.read),
        figures=[*done.losses, *logged],
        spec=done.spec,
        disclosed={name: figures[name] for name in config.disclose},
        paths=[*config.data, *config.eval, config.output, config.package, *_beside(config)],
        known=names,
    )
    require_clean(scan)
    say(f"scanned: {scan.num_bytes:,} bytes of the bundle; no text, path, name, time or loss of this machine's in it")
    return scan


def _warn_of_norm(ready: Ready, done: Done) -> None:
    """A head that is larger than its job allows is said, before it is sealed for nothing."""
    norm = head_norm(done.tensors).get("head_norm", 0.0)
    if ready.job is not None and norm > ready.job.policy.max_head_norm:
        say(
            f"WARNING: the head's Frobenius norm is {norm:.4g}, the job allows {ready.job.policy.max_head_norm:g}: the "
            "owner's intake will refuse it"
        )
        say("  ask the owner for a job with another --max-head-norm, or tune on values in smaller units")


def _say_outcome(config: TuneConfig, outcome: Outcome, given: TuneConfig) -> None:
    """What the run was worth is said, loudly when it made things worse, and what comes next."""
    best, before = outcome.best_loss, outcome.before_loss
    if best is not None and before is not None:
        which = f"best validation loss {best:.4f} at step {outcome.best_step}, before tuning {before:.4f}"
        if config.objective == "next-token":
            which += f" (perplexity {math.exp(min(best, _MOST_NATS)):.4g}, {math.exp(min(before, _MOST_NATS)):.4g})"
        if config.runs > 1:
            which = f"validation loss of the mean {best:.4f}, before tuning {before:.4f}"
        if config.samples_answers:  # a loss that is a negative reward
            earned = f"{0 - best:.4f} at step {outcome.best_step}, before tuning {0 - before:.4f}"
            which = f"best mean reward of held-out prompts {earned}"
        say(which)
        if config.samples_answers and best == before:
            say("WARNING: tuning earned no more on held-out prompts. This bundle was written all the same.")
        elif not best < before:
            say("WARNING: tuning made it worse. This bundle is of no use to the owner; it was written all the same.")
            say(f"  try a lower --learning-rate: {config.rate() / 10:g} instead of {config.rate():g}, or more data")
    if config.round is None:
        planted = [] if config.canaries is None else ["--canaries", config.canaries]
        texts = [word for path in given.data for word in ("--data", path)]
        texts += [word for path in given.eval for word in ("--eval", path)]
        audit = ["offsite", "audit", "bundle", config.package, config.output, *texts, *planted]
        say_next(*audit, "-o", config.output.with_name(f"{config.output.name}-audit"))


def _beside(config: TuneConfig) -> list[Path]:
    """Return what other files the run read."""
    schema = None if config.rules is None else config.rules.json_schema
    return [path for path in (config.anchor, schema, config.reward) if path is not None]


def _folders(config: TuneConfig, work: Path) -> list[Path]:
    """Return where the runs' checkpoints and logs are: one folder, or one for each of several."""
    if config.runs == 1:
        return [work]
    return [averages.folder_of(work, number) for number in range(1, config.runs + 1)]


def _finish(config: TuneConfig, work: Path) -> None:
    """The log stands beside the bundle, for the client alone; checkpoints are gone."""
    log = work / averages.LOG_NAME
    target = config.output.parent / f"{config.output.name}.{averages.LOG_NAME}"
    if config.runs > 1:
        with staged_file(target, replace=True) as stage:
            stage.write_bytes(averages.joined_log(_folders(config, work)))
    elif log.is_file():
        log.replace(target)
    shutil.rmtree(work)


def _result(bundle: Bundle, ready: Ready, outcome: Outcome) -> dict[str, object]:
    text = ready.text
    return {
        "bundle": bundle.path.name,
        "bundle_digest": bundle.digest,
        "adapter_bytes": bundle.num_bytes,
        "adapter": bundle.manifest.adapter.kind,
        "placement": bundle.manifest.adapter.placement,
        "num_records": text.num_records,
        "num_truncated": text.num_truncated,
        "num_dropped": text.num_dropped,
        **({"num_in_both": text.num_in_both} if ready.eval_digests else {}),
        **outcome.figures(),
    }
