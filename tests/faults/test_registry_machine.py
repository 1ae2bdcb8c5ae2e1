"""The registry against a model of it, in any order of steps, with crashes at any point and old copies put back."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from offsite import faults
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import Job
from offsite.errors import ArtefactError, OffsiteError, PolicyError, Replayed
from server.registry.registry import Registry

OWNER, CLIENT = ("-".join([letter * 4] * 13) for letter in "ab")
BOUND = {"package_digest": "sha256:" + "1" * 64, "base_digest": "sha256:" + "2" * 64}
JOB = Job(job_id="0" * 32, owner=OWNER, client=CLIENT, adapter=AdapterSpec(), rounds=9, created=1, expires=9, **BOUND)
POINTS = ("commit-before", "commit-after", "log-half", "log-after", "head-after")
PATH = ("verified", "accepted", "plugged-in", "served")

# few enough that steps meet
numbers = st.integers(0, 3)


class Crash(BaseException):
    """The end of the process: no handler may go on after it."""


class Machine(RuleBasedStateMachine):
    """`self.known` maps a bundle's number to its state; a crash may have kept a step or not, and is looked up."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "keys").mkdir()
        self.known, self.newest, self.num_lines = {}, 0, 0
        self.registry = self.opened(create=True)
        self.registry.add_job(JOB, package=self.folder, client_name="client")

    def teardown(self):
        faults.set_hook(None)
        self.registry.close()
        shutil.rmtree(self.folder)

    def opened(self, **arguments):
        return Registry.open(self.folder / "registry", self.folder / "keys", **arguments)

    def digest(self, number):
        return "sha256:" + f"{number:x}" * 64

    def id(self, number):
        return f"{number:x}" * 16

    def holder(self, round_number):
        return next((n for n, (state, held) in self.known.items() if held == round_number and state != "refused"), None)

    @rule(number=numbers, round_number=st.integers(1, 3), fresh=st.booleans())
    def take_in(self, number, round_number, fresh):
        if number in self.known:
            assert self.registry.verdict(self.digest(number)).state == self.known[number][0]
            return
        sequence = self.newest + (1 if fresh else 0)
        envelope = SimpleNamespace(job_id=JOB.job_id, issuer=CLIENT, round=round_number, sequence=sequence)
        try:
            self.registry.receive(envelope, self.digest(number))
        except Replayed:
            assert self.holder(round_number) is not None or not fresh
            assert self.registry.verdict(self.digest(number)) is None
            return
        assert self.holder(round_number) is None
        self.registry.bundle_folder(self.id(number)).mkdir()
        self.registry.verified(self.digest(number), bundle_digest="x", tensors_sha256="y", figures={})
        self.known[number] = ("verified", round_number)
        self.newest = max(self.newest, sequence)

    @rule(number=numbers, to=st.sampled_from(PATH))
    def advance(self, number, to):
        if number not in self.known:
            return
        state, round_number = self.known[number]
        try:
            found = self.registry.advance(self.id(number), to).state
        except PolicyError:
            assert PATH.index(to) > PATH.index(state) + 1
        except ArtefactError:
            assert state == "refused"
        else:
            assert found == (to if PATH.index(to) > PATH.index(state) else state)
            self.known[number] = (found, round_number)

    @rule(number=numbers)
    def refuse(self, number):
        if number not in self.known:
            return
        state, round_number = self.known[number]
        try:
            self.registry.refuse(self.id(number))
        except PolicyError:
            assert state in ("plugged-in", "served")
        else:
            assert state not in ("plugged-in", "served")
            self.known[number] = ("refused", round_number)  # its sequence number stays the newest that was seen

    @precondition(lambda self: self.known)
    @rule(point=st.sampled_from(POINTS), to=st.sampled_from((*PATH, "refused")), number=numbers)
    def crash(self, point, to, number):
        """The process ends in the middle of a step; after a restart the step was taken, or it was not."""
        if number not in self.known:
            return
        state, round_number = self.known[number]

        def end(reached):
            if reached == point:
                raise Crash

        faults.set_hook(end)
        crashed = False
        try:
            _ = self.registry.refuse(self.id(number)) if to == "refused" else self.registry.advance(self.id(number), to)
        except Crash:
            crashed = True
        except OffsiteError:
            pass  # the step was not allowed in that state, as the other rules say
        finally:
            faults.set_hook(None)
            self.registry.close()
        self.registry = self.opened()
        found = self.registry.entry(self.id(number)).state
        order = (*PATH, "refused")
        moves = order.index(to) > order.index(state)  # a step that was taken already changes nothing
        if crashed:
            assert found == (to if moves and point != "commit-before" else state)
        assert found in (state, to)
        self.known[number] = (found, round_number)

    @precondition(lambda self: self.known)
    @rule(number=numbers)
    def turn_back(self, number):
        """An old copy of the folder is put back after something has changed: it is not used."""
        state = self.known.get(number, ("refused", 0))[0]
        if state not in PATH[:-1]:
            return
        self.registry.close()
        current, old = self.folder / "registry", self.folder / "old"
        shutil.copytree(current, old)
        self.registry = self.opened()
        self.advance(number, PATH[PATH.index(state) + 1])
        self.registry.close()
        current.rename(self.folder / "new")
        old.rename(current)
        try:
            self.opened().close()
        except Replayed:
            pass
        else:
            raise AssertionError("an old registry was opened")
        shutil.rmtree(current)
        (self.folder / "new").rename(current)
        self.registry = self.opened()

    @invariant()
    def the_registry_is_as_the_model(self):
        found = {entry.id: (entry.state, entry.round) for entry in self.registry.entries()}
        assert found == {self.id(number): state for number, state in self.known.items()}
        rounds = [held for state, held in self.known.values() if state != "refused"]
        assert len(rounds) == len(set(rounds))
        folders = {path.name for path in (self.folder / "registry" / "bundles").iterdir()}
        assert folders >= {self.id(number) for number, (state, _) in self.known.items() if state != "refused"}

    @invariant()
    def the_log_is_whole_and_only_grows(self):
        number = self.registry.verify_log().number
        assert number >= self.num_lines
        self.num_lines = number


Machine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase
