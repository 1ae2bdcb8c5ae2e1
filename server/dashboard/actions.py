"""What a click carries out: the verbs' own functions, with the settings that the command line would make."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from offsite.config import Config, build
from offsite.errors import ConfigError
from offsite.keys.identity import Identity
from server.dashboard.config import OwnerUpConfig
from server.dashboard.shelf import Shelf
from server.exchange.config import InviteConfig
from server.exchange.invite import run as invite_run
from server.plugging.config import WithdrawConfig
from server.plugging.withdraw import run as withdraw_run
from server.registry.config import LogVerifyConfig, RegistryAcceptConfig, RegistryRefuseConfig
from server.registry.verbs import accept_run, log_verify_run, refuse_run

_MAX_NAMES = 1000


@dataclass(frozen=True)
class Verdict:
    """A decision about one bundle: what its page of confirmation says, and what carries it out."""

    verb: str
    title: str
    told: tuple[str, ...]
    carry_out: Callable[[str, Collection[str]], object]


class Actions:
    """Carries out verbs on one registry with keys that are open.

    Each method raises what its verb raises, and changes what its verb changes.
    """

    def __init__(self, config: OwnerUpConfig, shelf: Shelf, identity: Identity) -> None:
        self._config, self._shelf, self._identity = config, shelf, identity
        self.verdicts = {one.verb: one for one in (
            Verdict("accept", "Accept this bundle?", (
                "It may be plugged in from then on, by you or by a federation's round.",
                "Nothing is plugged in by itself, and your model's files are not touched.",
                "You can withdraw it later.",
            ), self.accept),
            Verdict("refuse", "Refuse this bundle for good?", (
                "Its files are deleted. That cannot be undone.",
                "The same bytes are never taken in again; its round of the job is free for another.",
                "The client is told that it was refused.",
            ), self.refuse),
            Verdict("withdraw", "Withdraw this bundle?", (
                "Its files are deleted, and so are adapted folders that you name. That cannot be undone.",
                "Its round stays taken. A server that looks in this registry serves it no longer.",
                "Your keys sign a statement that says so, for the client; it is listed under Log.",
                "What others have copied, and sums of a federation that hold it, cannot be taken back.",
            ), self.withdraw),
        )}  # fmt: skip

    def accept(self, bundle_id: str, _: Collection[str] = ()) -> object:
        """``offsite registry accept ID``."""
        return accept_run(self._settings(RegistryAcceptConfig, id=bundle_id))

    def refuse(self, bundle_id: str, _: Collection[str] = ()) -> object:
        """``offsite registry refuse ID``."""
        return refuse_run(self._settings(RegistryRefuseConfig, id=bundle_id))

    def withdraw(self, bundle_id: str, adapted: Collection[str] = ()) -> object:
        """``offsite withdraw ID --adapted FOLDER ...``.

        Args:
            adapted: folders that are to be deleted, as `Shelf.adapted` calls them.

        Raises:
            ConfigError: besides the verb's, when no folder of such a digest is there any longer.
        """
        found = self._shelf.adapted(bundle_id)
        if missing := set(adapted) - found.keys():
            raise ConfigError(
                f"{len(missing)} adapted folder(s) that were ticked are not there as they were",
                hint="load the page again; nothing was withdrawn",
            )
        folders = [str(found[digest]) for digest in sorted(set(adapted))]
        output = self._shelf.withdrawal_path(bundle_id)
        return withdraw_run(
            self._settings(WithdrawConfig, id=bundle_id, adapted=folders, output=output), identity=self._identity
        )

    def invite(self, what: str, *, title: str, by_exchange: bool, seals: bool) -> object:
        """``offsite invite``, of a job or a package, as `Views.invitable` calls it.

        Args:
            by_exchange: the client fetches from the exchange; otherwise sealed folders go by hand.
            seals: the job and its package are sealed for the client.

        Raises:
            ConfigError: besides the verb's, when it is no longer there.
        """
        kind, _, key = what.partition(":")
        settings: dict[str, object] = {"title": title}
        if by_exchange:
            settings |= {"url": self._config.url, "certificate": self._config.certificate}
        if kind == "job" and key in (jobs := self._shelf.jobs()):
            path, opened = jobs[key]
            settings |= {"outbox": self._config.outbox if by_exchange and seals else None}
            package = self._shelf.packages().get(opened.job.package_digest)
            if seals and package is None:
                raise ConfigError("the job's package is not in the project's folder", hint="put it back")
            settings |= {"package": package.path if seals and package is not None else None}
        elif kind == "package" and (package := self._shelf.packages().get(f"sha256:{key}")) is not None:
            path = package.path
        else:
            raise ConfigError("what the invitation is to be about is not there", hint="load the page again")
        output = self._free_name(f"{path.name[:40]}-{key[:12]}")
        return invite_run(self._settings(InviteConfig, what=path, output=output, **settings), identity=self._identity)

    def verify_log(self) -> object:
        """``offsite log verify``."""
        return log_verify_run(self._settings(LogVerifyConfig))

    def _free_name(self, stem: str) -> Path:
        for number in range(1, _MAX_NAMES):
            end = "" if number == 1 else f"-{number}"
            path = self._shelf.invitations_folder / f"{stem}{end}.offsite.json"
            if not path.exists():
                return path
        raise ConfigError(f"{_MAX_NAMES} invitations are called {stem!r}", hint="move some away")

    def _settings(self, cls: type[Config], **flags: object) -> Config:
        """Return a verb's settings as the command line makes them of these flags; those that are None are not given."""
        given = {"keys": str(self._config.keys)}
        if "registry" in cls.model_fields:
            given["registry"] = str(self._config.registry)
        texts = {
            name: value if isinstance(value, list) else str(value)
            for name, value in flags.items()
            if value not in (None, "", [])
        }
        return build(cls, flags={**given, **texts})
