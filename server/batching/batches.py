"""Whether rows of different lengths may share a model's forward passes: looked up, then tried, never assumed.

A recurrent state or a sliding window is not kept row by row, and some positions depend on the longest row; such models
are told by their own configuration. What remains is tried: two rows of different lengths, read and continued together,
against each alone without a cache.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from offsite.modelling.precision import in_float32
from offsite.modelling.steps import TOLERANCE, Steps
from offsite.seq2seq.models import is_seq2seq
from server.batching.batch import Beside, keeps_logits, next_logits
from server.batching.cache import RowCache, padded
from server.batching.rows import Rows
from server.plugging.offset import Offset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPTS, _STEPS = (5, 12), 2
_MOVING_ROPES = ("dynamic", "longrope")
_FAILURES = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def cost_of(model: PreTrainedModel) -> tuple[int, int] | str:
    """Return the number of the cache's layers and its bytes per token and row, or why the model is not batched."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    plain: Any = model
    if is_seq2seq(plain):
        return "it is an encoder-decoder"
    if "forward" in vars(plain):
        return "it is several passes, whose scores are put together"
    if not plain._supports_default_dynamic_cache():
        return "its state is not a cache of keys and values"
    if "position_ids" not in inspect.signature(plain.forward).parameters:
        return "it is not told the positions of its tokens"
    config = plain.config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=config).layers
    except _FAILURES:
        return "its cache is of a kind of its own"
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "some of its layers are recurrent, or look back over a sliding window"
    ropes = repr(getattr(config, "rope_parameters", None)) + repr(getattr(config, "rope_scaling", None))
    if any(f"'{kind}'" in ropes for kind in _MOVING_ROPES):
        return "its positions depend on the longest text"
    return _tried(plain, len(layers))


def beside(offset: Offset) -> Beside | str:
    """Return the emulator with its adapter, as rows of a batch are read by it, or why it is not batched."""
    cost = cost_of(offset.emulator)
    if isinstance(cost, str):
        return f"of the emulator: {cost}"
    rows = Rows(offset.emulator)
    adapter = rows.put_on(offset.adapter)
    if not adapter.mixes:
        rows.take_off(adapter)
        return "the adapter replaces experts of the emulator, which cannot be computed beside themselves without it"
    return Beside(offset.emulator, rows, adapter, offset.beta, *cost)


def _tried(model: Any, num_layers: int) -> tuple[int, int] | str:
    cache = RowCache(num_layers, next(model.parameters()).device)
    deviation = _deviation(model, cache)
    if not deviation <= TOLERANCE and any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        with in_float32(model):
            deviation = _deviation(model, RowCache(num_layers, next(model.parameters()).device))
    if deviation == torch.inf:
        return "its forward pass does not take rows of different lengths"
    if not deviation <= TOLERANCE:
        return f"rows of different lengths change its logits by {deviation:.2g}"
    return num_layers, cache.num_bytes // (len(_PROMPTS) * padded(max(_PROMPTS) + _STEPS))


@torch.no_grad()
def _deviation(model: Any, cache: RowCache) -> float:
    """Return how far the scores of rows together are from those of each alone, relative to their size."""
    keeps = keeps_logits(model)
    table_VH = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(table_VH.shape[0], (size + _STEPS,), generator=generator).tolist() for size in _PROMPTS]
    found, expected = [], []
    try:
        cache.reserve(len(texts), max(_PROMPTS) + _STEPS)
        starts, ids = [0] * len(texts), [text[:size] for text, size in zip(texts, _PROMPTS, strict=True)]
        for step in range(_STEPS + 1):
            place = cache.at(range(len(texts)), starts, list(map(len, ids)))
            found.append(next_logits(model, cache, ids, *place, keeps=keeps).float())
            for text, size in zip(texts, _PROMPTS, strict=True):
                alone_BT = torch.tensor([text[: size + step]], device=table_VH.device)
                expected.append(Steps(model, alone_BT, cached=False).logits())
            starts = [size + step for size in _PROMPTS]
            ids = [[text[start]] for text, start in zip(texts, starts, strict=True)] if step < _STEPS else []
        together, alone = torch.cat(found).double(), torch.cat(expected).double()
        if not bool(torch.isfinite(alone).all()):
            return 0.0  # whoever asks for logits hears of it
        scale = (alone - alone.mean(-1, keepdim=True)).norm()
        difference = float((together - alone).norm())
    except _FAILURES:
        return torch.inf  # transformers names no error for what an architecture does not bear
    return difference / float(scale) if scale else difference
