"""The stages of an exploration, each a process of ``distill`` or ``rehearse``, run once and taken from then on.

All paths are relative to the work folder, which holds the text shared out, the packages and the rehearsals.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulator.dial.config import FEWEST_SIZES, SIZED, ClientSettings, DialConfig
from emulator.dial.exploration import Rung, Tried, figures_of
from emulator.dial.sizes import LADDERS, METHOD_OF, Shape, halfway, nearest
from emulator.dial.texts import Texts
from emulator.distillation.config import DistillConfig, OwnTextSettings
from offsite.artefacts.owner import owner_record_path
from offsite.config import flag_name, is_positional
from offsite.console import say
from offsite.errors import ConfigError, RunFailed, WrongBinding
from offsite.evaluation.figures import withheld
from offsite.evaluation.rehearsal import Rehearsal, read_rehearsal
from offsite.stages import Stage, play
from offsite.text.config import TextSettings

NOTES = "stages"
REFERENCE = "keep-all"

_OWN = {
    *("output", "public", "field_text", "steps", "resume", "launch", "tensorboard", "report_to", *SIZED),
    *OwnTextSettings.__annotations__,
    *(name for name in TextSettings.__annotations__),
}
"""Settings of ``distill`` that the stages have values of their own for."""


@dataclass(frozen=True)
class Scene:
    """Everything that stages are made of.

    Attributes:
        work: the folder in which they run.
        base_digest: of the full model.
        shape: what of the model sizes follow from.
    """

    config: DialConfig
    work: Path
    base_digest: str
    shape: Shape
    texts: Texts

    @property
    def notes(self) -> Path:
        """Where stages leave notes of what they did."""
        return self.work / NOTES

    @property
    def model(self) -> str:
        """The model as a process in another folder finds it."""
        path = Path(self.config.model)
        return str(path.resolve()) if path.is_dir() else self.config.model


@dataclass(frozen=True)
class Reference:
    """The full model as it was, and after LoRA on it, on the text measured on."""

    zero_shot: float
    lora_full: float


def explore(scene: Scene) -> tuple[Reference, list[Tried], list[Rung]]:
    """Return the reference, every size with a client, and the sizes between them without one.

    Raises:
        RunFailed: when a stage fails; those that ended well are kept.
        WrongBinding: when a rehearsal in the work folder is of something else.
        ConfigError: when a method makes too few different sizes of the model.
    """
    methods = scene.config.explore_method
    sizes = [(method, size) for method in methods for size in nearest(method, scene.config.explore_size, scene.shape)]
    for method in methods:
        if (num := sum(name == method for name, _ in sizes)) < FEWEST_SIZES:
            raise ConfigError(
                f"--explore-size: {method} makes {num} different sizes of this model of those, expected at least "
                f"{FEWEST_SIZES}",
                hint="name sizes that are further apart, as shares of the middle",
            )
    rungs = [
        (method, size)
        for method in methods
        for size in halfway(method, [each for name, each in sizes if name == method], scene.shape)
    ]
    say(
        f"dial: {len(sizes)} sizes with a client of {scene.config.client.steps} steps each, {len(rungs)} between them "
        "without, and LoRA on the full model; what ended well is not run again"
    )
    made = [package_stage(scene, method, size) for method, size in sizes]
    kept = _reference_stage(scene)
    _play(scene, [kept, *made], "packages")
    played = [rehearsal_stage(scene, stage, method) for stage, (method, _) in zip(made, sizes, strict=True)]
    compared = _reference_rehearsal(scene, kept)
    _play(scene, [compared, *played], "clients")
    measured = [package_stage(scene, method, size, is_rung=True) for method, size in rungs]
    _play(scene, measured, "sizes between", forget=True)
    reference = _reference(scene, kept, compared)
    tried = [
        tried_size(scene, reference, method, size, stage, client)
        for (method, size), stage, client in zip(sizes, made, played, strict=True)
    ]
    ladder = [
        Rung(
            method=method,
            size=size,
            field_kl=max(0.0, float(stage.outcome["field_kl"])),
            num_bytes=int(stage.outcome["package_bytes"]),
        )
        for (method, size), stage in zip(rungs, measured, strict=True)
    ]
    return reference, tried, ladder


def make(scene: Scene, method: str, size: float) -> tuple[Stage, Stage]:
    """Return the finished stages that made a package of that size and played a client on it."""
    made = package_stage(scene, method, size)
    _play(scene, [made], "the package asked for")
    client = rehearsal_stage(scene, made, method)
    _play(scene, [client], "its client")
    return made, client


def package_stage(scene: Scene, method: str, size: float, *, is_rung: bool = False) -> Stage:
    """Return the stage that makes a package of that size, training-free, and measures it on the field's text.

    Of a rung only the record stays, as a sign that it was made: its package is taken away again.
    """
    name = f"{'rung-' if is_rung else ''}{method}-{size:.6g}"
    words = ["distill", scene.model, *LADDERS[method].words(size, scene.shape), "--steps", "0", "-o", name]
    words += [word for file in scene.texts.calibration for word in ("--public", file)]
    words += [word for file in scene.texts.measured for word in ("--field-text", file)]
    words += _carried(scene.config, method)
    inputs = {"model": scene.base_digest, "text": scene.texts.digest("calibration", "measured")}
    leaves = scene.work / name
    return Stage(name, scene.work, words, owner_record_path(leaves) if is_rung else leaves, inputs)


def rehearsal_stage(scene: Scene, made: Stage, method: str) -> Stage:
    """Return the stage that plays a client on the package that the finished stage made."""
    client = scene.config.client
    if not LADDERS[method].carries_everywhere and client.placement == "all":
        client = client.model_copy(update={"placement": f"{scene.config.bottom}+{scene.config.top}"})
    return _rehearsal(scene, made, client, [])


def tried_size(scene: Scene, reference: Reference, method: str, size: float, made: Stage, client: Stage) -> Tried:
    """Return what a size came to.

    Raises:
        WrongBinding: when the rehearsal is of another package, model or text.
    """
    found, num_bytes = _rehearsed(scene, made, client), int(made.outcome["package_bytes"])
    if not math.isclose(found.zero_shot, reference.zero_shot, rel_tol=1e-3):  # threads differ in what they round
        raise WrongBinding(f"rehearsal {client.name!r} was measured on other text than the reference")
    best = found.best
    return Tried(
        method=method,
        size=size,
        package_digest=found.package_digest,
        field_kl=max(0.0, float(made.outcome["field_kl"])),
        emulator_zero_shot=found.emulator_zero_shot,
        emulator_tuned=best.emulator_tuned,
        plugged_in=best.plugged_in,
        scale=best.scale,
        withheld_zero_shot=withheld(found.emulator_zero_shot, found.zero_shot),
        figures=figures_of(reference.zero_shot, reference.lora_full, best.emulator_tuned, best.plugged_in, num_bytes),
    )


def _reference_stage(scene: Scene) -> Stage:
    """Return the stage that makes a package of everything; it stays in the work folder and is never to be sent."""
    words = ["distill", scene.model, "--method", "keep-all", "--steps", "0", "-o", REFERENCE]
    words += [word for name in ("bottom", "top") for word in (f"--{name}", str(getattr(scene.config, name)))]
    return Stage(REFERENCE, scene.work, words, scene.work / REFERENCE, {"model": scene.base_digest})


def _reference_rehearsal(scene: Scene, kept: Stage) -> Stage:
    """Return the stage that tunes LoRA on everything: the client's own adapter where that is low-rank."""
    client, changed = scene.config.client, {"placement": "all"}
    if client.adapter not in ("lora", "rslora", "dora"):
        usual = ClientSettings()
        changed |= {"adapter": usual.adapter}
        client = client.model_copy(update={"learning_rate": usual.learning_rate})
    return _rehearsal(scene, kept, client.model_copy(update=changed), ["--scale", "1"])


def _rehearsal(scene: Scene, made: Stage, client: ClientSettings, more: Sequence[str]) -> Stage:
    name, config = f"{made.name}.client.json", scene.config
    words = ["rehearse", scene.model, "--package", made.name, "-o", name]
    words += [word for file in scene.texts.tuned for word in ("--data", file)]
    words += [word for file in scene.texts.measured for word in ("--heldout", file)]
    words += [word for key, value in client.model_dump().items() for word in (flag_name(key), f"{value}")]
    words += ["--block-tokens", str(config.block_tokens), "--seed", str(config.seed), "--device", config.device]
    words += ["--precision", config.precision, *more]
    inputs = {"text": scene.texts.digest("tuned", "measured"), "package": str(made.outcome.get("package_digest", ""))}
    return Stage(f"client-{made.name}", scene.work, words, scene.work / name, inputs)


def _rehearsed(scene: Scene, made: Stage, client: Stage) -> Rehearsal:
    found = read_rehearsal(scene.work / str(client.outcome["rehearsal"]))
    if found.package_digest != made.outcome["package_digest"] or found.base_digest != scene.base_digest:
        raise WrongBinding(f"rehearsal {client.name!r} is of another package or model", hint="delete the work folder")
    return found


def _reference(scene: Scene, kept: Stage, compared: Stage) -> Reference:
    """Return the reference's figures.

    Raises:
        RunFailed: when LoRA on the full model made nothing better, so that there is nothing to recover.
    """
    found = _rehearsed(scene, kept, compared)
    if found.best.plugged_in >= found.zero_shot:
        raise RunFailed(
            f"LoRA on the full model gained nothing on the field's text ({found.zero_shot:.4g} before, "
            f"{found.best.plugged_in:.4g} after)",
            hint="try another --client learning_rate, more steps, or more text",
        )
    return Reference(found.zero_shot, found.best.plugged_in)


def _carried(config: DialConfig, method: str) -> list[str]:
    """Return the words of those settings of ``distill`` that were given and that a stage of the method takes."""
    words: list[str] = []
    for name, field in DistillConfig.model_fields.items():
        if name not in config.model_fields_set or name in _OWN or is_positional(field):
            continue
        if METHOD_OF.get(name, method) != method:
            continue
        words += _typed(flag_name(name), getattr(config, name))
    return words


def _typed(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if value is None:
        return []
    return [flag, str(value.resolve()) if isinstance(value, Path) else str(value)]


def _play(scene: Scene, stages: Sequence[Stage], what: str, *, forget: bool = False) -> None:
    """The stages have ended well, a few at a time; with `forget` what they made is gone but for its sign."""
    num = scene.config.parallel
    for start in range(0, len(stages), num):
        batch = stages[start : start + num]
        say(f"dial: {what}, {start + 1} to {start + len(batch)} of {len(stages)}")
        for stage in batch:
            _sweep(stage, forget=forget)
        play(batch, scene.notes)
        if forget:
            for stage in batch:
                _sweep(stage, forget=True)


def _sweep(stage: Stage, *, forget: bool) -> None:
    """Nothing that a broken run left stands in the stage's way: a package without its record, a record alone."""
    if stage.words[0] != "distill":
        return
    package = stage.party / stage.name
    if forget or not owner_record_path(package).exists():
        shutil.rmtree(package, ignore_errors=True)
        shutil.rmtree(package.with_name(f"{package.name}.work"), ignore_errors=True)
    elif not package.exists():
        owner_record_path(package).unlink()
