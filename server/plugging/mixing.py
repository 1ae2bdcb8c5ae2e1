"""A model that answers with a mixture of its own probabilities and those of an adapter on it: two passes, one model.

p = (1 - mix) p_full + mix p_plugged, token by token. The adapter is off in one pass and on in the other; the weights
are in memory once. What the model then returns as logits are the logarithms of the mixture, so that whatever reads
logits - perplexity, tasks, greedy choice, sampling, bias, penalties, temperature - reads the mixture's.

How several passes are one model is here too (`stay_together`), for whatever puts their logits together. Generation
keeps the past of every pass: a cache that is handed in has twins. Whether that holds for an architecture is tried as
for any cache (`offsite.modelling.steps.cache_is_right`). Measuring holds the hidden states of every pass, and makes
logits of a few positions at a time (`offsite.modelling.head`).

Shape letters: B batch, T tokens, D widths of all passes together, V vocabulary, n some positions.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offsite.errors import ConfigError
from offsite.modelling.head import Before, before_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replaced = Sequence[tuple[nn.Parameter, Tensor]]
"""Parameters that an adapter replaced, with the data that they had without it."""

Combine = Callable[[Sequence[Tensor]], Tensor]
"""From the logits of every pass, in order, to those of the whole; the last dimension is the vocabulary."""

_CACHES = ("past_key_values", "cache_params")
_OWN = ("forward", "before_head")
"""What a model that is several passes has of its own beside its class's."""


def mixture(full_BTV: Tensor, plugged_BTV: Tensor, mix: float) -> Tensor:
    """Return the logarithm of ``(1 - mix) softmax(full) + mix softmax(plugged)``, float32.

    Args:
        mix: in (0, 1); the ends are one model alone.

    Raises:
        ConfigError: when it is not.
    """
    if not 0 < mix < 1:
        raise ConfigError(f"--mix: found {mix:g}, expected more than 0 and less than 1 for a mixture")
    full_BTV = torch.log_softmax(full_BTV.float(), dim=-1).add_(math.log1p(-mix))
    plugged_BTV = torch.log_softmax(plugged_BTV.float(), dim=-1).add_(math.log(mix))
    return torch.logaddexp(full_BTV, plugged_BTV, out=full_BTV)


@contextmanager
def mixed(model: PreTrainedModel, replaced: Replaced, mix: float) -> Iterator[PreTrainedModel]:
    """Yield the model, which carries an adapter, as a mixture with itself without it; afterwards it is as it was."""
    stay_mixed(model, replaced, mix)
    try:
        yield model
    finally:
        take_apart(model)


def stay_mixed(model: PreTrainedModel, replaced: Replaced, mix: float) -> None:
    """From now on every forward pass of the model, which carries an adapter, is two, and its logits are a mixture's.

    It may be moved to another device or dtype. It is for inference: nothing is trained, and labels are refused.

    Args:
        replaced: the parameters that the adapter replaced; peft's layers are found in the model.
        mix: the adapter's share of the probabilities, in (0, 1).

    Raises:
        ConfigError: when `mix` is outside, or the model carries no adapter.
    """
    if not 0 < mix < 1:
        raise ConfigError(f"--mix: found {mix:g}, expected more than 0 and less than 1 for a mixture")
    without = Pass(model, Switch(model, replaced, "--mix").off)
    stay_together(model, [without], lambda logits: mixture(logits[1], logits[0], mix))


class Switch:
    """Takes an adapter off the model that carries it, and puts it on again.

    Args:
        replaced: the parameters that the adapter replaced; peft's layers are found in the model.
        flag: what asks for it, for the message.

    Raises:
        ConfigError: when the model carries no adapter.
    """

    def __init__(self, model: PreTrainedModel, replaced: Replaced, flag: str) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if not self._layers and not replaced:
            raise ConfigError(f"{flag}: the model carries no adapter that could be taken off")
        self._replaced, self._stored = replaced, [data for _, data in replaced]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The adapter is off inside; parameters that it replaced have the data from before, where they are now."""
        on = [parameter.data for parameter, _ in self._replaced]
        for number, (parameter, _) in enumerate(self._replaced):
            self._stored[number] = self._stored[number].to(device=on[number].device, dtype=on[number].dtype)
            parameter.data = self._stored[number]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False
            for (parameter, _), data in zip(self._replaced, on, strict=True):
                parameter.data = data


@dataclass(frozen=True)
class Pass:
    """One more forward pass of a model that is several: of which model, and in what state.

    Attributes:
        model: the same one, or another of its architecture and vocabulary.
        inside: what is entered for the pass.
        fresh: returns an empty cache for the pass, from one that the first pass is handed; or None, and the model makes
            its own.
    """

    model: PreTrainedModel
    inside: Callable[[], AbstractContextManager[None]] = nullcontext
    fresh: Callable[[Any], Any] = copy.deepcopy


def stay_together(model: PreTrainedModel, others: Sequence[Pass], combine: Combine) -> None:
    """From now on a forward pass of the model is its own and the others', and its logits are what `combine` makes.

    It is for inference: nothing is trained, and labels are refused. `take_apart` makes it what it was.
    """
    plain, twins = model.forward, [_Twins(one.fresh) for one in others]

    @functools.wraps(plain)
    def forward(*args: Any, **given: Any) -> Any:
        if given.get("labels") is not None:
            raise ConfigError("a model of several passes has no loss to train on")
        caches = {name: given[name] for name in _CACHES if given.get(name) is not None}
        pasts = [{name: known.of(cache) for name, cache in caches.items()} for known in twins]
        found = plain(*args, **given)
        logits = [found.logits]
        for one, past, known in zip(others, pasts, twins, strict=True):
            call = plain if one.model is model else one.model.forward
            with one.inside():
                output = call(*args, **{**given, **past})
            for name in _CACHES:
                if getattr(found, name, None) is not None:
                    known.meet(getattr(found, name), getattr(output, name))
            logits.append(output.logits)
        found.logits = combine(logits)
        return found

    def before(batch: Mapping[str, Tensor], chosen_BT: Tensor) -> Before:
        with _alone(model):
            return _before(model, others, combine, batch, chosen_BT)

    model.forward = forward  # type: ignore[method-assign]
    model.before_head = before  # type: ignore[assignment]


def take_apart(model: PreTrainedModel) -> None:
    """The model, which `stay_together` had made several passes, is one again."""
    for name in _OWN:
        delattr(model, name)


@contextmanager
def _alone(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a forward pass of the model is its own alone."""
    own = {name: vars(model).pop(name) for name in _OWN if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(own)


def _before(
    model: PreTrainedModel, others: Sequence[Pass], combine: Combine, batch: Mapping[str, Tensor], chosen_BT: Tensor
) -> Before:
    """Return the hidden states of all passes at the chosen positions, side by side, and what makes logits of them."""
    passes, parts = [Pass(model), *others], list[Before]()
    for one in passes:
        with one.inside():
            found = before_head(one.model, batch, chosen_BT)
        parts.append(found if isinstance(found, Before) else Before(found, lambda same: same, found.shape[-1], False))
    widths = [part.hidden.shape[-1] for part in parts]

    def project(hidden_nD: Tensor) -> Tensor:
        logits = []
        with _alone(model):
            for one, part, hidden in zip(passes, parts, hidden_nD.split(widths, -1), strict=True):
                with one.inside():
                    logits.append(part.project(hidden))
        return combine(logits)

    hidden_ND = torch.cat([part.hidden for part in parts], -1)
    return Before(hidden_ND, project, parts[0].num_scores, any(part.learns for part in parts))


class _Twins:
    """For every cache of the first pass the one of another."""

    def __init__(self, fresh: Callable[[Any], Any]) -> None:
        self._known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._fresh = fresh

    def of(self, cache: Any) -> Any:
        if cache not in self._known:
            if cache.get_seq_length():
                raise ValueError("a cache holds a past that another pass has not seen")
            self._known[cache] = self._fresh(cache)
        return self._known[cache]

    def meet(self, cache: Any, twin: Any) -> None:
        self._known[cache] = twin
