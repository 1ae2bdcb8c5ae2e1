"""What an evaluation records beside its figures (artefacts, counts, versions, command), and the table people read."""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

import offsite
from offsite.artefacts.bundle import Bundle
from offsite.artefacts.owner import OwnerRecord
from offsite.artefacts.package import Package
from offsite.config import VerbConfig, flag_name, is_positional
from offsite.console import say, table
from offsite.errors import ConfigError, DataError
from offsite.evaluation.preferences import wilson
from offsite.evaluation.regression import interval
from offsite.evaluation.results import (
    OF_HEADS,
    PREFERENCES,
    REWARDS,
    ROWS,
    TAGS,
    VALUES,
    Crossing,
    Parameters,
    Results,
    Summary,
    whole_figure,
)
from offsite.tasks.config import RuleSettings
from offsite.tensors import TensorSpec
from server.evaluation.config import named_paths
from server.plugging.ways import Way

OUTCOME_FIGURES = (
    "steps",
    "tokens",
    "seconds",
    "tokens_per_second",
    "peak_bytes",
    "first_loss",
    "final_loss",
    "best_loss",
    "best_step",
)
"""What is taken from the JSON object of ``distill`` and ``tune``; whatever else it holds stays where it is."""


class Crossings(TypedDict):
    """What crossed, under the names of `Results`."""

    package: Crossing
    bundles: dict[str, Crossing]


def crossings(package: Package, bundles: Mapping[str, Bundle]) -> Crossings:
    """Return what crossed from owner to client, and back by seed."""
    sent = Crossing(
        name=package.path.name,
        digest=package.digest,
        files=package.manifest.files,
        num_parameters=_size(package.manifest.tensors),
        disclosed=dict(package.manifest.figures),
    )
    returned = {
        seed: Crossing(
            name=bundle.path.name,
            digest=bundle.digest,
            files=bundle.manifest.files,
            num_parameters=_size(bundle.manifest.tensors),
            disclosed={str(name): value for name, value in bundle.manifest.disclosed.items()},
        )
        for seed, bundle in bundles.items()
    }
    return {"package": sent, "bundles": returned}


def parameters(model: nn.Module, record: OwnerRecord, package: Package, bundle: Bundle) -> Parameters:
    """Return how large the full model, its middle, the emulator and the adapter are."""
    middle = [model.get_submodule(name) for name in record.full_middle()]
    emulator = [name for name in package.block_tensors() if name.startswith("middle.")]
    return Parameters(
        full=sum(parameter.numel() for parameter in model.parameters()),
        middle=sum(parameter.numel() for block in middle for parameter in block.parameters()),
        emulator=sum(map(record.num_stored, emulator)),
        adapter=_size(bundle.manifest.tensors),
    )


def read_outcomes(files: Sequence[tuple[str, Path]]) -> dict[str, dict[str, float]]:
    """Return the figures of each run, from the JSON object that its verb printed.

    Raises:
        ConfigError: when a file cannot be read.
        DataError: when it does not end in a JSON object.
    """
    found = {}
    for name, path in files:
        try:
            lines = path.read_text(encoding="utf-8").strip().splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read outcome {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None
        except UnicodeDecodeError:
            raise DataError(f"outcome {path.name!r} is not UTF-8 text") from None
        found[name] = _outcome(path, lines)
    return found


def reproduce(config: VerbConfig) -> tuple[dict[str, Any], str]:
    """Return the settings and the command that gave them, with file names in place of paths."""
    settings: dict[str, Any] = {}
    words = ["offsite", config.verb]
    cls = type(config)
    # as it is typed: words, then the verb's own settings, then those that several verbs share
    fields = sorted(
        cls.model_fields.items(), key=lambda item: (not is_positional(item[1]), item[0] not in cls.__annotations__)
    )
    for name, field in fields:
        value = getattr(config, name)
        if name == "keys" and getattr(config, "registry", None) is None:
            continue  # read for the registry's sake alone
        shown = _shown(name, value)
        settings[name] = shown
        if value == field.default and not (name == "scale" and name in config.model_fields_set):
            continue  # a share that is given counts, the package may have one of its own
        if is_positional(field):
            words.append(shown)
        elif isinstance(value, bool):
            words.append(flag_name(name) if value else f"--no-{flag_name(name)[2:]}")
        else:
            many = shown if isinstance(shown, list) else [shown]
            for item in many:
                words += [flag_name(name), ",".join(f"{k}={v}" for k, v in item.items()) if name == "fields" else item]
    return settings, shlex.join(str(word) for word in words)


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    found = {"offsite": offsite.__version__, "python": platform.python_version()}
    return {**found, **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}}


def show(results: Results) -> None:
    """The table of rows and the figures are on stderr."""
    tasks = [(task, metric) for task, row in results.rows["zero_shot"].tasks.items() for metric in row]
    columns = ["", whole_figure(results), *(f"{task} {metric}" for task, metric in tasks), "seeds"]
    lines = []
    for row, found in results.rows.items():
        cells = [spread(found.perplexity), *(spread(found.tasks[task][metric]) for task, metric in tasks)]
        lines.append([row.replace("_", " "), *cells, str(len(found.perplexity.values))])
    size = f"{results.data.num_tokens:,} tokens"
    way = Way.stated(results.scale, results.way)
    part = "" if results.scale == 1 else f", {results.scale:g} of its update plugged in"
    part = f", plugged in: {way.told}" if way.word else part
    part += ", corrected" if results.corrected else ""
    part += f"; offset with beta {results.beta:g}" if results.beta is not None else ""
    table(f"{results.data.name}, {size}; {results.adapter.kind} {results.adapter.placement}{part}", columns, lines)
    for name, figure in results.metrics.items():
        if figure is not None and name != "capability":  # withheld zero-shot under its first name
            say(f"  {name.replace('_', ' ')}: {spread(figure, digits=3)}")
    for line in _of_preferences(results):
        say(f"  {line}")
    adapter_bytes = flat(results)["adapter_bytes"]
    say(f"  sent {results.package.num_bytes / 1e6:,.1f} MB, returned {adapter_bytes / 1e6:,.2f} MB")


def _of_preferences(results: Results) -> list[str]:
    """Return what is said of pairs, or of a head, beside the table: how sure the shares are, and what was recovered."""
    task = _own_task(results)
    if task is None:
        return []
    num, figures = results.tasks[task], results.rows["plugged_in"].tasks[task]
    noun = "pairs" if task in (PREFERENCES, REWARDS) else "words" if task == TAGS else "rows"
    if task == VALUES:
        each = [f"{name} {_sure(name, one.mean, num)}" for name, one in figures.items()]
        found = [f"{num} rows, 95%: plugged in {', '.join(each)}"]
    else:
        accuracy = figures["accuracy"].mean
        low, high = wilson(accuracy, num)
        what = "prefers the chosen answer in" if noun == "pairs" else "is right about"
        found = [f"{num} {noun}: plugged in {what} {accuracy:.1%} ({low:.1%} to {high:.1%}, 95%)"]
    for metric, recovered in results.task_metrics[task].items():
        found += [
            f"{metric.replace('_', ' ')}, {name.replace('_', ' ')}: {spread(figure, digits=3)}"
            for name, figure in recovered.items()
            if figure is not None and name != "gap"
        ]
    return found


def _own_task(results: Results) -> str | None:
    """Return the task that ``--data`` is measured as, beside perplexity; None of text."""
    return next((task for task in (PREFERENCES, *OF_HEADS) if task in results.tasks), None)


def _sure(metric: str, value: float, num: int) -> str:
    low, high = interval(metric, value, num)
    return f"{value:.4g} ({low:.4g} to {high:.4g})"


def _interval(task: str, metric: str, value: float, num: int) -> list[float] | None:
    """Return the 95 % interval of a figure; None of an F1, and of an error without an upper end."""
    if task == VALUES:
        found = list(interval(metric, value, num))
        return found if all(map(math.isfinite, found)) else None
    return None if metric in ("macro_f1", "f1") else list(wilson(value, num))


def _flat_preferences(results: Results) -> dict[str, Any]:
    """Return the figures of pairs, rows or words by row, with 95 % intervals, and recoveries; nothing of text."""
    task = _own_task(results)
    if task is None:
        return {}
    num = results.tasks[task]
    rows: dict[str, Any] = {}
    for row, found in results.rows.items():
        shares = {name: figure.mean for name, figure in found.tasks[task].items()}
        sure = {f"{name}_interval": _interval(task, name, share, num) for name, share in shares.items()}
        rows[row] = shares | {name: one for name, one in sure.items() if one is not None}
    recovered = {
        metric: {name: figure.mean if figure else None for name, figure in figures.items() if name != "gap"}
        for metric, figures in results.task_metrics[task].items()
    }
    counted = "num_pairs" if task in (PREFERENCES, REWARDS) else "num_words" if task == TAGS else "num_rows"
    return {task: {counted: num, "rows": rows, "recovered": recovered}}


def spread(figure: Summary, *, digits: int = 4) -> str:
    """Return mean and deviation as people read them."""
    mean = f"{figure.mean:.{digits}g}" if abs(figure.mean) < 10 ** max(digits, 4) else f"{figure.mean:,.0f}"
    return mean if figure.deviation is None else f"{mean} ± {figure.deviation:.2g}"


def flat(results: Results) -> dict[str, Any]:
    """Return the figures as one flat object: means by row and metric, null for what was not run."""
    rows = results.rows
    found: dict[str, Any] = {row: rows[row].perplexity.mean if row in rows else None for row in ROWS}
    found |= {name: figure.mean if figure else None for name, figure in results.metrics.items()}
    bundles = list(results.bundles.values())
    return {
        **found,
        "scale": results.scale,
        "way": str(Way.stated(results.scale, results.way)),
        "num_seeds": len(bundles),
        "package_bytes": results.package.num_bytes,
        "adapter_bytes": round(math.fsum(bundle.num_bytes for bundle in bundles) / len(bundles)),
        "emulator_share": results.parameters.emulator / results.parameters.middle,
        "seconds": results.seconds,
        **_flat_preferences(results),
    }


def _size(tensors: Mapping[str, TensorSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in tensors.values())


def _outcome(path: Path, lines: list[str]) -> dict[str, float]:
    try:
        stated = json.loads(lines[-1])
    except (IndexError, ValueError, RecursionError):
        try:
            stated = json.loads("\n".join(lines))
        except (ValueError, RecursionError):
            stated = None
    if not isinstance(stated, dict):
        raise DataError(f"outcome {path.name!r} does not end in the JSON object that a verb prints")
    figures = {name: stated.get(name) for name in OUTCOME_FIGURES}
    return {
        name: float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _shown(name: str, value: Any) -> Any:
    """Return a setting without its folders."""
    if name == "model":
        return Path(value).name
    if name in {"bundle", "reference", "log", "outcome"} and isinstance(value, tuple):
        return [f"{label}={path.name}" for label, path in named_paths(value)]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, RuleSettings):
        return value.word
    if name in {"data", "heldout", "spare"} and len(value) == 1:
        return value[0].name
    if isinstance(value, tuple):
        return [item.name if isinstance(item, Path) else item for item in value]
    return value
