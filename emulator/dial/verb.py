"""``offsite distill``: one package of a given size, or with ``--target`` the size that gives what its owner asks for.

An exploration tries a few sizes, with a rehearsed client each, and fits a line through them. ``--target`` then makes
the package of the size found and rehearses a client on that, too: what was predicted and what was measured stand in
the owner's record. ``--explore`` ends with the page. What a run has done is in ``PACKAGE.work``, and not done again.
"""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emulator.compression.width import MULTIPLE
from emulator.dial.config import DialConfig
from emulator.dial.exploration import Exploration, FittedLine, Made, Rung, Tried, Wanted, write_exploration
from emulator.dial.explore import NOTES, Reference, Scene, explore, make, tried_size
from emulator.dial.page import verdict, write_page
from emulator.dial.predict import Answer, Curve, answer, curve
from emulator.dial.sizes import LADDERS, Shape
from emulator.dial.targets import Target
from emulator.dial.texts import Texts, read_texts, share_out, write_texts
from emulator.distillation import distill
from emulator.distillation.selfwritten import forget, own_text
from offsite import __version__
from offsite.artefacts.owner import Dialled, owner_record_path, read_owner_record, write_owner_record
from offsite.artefacts.package import open_package
from offsite.config import flag_name, is_positional
from offsite.console import say, say_next, table
from offsite.digests import model_digest
from offsite.errors import ConfigError, RunFailed, WrongBinding
from offsite.modelling.causal import refuse_uncausal
from offsite.modelling.load import load_model, refuse_encoder
from offsite.modelling.mlps import find_mlps
from offsite.modelling.split import make_plan
from offsite.staging import refuse_existing, remove
from offsite.text.records import require_files
from offsite.training.devices import choose_device
from offsite.training.precision import PRECISION_NOTE, settled

LIBRARIES = ("torch", "transformers", "peft")
CLOSE = 0.05
"""Recoveries that differ by more are said to: the prediction is meant to be as near as this."""


def run(config: DialConfig) -> dict[str, object]:
    """Do what ``offsite distill`` says: with ``--target`` or ``--explore`` an exploration, otherwise one package.

    Raises:
        OffsiteError: with the reason; no package then stands. When what was asked for cannot be met (RunFailed), the
            page and its file do.
    """
    return _dial(config) if config.is_dial else distill.run(config)


@dataclass(frozen=True)
class _Paths:
    """What stands beside the package: the page, its file and the work folder."""

    page: Path
    file: Path
    work: Path

    @classmethod
    def beside(cls, output: Path) -> _Paths:
        return cls(*(output.with_name(output.name + end) for end in (".explore.html", ".explore.json", ".work")))


def _dial(config: DialConfig) -> dict[str, object]:
    began, paths = time.monotonic(), _Paths.beside(config.output)
    _require_free(config, paths)
    refuse_encoder(config.model)
    require_files(() if config.writes_itself else config.public)
    require_files(config.field_text)
    scene = _scene(config, paths)
    reference, tried, ladder = explore(scene)
    curves = [_curve(method, tried, ladder, reference) for method in config.explore_method]
    target = config.asked
    found = (
        None if target is None else answer(target, curves, [_shares(method, scene) for method in config.explore_method])
    )
    made = None
    package: Path | None = None
    if found is not None and found.is_met and not config.explore:
        made, package = _made(scene, reference, found)
    exploration = _exploration(config, scene, reference, (tried, ladder), curves, (target, found, made), began)
    digest = write_exploration(paths.file, exploration)
    write_page(paths.page, exploration, file=paths.file.name)
    _show(exploration)
    say(f"dial: {paths.page.name}: open it in a browser")
    told: dict[str, object] = {"exploration": paths.file.name, "page": paths.page.name, "num_tried": len(tried)}
    if target is not None and found is not None:
        told |= {"target": target.name, "value": target.value, "method": found.method, "size": found.size}
        told |= {f"predicted_{name}": value for name, value in found.predicted.model_dump().items()}
        if not found.is_met:
            raise _unmet(target, found, paths)
    if made is not None and package is not None and target is not None and found is not None:
        _publish(config, package, found, made, target, digest)
        told |= made.measured.model_dump() | {"package": config.output.name, "package_digest": made.package_digest}
        told |= {"scale": made.scale, "learning_rate": made.learning_rate}
        _say_made(config, target, found, made)
        remove(paths.work)
        if config.writes_itself:
            forget(config)
    else:
        _say_kept(config, paths)
    return {**told, "seconds": round(time.monotonic() - began, 1)}


def _require_free(config: DialConfig, paths: _Paths) -> None:
    """Return only if nothing of anybody else's stands where this run writes.

    Raises:
        ConfigError: naming what does.
    """
    if not config.explore:
        refuse_existing(config.output)
    work = paths.work
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ConfigError(f"work folder {work.name!r} is not a folder of its own", hint="choose another name with -o")
    if work.is_dir() and not (work / NOTES).is_dir() and any(work.iterdir()):
        raise ConfigError(f"work folder {work.name!r} is another run's", hint="choose another name with -o")
    if not work.is_dir():
        for path in (paths.page, paths.file):
            refuse_existing(path)


def _scene(config: DialConfig, paths: _Paths) -> Scene:
    """Return what stages are made of; the text is shared out in the work folder."""
    own = own_text(config) if config.writes_itself else None
    say("dial: reading the text, and sharing it out: to calibrate on, to tune on, to measure on")
    public, field = read_texts(
        config.public,
        config.field_text,
        fields=config.fields,
        document_field=config.document_field,
        separator=config.separator,
        own=own,
    )
    shared = share_out(public, field, seed=config.seed)
    digest, shape = _look(config)
    try:
        (paths.work / NOTES).mkdir(parents=True, exist_ok=True)
        texts: Texts = write_texts(paths.work, shared)
    except OSError as error:
        raise RunFailed(f"cannot write {paths.work.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    note = paths.work / NOTES / PRECISION_NOTE
    arithmetic = settled(config.precision, choose_device(config.device), note=note)  # one for all that is compared
    return Scene(config.model_copy(update={"precision": arithmetic}), paths.work, digest, shape, texts)


def _look(config: DialConfig) -> tuple[str, Shape]:
    """Return the full model's digest and what sizes follow from; it is gone from memory afterwards."""
    say(f"loading {Path(config.model).name!r}")
    full = load_model(config.model)
    plan = make_plan(full, num_bottom=config.bottom, num_top=config.top)
    refuse_uncausal(full)
    block = list(full.get_submodule(plan.stack.name).children())[plan.num_bottom]
    parts = find_mlps(block) if "width" in config.explore_method else ()
    num_channels = parts[0].num_channels if parts else 1
    return model_digest(full), Shape(plan.num_middle, num_channels, MULTIPLE)


def _shares(method: str, scene: Scene) -> list[float]:
    return list(LADDERS[method].shares(scene.shape))


def _curve(method: str, tried: list[Tried], ladder: list[Rung], reference: Reference) -> Curve:
    """Return the curve of one method.

    Raises:
        RunFailed: when its sizes are too much alike for a line.
    """
    try:
        found = curve(
            method,
            [one for one in tried if one.method == method],
            [rung for rung in ladder if rung.method == method],
            zero_shot=reference.zero_shot,
            lora_full=reference.lora_full,
        )
    except ValueError as error:
        raise RunFailed(f"method {method}: {error}", hint="try other sizes with --explore-size") from None
    if found.is_turned:
        say(f"warning: {method}: a larger size did worse somewhere; such neighbours are predicted from their mean")
    if found.line.b <= 0:
        say(f"warning: {method}: what withheld more recovered more: the line says little; try more --client steps")
    return found


def _made(scene: Scene, reference: Reference, found: Answer) -> tuple[Made, Path]:
    """Return the package that was made in the work folder, and what a client came to on it."""
    say(f"dial: {found.method} {found.size:.4g} is predicted to give what was asked for; it is made, and rehearsed")
    stage, client = make(scene, found.method, found.size)
    one = tried_size(scene, reference, found.method, found.size, stage, client)
    rate = float(client.outcome["learning_rate"])
    made = Made(package_digest=one.package_digest, scale=one.scale, learning_rate=rate, measured=one.figures)
    return made, scene.work / stage.name


def _exploration(
    config: DialConfig,
    scene: Scene,
    reference: Reference,
    sizes: tuple[list[Tried], list[Rung]],
    curves: list[Curve],
    asked: tuple[Target | None, Answer | None, Made | None],
    began: float,
) -> Exploration:
    target, found, made = asked
    wanted = None
    if target is not None and found is not None:
        wanted = Wanted(
            target=target.name,
            value=target.value,
            is_met=found.is_met,
            method=found.method,
            size=found.size,
            predicted=found.predicted,
        )
    return Exploration(
        model=Path(config.model).name,
        base_digest=scene.base_digest,
        calibration=scene.texts.stated["calibration"],
        tuned_on=scene.texts.stated["tuned"],
        measured_on=scene.texts.stated["measured"],
        client=config.client.model_dump(),
        zero_shot=reference.zero_shot,
        lora_full=reference.lora_full,
        tried=tuple(sizes[0]),
        ladder=tuple(sizes[1]),
        lines=tuple(
            FittedLine(method=one.method, a=one.line.a, b=one.line.b, residual=one.line.residual) for one in curves
        ),
        wanted=wanted,
        made=made,
        command=command(config),
        versions={"offsite": __version__, **{name: version(name) for name in LIBRARIES}},
        seconds=round(time.monotonic() - began, 1),
    )


def command(config: DialConfig, *, as_typed: bool = False) -> str:
    """Return the command that gave these settings, with file names in place of paths unless it is to be typed again."""
    words = ["offsite", "distill", config.model if as_typed else Path(config.model).name]
    for name, field in DialConfig.model_fields.items():
        if name not in config.model_fields_set or is_positional(field):
            continue
        value, flag = getattr(config, name), flag_name(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words += [flag, str(one) if as_typed and isinstance(one, Path) else _word(one)]
    return shlex.join(words)


def _word(value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    if hasattr(value, "model_fields_set"):
        return ",".join(f"{name}={getattr(value, name)}" for name in sorted(value.model_fields_set))
    if isinstance(value, dict):
        return ",".join(f"{name}={one}" for name, one in value.items())
    return str(value)


def _publish(config: DialConfig, made: Path, found: Answer, measured: Made, target: Target, digest: str) -> None:
    """The package and its record, which says what was predicted and measured, stand under their names.

    Raises:
        WrongBinding: when the package in the work folder is no longer the one that was rehearsed.
        RunFailed: when it cannot be moved.
    """
    record = read_owner_record(owner_record_path(made))
    if not record.package_digest == open_package(made).digest == measured.package_digest:
        raise WrongBinding(f"package {made.name!r} is not the one that was rehearsed", hint="delete the work folder")
    dialled = Dialled(
        target=target.name,
        value=target.value,
        method=found.method,
        size=found.size,
        predicted=found.predicted,
        measured=measured.measured,
        scale=measured.scale,
        exploration=digest,
    )
    refuse_existing(config.output)
    record_path = write_owner_record(config.output, record.model_copy(update={"dial": dialled}))
    try:
        made.rename(config.output)
        parent = os.open(config.output.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        record_path.unlink(missing_ok=True)
        raise RunFailed(f"cannot write {config.output.name!r}: {(error.strerror or 'i/o error').lower()}") from None


def _unmet(target: Target, found: Answer, paths: _Paths) -> RunFailed:
    figures = found.predicted
    return RunFailed(
        f"{target.shown()} cannot be met within the sizes explored: the nearest is "
        f"{target.shown(target.kind.read(figures))}, {found.method} {found.size:.3g} (recovery {figures.recovery:.2f}, "
        f"withheld {figures.withheld:.2f} nats, gap {figures.gap:.2f}, {target_bytes(figures.num_bytes)})",
        hint=f"{paths.page.name} shows every size; ask for what one gives, or try others with --explore-size",
    )


def target_bytes(num_bytes: int) -> str:
    """Return an amount of bytes as people read it."""
    return Target("bytes", float(num_bytes)).shown(float(num_bytes)).replace("\N{NO-BREAK SPACE}", " ")


def _say_made(config: DialConfig, target: Target, found: Answer, made: Made) -> None:
    """What was predicted is on stderr beside what was measured, and what to do with the package."""
    predicted, measured = found.predicted, made.measured
    if not target.is_met(measured):
        read = target.kind.read
        say(
            f"warning: asked for {target.shown()}, predicted {target.shown(read(predicted))}, "
            f"measured {target.shown(read(measured))}"
        )
    if abs(predicted.recovery - measured.recovery) > CLOSE:
        say(
            f"warning: predicted recovery {predicted.recovery:.2f}, measured {measured.recovery:.2f}: the line is rough"
        )
    say(f"dial: {config.output.name} of {measured.num_bytes:,} bytes is written; both stand in its owner's record")
    say(f"dial: keep {config.output.name}.owner.json: plug-in needs it, and it is not to be sent")
    if made.scale != 1:
        say(f"plug-in takes {made.scale:g} of what comes back, unless --scale says otherwise")
    say_next("offsite", "mark", config.output, "--recipient", "FINGERPRINT", "-o", f"{config.output}.marked")


def _say_kept(config: DialConfig, paths: _Paths) -> None:
    say(f"dial: what was tried is kept in {paths.work.name!r}: the same command with a --target goes on from it")
    if not config.target:
        words = [word for word in shlex.split(command(config, as_typed=True)) if word != "--explore"]
        say_next(*words, "--target", "recovery=0.8")


def _show(found: Exploration) -> None:
    """The table is on stderr."""
    lines = [
        [f"{one.method} {one.size:.3g}", target_bytes(one.figures.num_bytes), f"{one.field_kl:.3f}",
         f"{one.emulator_zero_shot:,.2f}", f"{one.emulator_tuned:,.2f}", f"{one.figures.withheld:.2f}",
         f"{one.plugged_in:,.2f}", f"{one.scale:g}", f"{one.figures.recovery:.2f}", f"{one.figures.recovery_nats:.2f}",
         f"{one.figures.gap:.2f}"]
        for one in found.tried
    ]  # fmt: skip
    for name, one in (("predicted", found.wanted), ("made", found.made)):
        if one is None:
            continue
        figures = one.predicted if isinstance(one, Wanted) else one.measured
        shown = [f"{figures.recovery:.2f}", f"{figures.recovery_nats:.2f}", f"{figures.gap:.2f}"]
        cells = [target_bytes(figures.num_bytes), "", "", "", f"{figures.withheld:.2f}", "", "", *shown]
        lines.append([name, *cells])
    columns = [
        "size",
        "bytes",
        "KL",
        "as sent",
        "tuned",
        "withheld",
        "plugged in",
        "share",
        "recovery",
        "in nats",
        "gap",
    ]
    table(f"full model {found.zero_shot:.2f}, with LoRA {found.lora_full:.2f}, on text of the field", columns, lines)
    for line in found.lines:
        say(f"  {line.method}: recovery = {line.a:.3f} - {line.b:.3f} withheld, within {line.residual:.3f}")
    if text := verdict(found):
        say(text.replace("\N{NO-BREAK SPACE}", " "))
