"""Where the demo plays: both parties' folders and text, the model by its files, and what every play has in common."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offsite.demo.config import DemoConfig
from offsite.digests import sha256_bytes, sha256_file
from offsite.errors import ConfigError
from offsite.evaluation.results import RESULTS_NAME, Results, read_results
from offsite.modelling.fetch import fetched_folder, known
from offsite.stages import Stage, play

AT_REGISTRY = ("--registry", "registry", "--keys", "keys")


@dataclass(frozen=True)
class Scene:
    """Who plays where, with which model and text: names as the verbs take them, digests of what they stand for.

    Args:
        text: digest of every file that a party was given, by a name.
        steps: further words of some verbs, by the stage's name.
    """

    owner: Path
    client: Path
    notes: Path
    report: Path
    model: str
    model_digest: str
    text: Mapping[str, str]
    steps: Mapping[str, list[str]]
    seed: list[str]

    def whole(self) -> Stage:
        """Return the finished stage that made a package of everything, on which the reference is tuned."""
        words = ["distill", self.model, "--method", "keep-all", "--steps", "0", "-o", "keep-all"]
        kept = Stage("keep-all", self.owner, words, self.owner / "keep-all", {"model": self.model_digest})
        play([kept], self.notes)
        return kept

    def plug_in(self, package_digest: str, bundle_id: str) -> dict[str, str]:
        """The accepted bundle is plugged in. Returns what that depends on."""
        words = ["plug-in", self.model, bundle_id, *AT_REGISTRY, "-o", "adapted"]
        inputs = {"model": self.model_digest, "package": package_digest, "bundle": bundle_id}
        play([Stage("plug-in", self.owner, words, self.owner / "adapted", inputs)], self.notes)
        return inputs

    def reported(self) -> Results:
        """Return what was measured, once its page stands."""
        words = ["report", "run", "evaluation", "-o", str(self.report.resolve())]
        inputs = {"results": sha256_file(self.owner / "evaluation" / RESULTS_NAME)}
        play([Stage("report", self.owner, words, self.report, inputs)], self.notes)
        return read_results(self.owner / "evaluation")


def set_scene(
    config: DemoConfig,
    given: Mapping[str, tuple[Path, Mapping[str, tuple[str, ...]]]],
    steps: Mapping[str, list[str]],
) -> Scene:
    """Return the scene with each party's files in its folder and the model on this machine.

    Args:
        given: of each text its file, and the names that it has at the ``owner`` and the ``client``.
        steps: further words of some verbs, by the stage's name.

    Raises:
        ConfigError: when the output folder holds what no demo has made.
        RunFailed: when the model cannot be fetched.
    """
    owner, client, notes = folders_of(config.output)
    for file, names in given.values():
        for party, folder in (("owner", owner), ("client", client)):
            for name in names.get(party, ()):
                give(file, folder / name)
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    if model in known():
        play([Stage("fetch", owner, ["fetch", model])], notes)
    return Scene(
        owner=owner,
        client=client,
        notes=notes,
        report=config.output / "report.html",
        model=model,
        model_digest=identity(model),
        text={name: sha256_file(file) for name, (file, _) in given.items()},
        steps=steps,
        seed=["--seed", str(config.seed)],
    )


def folders_of(output: Path) -> tuple[Path, Path, Path]:
    """Return the owner's folder, the client's and the one for notes; all stand.

    Raises:
        ConfigError: when `output` holds what no demo has made, for steps that are run again replace what they left.
    """
    owner, client, notes = output / "owner", output / "client", output / "stages"
    if (output.exists() and not output.is_dir()) or (not notes.is_dir() and output.is_dir() and any(output.iterdir())):
        raise ConfigError(
            f"output {output.name!r} exists and is not an earlier demo's folder", hint="choose another name with -o"
        )
    try:
        for folder in (notes, owner, client):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make folder {output.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    return owner, client, notes


def identity(model: str) -> str:
    """Return a digest of the model's files; of its name alone when it is not on this machine."""
    folder = Path(model) if Path(model).is_dir() else fetched_folder(model) if model in known() else None
    if folder is None:
        return model
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return sha256_bytes("\n".join(f"{path.name} {sha256_file(path)}" for path in files).encode())


def give(source: Path, target: Path) -> None:
    """The file is in a party's folder, too."""
    shutil.copyfile(source, target)
