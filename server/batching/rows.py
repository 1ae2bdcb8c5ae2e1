"""Adapters on one model, row by row of a batch: each row is computed with the adapter of its own request.

Nothing is plugged into the model. Modules that some adapter changes compute through here: a low-rank update is added
to the rows that ask for it, by batched products over stacks that hold each adapter once; what an adapter replaces
(BitFit's vectors, whole blocks' weights) stands in for the model's own in its rows alone. Without a plan in force the
modules are as they were.

Ranks are never padded: adapters of one rank on the same modules share a stack, others have another. Scales (share,
rsLoRA) are folded into the factor B once, in float32. Where a replaced parameter cannot be told row by row (experts,
whose tokens are regrouped), the adapter does not `mix`: its requests are batched among themselves.

Shape letters: B rows, T tokens, I inputs, O outputs, K rank, N rows of one stack, G adapters in them, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.norms import modules_of, scale_of
from offsite.errors import UnsupportedModel, WrongNames, WrongShape
from offsite.modelling.blocks import EXPERTS, is_conv1d, is_linear, linear_dims
from server.plugging.fit import Fitted, full_name

_KEPT_PLANS = 8
_SPARSE = 2  # a run of slots is used as it stands while at most so many times as long as the adapters in it


@dataclass(eq=False)
class RowAdapter:
    """An adapter that is on the model, for the rows that ask for it.

    Attributes:
        mixes: whether its rows may be computed together with those of other adapters.
        num_bytes: what it holds in memory.
    """

    kind: str
    mixes: bool = True
    num_bytes: int = 0
    pool: _Pool | None = field(default=None, repr=False)
    slot: int = -1
    gains: dict[str, Tensor] = field(default_factory=dict, repr=False)
    replaced: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def is_on(self) -> bool:
        """Whether rows may ask for it; not once it is taken off."""
        return bool(self.pool or self.replaced)

    @property
    def paths(self) -> set[str]:
        """Names of the modules that it changes."""
        return set(self.replaced) | (set(self.pool.stacks) if self.pool else set())


class Rows:
    """A model whose rows may each have an adapter of their own.

    Args:
        model: a causal language model without an adapter; its modules' `forward` is wrapped, its weights stay.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._pools: dict[tuple[int, frozenset[str]], _Pool] = {}
        self._wrapped: set[str] = set()
        self._plans: dict[tuple[RowAdapter | None, ...], _Plan] = {}
        self._plan: _Plan | None = None

    def put_on(self, adapter: Fitted) -> RowAdapter:
        """Return the adapter, ready for rows to ask for; the model computes what it did.

        Raises:
            WrongNames, WrongShape, UnsupportedModel: when its tensors do not fit the model; nothing is changed then.
        """
        if adapter.spec.head is not None:
            raise UnsupportedModel(
                f"this adapter is for {adapter.spec.task} and writes no text", hint="serve its folder alone"
            )
        if any(name.endswith(".lora_A") for name in adapter.tensors):
            found = self._low_rank(adapter)
        else:
            found = self._replacing(adapter)
        for path in found.paths - self._wrapped:
            self._wrap(path)
        return found

    def take_off(self, adapter: RowAdapter) -> None:
        """No row may ask for the adapter any more; its memory is free, or another's."""
        if adapter.pool is not None:
            adapter.pool.leave(adapter.slot)
            if not adapter.pool.num_used:
                self._pools = {key: pool for key, pool in self._pools.items() if pool is not adapter.pool}
        adapter.pool, adapter.slot = None, -1
        adapter.gains.clear()
        adapter.replaced.clear()
        self._plans.clear()

    @contextmanager
    def of(self, adapters: Sequence[RowAdapter | None]) -> Iterator[None]:
        """Forward passes inside are of so many rows, with these adapters.

        Raises:
            UnsupportedModel: when one that does not mix is among others.
        """
        key = tuple(adapters)
        plan = self._plans.pop(key, None) or _Plan(key, next(self._model.parameters()).device)
        self._plans[key] = plan  # the newest last
        if len(self._plans) > _KEPT_PLANS:
            del self._plans[next(iter(self._plans))]
        self._plan = plan
        try:
            yield
        finally:
            self._plan = None

    def _low_rank(self, adapter: Fitted) -> RowAdapter:
        factors, gains, scale = {}, {}, scale_of(adapter.spec)
        for canonical in modules_of(adapter.tensors):
            path = full_name(f"{canonical}.x", adapter.sites).removesuffix(".x")
            module = self._module(path)
            if not is_linear(module):
                raise WrongNames(f"the adapter has factors for {path!r}, which is no linear of the model")
            device = module.get_parameter("weight").device
            a_KI, b_OK = (adapter.tensors[f"{canonical}.{part}"].float() for part in ("lora_A", "lora_B"))
            if (a_KI.shape[1], b_OK.shape[0]) != linear_dims(module) or a_KI.shape[0] != b_OK.shape[1]:
                raise WrongShape(f"the adapter's factors do not fit {path!r}")
            factors[path] = (a_KI.T.to(device), (scale * b_OK.T).to(device))
            magnitude = adapter.tensors.get(f"{canonical}.magnitude")
            if magnitude is not None:  # DoRA: bias + m / |W + s B A| * (W x + s B A x), its norm worked out once
                weight = module.get_parameter("weight").detach().float()
                weight = (weight.T if is_conv1d(module) else weight) + scale * b_OK.to(device) @ a_KI.to(device)
                gains[path] = magnitude.float().to(device) / weight.norm(dim=1)
        key = (adapter.spec.rank, frozenset(factors))
        pool = self._pools.setdefault(key, _Pool())
        found = RowAdapter(adapter.spec.kind, pool=pool, slot=pool.join(factors), gains=gains)
        found.num_bytes = sum(_num_bytes(one) for pair in factors.values() for one in pair)
        found.num_bytes += sum(map(_num_bytes, gains.values()))
        return found

    def _replacing(self, adapter: Fitted) -> RowAdapter:
        found = RowAdapter(adapter.spec.kind)
        for name, tensor in adapter.tensors.items():
            path, _, parameter = full_name(name, adapter.sites).rpartition(".")
            module = self._module(path)
            own = module._parameters.get(parameter)
            if own is None:
                raise WrongNames(f"the adapter has a tensor for {path}.{parameter}, which is no parameter of the model")
            if own.shape != tensor.shape:
                raise WrongShape(
                    f"{path}.{parameter} has shape {tuple(own.shape)}, the adapter's {tuple(tensor.shape)}"
                )
            held = tensor.to(own.device, own.dtype)
            found.replaced.setdefault(path, {})[parameter] = held
            found.num_bytes += _num_bytes(held)
            if EXPERTS.search(path) or (tensor.dim() > 1 and not is_linear(module)):
                found.mixes = False
        return found

    def _module(self, path: str) -> nn.Module:
        try:
            return self._model.get_submodule(path)
        except AttributeError:
            raise WrongNames(f"the adapter has tensors for {path!r}, which is no module of the model") from None

    def _wrap(self, path: str) -> None:
        module, plain = self._model.get_submodule(path), self._model.get_submodule(path).forward

        def forward(*args: Any, **given: Any) -> Any:
            if self._plan is None:
                return plain(*args, **given)
            return self._plan.forward(path, module, plain, args, given)

        module.forward = forward  # type: ignore[method-assign]
        self._wrapped.add(path)


class _Pool:
    """Stacked factors of the adapters of one rank on the same modules: A (S, I, K) and scaled B (S, K, O)."""

    def __init__(self) -> None:
        self.stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._free: list[int] = []
        self._num_slots = 0

    @property
    def num_used(self) -> int:
        return self._num_slots - len(self._free)

    def join(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> int:
        """Return the slot in which the factors are."""
        if not self._free:
            more = max(1, self._num_slots // 8)
            stacks = {}
            for path, pair in factors.items():
                grown = [one.new_zeros(self._num_slots + more, *one.shape) for one in pair]
                for new, old in zip(grown, self.stacks.get(path, ()), strict=False):
                    new[: self._num_slots] = old
                stacks[path] = (grown[0], grown[1])
            self.stacks = stacks  # all of them, or as they were where memory ends
            self._free = list(range(self._num_slots, self._num_slots + more))
            self._num_slots += more
        slot = self._free.pop(0)
        for path, pair in factors.items():
            for stack, one in zip(self.stacks[path], pair, strict=True):
                stack[slot] = one
        return slot

    def leave(self, slot: int) -> None:
        self._free = sorted([*self._free, slot])
        for pair in self.stacks.values():
            for stack in pair:
                stack[slot] = 0


class _Part:
    """Rows of a batch whose adapters share a stack, and how their products are taken."""

    def __init__(self, pool: _Pool, rows: list[int], slots: list[int], num_rows: int, device: torch.device) -> None:
        order = sorted(range(len(rows)), key=lambda at: slots[at])
        rows, slots = [rows[at] for at in order], [slots[at] for at in order]
        used = sorted(set(slots))
        self.pool = pool
        self.slot = used[0] if len(used) == 1 else None
        self._low, self._high = used[0], used[-1] + 1
        self._chosen: Tensor | None = None
        if self._high - self._low > _SPARSE * len(used):  # copied each time: it is the smaller part of a long run
            self._chosen = torch.tensor(used, device=device)
            groups = [used.index(slot) for slot in slots]
        else:
            groups = [slot - self._low for slot in slots]
        places = [slots[:at].count(slot) for at, slot in enumerate(slots)]
        self._num_groups = len(used) if self._chosen is not None else self._high - self._low
        self._num_places = max(places) + 1
        self._is_plain = self._num_places == 1 and groups == list(range(self._num_groups))
        self.rows_N = None if rows == list(range(num_rows)) else torch.tensor(rows, device=device)
        self._groups_N, self._places_N = torch.tensor(groups, device=device), torch.tensor(places, device=device)

    def update(self, path: str, x_NTI: Tensor) -> Tensor:
        """Return what the adapters add, (N, T, O) float32."""
        a_SIK, b_SKO = self.pool.stacks[path]
        x_NTI = x_NTI.to(a_SIK.dtype)
        if self.slot is not None:
            return x_NTI @ a_SIK[self.slot] @ b_SKO[self.slot]
        a_GIK, b_GKO = (
            stack[self._low : self._high] if self._chosen is None else stack.index_select(0, self._chosen)
            for stack in (a_SIK, b_SKO)
        )
        if self._is_plain:
            return torch.bmm(torch.bmm(x_NTI, a_GIK), b_GKO)
        num_tokens = x_NTI.shape[1]
        packed = x_NTI.new_zeros(self._num_groups, self._num_places, *x_NTI.shape[1:])
        packed[self._groups_N, self._places_N] = x_NTI
        found = torch.bmm(torch.bmm(packed.flatten(1, 2), a_GIK), b_GKO)
        found = found.view(self._num_groups, self._num_places, num_tokens, -1)
        return found[self._groups_N, self._places_N]


class _Plan:
    """How a batch of rows with these adapters is computed; worked out once for as long as no row joins or leaves."""

    def __init__(self, adapters: tuple[RowAdapter | None, ...], device: torch.device) -> None:
        self.adapters = adapters
        self._is_uniform = len(set(map(id, adapters))) == 1
        if not self._is_uniform and not all(one is None or one.mixes for one in adapters):
            raise UnsupportedModel("an adapter of experts cannot be computed beside other adapters")
        by_pool: dict[int, tuple[_Pool, list[int]]] = {}
        by_adapter: dict[int, tuple[RowAdapter, list[int]]] = {}
        for row, one in enumerate(adapters):
            if one is not None:
                by_adapter.setdefault(id(one), (one, []))[1].append(row)
                if one.pool is not None:
                    by_pool.setdefault(id(one.pool), (one.pool, []))[1].append(row)
        self._parts = [
            _Part(pool, rows, [one.slot for row in rows if (one := adapters[row]) is not None], len(adapters), device)
            for pool, rows in by_pool.values()
        ]
        self._groups = [(one, torch.tensor(rows, device=device)) for one, rows in by_adapter.values()]
        self._vectors: dict[tuple[str, str], Tensor] = {}

    def forward(
        self, path: str, module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]
    ) -> Any:
        """Return what the module computes of these rows."""
        replacing = [(one, rows_N) for one, rows_N in self._groups if path in one.replaced]
        parts = [part for part in self._parts if path in part.pool.stacks]
        if self._is_uniform:
            own = replacing[0][0].replaced[path] if replacing else {}
            with _standing_in(module, own):
                found = plain(*args, **given)
            return self._added(path, module, args[0], found, parts) if parts else found
        if replacing and not is_linear(module):
            return self._by_vectors(path, module, plain, args, given)
        found = plain(*args, **given)
        if not replacing and not parts:
            return found
        x_BTI, found_BTO = self._by_row(args[0]), self._by_row(found)
        for one, rows_N in replacing:
            found_BTO[rows_N] = _linear(module, x_BTI[rows_N], one.replaced[path])
        return self._added(path, module, x_BTI, found_BTO, parts).view(found.shape)

    def _added(self, path: str, module: nn.Module, x_BTI: Tensor, found_BTO: Tensor, parts: list[_Part]) -> Tensor:
        for part in parts:
            rows_N = part.rows_N
            if rows_N is None:
                found_BTO = (found_BTO + part.update(path, x_BTI)).to(found_BTO.dtype)
            else:
                found_BTO[rows_N] += part.update(path, x_BTI[rows_N]).to(found_BTO.dtype)
        for one, rows_N in self._groups:
            if path in one.gains:
                bias = module._parameters.get("bias")
                shift = 0.0 if bias is None else bias.detach().float()
                rows = found_BTO if self._is_uniform else found_BTO[rows_N]
                gained = ((rows.float() - shift) * one.gains[path] + shift).to(found_BTO.dtype)
                if self._is_uniform:
                    found_BTO = gained
                else:
                    found_BTO[rows_N] = gained
        return found_BTO

    def _by_vectors(
        self, path: str, module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]
    ) -> Any:
        """Return what a norm computes whose vectors differ from row to row: they are broadcast over all else."""
        names = {name for one, _ in self._groups for name in one.replaced.get(path, ())}
        num_between = args[0].dim() - 2
        stacked = {name: self._stacked(path, module, name, num_between) for name in names}
        if isinstance(module, nn.LayerNorm):
            found = functional.layer_norm(args[0], module.normalized_shape, None, None, module.eps)
            for name, turn in (("weight", torch.mul), ("bias", torch.add)):
                vector = stacked.get(name, module._parameters.get(name))
                found = found if vector is None else turn(found, vector)
            return found
        if isinstance(module, nn.RMSNorm):
            return functional.rms_norm(args[0], module.normalized_shape, None, module.eps) * stacked["weight"]
        with _standing_in(module, stacked):
            return plain(*args, **given)

    def _stacked(self, path: str, module: nn.Module, name: str, num_between: int) -> Tensor:
        key = (path, name)
        if key not in self._vectors:
            own = module.get_parameter(name).detach()
            rows = [own if one is None else one.replaced.get(path, {}).get(name, own) for one in self.adapters]
            self._vectors[key] = torch.stack(rows)
        found = self._vectors[key]
        return found.view(found.shape[0], *[1] * num_between, *found.shape[1:])

    def _by_row(self, x: Tensor) -> Tensor:
        """Return inputs or outputs of a linear as (B, T, ...); some models flatten rows and tokens.

        Raises:
            UnsupportedModel: when they are not of these rows.
        """
        num_rows = len(self.adapters)
        if x.dim() == 2 and x.shape[0] % num_rows == 0:
            return x.view(num_rows, -1, x.shape[1])
        if x.dim() != 3 or x.shape[0] != num_rows:
            raise UnsupportedModel(f"a linear was given {tuple(x.shape)}, which is not {num_rows} rows of tokens")
        return x


@contextmanager
def _standing_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module's parameters of these names are the tensors inside."""
    own = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(own)


def _linear(module: nn.Module, x: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
    """Return what the linear computes with these parameters in place of its own."""
    weight: Tensor = replaced.get("weight", module.get_parameter("weight"))
    bias = replaced.get("bias", module._parameters.get("bias"))
    return functional.linear(x, weight.T if is_conv1d(module) else weight, bias)


def _num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
