"""``OUTPUT.work`` of answers that are being written: those that there are already, so that a kill loses one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from offsite.errors import ConfigError, RunFailed
from offsite.staging import staged_file

_BINDING, _ANSWERS = "binding.json", "answers.jsonl"


class Kept:
    """Answers in the order in which they were given, a line of JSON each.

    Args:
        binding: what an earlier run must share with this one for its answers to be taken.
        of: what they follow from, in words for whoever gives something else.

    Raises:
        ConfigError: when the folder holds answers of another run.
    """

    def __init__(self, folder: Path, binding: Mapping[str, object], *, of: str) -> None:
        self._folder, stated = folder, folder / _BINDING
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not stated.exists():
                with staged_file(stated) as stage:
                    stage.write_text(json.dumps(binding), encoding="ascii")
            if json.loads(stated.read_bytes()) != json.loads(json.dumps(binding)):
                raise ConfigError(
                    f"work folder {folder.name!r} holds answers of {of}",
                    hint="name another output with -o, or delete the folder",
                )
            self.lines = self._whole_lines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"work folder {folder.name!r} cannot be used: {_why(error)}", hint="delete it") from None

    def add(self, answer: Mapping[str, object]) -> None:
        """One more answer is on disk; a kill no longer loses it.

        Raises:
            RunFailed: when the disk is full.
        """
        line = json.dumps(answer, ensure_ascii=False) + "\n"
        try:
            with (self._folder / _ANSWERS).open("a", encoding="utf-8") as out:
                out.write(line)
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise RunFailed(
                f"cannot write in {self._folder.name!r}: {_why(error)}", hint="free space, then again"
            ) from None
        self.lines.append(line)

    def finish(self, output: Path) -> None:
        """All answers stand at `output`, and nothing of the work is left."""
        with staged_file(output) as stage:
            stage.touch(mode=0o600)
            stage.write_text("".join(self.lines), encoding="utf-8")
        self.remove()

    def remove(self) -> None:
        """Nothing of it is left."""
        shutil.rmtree(self._folder)

    def _whole_lines(self) -> list[str]:
        path = self._folder / _ANSWERS
        if not path.exists():
            return []
        raw = path.read_bytes()
        kept = raw[: raw.rfind(b"\n") + 1]  # a kill tears the last line
        if kept != raw:
            with staged_file(path, replace=True) as stage:
                stage.write_bytes(kept)
        return [f"{line}\n" for line in kept.decode("utf-8").split("\n")[:-1]]  # a text may hold other line ends


def _why(error: Exception) -> str:
    return ((error.strerror or "i/o error") if isinstance(error, OSError) else "its files are damaged").lower()
