"""The run's facts as plain data: what crossed and what did not, the limits of what was measured, and what it ran on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from offsite.evaluation.results import ROWS, Crossing, Results, RowName, whole_figure
from offsite.report.figures import NAMES
from offsite.report.numbers import number


@dataclass(frozen=True)
class File:
    """A file of an artefact; of its digest the first 16 digits."""

    name: str
    num_bytes: int
    digest: str


@dataclass(frozen=True)
class Artefact:
    """A package or a bundle: what it is called, how much it holds, what figures it states, and its files."""

    label: str
    num_bytes: int
    num_parameters: int
    stated: str
    files: tuple[File, ...]

    @classmethod
    def of(cls, name: str, crossing: Crossing) -> Artefact:
        """Return what the page shows of the artefact that the results know by that name."""
        stated = ", ".join(f"{key} {number(value)}" for key, value in crossing.disclosed.items())
        files = (
            File(file, entry.bytes, entry.sha256.removeprefix("sha256:")[:16] + "\N{HORIZONTAL ELLIPSIS}")
            for file, entry in crossing.files.items()
        )
        return cls(
            label=name if name == crossing.name else f"{crossing.name} ({name})",
            num_bytes=crossing.num_bytes,
            num_parameters=crossing.num_parameters,
            stated=stated or "none",
            files=tuple(files),
        )


@dataclass(frozen=True)
class Crossed:
    """What crossed either way, and the method that made what stands in for what did not."""

    package: Artefact
    bundles: tuple[Artefact, ...]
    method: str

    @classmethod
    def of(cls, results: Results) -> Crossed:
        """Return both artefacts' files."""
        return cls(
            package=Artefact.of(results.package.name, results.package),
            bundles=tuple(Artefact.of(name, crossing) for name, crossing in results.bundles.items()),
            method=_settings(results.method),
        )


@dataclass(frozen=True)
class Fact:
    """A line of the page's last table: its name, what is told, and the digests of it."""

    name: str
    told: str = ""
    digests: tuple[str, ...] = ()


def limits(results: Results) -> list[str]:
    """Return what the figures do not say."""
    rows = results.rows
    tuned = results.metrics.get("withheld_after_tuning")
    after = f": {number(tuned.mean)} nats per token are withheld then, by this client" if tuned else ""
    texts = [
        "Not differentially private. Nothing here bounds what the adapter reveals of the text it was tuned on, and no "
        "attack on it was tried.",
        f"The emulator gives capability away. Whoever has the package has a model of {whole_figure(results)} "
        f"{number(rows['emulator_zero_shot'].perplexity.mean)} on this text, against "
        f"{number(rows['zero_shot'].perplexity.mean)} of the full model ({_as_sent(results)}), and after tuning one of "
        f"{number(rows['emulator_tuned'].perplexity.mean)}{after}. How much of the middle could be rebuilt from it was "
        "not measured.",
        f"One text was measured on: {results.data.num_tokens:,} tokens, from a file of {results.data.num_records:,} "
        "records. Whether either side had seen it is for those who chose it to say.",
    ]
    if len(results.bundles) == 1:
        texts.append("One seed: how much of the figures is chance is not known.")
    missing = [NAMES[name] for name in ("lora_full", "ceiling", "full") if name not in rows]
    if missing:
        texts.append(f"Not run: {', '.join(missing)}. The recoveries against them are unknown.")
    return texts


def facts(results: Results) -> list[Fact]:
    """Return the digests of all that was used, and what it ran on."""
    return [
        Fact("held-out text", results.data.name, (results.data.sha256,)),
        Fact("full model", results.model, (results.base_digest,)),
        Fact("package", digests=(results.package.digest,)),
        *(Fact(f"bundle {name}", digests=(crossing.digest,)) for name, crossing in results.bundles.items()),
        *(Fact(f"reference {NAMES[name]}", digests=digests) for name, digests in _named(results.references)),
        *([] if results.beta is None else [Fact("offset", f"with beta {number(results.beta)}")]),
        Fact("device", results.device),
        Fact("versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())),
        Fact("took", f"{results.seconds:,.0f} s"),
    ]


def one_flag_a_line(command: str) -> str:
    """Return the command with every flag on a line of its own, still fit to be pasted into a shell."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def _named(references: Mapping[str, tuple[str, ...]]) -> list[tuple[RowName, tuple[str, ...]]]:
    return [(name, references[name]) for name in ROWS if name in references]


def _as_sent(results: Results) -> str:
    """Return how far the package as sent falls behind: what earlier versions called capability."""
    name = "withheld_zero_shot" if "withheld_zero_shot" in results.metrics else "capability"
    figure = results.metrics.get(name)
    return f"{name.replace('_', ' ')} {number(figure.mean)} nats per token" if figure else f"{name} not measured"


def _settings(method: Mapping[str, object]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in method.items() if key != "name")
    return f"{method.get('name', '?')} ({rest})" if rest else str(method.get("name", "?"))
