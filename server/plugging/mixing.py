"""A model that answers with a mixture of its own probabilities and those of an adapter on it: two passes, one model.

p = (1 - mix) p_full + mix p_plugged, token by token. The adapter is off in one pass and on in the other; the weights
are in memory once. What the model then returns as logits are the logarithms of the mixture, so that whatever reads
logits - perplexity, tasks, greedy choice, sampling, bias, penalties, temperature - reads the mixture's.

Generation keeps the past of both passes: a cache that is handed in has a twin. Whether that holds for an architecture
is tried as for any cache (`offsite.modelling.steps.cache_is_right`).

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offsite.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replaced = Sequence[tuple[nn.Parameter, Tensor]]
"""Parameters that an adapter replaced, with the data that they had without it."""

_CACHES = ("past_key_values", "cache_params")


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
        del model.forward


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
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers and not replaced:
        raise ConfigError("--mix: the model carries no adapter that could be taken off")
    plain, twins = model.forward, _Twins()
    stored = [data for _, data in replaced]

    @contextmanager
    def off() -> Iterator[None]:
        """The adapter is off inside; parameters that it replaced have the data from before, where they are now."""
        on = [parameter.data for parameter, _ in replaced]
        for number, (parameter, _) in enumerate(replaced):
            stored[number] = stored[number].to(device=on[number].device, dtype=on[number].dtype)
            parameter.data = stored[number]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False
            for (parameter, _), data in zip(replaced, on, strict=True):
                parameter.data = data

    @functools.wraps(plain)
    def forward(*args: Any, **given: Any) -> Any:
        if given.get("labels") is not None:
            raise ConfigError("a mixture of two passes has no loss to train on")
        caches = {name: given[name] for name in _CACHES if given.get(name) is not None}
        with off():
            full = plain(*args, **{**given, **{name: twins.of(cache) for name, cache in caches.items()}})
        found = plain(*args, **given)
        for name in _CACHES:
            if getattr(found, name, None) is not None:
                twins.meet(getattr(found, name), getattr(full, name))
        found.logits = mixture(full.logits, found.logits, mix)
        return found

    model.forward = forward  # type: ignore[method-assign]


class _Twins:
    """For every cache of the pass with the adapter the one of the pass without."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def of(self, cache: Any) -> Any:
        if cache not in self._known:
            if cache.get_seq_length():
                raise ValueError("a cache holds a past that the model without the adapter has not seen")
            self._known[cache] = copy.deepcopy(cache)
        return self._known[cache]

    def meet(self, cache: Any, twin: Any) -> None:
        self._known[cache] = twin
