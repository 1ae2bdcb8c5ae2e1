"""A federation on the owner's side, whatever carries its messages: what a round asks, and what becomes of the answers.

Nothing here knows Flower (``server/federation/flower.py``) or a network. A round is asked (`Federation.ask`), the
registry takes its answers in as it does every bundle, and it is closed (`Federation.close_round`): the verified
adapters' effective updates are put together and added to what earlier rounds added. Until a round is closed nothing of
it counts. Killed anywhere, `Federation` goes on after the last round that was closed, with the same bytes asked of the
same clients.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from adapters.kinds import declared
from adapters.norms import adapted_names, base_tensors
from adapters.rounds import grown
from adapters.updates import Update, from_tensors, norm, scaled, to_tensors, truncated, turned, update_of
from adapters.vector import require_summable
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import JOB_NAME, Job
from offsite.artefacts.owner import OwnerRecord
from offsite.artefacts.round import ROUND_FORMAT, Round, RoundManifest, open_round, write_round
from offsite.console import muted, say
from offsite.digests import sha256_file
from offsite.errors import ArtefactError, BadDigest, ConfigError, Expired, RunFailed, Untrusted, WrongBinding
from offsite.exchange.packing import unpack
from offsite.exchange.verbs import seal_run
from offsite.faults import reach
from offsite.keys.identity import Identity
from offsite.keys.trust import TrustStore
from offsite.sealed.config import SealConfig
from offsite.sealed.ledger import Ledger
from offsite.sealed.manifest import sealed_size
from offsite.staging import fsync, staged_folder
from offsite.tensors import TensorSpec, read_header, read_tensors, torch_dtype, write_tensors
from server.aggregation.aggregate import Aggregated, Contribution, Rule, aggregate
from server.aggregation.privacy import CentralPrivacy, aggregate_privately, drawn, require_delta, spent
from server.aggregation.screening import FEWEST, screen
from server.federation.config import FederationConfig, RoundsConfig
from server.federation.participants import one_adapter, participants, require_unused
from server.federation.realign import Realigner
from server.federation.secureterms import secure_terms
from server.federation.state import SHARED, Told, added
from server.plugging.shares import require_parts
from server.registry.federations import FederationStore, Finished
from server.registry.intake import asked_round, job_package, read_registered, take_in
from server.registry.registry import Registry
from server.registry.rows import Entry, Verdict

_SLACK_BYTES = 2**26  # of a sealed bundle beside its tensors


class Federation:
    """One run over the open registry; begun now, or gone on with.

    Raises:
        ConfigError: when the jobs do not fit each other or the settings, or the run was begun with other settings.
        ArtefactError: when package, registry or what earlier rounds left is unsound.
    """

    def __init__(self, config: FederationConfig, registry: Registry, identity: Identity, *, outbox: Path) -> None:
        self.config, self.registry, self.identity, self.outbox = config, registry, identity, outbox
        self.trust = TrustStore(config.keys)
        self.participants = participants(config, registry, self.trust)
        jobs = {key: one.job for key, one in self.participants.items()}
        self.spec = one_adapter(jobs.values(), config)
        self.package, self.record = job_package(registry, next(iter(jobs.values())))
        layout, tensors = self.record.layout, self.record.block_tensors
        self.shapes: dict[str, TensorSpec] = {name: tensors[name] for name in adapted_names(self.spec, layout, tensors)}
        require_parts(self.spec, self.shapes, layout, config.way)  # not after all rounds
        self.is_conv1d = turned(layout, tensors)
        num_bytes = sum(one.num_bytes for one in declared(self.spec, layout, tensors).values())
        self._limit_bytes = sealed_size(num_bytes) + _SLACK_BYTES
        self.job_ids = {key: job.job_id for key, job in jobs.items()}
        fixed = {**config.fixed(), "package": self.package.digest, "jobs": sorted(self.job_ids.values())}
        self.rule = rule_of(config)
        if config.secure:
            require_summable(self.spec, share_a=config.share_a)
        require_unused(registry, config.name, self.job_ids.values())
        self.store = FederationStore(registry, config.name, fixed)
        self.privacy = _privacy(config, len(self.store.begun["jobs"]))  # the divisor stays when a client leaves
        if self.privacy is not None and config.share_a:
            _require_low_rank(self.spec, self.shapes)
        self.folder = registry.folder / "federations" / self.store.id
        self._realigner = Realigner(config, self.package, self.folder)
        self.states: dict[str, Update] = self._load_states()

    @property
    def finished(self) -> list[Finished]:
        """The rounds that are closed."""
        return self.store.finished()

    @property
    def num_finished(self) -> int:
        """How many rounds are closed."""
        return len(self.finished)

    # --- asking

    def ask(self, number: int) -> dict[str, Path]:
        """Return the sealed round for each client that it is asked of; asked before, it is the same.

        Raises:
            RunFailed: when the disk fails, or fewer clients than a round needs were drawn.
        """
        asked = self.store.asked(self.job_ids, number)
        # Coins that came to nobody are not thrown again: the accountant does not know of a second throw.
        if not asked and (self.privacy is None or not self.store.is_drawn(number)):
            clients = self._draw()
            emulator = self._realigner.before(number, lambda earlier: self._write_round(number, "train", "", earlier))
            secure = self._secure_terms(number, clients, emulator) if self.config.secure else None
            rounds = {client: self._write_round(number, "train", client, emulator, secure) for client in clients}
            asked = {client: found.digest for client, found in rounds.items()}
            self.store.ask(self.job_ids, asked, number)
        reach("round-asked")
        found = self._sealed_for(asked, number, "round")
        self._take_back(number)
        return found

    def _secure_terms(self, number: int, clients: list[str], emulator: Update) -> str:
        """Return the terms of a secure round, which name all else that it asks: of everybody alike."""
        draft = self._write_round(number, "train", clients[0], emulator)
        try:
            return secure_terms(
                self.config,
                federation_id=self.store.id,
                expected=declared(self.spec, self.record.layout, self.record.block_tensors),
                number=number,
                clients=clients,
                asked=draft.manifest.asked,
            )
        finally:
            shutil.rmtree(draft.path)

    def say_finished(self) -> None:
        """Every client is told, by a sealed round that asks for nothing, that there is no further one."""
        found = {client: self._write_round(self.config.rounds, "finish", client, {}) for client in self.participants}
        self._sealed_for({client: one.digest for client, one in found.items()}, self.config.rounds, "finish")

    def _take_back(self, number: int) -> None:
        """Earlier rounds are in the outbox no more: they are closed, and each is as large as this one."""
        for one in self.participants.values():
            for path in self.outbox.glob(f"round-{one.job.job_id[:12]}-*"):
                is_round = re.fullmatch(r"round-[0-9a-f]{12}-[0-9]{4,}", path.name)
                if is_round and path.name != _offered("round", one.job, number):
                    shutil.rmtree(path, ignore_errors=True)

    def _sealed_for(self, digests: Mapping[str, str], number: int, what: str) -> dict[str, Path]:
        """Return the sealed rounds by client; a client that is trusted no longer, or its job over, gets none."""
        found = {}
        for client, digest in sorted(digests.items()):
            try:
                found[client] = self._sealed(client, number, digest, what)
            except (Untrusted, Expired) as error:
                say(f"  {self.participants[client].name}: gets no round: {error}")
        return found

    def _draw(self) -> list[str]:
        """Return the clients of a round, drawn by the operating system's randomness."""
        keys, source = sorted(self.participants), random.SystemRandom()
        if self.config.fraction == 1:
            return keys
        if self.privacy is not None:  # each by a coin of its own, as the accountant assumes
            return list(drawn(keys, self.privacy.rate))
        return sorted(source.sample(keys, max(self.config.min_clients, round(self.config.fraction * len(keys)))))

    def _state_of(self, client: str) -> Update:
        return self.states.get(SHARED if self.config.mode == "shared" else client, {})

    def _write_round(
        self, number: int, task: Literal["train", "finish"], client: str, emulator: Update, secure: str | None = None
    ) -> Round:
        """Return the round's plain folder, the one there is or a new one: what it asks, from which weights."""
        config, state = self.config, self._state_of(client) if task == "train" else {}
        manifest = RoundManifest(
            format=ROUND_FORMAT,
            federation_id=self.store.id,
            task=task,
            round=number,
            num_rounds=config.rounds,
            package_digest=self.package.digest,
            base_digest=self.package.manifest.base_digest,
            adapter=self.spec,
            steps=config.steps,
            learning_rate=config.learning_rate,
            proximal=config.proximal,
            secure=secure,
            clip=config.clip if secure is not None else None,
        )
        start = self.start_of(number) if task == "train" else {}
        stage = self.folder / "writing"
        shutil.rmtree(stage, ignore_errors=True)
        found = write_round(stage, manifest, update=to_tensors(state), emulator=to_tensors(emulator), start=start)
        place = self.registry.round_folder(found.digest)
        if place.is_dir():
            shutil.rmtree(stage)
        else:
            stage.rename(place)
            fsync(place.parent)  # it is on disk before the registry says that it was asked
        return open_round(place)

    def _sealed(self, client: str, number: int, digest: str, what: str) -> Path:
        """Return the round sealed for the client in the outbox, sealed now unless it was."""
        job = self.participants[client].job
        out = self.outbox / _offered(what, job, number)
        if out.is_dir():
            return out
        job_folder = self.folder / "jobs" / job.job_id
        if not job_folder.is_dir():
            with Ledger(self.config.keys) as ledger, staged_folder(job_folder) as stage:
                (stage / JOB_NAME).write_bytes(ledger.job(job.job_id).raw)
        sealing = SealConfig(
            input=self.registry.round_folder(digest),
            output=out,
            job=job_folder,
            round=number,
            keys=self.config.keys,
            passphrase_file=self.config.passphrase_file,
        )
        with muted():
            seal_run(sealing, identity=self.identity)
        return out

    # --- answers

    def take_in(self, parts: Mapping[str, bytes]) -> Verdict:
        """Return what the registry makes of a sealed bundle that came as named bytes.

        Raises:
            ArtefactError: when it is no sealed folder at all.
            RunFailed: when the disk fails.
        """
        place = self.folder / "parcel"
        shutil.rmtree(place, ignore_errors=True)
        unpack(parts, place, limit_bytes=self._limit_bytes)
        try:
            return take_in(self.registry, place, self.identity, self.trust)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def answers(self, number: int) -> dict[str, Entry]:
        """Return the bundles of the round that stand verified in the registry, by client."""
        found = {}
        for entry in self.registry.entries():
            is_ours = entry.round == number and self.job_ids.get(entry.client) == entry.job_id
            if is_ours and entry.state not in ("received", "refused", "withdrawn"):
                found[entry.client] = entry
        return found

    def contribution(self, entry: Entry) -> Contribution:
        """Return the verified bundle's effective update, on the weights that its round gave.

        Raises:
            ArtefactError: when its files are not those that were verified, or it trained a factor A that is shared.
        """
        round_ = asked_round(self.registry, entry.job_id, entry.round)
        if round_ is None:
            raise WrongBinding(f"bundle {entry.id} answers no round of this federation")
        verified = read_registered(self.registry, entry, self.record)
        for name, tensor in round_.load_start().items():
            if not torch.equal(verified.tensors[name], tensor):
                raise BadDigest(f"bundle {entry.id}: {name!r} is shared by all and was changed")
        base = grown(base_tensors(self.package, list(self.shapes)), round_)
        update = update_of(self.spec, verified.tensors, base, is_conv1d=self.is_conv1d)
        return Contribution(client=entry.client, update=update)

    def close_round(self, number: int, left_out: Mapping[str, str]) -> Finished:
        """The round's answers count: updates are put together, added, written, and the round is finished.

        Args:
            left_out: clients that did not answer, or not well, and why.

        Raises:
            RunFailed: with fewer answers than a round needs; nothing has changed then.
        """
        entries = self.answers(number)
        reasons = {client: reason for client, reason in left_out.items() if client not in entries}
        contributions: list[Contribution] = []
        for client, entry in sorted(entries.items()):
            try:
                contributions.append(self.contribution(entry))
            except ArtefactError as error:
                reasons[client] = f"{type(error).__name__}: {error}"
        if len(contributions) < self.config.min_clients and self.privacy is None:
            for client, reason in sorted(reasons.items()):
                say(f"  {self.participants[client].name}: left out: {reason}")
            raise RunFailed(
                f"round {number}: {len(contributions)} sound answer(s), {self.config.min_clients} are needed; "
                "the model is as it was",
                hint="run the same command again to ask the others once more",
            )
        states, told = self._put_together(number, contributions, reasons)
        for client in told.used:
            self.registry.advance(entries[client].id, "accepted")
        return self.finish_round(number, states, told)

    def finish_round(self, number: int, states: Mapping[str, Update], told: Told) -> Finished:
        """What all rounds added so far is on disk, and the round is finished with what is told of it."""
        files = self._write_states(number, states)
        reach("round-summed")
        self.store.finish(number, {**asdict(told), "files": files})
        self.states = dict(states)
        reach("round-finished")
        return self.finished[-1]

    def _put_together(
        self, number: int, contributions: list[Contribution], reasons: dict[str, str]
    ) -> tuple[dict[str, Update], Told]:
        # of a private round nothing is told that was measured of one client
        norms = {one.client: norm(one.update) for one in contributions} if self.privacy is None else {}
        if self.config.mode == "personal":
            states = dict(self.states)
            for one in contributions:
                states[one.client] = added(states.get(one.client, {}), one.update)
            return states, Told(sorted(norms), reasons, norms, {})
        found = self._aggregated(contributions, number)
        state, figures = self.stepped(found.update), dict(found.figures)
        if self.config.rank is not None:
            state, figures["truncation_error"] = truncated(state, self.config.rank)
        sound = [one for one in contributions if one.client not in found.left_out]
        flags = screen(sound).flags if len(sound) >= FEWEST and self.privacy is None else {}
        return {SHARED: state}, Told(list(found.used), {**reasons, **found.left_out}, norms, figures, flags)

    def stepped(self, update: Update) -> Update:
        """Return what all rounds added with this one's update, times the server's learning rate (arXiv:2003.00295).

        Noise of central privacy is in the update already: what follows costs no epsilon.
        """
        rate = self.config.server_learning_rate
        return added(self.states.get(SHARED, {}), update if rate == 1 else scaled(update, rate))

    def _aggregated(self, contributions: list[Contribution], number: int) -> Aggregated:
        shapes = {name: one.shape for name, one in self.shapes.items()}
        if self.privacy is None:
            return aggregate(contributions, self.rule, min_survivors=self.config.min_clients, shapes=shapes)
        found = aggregate_privately(contributions, self.privacy, shapes, shared_a=self._noise_beside(number))
        epsilon = spent(number, self.privacy.sigma, self.privacy.rate, self.config.delta).epsilon
        return replace(found, figures={**found.figures, "epsilon": epsilon, "delta": self.config.delta})

    def start_of(self, number: int) -> dict[str, Tensor]:
        """Return the factors A that all clients of a round share; empty when each starts its own."""
        return _shared_a(self.spec, self.record, f"{self.store.id}/{number}") if self.config.share_a else {}

    def _noise_beside(self, number: int) -> dict[str, Tensor]:
        """Return the factors beside which noise goes on the others alone, by weight; of GPT-2's linears it cannot."""
        start = {} if self.is_conv1d else self.start_of(number)
        return {f"{name.removesuffix('.lora_A')}.weight": tensor.float() for name, tensor in start.items()}

    # --- what rounds leave

    def _write_states(self, number: int, states: Mapping[str, Update]) -> dict[str, str]:
        """Write what all rounds added so far, and return the digest of each file."""
        folder = self.folder / f"after-{number:04d}"
        shutil.rmtree(folder, ignore_errors=True)  # of a round that was not finished
        with staged_folder(folder) as stage:
            for name, state in states.items():
                write_tensors(stage / f"{name}.safetensors", to_tensors(state))
        return {name: sha256_file(folder / f"{name}.safetensors") for name in sorted(states)}

    def _load_states(self) -> dict[str, Update]:
        if not (done := self.finished):
            return {}
        folder = self.folder / f"after-{done[-1].round:04d}"
        found: dict[str, Update] = {}
        for name, digest in done[-1].content["files"].items():
            path = folder / f"{name}.safetensors"
            if not path.is_file() or sha256_file(path) != digest:
                raise BadDigest(f"what round {done[-1].round} left is not what the registry says it left")
            found[name] = from_tensors("the federation's state", read_tensors(path, read_header(path)), self.shapes)
        return found


def _offered(what: str, job: Job, number: int) -> str:
    """Return the name of a sealed round in the outbox."""
    return f"{what}-{job.job_id[:12]}-{number:04d}"


def rule_of(config: RoundsConfig) -> Rule:
    """Return the rule of the settings, which bears the fewest answers that a round may end with.

    Raises:
        ConfigError: when it does not.
    """
    found = Rule(
        name=config.rule,
        num_byzantine=config.num_byzantine,
        trim=config.trim,
        keep=config.keep,
        max_norm=config.max_norm,
    )
    try:
        found.require(config.min_clients)
    except ConfigError as error:
        raise ConfigError(str(error), hint="--min-clients says with how few answers a round may end") from None
    return found


def _privacy(config: FederationConfig, num_clients: int) -> CentralPrivacy | None:
    """Return the settings of central privacy, None without it.

    Raises:
        ConfigError: when delta is too large for so few clients, or the noise gives no guarantee.
    """
    if config.noise_multiplier is None:
        return None
    require_delta(config.delta, num_clients)
    found = CentralPrivacy(
        clip=config.clip, sigma=config.noise_multiplier, rate=config.fraction, num_clients=num_clients
    )
    whole = spent(config.rounds, found.sigma, found.rate, config.delta)
    say(f"central privacy: epsilon {whole.epsilon:.3g} at delta {config.delta:g} for a client's part in all rounds")
    return found


def _require_low_rank(spec: AdapterSpec, shapes: Mapping[str, TensorSpec]) -> None:
    """Return only if the adapter's updates keep their factors, so that noise can go on one of them.

    Raises:
        ConfigError: when its rank is above what a weight can have.
    """
    name, least = min(((name, min(one.shape)) for name, one in shapes.items()), key=lambda found: found[1])
    if spec.rank > least:
        raise ConfigError(
            f"rank {spec.rank} is above what {name!r} can have, {least}: its updates have no factors B to put noise on",
            hint="make jobs with a smaller rank, or leave --share-a",
        )


def _shared_a(spec: AdapterSpec, record: OwnerRecord, label: str) -> dict[str, Tensor]:
    """Return factors A as LoRA starts them, in the bundle's dtype; drawn from a public label, they are no secret."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big"))
    found = {}
    for name, one in declared(spec, record.layout, record.block_tensors).items():
        if name.endswith(".lora_A"):
            bound = 1 / math.sqrt(one.shape[1])  # kaiming_uniform_(a=sqrt(5)), as in peft
            drawn = torch.rand(one.shape, generator=generator) * 2 * bound - bound
            found[name] = drawn.to(torch_dtype(spec.dtype))
    return found


@contextmanager
def opened_federation(config: FederationConfig, identity: Identity, *, outbox: Path) -> Iterator[Federation]:
    """Yield the federation over the registry that the settings name; closed on leaving.

    Raises:
        ConfigError: as `Federation`, or while another process runs a federation over the registry.
    """
    with Registry.open(config.registry, config.keys) as registry, registry.one_federation() as mine:
        if not mine:
            raise ConfigError(f"a federation is running over registry {config.registry.name!r} already")
        found = Federation(config, registry, identity, outbox=outbox)
        say(
            f"federation {config.name!r}: {len(found.participants)} clients, "
            f"{found.num_finished} of {config.rounds} rounds are finished"
        )
        yield found
