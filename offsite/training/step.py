"""One optimizer step, the same step however its batch is cut over parts and processes.

The batch is cut by rows into ``processes * accumulate`` parts; loss and gradient are sums over counted
positions, divided once by the count of the whole batch; everything random inside a part is drawn from
(seed, step, part).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.errors import DataError, RunFailed
from offsite.training.config import LoopConfig
from offsite.training.precision import uses_bf16
from offsite.training.processes import Processes

Batch = Mapping[str, Tensor]
StepLoss = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Stepped:
    """What one step did.

    Args:
        loss: per counted position; none when nothing counted, and then no weight changed.
        rate: learning rate.
        gradient_norm: global L2 norm before clipping, of the loss per counted position.
        num_tokens: tokens of the whole batch.
    """

    loss: float | None
    rate: float
    gradient_norm: float
    num_tokens: int


class Stepper:
    """Updates `trainable` (float32) by AdamW from `step_loss` under autocast; see `offsite.training.loop.train`."""

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        step_loss: StepLoss,
        config: LoopConfig,
        processes: Processes,
    ) -> None:
        """Start from no momentum.

        Raises:
            ConfigError: when bf16 is asked of a GPU without it.
        """
        self._model, self._trainable, self._step_loss = model, dict(trainable), step_loss
        self._config, self._processes = config, processes
        self.device = next(iter(trainable.values())).device
        self._bf16 = uses_bf16(config.precision, self.device)
        self._optimizer = _adamw(trainable.values(), config, self.device)

    def step(self, number: int, batch: Batch) -> Stepped:
        """The weights are updated once; `number` counts from 1.

        Raises:
            DataError: when the batch has fewer rows than parts.
            RunFailed: when the loss or the gradient is not finite; the weights are then unchanged.
        """
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part, rows in self._parts(batch, number):
            # For dropout and for positions that the loss samples: the same after a resume. Noise that
            # protects data must never be drawn from here, for its seed is known.
            torch.manual_seed(_part_seed(self._config.seed, number, part))
            with self._autocast():
                total, count = self._step_loss(self._model, rows)
            total.backward()  # type: ignore[no-untyped-call]
            sums += torch.stack((total.detach().double(), torch.as_tensor(count, device=self.device).double()))
        loss_sum, count_sum = self._processes.total(sums.tolist())
        require_finite("loss", loss_sum, number)
        current, norm = rate(self._config, number), 0.0
        if count_sum > 0:  # the same on every process
            norm = self._scale_gradients(self._processes.size / count_sum)  # FSDP2 averages over the processes
            require_finite("gradient norm", norm, number)
            for group in self._optimizer.param_groups:
                group["lr"] = current
            self._optimizer.step()
        return Stepped(loss_sum / count_sum if count_sum > 0 else None, current, norm, _num_tokens(batch))

    def updates(self) -> dict[str, int]:
        """Return how often each tensor was updated; one that never had a gradient is absent."""
        state = self._optimizer.state
        return {name: int(state[tensor]["step"]) for name, tensor in self._trainable.items() if state.get(tensor)}

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's moments of the updated tensors, by "<name>.exp_avg" and "<name>.exp_avg_sq", not copied."""
        state = self._optimizer.state
        return {f"{name}.{kind}": state[self._trainable[name]][kind] for name in self.updates() for kind in _MOMENTS}

    def restart(self, updates: Mapping[str, int]) -> None:
        """The optimizer counts these updates, with zero moments for the caller to fill through `moments`."""
        self._optimizer.state.clear()
        for name, count in updates.items():
            tensor = self._trainable[name]
            step = torch.tensor(float(count), dtype=torch.float32, device=self.device)
            self._optimizer.state[tensor] = {"step": step} | {kind: torch.zeros_like(tensor) for kind in _MOMENTS}

    def _parts(self, batch: Batch, number: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield this process's parts of the batch, numbered over all processes, on the device."""
        num_own, num_rows = self._config.accumulate, len(next(iter(batch.values())))
        num_parts = num_own * self._processes.size
        if num_rows < num_parts:
            each = f"{self._processes.size} processes, {num_own} parts each"
            raise DataError(f"batch of step {number}: {num_rows} rows, expected {num_parts} or more ({each})")
        first = num_own * self._processes.rank
        for part in range(first, first + num_own):
            rows = slice(num_rows * part // num_parts, num_rows * (part + 1) // num_parts)
            yield part, {name: value[rows].to(self.device, non_blocking=True) for name, value in batch.items()}

    def _autocast(self) -> torch.autocast:
        # The cache of cast weights would keep every gathered weight of a sharded model alive, and a cast
        # made without gradient would be reused where one is needed; a weight is rarely used twice anyway.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16, cache_enabled=False)

    def _scale_gradients(self, scale: float) -> float:
        """Gradients are multiplied by `scale`, then clipped. Returns their global norm before clipping."""
        gradients = [tensor.grad for tensor in self._trainable.values() if tensor.grad is not None]
        if not gradients:
            return 0.0
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total) * scale
        if math.isfinite(norm):
            clip = self._config.clip_norm
            share = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
            torch._foreach_mul_(gradients, scale * share)
        return norm


def rate(config: LoopConfig, number: int) -> float:
    """Return the learning rate of a step, from 1: the peak at `warmup_steps`, `min_rate_share` of it at the last."""
    warmup = max(config.warmup_steps, 1)
    if number <= warmup:
        return config.learning_rate * number / warmup
    done = (number - warmup) / (config.steps - warmup)
    fallen = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "constant": 0.0}[config.schedule]
    return config.learning_rate * (1 - fallen * (1 - config.min_rate_share))


def _adamw(tensors: Iterable[nn.Parameter], config: LoopConfig, device: torch.device) -> torch.optim.AdamW:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []  # norms and biases are not decayed
    for tensor in tensors:
        (matrices if tensor.dim() >= 2 else vectors).append(tensor)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=fused)


def _part_seed(seed: int, number: int, part: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{part}".encode()).digest()[:7], "big")


def require_finite(what: str, value: float, number: int) -> None:
    """Return only if `value` is finite.

    Raises:
        RunFailed: naming `what` and the step.
    """
    if not math.isfinite(value):
        raise RunFailed(f"{what} is {value} at step {number}", hint="lower the learning rate")


def _num_tokens(batch: Batch) -> int:
    """Return the tokens of a batch that are not padding, of all rows of a pair; its rows when it holds no tokens."""
    masks = [tensor for name, tensor in batch.items() if name.endswith("attention_mask")]
    if masks:
        return sum(int(mask.sum()) for mask in masks)
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))
