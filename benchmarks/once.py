"""Pieces of a benchmark's work that are done once: each in a folder named by its settings and the files it read."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offsite.digests import sha256_bytes, sha256_file
from offsite.staging import staged_file


class Once:
    """Finished work under one folder; ``took`` has the seconds of what was asked for, by folder."""

    def __init__(self, work: Path) -> None:
        """Look for finished work in the folder `work`, which exists."""
        self.work = work
        self.took: dict[str, float] = {}

    def do(
        self,
        name: str,
        settings: Mapping[str, Any],
        work: Callable[[Path, Any], dict[str, Any]],
        *,
        resumes: bool = False,
    ) -> dict[str, Any]:
        """Return what a piece of work told, now or before, with its folder's name under ``folder``.

        Args:
            work: called with the folder to write and the settings.
            resumes: it goes on from what a killed one left in its ``.work`` folder, which is removed otherwise.
        """
        stated = json.dumps({key: _told(value) for key, value in settings.items()}, sort_keys=True)
        out = self.work / f"{name}-{sha256_bytes(stated.encode()).removeprefix('sha256:')[:12]}"
        record = out.with_name(f"{out.name}.told.json")
        if not record.is_file():
            shutil.rmtree(out, ignore_errors=True)
            if not resumes:
                shutil.rmtree(out.with_name(f"{out.name}.work"), ignore_errors=True)
            began = time.monotonic()
            found = {**work(out, settings), "folder": out.name}
            found["took_seconds"] = round(time.monotonic() - began, 1)
            with staged_file(record, replace=True) as stage:
                stage.write_text(json.dumps(found) + "\n", encoding="utf-8")
        told = self.told(out)
        self.took[out.name] = told["took_seconds"]
        return told

    def told(self, out: Path) -> dict[str, Any]:
        """Return what the finished work in that folder told."""
        found: dict[str, Any] = json.loads(out.with_name(f"{out.name}.told.json").read_text(encoding="utf-8"))
        return found

    def rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Return a file of these rows, named by how many there are."""
        path = self.work / f"{name}-{len(rows)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path


def _told(value: Any) -> Any:
    """Return a setting as its content says it: of a file its digest, of a folder its name."""
    if isinstance(value, Path):
        return sha256_file(value) if value.is_file() else value.name
    if isinstance(value, tuple):
        return [_told(one) for one in value]
    return value.rpartition("/")[2] if isinstance(value, str) else value
