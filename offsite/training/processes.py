"""One process or many: who this process is, sharding a model over all of them, and starting them.

Several processes are used only when a launcher has said so in the environment (torchrun's ``RANK``,
``WORLD_SIZE`` and ``LOCAL_RANK``). Parameters are then sharded by torch's FSDP2, on GPUs (NCCL) and on
CPUs (gloo) alike; a silent fallback to whole copies per process is an error (`assert_sharded`).
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from offsite.console import say
from offsite.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_SECOND_SIGNAL_SECONDS = 2.0


@dataclass(frozen=True)
class Processes:
    """This process among all that train together.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        device: where this process computes.
        is_main: whether this is the one process that writes files and speaks.
    """

    rank: int
    size: int
    device: torch.device
    is_main: bool

    def wait(self) -> None:
        """Every process has come this far."""
        if self.size > 1:
            torch.distributed.barrier()

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over all processes, in float64."""
        return self._reduced(values, "SUM") if self.size > 1 else list(values)

    def largest(self, value: float) -> float:
        """Return the largest `value` over all processes."""
        return self._reduced([value], "MAX")[0] if self.size > 1 else value

    def from_main(self, value: float) -> float:
        """Return the main process's `value`, so that a decision made on it is everybody's."""
        return self._reduced([value if self.is_main else 0.0], "SUM")[0] if self.size > 1 else value

    def require_same(self, digest: bytes, what: str) -> None:
        """Every process holds the same bytes.

        Raises:
            RunFailed: on every process, when `digest` differs between any two.
        """
        if self.size == 1:
            return
        number = int.from_bytes(digest[:6], "big")  # 48 bits: exact in float64
        if self.largest(number) != -self.largest(-number):
            raise RunFailed(f"{what} differ between processes", hint="seed torch before anything random is made")

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, how))
        return [float(value) for value in tensor.tolist()]


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several; needs no set-up."""
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def world() -> Processes:
    """Return this process's place; the processes are connected on the first call when there are several."""
    has_cuda = torch.cuda.is_available()
    if not is_launched():
        return Processes(0, 1, torch.device("cuda" if has_cuda else "cpu"), True)
    from accelerate import PartialState

    fresh = not torch.distributed.is_initialized()
    state = PartialState(cpu=not has_cuda)
    if fresh:
        atexit.register(_leave)
    return Processes(state.process_index, state.num_processes, state.device, state.is_main_process)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard(model: nn.Module, blocks: Sequence[nn.Module], processes: Processes) -> None:
    """Each process holds its share of every parameter of `model`, on its device; one process: nothing changes.

    `blocks` are gathered one at a time while they compute, everything else of `model` at once, so
    `blocks` should hold most of the weights: also those of a frozen teacher inside `model`. A model on
    the CPU is moved to the device block by block and never stands there whole. Afterwards parameters
    are DTensors, *new objects* in place of the old, and the model must be used through the forwards of
    `model` and `blocks`: calling an inner module around them meets shards.

    Raises:
        RunFailed: when a parameter stayed whole.
    """
    if processes.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # No MixedPrecisionPolicy: autocast alone decides the arithmetic, so that one process and many agree.
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for module in [*blocks, model]:
        if not isinstance(module, FSDPModule):
            # The root too: left gathered after an evaluation, it would not see weights that `fill` changes.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    assert_sharded(model)


def assert_sharded(model: nn.Module) -> None:
    """Return only if every parameter of `model` is a DTensor: spread over the processes, not copied.

    Raises:
        RunFailed: naming the first parameter that is whole.
    """
    for name, parameter in model.named_parameters():
        if not _is_spread(parameter):
            raise RunFailed(f"parameter {name!r} is held whole by every process, expected shards")


def _is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor, Shard

    return isinstance(tensor, DTensor) and any(isinstance(place, Shard) for place in tensor.placements)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor on the same device (all processes must call), or a plain one as it is."""
    return tensor.full_tensor() if _is_spread(tensor) else tensor


def gather(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Return the whole tensors: on the main process, empty elsewhere. All processes must call.

    Returns:
        detached tensors; with several processes on the CPU, gathered one at a time; with one process
        they share storage with `tensors` and stay where they are.
    """
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if processes.is_main:
            gathered[name] = value.cpu() if processes.size > 1 else value
    return gathered


def full_state(model: nn.Module, names: Iterable[str], processes: Processes) -> dict[str, Tensor]:
    """Return `model`'s parameters of these names, whole, as `gather` does."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return gather({name: parameters[name] for name in names}, processes)


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """`target`, plain or sharded, holds `value` (whole, the same on every process); nothing is sent."""
    if _is_spread(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device)
        share = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(share.to_local())
    else:
        target.copy_(value)


@dataclass
class Stop:
    """Whether someone has asked this process to stop after the step it is in."""

    requested: bool = False
    since: float = 0.0


@contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Yield a `Stop` that the first Ctrl-C sets; a second one, two seconds later or more, interrupts at once.

    A KeyboardInterrupt in mid-step could leave half the weights updated, or one process waiting for
    the others for ever. Outside the main thread Python delivers no signals, and nothing is installed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(_number: int, _frame: object) -> None:
        now = time.monotonic()
        if stop.requested and now - stop.since > _SECOND_SIGNAL_SECONDS:  # a launcher may repeat the terminal's
            raise KeyboardInterrupt
        if not stop.requested:
            stop.requested, stop.since = True, now

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def launch(num: int, argv: Sequence[str], *, module: str = "offsite") -> int:
    """Run ``python -m MODULE ARGV`` in `num` processes of this machine, connected over loopback only.

    This process becomes torchrun's agent until they end. When one fails the others are stopped.

    Returns:
        the exit code: 0, or that of the process that failed; 5 when it was killed.

    Raises:
        ConfigError: when this process was itself launched so, or there are fewer GPUs than `num`.
        KeyboardInterrupt: after Ctrl-C, when the processes have ended.
    """
    if is_launched():
        raise ConfigError("this process is already one of several, it cannot launch more")
    if 0 < torch.cuda.device_count() < num:
        raise ConfigError(f"{num} processes asked for, this machine has {torch.cuda.device_count()} GPUs")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    address = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(num)]
    with _environment(num), _quiet_agent():
        try:
            run(parse_args([*address, "-m", module, *argv]))
        except ChildFailedError as error:
            return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, num)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise RunFailed(f"stopped by {error.sigval.name}") from None
    return 0


def _exit_code(failures: Mapping[int, int], num: int) -> int:
    rank, code = next(((rank, code) for rank, code in failures.items() if code > 0), (-1, -1))
    if rank < 0:
        rank, code = next(iter(failures.items()))
    if code > 0:
        if rank > 0:  # the main process has said why; another is silent by rule
            say(f"process {rank} of {num} ended with exit code {code}")
        return code
    say(f"process {rank} of {num} was killed by signal {-code}")
    return RunFailed.exit_code


@contextmanager
def _environment(num: int) -> Iterator[None]:
    """The workers' environment, restored afterwards."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    given = {
        # `-m` would put the current folder first, where a user's own client.py shadows ours
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num)),
    }
    if loopback:
        given |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    before = dict(os.environ)
    for name, value in given.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent's log is silent and its signal handlers are gone afterwards; the workers say what happened."""
    level, handlers = logging.root.manager.disable, {number: signal.getsignal(number) for number in _SIGNALS}
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
