"""Every error a caller of offsite may catch, in one tree.

::

    OffsiteError
    +-- ConfigError        a setting is wrong or settings contradict each other      exit 2
    +-- DataError          a text file cannot be read as asked                       exit 2
    +-- UnsupportedModel   the model cannot be cut, or not in this way               exit 2
    +-- ArtefactError      a package or bundle was rejected                          exit 3
    |   +-- TooLarge           over a size limit, checked before anything is read
    |   +-- BadDigest          a file's bytes are not those the manifest binds
    |   +-- BadSchema          the manifest or a file's header has the wrong form
    |   +-- WrongBinding       made for another model or another package
    |   +-- WrongNames         the set of tensor or file names is not the exact set
    |   +-- WrongShape         a tensor's shape or dtype is not the declared one
    |   +-- NotFinite          a tensor holds NaN or infinity
    |   +-- NormTooLarge       an update is larger than the job allows
    |   +-- BadKey             a key file or card is malformed, weak, exposed or locked by another passphrase
    |   +-- Untrusted          the issuer's key is unknown, revoked or expired
    |   +-- BadSignature       a signature does not fit the bytes as received
    |   +-- WrongRecipient     sealed for somebody else
    |   +-- Expired            past its date, or dated in the future
    |   +-- Replayed           seen before, older than what was seen, or a state that was rolled back
    |   +-- BadEncryption      a sealed file does not decrypt
    +-- PolicyError        a rule of this machine's owner refuses                    exit 4
    +-- RunFailed          the work broke off: NaN, disk full, peer unreachable      exit 5

Messages are lower case without a full stop and say what was found, what was expected and in which
object. They never hold training text or keys. ``hint`` says what to do next.
"""

from __future__ import annotations


class OffsiteError(Exception):
    """An error whose message is fit for the person at the terminal."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(OffsiteError):
    """A setting is wrong, unknown, or contradicts another; all problems are reported at once."""

    exit_code = 2


class DataError(OffsiteError):
    """A text file cannot be read as asked; names the file and the row, never the row's text."""

    exit_code = 2


class UnsupportedModel(OffsiteError):
    """The model cannot be cut or compressed in the way asked for; names the reason."""

    exit_code = 2


class ArtefactError(OffsiteError):
    """A package or bundle was rejected; the subclass names the check that failed."""

    exit_code = 3


class TooLarge(ArtefactError):
    """Over a size limit."""


class BadDigest(ArtefactError):
    """A file's bytes are not those that the manifest binds."""


class BadSchema(ArtefactError):
    """A manifest, configuration or tensor file does not have the specified form."""


class WrongBinding(ArtefactError):
    """The artefact was made for another model, package or format version."""


class WrongNames(ArtefactError):
    """The set of file or tensor names differs from the exact set expected."""


class WrongShape(ArtefactError):
    """A tensor's shape or dtype differs from the one declared."""


class NotFinite(ArtefactError):
    """A tensor holds NaN or infinity."""


class NormTooLarge(ArtefactError):
    """An adapter's effective update is larger than the job allows."""


class BadKey(ArtefactError):
    """A key file or card is malformed, weak, readable by others, or locked by another passphrase."""


class Untrusted(ArtefactError):
    """The issuer's key is unknown here, revoked, or past its date."""


class BadSignature(ArtefactError):
    """A signature does not fit the bytes as they were received."""


class WrongRecipient(ArtefactError):
    """Sealed for another key than the one given."""


class Expired(ArtefactError):
    """Past its date, or dated further in the future than clocks differ."""


class Replayed(ArtefactError):
    """Seen before in another form, older than what was seen, or checked against a state that was rolled back."""


class BadEncryption(ArtefactError):
    """A sealed file does not decrypt to what its manifest binds."""


class PolicyError(OffsiteError):
    """A rule set by this machine's owner refuses the step."""

    exit_code = 4


class RunFailed(OffsiteError):
    """Work that had started cannot go on; what was finished before is kept."""

    exit_code = 5
