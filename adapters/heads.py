"""Heads: what an adapter answers in place of a next token, trained and returned with it.

On a causal language model a head is one tensor, ``head.weight`` (labels, hidden) float32, without a bias: a reward
model or a regression has one row, a classifier one for each label, in the order of ``AdapterSpec.head.labels``. It
begins at zero.
What it reads is the state that the model's own head over the vocabulary reads, behind the last norm, at the last
token that is no padding, and no padding is every token but the tokenizer's padding token: transformers' rule for
decoders with ``ForSequenceClassification``, whose weight ``score.weight`` is this tensor. A text is read as its
tokenizer gives it, without an end-of-sequence token added. On an encoder it is the head of that family's sequence
classifier, which has more tensors and pools as that does, or of its token classifier, for tags
(``offsite/encoders/head.py``).

No package narrows what is read (widths are those of MLPs), so that a head is the full model's as it is. A cap on norms
holds it as a whole: it is added to nothing, so there is no weight to measure it by.

In a model that carries one it is the module ``score`` of the causal language model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.encoders.classifier import as_encoder_classifier, classifier_class
from offsite.encoders.head import head_shapes, head_size, make_head
from offsite.encoders.trunk import is_encoder
from offsite.errors import ConfigError, NormTooLarge, UnsupportedModel, WrongShape
from offsite.evaluation.heads import SCORE
from offsite.modelling.head import causal_lm
from offsite.tensors import TensorSpec
from offsite.vision.models import reads_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "head.weight"
"""Canonical name of a head's tensor."""

_NAMELESS = {"reward": "reward", "regress": "value"}
"""What transformers' configuration calls the one output of a head without labels, by its task."""

_PREFIX = "head."  # of no block's name


def head_tensors(spec: AdapterSpec) -> dict[str, TensorSpec]:
    """Return the head's tensors as a bundle holds them; none where the adapter has no head."""
    if spec.head is None:
        return {}
    head = spec.head
    shapes: dict[str, tuple[int, ...]] = {"weight": (head.num_labels, head.hidden)}
    if head.encoder:
        shapes = head_shapes(head.encoder, head.num_labels, head.hidden, head.task)
    return {f"{_PREFIX}{name}": TensorSpec(shape=shape, dtype="float32") for name, shape in shapes.items()}


def without_head(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an adapter lies in blocks: all but its head."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}


def only_head(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an adapter is its head."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}


def encoder_of(model: nn.Module) -> str:
    """Return the architecture of an encoder, whose form its head has; nothing of a causal language model."""
    lm: Any = causal_lm(model)
    return str(lm.config.model_type) if is_encoder(lm) else ""


def read_size(model: nn.Module) -> int:
    """Return the size of the state that a head on this causal language model or encoder reads.

    Raises:
        UnsupportedModel: when the model has no head over its vocabulary.
    """
    lm: Any = causal_lm(model)
    if is_encoder(lm):
        return head_size(lm.config)
    table = lm.get_output_embeddings()
    if table is None:
        raise UnsupportedModel(f"{type(lm).__name__} has no head over a vocabulary, so none can stand in its place")
    return int(table.weight.shape[1])


def require_classifier(model: nn.Module, task: str) -> type[nn.Module]:
    """Return the class that opens this causal language model or encoder with a head for that task.

    Raises:
        UnsupportedModel: when transformers has none, or one of another form; of tags, when it is no encoder.
    """
    lm: Any = causal_lm(model)
    if task == "tag" and not is_encoder(lm):
        raise UnsupportedModel(
            f"tags are learnt on an encoder, {lm.config.model_type} reads a text from left to right",
            hint="make a package of a BERT, RoBERTa, ModernBERT or the like; a decoder takes classify and regress",
        )
    if task != "classify" and reads_images(lm):
        raise UnsupportedModel(f"{lm.config.model_type} reads images, and learns to classify them alone")
    found: Any = classifier_class(lm.config, task)
    if found is None:
        raise UnsupportedModel(
            f"transformers has no sequence classifier for {lm.config.model_type}",
            hint="a job for text (--objective next-token or dpo) has no need of one",
        )
    if found.base_model_prefix != lm.base_model_prefix:
        raise UnsupportedModel(f"{found.__name__} and {type(lm).__name__} hold their blocks under different names")
    return found  # type: ignore[no-any-return]


def attach_head(model: nn.Module, head: Head) -> dict[str, nn.Parameter]:
    """Put an untrained head on a model, in place, and return its parameters by canonical name.

    All of it is zero, but what an encoder's has between states and labels, which begins at random.

    Raises:
        WrongShape: when the model's state is of another size.
        UnsupportedModel: when transformers could not open the result, or the model has a module of that name.
    """
    lm: Any = causal_lm(model)
    require_classifier(lm, head.task)
    if (size := read_size(lm)) != head.hidden:
        raise WrongShape(f"the head reads states of {head.hidden} numbers, the model's have {size}")
    if hasattr(lm, SCORE):
        raise UnsupportedModel(f"{type(lm).__name__} has a module named {SCORE!r} of its own")
    place = next(lm.parameters()).device
    if head.encoder != encoder_of(lm):
        raise UnsupportedModel(
            f"the head is of {head.encoder or 'a causal language model'}, not of {type(lm).__name__}"
        )
    if head.encoder:
        module: nn.Module = make_head(lm.config, head.num_labels, head.task).to(place)
    else:
        module = nn.Linear(head.hidden, head.num_labels, bias=False, device=place, dtype=torch.float32)
        module.weight = nn.Parameter(torch.zeros_like(module.weight))
    setattr(lm, SCORE, module)
    return {f"{_PREFIX}{name}": parameter for name, parameter in module.named_parameters()}


def put_head(model: nn.Module, head: Head, tensors: Mapping[str, Tensor]) -> None:
    """The model carries that head, with these weights.

    Raises:
        WrongShape, UnsupportedModel: as `attach_head`.
    """
    with torch.no_grad():
        for name, parameter in attach_head(model, head).items():
            parameter.copy_(tensors[name])


def detach_head(model: nn.Module) -> None:
    """The model carries no head any more; one that carried none is as it was."""
    lm: Any = causal_lm(model)
    if hasattr(lm, SCORE):
        delattr(lm, SCORE)


def as_classifier(model: nn.Module, head: Head, *, pad_id: int) -> PreTrainedModel:
    """Return transformers' classifier of this model, of texts or of tokens: its blocks, shared, and a head.

    The head's weights are copied in the dtype of the model; without a head on the model they are zero. The
    configuration names the labels, the kind of problem, and the padding token before which a text is read.

    Raises:
        UnsupportedModel: when transformers has none, or one that needs more than these weights.
    """
    lm: Any = causal_lm(model)
    make: Any = require_classifier(lm, head.task)
    config = copy.deepcopy(lm.config)
    names = head.labels or (_NAMELESS[head.task],)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    if head.task != "tag":  # of tokens there is but one kind
        config.problem_type = "single_label_classification" if head.labels else "regression"
    if not head.encoder:  # an encoder counts positions by its own
        config.pad_token_id = pad_id
    config.dtype = lm.dtype
    if head.encoder:
        on_it = getattr(lm, SCORE) if hasattr(lm, SCORE) else make_head(lm.config, head.num_labels, head.task)
        return as_encoder_classifier(lm, on_it, config).requires_grad_(False)  # type: ignore[return-value]
    with torch.device("meta"):
        found = make(config)
    prefix = found.base_model_prefix
    own = {name: tuple(one.shape) for name, one in found.named_parameters() if not name.startswith(f"{prefix}.")}
    if own != {f"{SCORE}.weight": (head.num_labels, head.hidden)}:
        raise UnsupportedModel(f"{make.__name__} has a head of another form")
    module = nn.Linear(head.hidden, head.num_labels, bias=False, device=lm.device, dtype=lm.dtype)
    with torch.no_grad():
        module.weight.copy_(getattr(lm, SCORE).weight) if hasattr(lm, SCORE) else module.weight.zero_()
    setattr(found, prefix, lm.base_model)
    setattr(found, SCORE, module)
    return found.eval().requires_grad_(False)  # type: ignore[no-any-return]


def head_norm(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ``head_norm``, the Frobenius norm of the adapter's head, float64; nothing where it has none."""
    squares = [float(tensor.double().square().sum()) for tensor in only_head(tensors).values()]
    return {"head_norm": math.sqrt(math.fsum(squares))} if squares else {}


def check_head(tensors: Mapping[str, Tensor], *, max_head_norm: float) -> None:
    """Return only if the head, where there is one, is not larger than allowed.

    Raises:
        NormTooLarge: with its Frobenius norm.
    """
    found = head_norm(tensors).get("head_norm", 0.0)
    if not found <= max_head_norm:
        raise NormTooLarge(
            f"{HEAD!r}: the head's Frobenius norm is {found:.4g}, at most {max_head_norm:g} is allowed",
            hint="tune for fewer steps or at a lower rate, or agree on a job with other limits",
        )


def require_no_head(spec: AdapterSpec, what: str) -> None:
    """Return only if the adapter has no head.

    Raises:
        ConfigError: saying what takes none.
    """
    if spec.head is not None:
        raise ConfigError(f"{what} takes adapters for text, this one is for {spec.task}")
