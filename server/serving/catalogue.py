"""What is served under which name: the model, adapters that were named, and a registry's accepted bundles.

A registry is looked at again when somebody asks, so that a bundle that its owner accepts or refuses comes and goes
without a restart. A bundle is served under its client's own name. A name can be wished for by anybody, so it stays with
the client that was registered first, and with its newest bundle; every other one is served as ``NAME@ID``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.artefacts.owner import OwnerRecord, owner_record_path, read_owner_record
from offsite.console import say
from offsite.errors import ConfigError, OffsiteError
from server.batching.rows import RowAdapter
from server.plugging.fit import Fitted, fit
from server.plugging.plug import accepted, record_of
from server.plugging.shares import rehearsed_share, taken
from server.plugging.ways import Way
from server.registry.intake import read_registered
from server.registry.registry import Registry
from server.registry.rows import Entry
from server.serving.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STANDING = ("accepted", "plugged-in", "served")
"""States in which a bundle is its owner's to use."""

_LOOK_SECONDS = 0.5
_TRY_AGAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Served:
    """One name that clients may ask for; without an adapter it is the model as it was loaded."""

    name: str
    adapter: RowAdapter | None = field(default=None, repr=False)
    created: int = field(default_factory=lambda: int(time.time()))


class Bundles:
    """The accepted bundles of a registry, for one full model.

    Args:
        registry: open, and open for as long as this is used.
        model: the full model without an adapter; not changed.
        base_digest: ``offsite.digests.model_digest(model)``.
        packages: where packages are now that are not where they were when their jobs were made.

    Raises:
        ArtefactError: when a package that is named has no owner's record beside it.
    """

    def __init__(
        self, registry: Registry, model: PreTrainedModel, base_digest: str, packages: Sequence[Path] = ()
    ) -> None:
        self._registry, self._model, self._base_digest = registry, model, base_digest
        self._shares: dict[str, float] = {}  # of bundles that were never plugged in
        self._packages = {read_owner_record(owner_record_path(one)).package_digest: one for one in packages}

    def standing(self) -> dict[str, Entry]:
        """Return the bundles that are to be served, by id, oldest first; none of any other model's."""
        found = {}
        for entry in self._registry.entries():
            if entry.state in STANDING and self._registry.job(entry.job_id).base_digest == self._base_digest:
                found[entry.id] = entry
        return found

    def names(self, entries: Sequence[Entry], taken_names: frozenset[str]) -> dict[str, str]:
        """Return under which name each of the bundles is served, by id.

        Args:
            taken_names: what other things are called.
        """
        clients = self._registry.client_names()
        holders: dict[str, str] = {}
        for client, name in clients.items():
            if name not in taken_names:  # whoever was registered first, also with nothing to be served now
                holders.setdefault(name, client)
        newest = {entry.client: entry.id for entry in sorted(entries, key=lambda one: (one.received, one.sequence))}
        found = {}
        for entry in entries:
            name = clients[entry.client]
            is_plain = holders.get(name) == entry.client and newest[entry.client] == entry.id
            found[entry.id] = name if is_plain else f"{name}@{entry.id}"
        return found

    def way(self, bundle_id: str) -> Way:
        """Return the way in which the bundle was plugged in last; where it never was, as `plug-in` would by itself.

        Raises:
            ConfigError, ArtefactError: when it never was, and the package's owner's record is gone.
        """
        known = self._registry.ways(bundle_id, "plugged-in")
        if known:
            return Way.parse(known[-1][0])
        if bundle_id not in self._shares:
            entry = self._registry.entry(bundle_id)
            self._shares[bundle_id] = rehearsed_share(self._registry.job(entry.job_id).adapter, self._record(entry))
        return Way(self._shares[bundle_id])

    def _record(self, entry: Entry) -> OwnerRecord:
        moved = self._packages.get(self._registry.job(entry.job_id).package_digest)
        return record_of(self._registry, entry, moved)

    def read(self, bundle_id: str) -> tuple[Fitted, Way]:
        """Return the bundle's adapter, plugged in by `way`, and that way.

        Raises:
            ConfigError: when it answers a federation's later round, or directions are spared, which needs text.
            ArtefactError: when its files are not those that were verified, or it was refused meanwhile.
        """
        entry = accepted(self._registry, bundle_id)
        record = self._record(entry)
        way = self.way(bundle_id)
        if way.spare is not None:
            raise ConfigError(
                f"bundle {bundle_id} is plugged in with directions spared", hint="serve its folder with --adapter"
            )
        verified = read_registered(self._registry, entry, record)
        fitted = fit(self._model, verified, record, base_digest=self._base_digest)
        return taken(self._model, fitted, replace(way, mix=1.0)), way

    def note(self, bundle_id: str, way: Way) -> None:
        """The registry knows that the bundle is served, and how; its state stays, so that it can be refused."""
        self._registry.note_way(bundle_id, "served", str(way))


class Catalogue:
    """The names that are served.

    Args:
        engine: on whose model the adapters are.
        fixed: what is served for as long as the server runs.
        bundles: of a registry, which come and go.
        stands: tells whether what is fixed may still be served; None, and it always may.
        each_stands: the same of single names of what is fixed.
    """

    def __init__(
        self,
        engine: Engine,
        fixed: Mapping[str, Served],
        bundles: Bundles | None = None,
        stands: Callable[[], bool] | None = None,
        each_stands: Mapping[str, Callable[[], bool]] | None = None,
    ) -> None:
        self._engine, self._fixed, self._bundles, self._stands = engine, dict(fixed), bundles, stands
        self._each_stands = dict(each_stands or {})
        self._by_id: dict[str, Served] = {}
        self._refused: dict[str, tuple[float, str]] = {}
        self._ways: dict[str, Way] = {}
        self._named = dict(self._fixed)
        self._looked, self._lock = -_LOOK_SECONDS, asyncio.Lock()

    async def names(self) -> dict[str, Served]:
        """Return what is served now, by name.

        Raises:
            OffsiteError: when the registry cannot be read.
        """
        if self._stands is not None and not await asyncio.to_thread(self._stands):
            return {}
        if self._bundles is not None:
            async with self._lock:
                if time.monotonic() - self._looked >= _LOOK_SECONDS:
                    await self._look(self._bundles)
                    self._looked = time.monotonic()
        gone = await asyncio.to_thread(self._fallen) if self._each_stands else frozenset[str]()
        return {name: served for name, served in self._named.items() if name not in gone}

    def _fallen(self) -> frozenset[str]:
        return frozenset(name for name, stands in self._each_stands.items() if not stands())

    async def find(self, name: str) -> Served | None:
        """Return what is served under that name."""
        return (await self.names()).get(name)

    async def _look(self, bundles: Bundles) -> None:
        standing = await asyncio.to_thread(bundles.standing)
        ways = await asyncio.to_thread(lambda: {one: bundles.way(one) for one in self._by_id if one in standing})
        for bundle_id in [one for one in self._by_id if one not in standing or ways[one] != self._ways[one]]:
            gone = self._by_id.pop(bundle_id)
            if gone.adapter is not None:
                await self._engine.retire(gone.adapter)
            changed = (
                "is put on anew: it was plugged in another way" if bundle_id in standing else "is served no longer"
            )
            say(f"bundle {bundle_id} {changed}")
        for bundle_id in [one for one in standing if one not in self._by_id and self._may_try(one)]:
            try:
                served, way = await self._engine.in_thread(lambda one=bundle_id: self._put_on(bundles, one))  # type: ignore[misc]
            except (OffsiteError, OSError, RuntimeError, MemoryError) as error:  # torch: RuntimeError of memory, too
                if self._refused.get(bundle_id, (0.0, ""))[1] != str(error):
                    say(f"bundle {bundle_id} is not served: {error}")
                self._refused[bundle_id] = (time.monotonic(), str(error))
            else:
                self._by_id[bundle_id], self._ways[bundle_id] = served, way
        entries = [entry for bundle_id, entry in standing.items() if bundle_id in self._by_id]
        names = await asyncio.to_thread(bundles.names, entries, frozenset(self._fixed))
        before = set(self._named)
        self._named = {**self._fixed, **{name: replace(self._by_id[one], name=name) for one, name in names.items()}}
        for one, name in names.items():
            if name not in before:
                say(f"bundle {one} is served as {name!r}")

    def _may_try(self, bundle_id: str) -> bool:
        """Tell whether the bundle was never refused, or some time ago: a file may be there again, memory free."""
        return bundle_id not in self._refused or time.monotonic() - self._refused[bundle_id][0] >= _TRY_AGAIN_SECONDS

    def _put_on(self, bundles: Bundles, bundle_id: str) -> tuple[Served, Way]:
        adapter, way = bundles.read(bundle_id)
        found = self._engine.rows.put_on(adapter)
        try:
            bundles.note(bundle_id, way)
        except OffsiteError:
            self._engine.rows.take_off(found)
            raise
        return Served(bundle_id, found), way
