"""A model that writes, token by token: the one loop under serving, audits and answers.

A causal language model goes on from prompts; an encoder-decoder reads them once, and answers from its start token on.

What a model needs beside the tokens (positions, which cache under which name, what to leave out after the first step)
differs from architecture to architecture. transformers knows it in `prepare_inputs_for_generation` and
`_update_model_kwargs_for_generation`, which its own `generate` calls, and so does this loop. Whether a model's cache
can be believed is tried, not assumed.

Shapes: B = prompts in a batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offsite.console import say
from offsite.modelling.precision import in_float32
from offsite.seq2seq.models import is_seq2seq, start_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 5e-3
"""Largest deviation of cached logits from uncached ones, as root mean squares: float32 has 1e-6, TF32 1e-3."""

_PROBE_TOKENS, _PROBE_STEPS = 12, 2


class Steps:
    """Prompts and what was added to them; `logits` scores what comes next, `add` takes what was chosen.

    Args:
        model: a causal language model or an encoder-decoder in evaluation mode, or a PEFT model around one; not
            changed.
        prompts_BT: at least one token each, all equally long, so that nothing is padded; int64, on the model's device.
        cached: keep the past in the model's cache, so that a step forwards one token; see `cache_is_right`.
    """

    def __init__(self, model: PreTrainedModel, prompts_BT: Tensor, *, cached: bool) -> None:
        self._model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._ids_BT, self._cached, self._is_first = prompts_BT, cached, True
        self._ids_name, self._is_pair = "input_ids", is_seq2seq(self._model)
        if self._is_pair:
            self._read(prompts_BT)
            return
        known = inspect.signature(self._model.forward).parameters
        self._given: dict[str, Any] = {"use_cache": cached, "attention_mask": torch.ones_like(prompts_BT)}
        if "logits_to_keep" in known:  # a long prompt's scores would be gigabytes
            self._given["logits_to_keep"] = 1
        if "position_ids" in known:
            positions_T = torch.arange(prompts_BT.shape[1], device=prompts_BT.device)
            self._given["position_ids"] = positions_T.expand_as(prompts_BT)
        if cached:
            self._given |= empty_cache(self._model)

    def _read(self, prompts_BS: Tensor) -> None:
        """The encoder has read the prompts, and the decoder stands at its start token."""
        from transformers import DynamicCache, EncoderDecoderCache

        mask_BS = torch.ones_like(prompts_BS)
        with torch.no_grad():
            read = self._model.get_encoder()(input_ids=prompts_BS, attention_mask=mask_BS, return_dict=True)
        self._given = {"use_cache": self._cached, "attention_mask": mask_BS, "encoder_outputs": read}
        if self._cached:
            self._given["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._ids_BT = prompts_BS.new_full((len(prompts_BS), 1), start_token(self._model.config))
        self._ids_name = "decoder_input_ids"

    def logits(self) -> Tensor:
        """Return the scores of each next token: (B, V) float32, storage of its own. To be called once per token."""
        ids_BT, given = self._ids_BT, self._given
        with torch.no_grad():  # entered per step: the mode belongs to the thread
            if self._cached:
                given = self._model.prepare_inputs_for_generation(
                    ids_BT,
                    next_sequence_length=None if self._is_first else 1,
                    is_first_iteration=self._is_first,
                    **given,
                )
            else:
                given = {**given, self._ids_name: ids_BT}
            output = self._model(**given, return_dict=True)
            self._given = self._model._update_model_kwargs_for_generation(
                output, self._given, is_encoder_decoder=self._is_pair
            )
            self._is_first = False
            logits_BV: Tensor = output.logits[:, -1]
            return logits_BV.float().clone()

    def add(self, tokens_B: Tensor) -> None:
        """Every prompt, or what is written of an encoder-decoder's answer, is one token longer."""
        self._ids_BT = torch.cat([self._ids_BT, tokens_B[:, None].to(self._ids_BT)], dim=1)


def empty_cache(model: Any) -> dict[str, Any]:
    """Return the cache that `generate` would hand to the model, by its name; models of their own caches get none."""
    from transformers import DynamicCache

    if not model._supports_default_dynamic_cache():
        return {}
    name = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
    return {name: DynamicCache(config=model.config.get_text_config(decoder=True))}


def cache_is_right(model: PreTrainedModel, *, batch_size: int = 1) -> bool:
    """Tell whether two cached steps have the logits of one forward without a cache; if not, say so in one line.

    Models of lower precision are tried again in float32 before they are doubted.

    Args:
        batch_size: prompts that go on together; some caches mix them up.
    """
    deviation = _deviation(model, min(batch_size, 2))
    if not deviation <= TOLERANCE and any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        with in_float32(model):
            deviation = _deviation(model, min(batch_size, 2))
    if deviation <= TOLERANCE:
        return True
    found = "fails" if deviation == torch.inf else f"changes its logits by {deviation:.2g}"
    say(f"the cache of this {model.config.model_type} model {found}: going on without it, which is slower")
    return False


def _deviation(model: PreTrainedModel, num_rows: int = 1) -> float:
    """Return how far cached logits are from uncached ones, relative to their size; inf where the cache cannot be used.

    Taken over three positions: the prompt's last and the two steps after it.
    """
    table_VH: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    num_tokens = _PROBE_TOKENS + _PROBE_STEPS
    ids_BT = torch.randint(table_VH.shape[0], (num_rows, num_tokens), generator=generator).to(table_VH.device)
    plain = _walked(model, ids_BT, cached=False)
    try:
        found = _walked(model, ids_BT, cached=True)
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return torch.inf  # transformers names no error for a cache that an architecture does not bear
    expected_BV, found_BV = torch.cat(plain).double(), torch.cat(found).double()
    if not bool(torch.isfinite(expected_BV).all()):
        return 0.0  # whoever asks for logits hears of it
    scale = (expected_BV - expected_BV.mean(-1, keepdim=True)).norm()
    difference = float((found_BV - expected_BV).norm())
    return difference / float(scale) if scale else difference


def _walked(model: PreTrainedModel, ids_BT: Tensor, *, cached: bool) -> list[Tensor]:
    steps = Steps(model, ids_BT[:, :_PROBE_TOKENS], cached=cached)
    found = [steps.logits()]
    for place in range(_PROBE_TOKENS, ids_BT.shape[1]):
        steps.add(ids_BT[:, place])
        found.append(steps.logits())
    return found
