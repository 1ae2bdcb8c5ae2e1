"""Coverage-guided fuzzing of the sealed manifest and its signatures: ``make fuzz``.

An input is ``manifest.json``, a byte of zero, and ``signatures.json``; without the zero, the signatures have the right
form. The issuer is trusted and its signatures fit whatever it signed: what is looked for is what a peer can do who
means ill. Every input is refused by an error of offsite's own, or is a manifest that says what a JSON parser reads.
"""

from __future__ import annotations

import json
import sys

ISSUER = "-".join(["aaaa"] * 13)
NOW = 1_800_000_000


class Agreeable:
    """Keys under which everything is signed."""

    def verify(self, purpose: str, message: bytes, signatures: object) -> None:
        """Nothing is checked: the issuer is who it says, and hostile."""


def check(data: bytes) -> bool:
    """Return whether the manifest was accepted; AssertionError when the parser broke its word."""
    from offsite.errors import ArtefactError
    from offsite.keys.identity import Signatures
    from offsite.sealed.manifest import KINDS, verify_sealed, write_signatures

    manifest_raw, given, signatures_raw = data.partition(b"\0")
    if not given:
        signatures_raw = write_signatures(ISSUER, Signatures(bytes(64), bytes(3309)))
    try:
        manifest = verify_sealed(manifest_raw, signatures_raw, lambda _: Agreeable(), now=NOW)  # type: ignore[arg-type,return-value]
    except ArtefactError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 500
        return False
    assert json.loads(manifest_raw) == manifest.model_dump(mode="json")
    assert manifest.issuer in signatures_raw.decode()
    assert manifest.created < manifest.expires
    assert manifest.created - 300 <= NOW <= manifest.expires + 300
    for file in manifest.files:
        assert KINDS[manifest.kind].fullmatch(file.name)
        assert "/" not in file.name
        assert "\\" not in file.name
        assert not file.name.startswith(".")
        assert 0 <= file.bytes < file.sealed_bytes
    return True


def main() -> None:
    """Fuzz with the words of the command line, which are libFuzzer's."""
    import atheris

    with atheris.instrument_imports(include=["offsite"]):
        import offsite.sealed.manifest  # noqa: F401
    atheris.Setup(sys.argv, lambda data: bool(check(data)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
