"""What ``offsite inspect`` shows of an adapted folder."""

from __future__ import annotations

from pathlib import PurePath

from offsite.console import say
from offsite.inspection.thing import Thing
from offsite.inspection.words import adapter_words, facts, rows
from server.plugging.adapted import open_adapted
from server.plugging.ways import Way

_FORMS = {
    "peft": "a PEFT folder, which peft, transformers and vLLM open on the full model",
    "own": "tensors under the full model's names, which offsite opens",
    "merged": "a whole checkpoint with its tokenizer, which needs no base",
}
_FILES_AGREE = "every file agrees with the manifest"


def show(thing: Thing) -> dict[str, object]:
    """An adapted folder is told: its form, what it was made of, how much of the update is in it.

    Raises:
        ArtefactError: with the subclass of the check that failed.
    """
    manifest = open_adapted(thing.path)
    say(f"adapted folder {thing.name}: {_FILES_AGREE}")
    facts(
        {
            "form": f"{manifest.form}: {_FORMS[manifest.form]}",
            "adapter": adapter_words(manifest.adapter),
            "blocks": len(manifest.sites),
            "base model": f"{PurePath(manifest.base).name}, {manifest.base_digest}",
            "package": manifest.package_digest,
            "bundle": manifest.bundle_digest,
            "in registry": manifest.intake,
            "update": _update(manifest.plugged) + (", corrected" if manifest.corrected else ""),
            "spared text": manifest.spare_text or None,
            "merged": manifest.merged_digest,
        }
    )
    rows("files", ["name", "bytes", "sha256"], [
        [name, f"{entry.bytes:,}", entry.sha256.removeprefix("sha256:")[:16]] for name, entry in manifest.files.items()
    ])  # fmt: skip
    return {
        "kind": "adapted",
        "form": manifest.form,
        "adapter": manifest.adapter.model_dump(mode="json"),
        "base_digest": manifest.base_digest,
        "package_digest": manifest.package_digest,
        "bundle_digest": manifest.bundle_digest,
        "merged_digest": manifest.merged_digest,
        "id": manifest.intake,
        "scale": manifest.scale,
        "way": str(manifest.plugged),
        "corrected": manifest.corrected,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "verified": True,
        "checked": _FILES_AGREE,
    }


def _update(way: Way) -> str:
    if way.word:
        return way.told
    return "all of it" if way.is_plain else f"{way.scale:g} of it"
