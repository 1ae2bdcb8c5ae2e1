"""What a causal model says of chosen positions, a few at a time: never a (tokens x vocabulary) tensor.

The scores over a vocabulary are the largest tensor of a step, their gradient is as large again, and most positions need
neither. So a model runs once with its head closed to all but one position; the hidden states that would have gone into
the head are kept, and only the chosen ones go through it, in chunks. A chunk goes through the model's own code behind
its blocks, not through the head alone: what a model does to its scores afterwards (scaling, soft caps) is done. That
this gives what the model itself gives is looked at in every pass, at one position; a model of another make, or one that
is sharded over processes, scores all chosen positions at once, as it would by itself.

A position's value (a loss, a divergence) depends on the hidden state of that position alone. Its gradient is therefore
taken with it, while the chunk's scores are there, and kept as (positions, width): the backward pass multiplies it by
what each position's value weighs, which is a row's own weight where gradients are clipped row by row.

Shapes: B rows, T tokens, D width, V vocabulary, N chosen positions in row order, n positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from offsite.errors import UnsupportedModel
from offsite.seq2seq.inputs import inputs_of

_ELEMENTS_AT_ONCE = 1 << 23
"""Scores that are held at once, about; their gradient takes as much again."""

_FEWEST_ROWS = 16


class Measure(Protocol):
    """A value of every chosen position, from its scores."""

    def __call__(self, scores_nV: Tensor, rows: slice, *, slopes: bool) -> tuple[Tensor, Tensor | None]:
        """Return the values (n,) of the chosen positions `rows`, and with `slopes` their derivatives (n, V).

        Args:
            scores_nV: float32 or float64, without a graph; may be overwritten.
        """


class CrossEntropy:
    """Negative log-likelihood of each position's target, in nats."""

    def __init__(self, targets_N: Tensor) -> None:
        self._targets_N = targets_N

    def __call__(self, scores_nV: Tensor, rows: slice, *, slopes: bool) -> tuple[Tensor, Tensor | None]:
        """See `Measure`."""
        targets_n1 = self._targets_N[rows][:, None]
        logs_nV = scores_nV.log_softmax(-1)
        values_n = -logs_nV.gather(1, targets_n1)[:, 0]
        if not slopes:
            return values_n, None
        return values_n, logs_nV.exp_().scatter_add_(1, targets_n1, torch.full_like(values_n, -1.0)[:, None])


class Divergence:
    """KL of each position's distribution from another model's, which is held fixed, in nats: KL(other || model)."""

    def __init__(self, other: Before | Tensor) -> None:
        """Take what `before_head` gave of the other model at the same positions; its scores are made when needed."""
        self._other = other
        place = (other if isinstance(other, Tensor) else other.hidden).device.type
        self._place, self._cast = place, (torch.is_autocast_enabled(place), torch.get_autocast_dtype(place))

    def __call__(self, scores_nV: Tensor, rows: slice, *, slopes: bool) -> tuple[Tensor, Tensor | None]:
        """See `Measure`."""
        logs_nV = scores_nV.log_softmax(-1)
        other_nV = wide(self._scores(rows)).log_softmax(-1)
        values_n = functional.kl_div(logs_nV, other_nV, reduction="none", log_target=True).sum(-1)
        return values_n, logs_nV.exp_().sub_(other_nV.exp_()) if slopes else None

    @torch.no_grad()
    def _scores(self, rows: slice) -> Tensor:
        if isinstance(self._other, Tensor):
            return self._other[rows]
        enabled, dtype = self._cast
        with torch.autocast(self._place, dtype=dtype, enabled=enabled, cache_enabled=False):
            return self._other.project(self._other.hidden[rows])


@dataclass(frozen=True)
class Before:
    """What a model has behind its blocks at the chosen positions."""

    hidden: Tensor
    """(N, D), with the graph that led there."""

    project: Callable[[Tensor], Tensor]
    """From hidden states (n, D) to scores (n, V), as the model makes them."""

    num_scores: int
    """V."""

    learns: bool
    """Whether parameters behind the blocks require a gradient."""

    def chunks(self) -> Iterator[slice]:
        """Yield the chosen positions, some at a time."""
        return _chunks(len(self.hidden), self.num_scores)


def values_at(model: nn.Module, batch: Mapping[str, Tensor], chosen_BT: Tensor, measure: Measure) -> Tensor:
    """Return `measure` at the chosen positions in row order: (N,) float32 (float64 of a float64 model), differentiable.

    Args:
        batch: ``input_ids`` and, unless all is text, ``attention_mask``, each (B, T) int64, on the model's device; of
            an encoder-decoder what its encoder reads as well (`offsite.seq2seq.inputs`).
        chosen_BT: bool.
    """
    found = before_head(model, batch, chosen_BT)
    if isinstance(found, Tensor):
        whole = [_Valued.apply(found[rows], measure, rows) for rows in _chunks(len(found), found.shape[-1])]
        return torch.cat(whole) if whole else found.new_zeros(0).float()
    if not len(found.hidden):
        return found.hidden.sum(-1).float()
    if not found.learns:
        return _Chunked.apply(found.hidden, found, measure)  # type: ignore[no-any-return]
    parts = []
    for rows in found.chunks():

        def part(hidden_nD: Tensor, rows: slice = rows) -> Tensor:
            return _Valued.apply(found.project(hidden_nD), measure, rows)  # type: ignore[no-any-return]

        hidden_nD = found.hidden[rows]
        parts.append(checkpoint(part, hidden_nD, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)


@torch.no_grad()
def scores_at(model: nn.Module, batch: Mapping[str, Tensor], chosen_BT: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the chosen positions and their scores (n, V), some at a time, in row order and the model's dtype.

    Args:
        batch, chosen_BT: as `values_at` takes them.
    """
    found = before_head(model, batch, chosen_BT)
    if isinstance(found, Tensor):
        for rows in _chunks(len(found), found.shape[-1]):
            yield rows, found[rows]
    else:
        for rows in found.chunks():
            yield rows, found.project(found.hidden[rows])


def before_head(model: nn.Module, batch: Mapping[str, Tensor], chosen_BT: Tensor) -> Before | Tensor:
    """Run the model and return what goes into its head at the chosen positions; of a model of another make, the scores.

    Args:
        batch, chosen_BT: as `values_at` takes them.

    Returns:
        hidden states and what makes scores of them, or scores (N, V), both with their graph.
    """
    lm = causal_lm(model)
    if "before_head" in vars(lm):  # several passes whose scores are put together know it themselves
        return lm.before_head(batch, chosen_BT)  # type: ignore[no-any-return]
    head, trunks = lm.get_output_embeddings(), _trunks(lm)
    given = {**inputs_of(batch), "use_cache": False}
    if not trunks or not isinstance(head, nn.Module) or _is_sharded(lm) or "forward" in vars(lm):
        return _all_at_once(model, head, given, chosen_BT)
    seen = _Seen(chosen_BT)
    with seen.watching(head, trunks):
        scores: Tensor = model(**given).logits
    if seen.hidden_ND is None or not seen.is_narrowed:
        return _all_at_once(model, head, given, chosen_BT)
    hidden_ND, trunk = seen.hidden_ND, seen.trunk
    replay = _Replay(lm, trunk, seen.output)
    if len(hidden_ND):
        with torch.no_grad():
            again_1V = replay(hidden_ND[:1].detach())
        if not _same(scores[0].detach(), again_1V):
            return _all_at_once(model, head, given, chosen_BT)
    learns = any(one.requires_grad for one in head.parameters()) or _learns_outside(lm, trunk)
    return Before(hidden_ND, replay, scores.shape[-1], learns)


def states_at(model: nn.Module, batch: Mapping[str, Tensor], chosen_BT: Tensor) -> Tensor:
    """Run the model and return what its blocks, and the norm behind them, have at the chosen positions, (N, D).

    A model without a head over a vocabulary is run up to there alone; any other scores one position besides.

    Args:
        batch, chosen_BT: as `values_at` takes them.

    Raises:
        UnsupportedModel: when the model does not hand on one state for each position.
    """
    lm = causal_lm(model)
    head, trunk = lm.get_output_embeddings(), lm.base_model
    given = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask"), "use_cache": False}
    seen = _Seen(chosen_BT)
    with seen.watching(head, _trunks(lm)):
        (trunk if head is None else model)(**given)
    if seen.hidden_ND is None:
        raise UnsupportedModel(f"{type(lm).__name__} does not hand on one state for each token")
    return seen.hidden_ND


def causal_lm(model: nn.Module) -> Any:
    """Return the language model itself, below what peft wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def wide(tensor: Tensor) -> Tensor:
    """Return it in float32, or in float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Seen:
    """What passed through a model: its trunk's output, and the part of it at the chosen positions."""

    trunk: nn.Module
    output: Any

    def __init__(self, chosen_BT: Tensor, *, whole: bool = False) -> None:
        self._chosen_BT, self._whole = chosen_BT, whole
        self.hidden_ND: Tensor | None = None
        self.is_narrowed = False
        self._depth = self._num_outputs = 0

    @contextmanager
    def watching(self, head: nn.Module | None, trunks: Sequence[nn.Module] = ()) -> Iterator[None]:
        """While inside, the head is handed one chosen position, or all of them."""
        handles = [] if head is None else [head.register_forward_pre_hook(self._narrow)]
        for trunk in trunks:
            handles.append(trunk.register_forward_pre_hook(self._enter))
            handles.append(trunk.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _narrow(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args or args[0].shape[:2] != self._chosen_BT.shape:
            return None
        self.is_narrowed = True
        chosen_ND = args[0][self._chosen_BT]
        return ((chosen_ND if self._whole else chosen_ND[:1].detach()).unsqueeze(0), *args[1:])

    def _enter(self, _module: nn.Module, _args: object) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, _args: object, output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._num_outputs += 1
        states = output[0] if isinstance(output, (tuple, Mapping)) and self._num_outputs == 1 else None
        self.trunk, self.output, self.hidden_ND = module, output, None
        if isinstance(states, Tensor) and states.shape[:2] == self._chosen_BT.shape:
            self.hidden_ND = states[self._chosen_BT]


class _Replay:
    """The model's own code behind its blocks: called with hidden states (n, D) it returns scores (n, V)."""

    def __init__(self, lm: Any, trunk: nn.Module, output: Any) -> None:
        self._lm, self._trunk = lm, trunk
        others = dict(output) if isinstance(output, Mapping) else {}
        self._make = type(output) if others else None
        self._others = {name: value for name, value in others.items() if name != "last_hidden_state"}

    def __call__(self, hidden_nD: Tensor) -> Tensor:
        hidden_1nD = hidden_nD.unsqueeze(0)
        output = (hidden_1nD,) if self._make is None else self._make(last_hidden_state=hidden_1nD, **self._others)
        own = self._trunk.__dict__.get("forward")
        self._trunk.forward = lambda *_, **__: output
        try:
            ids_1n = torch.zeros(hidden_1nD.shape[:2], dtype=torch.long, device=hidden_nD.device)
            # not [0]: its backward pass fills a tensor of this size with zeros and copies into it
            scores: Tensor = self._lm(input_ids=ids_1n, use_cache=False).logits.squeeze(0)
        finally:
            del self._trunk.forward
            if own is not None:
                self._trunk.forward = own
        return scores


class _Chunked(torch.autograd.Function):
    """Values of chosen positions whose head is frozen; the gradient is taken along with them, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, found: Before, measure: Measure) -> Tensor:  # type: ignore[override]
        needed = bool(ctx.needs_input_grad[0])
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        for rows in found.chunks():
            hidden_nD = hidden_ND[rows].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                scores_nV = found.project(hidden_nD)
            with torch.autocast(hidden_ND.device.type, enabled=False):
                values_n, slopes_nV = measure(wide(scores_nV.detach()), rows, slopes=needed)
            values.append(values_n)
            if slopes_nV is not None:
                gradients += torch.autograd.grad(scores_nV, hidden_nD, slopes_nV.to(scores_nV.dtype))
            del scores_nV, slopes_nV
        ctx.save_for_backward(torch.cat(gradients) if needed else torch.empty(0))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, weights_N: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * weights_N[:, None]).to(gradient_ND.dtype), None, None


class _Valued(torch.autograd.Function):
    """Values of some positions from their scores."""

    @staticmethod
    def forward(ctx: Any, scores_nV: Tensor, measure: Measure, rows: slice) -> Tensor:  # type: ignore[override]
        needed = bool(ctx.needs_input_grad[0])
        with torch.autocast(scores_nV.device.type, enabled=False):
            values_n, slopes_nV = measure(wide(scores_nV.detach()), rows, slopes=needed)
        ctx.save_for_backward(torch.empty(0) if slopes_nV is None else slopes_nV.to(scores_nV.dtype))
        return values_n

    @staticmethod
    def backward(ctx: Any, weights_n: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slopes_nV,) = ctx.saved_tensors
        return (slopes_nV * weights_n[:, None]).to(slopes_nV.dtype), None, None


def _trunks(lm: Any) -> list[nn.Module]:
    """Return the modules that may hold all that comes before the head."""
    trunk = getattr(lm, "base_model", lm)
    if trunk is lm or not isinstance(trunk, nn.Module):
        return []
    inner = getattr(trunk, "decoder", None)  # some call that alone
    return [trunk, inner] if isinstance(inner, nn.Module) else [trunk]


def _is_sharded(lm: nn.Module) -> bool:
    """Say whether processes share the parameters out among them; asked at every batch, so not each one alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(hasattr(parameter, "to_local") for parameter in lm.parameters())


def _learns_outside(lm: nn.Module, trunk: nn.Module) -> bool:
    """Say whether a parameter that is in no part of the trunk requires a gradient."""
    waiting, found = [lm], []
    while waiting:
        module = waiting.pop()
        if module is not trunk:
            found += [one for one in module.parameters(recurse=False) if one.requires_grad]
            waiting += module.children()
    inside = {id(one) for one in trunk.parameters()} if found else set()
    return any(id(one) not in inside for one in found)


def _all_at_once(model: nn.Module, head: object, given: Mapping[str, Any], chosen_BT: Tensor) -> Tensor:
    """Return the scores (N, V) of all chosen positions."""
    seen = _Seen(chosen_BT, whole=True)
    with seen.watching(head) if isinstance(head, nn.Module) else nullcontext():
        scores: Tensor = model(**given).logits
    return scores[0] if seen.is_narrowed else scores[chosen_BT]


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether they differ by rounding alone; what is not finite is found by who asked."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = wide(one.nan_to_num()), wide(other.nan_to_num())
    return bool((first - second).abs().max() <= torch.finfo(one.dtype).eps ** 0.5 * first.abs().max())


def _chunks(num: int, num_scores: int) -> Iterator[slice]:
    size = max(_FEWEST_ROWS, _ELEMENTS_AT_ONCE // max(1, num_scores))
    return (slice(first, min(num, first + size)) for first in range(0, num, size))
