"""Clipped gradients: sums over privacy units, each clipped to a norm, by hooks, by ghost clipping, or one by one.

A unit is one example, or all rows of one user. Its gradient is that of the mean over its rows of the row's mean loss
per counted token, or of the same with each token's loss times its own probability, which is held fixed and depends on
the row and the weights alone. Units whose gradient is not finite contribute zero. Whatever the engine, the sum over a
set of units and the sum over the set without one of them differ by at most `clip` in L2 norm.

Opacus computes per-row gradients layer by layer and gets some layers wrong or not at all, always loudly in what we have
seen (OPT's flattened tokens, tied weights). So an engine is taken only after it gave the sums that the one-by-one loop
gives, on rows made up here.

Source: DP-SGD, arXiv:1607.00133; ghost clipping, arXiv:2110.05679; weights of tokens, arXiv:2508.05629.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from client.objectives.tokens import by_row, token_losses
from offsite.errors import RunFailed
from offsite.text.batches import Example, collate

Unit = tuple[Example, ...]
Autocast = Callable[[], AbstractContextManager[Any]]
Sums = dict[str, Tensor]
_Item = TypeVar("_Item")

_SLACK = 1e-5  # rounding of norms and products in float32 stays inside the bound
_PROBE_LENGTHS = (6, 4, 5)
_PROBE_CLIP = 1e-3
_PROBE_FLOOR = 1e-3
_PROBE_ERROR = {False: 1e-3, True: 0.05}  # relative, without and with bfloat16
_PROBE_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, RunFailed)
_OPACUS_ON_MODULES = ("activations", "max_batch_len", "ft_compute_sample_grad")


class Clipper(Protocol):
    """Adds clipped gradients to sums; `num_zeroed` counts the units that contributed zero for want of a finite one."""

    name: str
    clip: float
    num_zeroed: int

    def add(self, units: Sequence[Unit], sums: Sums) -> list[float]:
        """Every unit's clipped gradient is added to `sums` (float64, by name). Returns the finite losses."""

    def close(self) -> None:
        """Nothing of the engine is left on the model."""


class OneByOne:
    """The reference: an ordinary backward pass per unit. Right for every layer, slow for short rows."""

    name = "one-by-one"

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        *,
        clip: float,
        rows: int,
        pad_id: int,
        autocast: Autocast,
        weighs_tokens: bool = False,
    ) -> None:
        """Start on `model`, whose `trainable` parameters require a gradient.

        Args:
            rows: most rows that go through the model at once.
            weighs_tokens: each token's loss counts times its own probability.
        """
        self.model, self.trainable, self.clip, self._weighs = model, dict(trainable), clip, weighs_tokens
        self.rows, self.pad_id, self.autocast = rows, pad_id, autocast
        self.num_zeroed = 0

    def add(self, units: Sequence[Unit], sums: Sums) -> list[float]:
        """See `Clipper.add`."""
        found = []
        for unit in units:
            self._clear()
            value = 0.0
            for rows in _parts(unit, self.rows):
                losses_B = self._losses(rows) / len(unit)
                _backward(losses_B.sum())
                value += float(losses_B.detach().sum())
            grads = {name: tensor.grad for name, tensor in self.trainable.items() if tensor.grad is not None}
            norms = [grad.float().norm().reshape(1) for grad in grads.values()]
            factor_1 = self._factors(torch.stack(norms).norm(dim=0)) if norms else None
            if factor_1 is not None and float(factor_1) > 0:
                for name, grad in grads.items():
                    sums[name] += (grad.float() * factor_1.reshape(())).double()
            found.append(value)
        self._clear()
        return _finite(found)

    def close(self) -> None:
        """See `Clipper.close`."""
        self._clear()

    def _losses(self, rows: Sequence[Example]) -> Tensor:
        """Return each row's mean loss in nats per counted token, weighed or not, (B,) float32."""
        device = next(iter(self.trainable.values())).device
        batch = {name: tensor.to(device) for name, tensor in collate(rows, self.pad_id).items()}
        with self.autocast():
            losses_N, counted_BT = token_losses(self.model, batch)
        if self._weighs:
            losses_N = losses_N * (-losses_N.detach()).exp()
        return by_row(losses_N, counted_BT) / counted_BT.sum(1).clamp(min=1)

    def _factors(self, norms_B: Tensor) -> Tensor:
        """Return by what each gradient is multiplied: at most `clip` is left of it, nothing if it is not finite."""
        finite_B = torch.isfinite(norms_B)
        self.num_zeroed += int((~finite_B).sum())
        factors_B = (self.clip / (norms_B * (1 + _SLACK))).clamp(max=1.0)
        return torch.where(finite_B, factors_B, torch.zeros_like(factors_B))

    def _clear(self) -> None:
        for tensor in self.trainable.values():
            tensor.grad = None


class Hooks(OneByOne):
    """Per-row gradients of a whole part at once, by Opacus' hooks: rows times parameters in memory. Example units."""

    name = "hooks"

    def __init__(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], **settings: Any) -> None:
        super().__init__(model, trainable, **settings)
        from opacus.grad_sample import GradSampleHooks

        self._hooks: Any = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=False)

    def add(self, units: Sequence[Unit], sums: Sums) -> list[float]:
        """See `Clipper.add`."""
        found: list[float] = []
        for part in _parts(units, self.rows):
            self._clear()
            losses_B = self._losses([row for (row,) in part])
            _backward(losses_B.sum())
            samples = self._samples(len(part))
            norms_B = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples.values()]).norm(dim=0)
            factors_B = self._factors(norms_B)
            kept = torch.isfinite(norms_B)
            for name, sample in samples.items():
                rows = sample if bool(kept.all()) else sample[kept]  # zero times NaN is NaN
                sums[name] += torch.einsum("b,b...->...", factors_B[kept], rows).double()
            found += losses_B.tolist()
        self._clear()
        return _finite(found)

    def close(self) -> None:
        """See `Clipper.close`."""
        super().close()
        self._hooks.cleanup()
        for module in self.model.modules():
            for name in _OPACUS_ON_MODULES:
                module.__dict__.pop(name, None)

    def _samples(self, num_rows: int) -> Sums:
        """Return the per-row gradients, (B, *shape) float32; a parameter that no row used has none.

        Raises:
            RunFailed: when Opacus gives none where there is a gradient, or one of another shape.
        """
        found: Sums = {}
        for name, tensor in self.trainable.items():
            sample = tensor.grad_sample  # type: ignore[attr-defined]
            if sample is None and tensor.grad is None:
                continue
            shape = tuple(getattr(sample, "shape", ()))
            if shape != (num_rows, *tensor.shape):
                raise RunFailed(f"per-example gradient of {name!r}: shape {shape}, expected {num_rows} rows of it")
            found[name] = sample.float()
        return found

    def _clear(self) -> None:
        for tensor in self.trainable.values():
            tensor.grad = None
            tensor.grad_sample = None  # type: ignore[attr-defined]


class Ghost(OneByOne):
    """Norms without per-row gradients, then a second pass with the clipped weights: less memory. Example units.

    What is clipped is not what was measured, so both are computed finer: float32 throughout, products of norms in
    float64. In bfloat16 the norms are up to some percent off, and the bound on what a unit can change with them.
    """

    name = "ghost"

    def __init__(self, model: nn.Module, trainable: Mapping[str, nn.Parameter], **settings: Any) -> None:
        super().__init__(model, trainable, **settings)
        from opacus.grad_sample import GradSampleHooksFastGradientClipping

        class Fine(GradSampleHooksFastGradientClipping):
            NORM_SAMPLERS: ClassVar[dict[type, Any]] = {nn.Linear: _linear_norms}

        self._hooks: Any = Fine(model, batch_first=True, loss_reduction="sum", strict=False, use_ghost_clipping=True)

    def add(self, units: Sequence[Unit], sums: Sums) -> list[float]:
        """See `Clipper.add`."""
        found: list[float] = []
        for part in _parts(units, self.rows):
            losses_B, factors_B = self._weighed([row for (row,) in part])
            kept = (factors_B > 0).tolist()
            if not all(kept):  # zero times NaN is NaN: once more, without the rows that do not count
                self._clear()
                rows = [row for (row,), keep in zip(part, kept, strict=True) if keep]
                losses_B, factors_B = self._weighed(rows) if rows else (losses_B[:0], factors_B[:0])
            if len(losses_B):
                self._clear()
                self._hooks.disable_hooks()
                try:
                    _backward((losses_B * factors_B).sum())
                finally:
                    self._hooks.enable_hooks()
                for name, tensor in self.trainable.items():
                    if tensor.grad is not None:
                        sums[name] += tensor.grad.double()
            found += losses_B.tolist()
        self._clear()
        return _finite(found)

    def close(self) -> None:
        """See `Clipper.close`."""
        super().close()
        self._hooks.cleanup()
        for module in self.model.modules():
            for name in _OPACUS_ON_MODULES:
                module.__dict__.pop(name, None)

    def _weighed(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return the rows' losses, their graph kept, and the factors that clip them, both (B,).

        Raises:
            RunFailed: when Opacus has no norm of a parameter that has a gradient.
        """
        self._clear()
        losses_B = self._losses(rows)
        _backward(losses_B.sum(), again=True)
        norms = []
        for name, tensor in self.trainable.items():
            norm_B = getattr(tensor, "_norm_sample", None)
            if norm_B is None and tensor.grad is None:
                continue
            if norm_B is None or norm_B.shape != (len(rows),):
                raise RunFailed(f"no norm of the per-example gradient of {name!r}")
            norms.append(norm_B.float())
        return losses_B, self._factors(torch.stack(norms).norm(dim=0))

    def _clear(self) -> None:
        for tensor in self.trainable.values():
            tensor.grad = None
            tensor.__dict__.pop("_norm_sample", None)


def _linear_norms(layer: nn.Linear, activations: Sequence[Tensor], backward_BTO: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the norms of a linear layer's per-row gradients, (B,), from token products alone."""
    back_BTO = backward_BTO.double().reshape(len(backward_BTO), -1, backward_BTO.shape[-1])
    inputs_BTI = activations[0].double().reshape(len(backward_BTO), -1, activations[0].shape[-1])
    products_BTT = (back_BTO @ back_BTO.mT) * (inputs_BTI @ inputs_BTI.mT)
    found: dict[Any, Tensor] = {layer.weight: products_BTT.sum((1, 2)).clamp(min=0).sqrt()}
    if layer.bias is not None:
        found[layer.bias] = back_BTO.sum(1).norm(dim=1)
    return found


def choose(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    *,
    clip: float,
    rows: int,
    pad_id: int,
    autocast: Autocast,
    wanted: Literal["hooks", "ghost", "one-by-one"],
    is_bf16: bool,
    weighs_tokens: bool = False,
) -> Clipper:
    """Return the wanted engine if it gives the one-by-one loop's sums on made-up rows, else that loop."""
    if wanted == "ghost":
        autocast, is_bf16 = nullcontext, False
    settings: dict[str, Any] = {"clip": clip, "rows": rows, "pad_id": pad_id, "autocast": autocast}
    settings["weighs_tokens"] = weighs_tokens
    reference = OneByOne(model, trainable, **settings)
    kind: type[OneByOne] | None = {"hooks": Hooks, "ghost": Ghost}.get(wanted)
    if kind is None:
        return reference
    expected = _probed(reference)
    engine: OneByOne | None = None
    try:
        engine = kind(model, trainable, **settings)
        if _relative_error(_probed(engine), expected) <= _PROBE_ERROR[is_bf16]:
            return engine
    except _PROBE_FAILURES:
        pass  # a layer that Opacus does not support: the name of the engine that is returned says so
    if engine is not None:
        engine.close()
    return reference


def _probed(engine: OneByOne) -> Sums:
    """Return the engine's sums over made-up rows, every one of them clipped."""
    vocabulary = int(engine.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    units: list[Unit] = []
    for row, length in enumerate(_PROBE_LENGTHS):
        ids = [(7 + 13 * row + 5 * place) % vocabulary for place in range(length)]
        units.append((Example(ids, ids),))
    sums, wanted_clip = zeros(engine.trainable), engine.clip
    with _without_chance(engine.model), _moved(engine.trainable):
        engine.clip = _PROBE_CLIP
        engine.add(units, sums)
        engine.clip, engine.num_zeroed = wanted_clip, 0
    return sums


def _relative_error(found: Sums, expected: Sums) -> float:
    """Return the largest distance of a tensor over its expected norm, small tensors mattering less; never NaN."""
    whole = float(torch.cat([tensor.flatten() for tensor in expected.values()]).norm())
    errors = [
        float((found[name] - tensor).norm()) / (float(tensor.norm()) + _PROBE_FLOOR * whole)
        for name, tensor in expected.items()
    ]
    return max(errors) if all(math.isfinite(error) for error in errors) else math.inf


def zeros(trainable: Mapping[str, Tensor]) -> Sums:
    """Return sums to add to: a zero of every shape, float64."""
    return {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in trainable.items()}


@contextmanager
def _without_chance(model: nn.Module) -> Iterator[None]:
    """Dropout is off; modules with parameters that learn stay in training mode, without which Opacus is blind."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = any(tensor.requires_grad for tensor in module.parameters(recurse=False))
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _moved(trainable: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The weights are a little off meanwhile, so that no gradient is zero as those beside LoRA's zero start are."""
    kept = {name: tensor.detach().clone() for name, tensor in trainable.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for tensor in trainable.values():
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.device))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in trainable.items():
                tensor.copy_(kept[name])


def _backward(loss: Tensor, *, again: bool = False) -> None:
    with warnings.catch_warnings():
        # the lowest blocks read embeddings, which do not learn; the hooks need only the outputs' gradients
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        loss.backward(retain_graph=again)  # type: ignore[no-untyped-call]


def _parts(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
