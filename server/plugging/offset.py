"""A full model whose scores are moved by what an adapter does to the emulator's: for adapters that cannot be placed.

scores = full + beta (emulator with the adapter - emulator without it), position by position. Nothing is plugged in: the
adapter stays on the emulator that it was tuned on, which is in memory once, beside the full model. So the full model
need not be the one that the package was made of, only one of its architecture with its vocabulary, token for token.

Source: Liu et al. (2024), Tuning language models by proxy, arXiv:2401.08565.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adapters.heads import only_head, require_no_head, without_head
from offsite.artefacts.package import Package
from offsite.errors import ConfigError
from offsite.modelling.load import load_tokenizer
from offsite.modelling.locate import locate
from server.plugging.fit import Fitted, plain_model, plug, plugged, replaced_of
from server.plugging.mixing import Pass, Switch, stay_together, take_apart
from server.plugging.plug import accepted, package_of, record_of
from server.registry.intake import read_registered
from server.registry.registry import Registry
from server.registry.verify import Verified

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EMULATOR = "offset_emulator"
"""Under which name the emulator hangs on the full model, so that both are moved and cast together."""

_PROBE = "A 45-year-old man; blood\tpressure 120/80.\n\n  \u00dcber na\u00efve \u6f22\u5b57 \U0001f600 don't"
"""Text that tokenizers of one vocabulary with other rules cut in other ways."""


@dataclass(frozen=True)
class Offset:
    """What is beside a full model whose scores are moved.

    Attributes:
        emulator: without the adapter, in evaluation mode, on the full model's device.
        adapter: as it was tuned, and where it goes on the emulator.
        beta: how much of the difference is added, above 0.
    """

    emulator: PreTrainedModel = field(repr=False)
    adapter: Fitted
    beta: float


def moved(full_BTV: Tensor, tuned_BTV: Tensor, untuned_BTV: Tensor, beta: float) -> Tensor:
    """Return ``full + beta (tuned - untuned)``, float32, in storage of its own.

    Where the emulator tells nothing about the difference (both scores are -inf), the full model's score stays.
    """
    difference_BTV = tuned_BTV.float() - untuned_BTV.float()
    difference_BTV.masked_fill_((tuned_BTV == untuned_BTV), 0.0)  # also where both are -inf
    return difference_BTV.mul_(beta).add_(full_BTV.float())


@contextmanager
def offset_by(model: PreTrainedModel, offset: Offset) -> Iterator[PreTrainedModel]:
    """Yield the full model, its scores moved; afterwards both models are as they were.

    Raises:
        ConfigError: from `require_alike`.
        WrongNames, WrongShape, UnsupportedModel: when the adapter does not fit the emulator.
    """
    require_alike(model, offset.emulator)
    before = [(parameter, parameter.data) for parameter in offset.emulator.parameters()]
    with plugged(offset.emulator, offset.adapter) as tuned:
        _stay(model, tuned, Switch(tuned, replaced_of(before), "--offset"), offset.beta)
        try:
            yield model
        finally:
            take_apart(model)
            delattr(model, _EMULATOR)


def stay_offset(model: PreTrainedModel, offset: Offset) -> None:
    """From now on the full model's scores are moved; it may be moved to another device or dtype, and is not trained.

    Raises:
        ConfigError: from `require_alike`.
        WrongNames, WrongShape, UnsupportedModel: when the adapter does not fit the emulator.
    """
    require_alike(model, offset.emulator)
    before = [(parameter, parameter.data) for parameter in offset.emulator.parameters()]
    tuned = plain_model(plug(offset.emulator, offset.adapter))
    _stay(model, tuned, Switch(tuned, replaced_of(before), "--offset"), offset.beta)


def _stay(model: PreTrainedModel, tuned: PreTrainedModel, switch: Switch, beta: float) -> None:
    fresh = functools.partial(_fresh, tuned)
    passes = [Pass(tuned, fresh=fresh), Pass(tuned, switch.off, fresh)]
    stay_together(model, passes, lambda logits: moved(logits[0], logits[1], logits[2], beta))
    model.add_module(_EMULATOR, tuned)


def _fresh(emulator: Any, _cache: Any) -> Any:
    """Return a cache for the emulator, which may have other layers than the full model; None where it makes its own."""
    from transformers import DynamicCache

    if not emulator._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=emulator.config.get_text_config(decoder=True))


def require_alike(model: PreTrainedModel, emulator: PreTrainedModel) -> None:
    """Return only if both are of one architecture, and score as many tokens.

    Raises:
        ConfigError: when they are not.
    """
    sizes = [int(one.get_output_embeddings().weight.shape[0]) for one in (model, emulator)]
    _require_one_kind((str(model.config.model_type), sizes[0]), (str(emulator.config.model_type), sizes[1]))


def require_same_tokens(source: str, package: Package) -> None:
    """Return only if the package cuts text into the tokens of the full model called `source`; no weights are read.

    Raises:
        ConfigError: when architecture or vocabulary differ, or nothing is found under that name.
    """
    from transformers import PreTrainedConfig

    place = locate(source)
    stated, _ = PreTrainedConfig.get_config_dict(place.source, local_files_only=place.is_cached)
    text: Any = package.empty_model().config.get_text_config()
    ours = {**stated, **(stated.get("text_config") or {})}
    theirs = {"model_type": text.model_type, "vocab_size": text.vocab_size}
    kinds = [(str(one.get("model_type")), int(one.get("vocab_size") or theirs["vocab_size"])) for one in (ours, theirs)]
    _require_one_kind(*kinds)
    tokenizers = [load_tokenizer(source), package.load_tokenizer()]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab() or _cut(tokenizers[0]) != _cut(tokenizers[1]):
        raise ConfigError(
            f"--offset: package {package.path.name!r} has another tokenizer than the full model",
            hint="scores can be moved only token for token: give a package with the full model's own tokenizer",
        )


def open_offset(source: str, package: Path, bundle_id: str, registry: Registry) -> tuple[Package, Verified]:
    """Return the package and the accepted bundle, checked as `plug-in` checks them; no weights of a model are read.

    Args:
        source: what the full model is called.
        package: that the bundle was tuned on; its owner's record lies beside it.

    Raises:
        ConfigError: when there is no such bundle, it is for a head, or the full model has other tokens.
        PolicyError: when it was not accepted.
        ArtefactError: when it was refused, or the package or the bundle is not what was verified.
    """
    entry = accepted(registry, bundle_id)
    record = record_of(registry, entry, package)
    found = package_of(package, registry, record)
    require_no_head(registry.job(entry.job_id).adapter, "--offset")
    require_same_tokens(source, found)
    return found, read_registered(registry, entry, record)


def load_offset(package: Package, verified: Verified, model: PreTrainedModel, beta: float) -> Offset:
    """Return what is beside the full model, in its dtype and on its device, without gradients.

    Raises:
        ArtefactError: when the package's tensors are not those it declares.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    emulator = package.load_model(dtype=dtype, device=str(model.device)).requires_grad_(False)
    return Offset(emulator, on_emulator(package, verified), beta)


def on_emulator(package: Package, verified: Verified) -> Fitted:
    """Return the adapter as it goes on the package's own model."""
    tensors = verified.tensors
    return Fitted(verified.spec, without_head(tensors), package.layout.blocks, only_head(tensors))


def _cut(tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    found: Sequence[int] = tokenizer(_PROBE)["input_ids"]
    return found


def _require_one_kind(full: tuple[str, int], emulator: tuple[str, int]) -> None:
    if full != emulator:
        raise ConfigError(
            f"--offset: the full model is {full[0]} with {full[1]:,} tokens, the emulator {emulator[0]} with "
            f"{emulator[1]:,}",
            hint="scores can be moved only token for token: give a package of a model of the same family",
        )
