"""The report's facts: what crossed and what did not, the limits of what was measured, and how to reproduce it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from offsite.evaluation.results import ROWS, Crossing, Results, RowName
from offsite.report.figures import NAMES
from offsite.report.markup import Markup, el, join
from offsite.report.numbers import count, number, size


def crossed(results: Results) -> Markup:
    """Return the files of both artefacts and what stayed on either side."""
    counts = results.parameters
    share = counts.emulator / counts.middle
    stayed = [
        f"With the owner: the full model's middle of {count(counts.middle)} parameters. In its place the package holds "
        f"{count(counts.emulator)} ({share:.0%}), made by the method {_settings(results.method)}. What of them is the "
        "middle's own follows from the method; the ends are the model's own.",
        "With the owner: which blocks and channels of the full model were kept. The package has its own numbering.",
        "With the client: the text it tuned on. A bundle's files hold the adapter's tensors and the figures listed "
        "above, if any.",
        "With the client: checkpoints, the state of the optimiser and its run's log, unless it handed the log over.",
    ]
    intro = (
        "Every file, as the manifests bind them. An artefact's manifest, offsite.json, crosses too; its SHA-256 is the "
        "artefact's digest."
    )
    back = "one bundle" if len(results.bundles) == 1 else f"{len(results.bundles)} bundles, one for each seed"
    return join(
        el("h2", "What crossed, and what did not"),
        el("p", intro),
        el("h3", "From owner to client: the package"),
        _artefacts({results.package.name: results.package}),
        el("h3", f"From client to owner: {back}"),
        _artefacts(results.bundles),
        el("h3", "What stayed"),
        el("ul", *(el("li", text) for text in stayed)),
    )


def _artefacts(found: Mapping[str, Crossing]) -> Markup:
    titles = (el("th", "file"), el("th", "bytes", class_="number"), el("th", "SHA-256"))
    parts: list[Markup] = []
    for name, crossing in found.items():
        told = ", ".join(f"{key} {number(value)}" for key, value in crossing.disclosed.items()) or "none"
        holds = f"{size(crossing.num_bytes)}, {count(crossing.num_parameters)} numbers in tensors"
        label = name if name == crossing.name else f"{crossing.name} ({name})"
        parts.append(
            el(
                "tr",
                el("td", el("b", label), el("small", f"{holds}; figures stated: {told}"), colspan=3),
                class_="artefact",
            )
        )
        parts += [
            el(
                "tr",
                el("td", el("code", file)),
                el("td", f"{entry.bytes:,}", class_="number"),
                el("td", entry.sha256.removeprefix("sha256:")[:16] + "\N{HORIZONTAL ELLIPSIS}", class_="digest"),
            )
            for file, entry in crossing.files.items()
        ]
    return el("div", el("table", el("thead", el("tr", *titles)), el("tbody", *parts)), class_="scroll")


def limits(results: Results) -> Markup:
    """Return what the figures do not say."""
    rows = results.rows
    capability = results.metrics.get("capability")
    shown = f"{number(capability.mean)} nats per token" if capability else "not measured"
    texts = [
        "Not differentially private. Nothing here bounds what the adapter reveals of the text it was tuned on, and no "
        "attack on it was tried.",
        f"The emulator gives capability away. Whoever has the package has a model of perplexity "
        f"{number(rows['emulator_zero_shot'].perplexity.mean)} on this text, against "
        f"{number(rows['zero_shot'].perplexity.mean)} of the full model (capability {shown}), and after tuning one of "
        f"{number(rows['emulator_tuned'].perplexity.mean)}. How much of the middle could be rebuilt from it was not "
        "measured.",
        f"One text was measured on: {results.data.num_tokens:,} tokens, from a file of {results.data.num_records:,} "
        "records. Whether either side had seen it is for those who chose it to say.",
    ]
    if len(results.bundles) == 1:
        texts.append("One seed: how much of the figures is chance is not known.")
    missing = [NAMES[name] for name in ("lora_full", "ceiling", "full") if name not in rows]
    if missing:
        texts.append(f"Not run: {', '.join(missing)}. The recoveries against them are unknown.")
    return join(el("h2", "Limits"), el("ul", *(el("li", text) for text in texts)))


def reproduce(results: Results) -> Markup:
    """Return the command, the digests and what it ran on."""
    facts: list[tuple[str, Any]] = [
        ("held-out text", join(results.data.name, el("div", results.data.sha256, class_="digest"))),
        ("full model", join(results.model, el("div", results.base_digest, class_="digest"))),
        ("package", el("div", results.package.digest, class_="digest")),
        *((f"bundle {name}", el("div", c.digest, class_="digest")) for name, c in results.bundles.items()),
        *(
            (f"reference {NAMES[name]}", join(*(el("div", digest, class_="digest") for digest in digests)))
            for name, digests in _named(results.references)
        ),
        ("device", results.device),
        ("versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())),
        ("took", f"{results.seconds:,.0f} s"),
    ]
    lines = [el("tr", el("th", name, scope="row"), el("td", value)) for name, value in facts]
    return join(
        el("h2", "How to reproduce it"),
        el("p", "With these files in one folder:"),
        el("pre", _one_flag_a_line(results.command)),
        el("div", el("table", el("tbody", *lines)), class_="scroll"),
    )


def _one_flag_a_line(command: str) -> str:
    """The command with every flag on a line of its own, still fit to be pasted into a shell."""
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


def _settings(method: Mapping[str, object]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in method.items() if key != "name")
    return f"{method.get('name', '?')} ({rest})" if rest else str(method.get("name", "?"))
