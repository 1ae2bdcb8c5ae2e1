"""Every so many rounds of a federation the emulator is realigned, by the owner's own verb in a process of its own.

Roles do not import each other: what crosses is a round folder in, and a folder with the emulator's difference out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapters.updates import Update, combined, from_tensors, to_tensors
from offsite.artefacts.package import Package
from offsite.artefacts.round import EMULATOR_FILE, Round
from offsite.console import muted, say
from offsite.stages import Stage, play
from offsite.staging import staged_folder
from offsite.tensors import read_header, read_tensors, write_tensors
from server.federation.config import FederationConfig

Ask = Callable[[Update], Round]


class Realigner:
    """The emulator's difference from the package, from round to round.

    Args:
        folder: the federation's own, where what was done is found again.
    """

    def __init__(self, config: FederationConfig, package: Package, folder: Path) -> None:
        self._config, self._package, self._folder = config, package, folder

    def before(self, number: int, ask: Ask) -> Update:
        """Return the emulator's difference with which round `number` is asked; realigned first when it is due.

        Args:
            ask: makes the round's folder with a given difference, for the verb to read what the rounds added.

        Raises:
            RunFailed: when the verb fails; the same command goes on.
        """
        every = self._config.realign_every
        due = 0 if every == 0 else (number - 1) // every * every  # the last round after which it was, or is, done
        if due == 0:
            return {}
        place = self._folder / f"emulator-after-{due:04d}"
        if not place.is_dir():
            earlier = self._read(self._folder / f"emulator-after-{due - every:04d}")
            self._realign(due, place, earlier, ask(earlier))
        return self._read(place)

    def _realign(self, due: int, place: Path, earlier: Update, round_: Round) -> None:
        config, out = self._config, self._folder / f"realigned-{due:04d}"
        say(f"realigning the emulator after round {due} on public text")
        words = ["realign", str(self._package.path.resolve()), str(round_.path.resolve()), "--model", config.model]
        words += [word for path in config.public for word in ("--public", str(path.resolve()))]
        words += ["--steps", str(config.realign_steps)]
        words += ["--block-tokens", str(config.block_tokens), "-o", str(out.resolve())]
        words += [] if config.realign_rank is None else ["--rank", str(config.realign_rank)]
        stage = Stage("realign", self._folder, words, leaves=out, inputs={"round": round_.digest})
        with muted():
            play([stage], self._folder / "stages" / f"{due:04d}")
        found = stage.outcome
        kept = "" if found["is_better"] else ": not used"
        say(f"  KL on held-out public text: {found['kl_before']:.4g} before, {found['kl_after']:.4g} after{kept}")
        difference = self._read(out)
        total = combined([earlier, difference], [1.0, 1.0]) if earlier and difference else earlier or difference
        with staged_folder(place) as fresh:
            if total:
                write_tensors(fresh / EMULATOR_FILE, to_tensors(total))

    def _read(self, folder: Path) -> Update:
        path = folder / EMULATOR_FILE
        if not path.is_file():
            return {}
        return from_tensors(
            "the emulator's difference", read_tensors(path, read_header(path)), self._package.block_tensors()
        )
