"""From an opened package to a model and a tokenizer: from declared shapes and settings, never from code.

The architecture is looked up by ``model_type`` in transformers' own table; every block of the middle may have
fewer MLP channels than it, and nothing else may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.artefacts.layout import (
    TOKENIZER_CLASS,
    TOKENIZER_KEYS,
    Layout,
    PackageManifest,
    config_keys,
    read_json,
    saved_tensors,
    shard_headers,
)
from offsite.errors import BadSchema, UnsupportedModel, WrongShape
from offsite.tensors import TensorSpec, check_exact, read_tensors, spec_of, torch_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What transformers' constructors are seen to raise on settings that make no sense.
_MALFORMED = (ArithmeticError, AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError)


def load_model(folder: Path, manifest: PackageManifest, dtype: str, device: str) -> PreTrainedModel:
    """Return the package's ends and emulator as one model, in evaluation mode.

    Args:
        dtype: dtype of the floating tensors in memory, whatever the file holds.

    Raises:
        BadSchema: when ``config.json`` does not describe a model of the layout's blocks.
        WrongNames, WrongShape, NotFinite: when the tensors are not exactly the architecture's, and finite.
    """
    model = _empty_model(folder, manifest.layout)
    _narrow(model, manifest.layout)
    _check_tensors(folder, manifest, {name: spec_of(tensor) for name, tensor in saved_tensors(model).items()})
    tensors: dict[str, torch.Tensor] = {}
    for shard, specs in shard_headers(folder, manifest).items():
        tensors.update(read_tensors(folder / shard, specs))
    target = torch_dtype(dtype)
    cast = {name: tensor.to(target) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model.load_state_dict(cast, strict=False, assign=True)  # names were matched exactly above; tied ones follow
    model.tie_weights()
    _check_linears(model, manifest.layout)
    model.eval()
    model.to(device)  # type: ignore[arg-type]
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer that the package's files describe; no class is looked up by name.

    Raises:
        BadSchema: when they do not describe a working tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    settings = read_json(folder / "tokenizer_config.json")
    if settings.pop("tokenizer_class", None) != TOKENIZER_CLASS or not settings.keys() <= TOKENIZER_KEYS:
        raise BadSchema(f"tokenizer_config.json of {folder.name!r} holds keys that a package may not hold")
    template = folder / "chat_template.jinja"
    try:
        _check_fast(folder / "tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    except _MALFORMED:
        raise BadSchema(f"the tokenizer files of {folder.name!r} do not describe a working tokenizer") from None
    return tokenizer


def _check_fast(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(path.name) from error


def _empty_model(folder: Path, layout: Layout) -> PreTrainedModel:
    """Return the architecture with storage that nothing has written to yet."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    what = f"config.json of {folder.name!r}"
    stated = read_json(folder / "config.json")
    kind = layout.model_type
    if stated.get("model_type") != kind or kind not in CONFIG_MAPPING:
        raise BadSchema(f"{what} does not name the layout's architecture, or one that transformers does not know")
    cls = CONFIG_MAPPING[kind]
    extra = stated.keys() - config_keys(cls) - {"model_type", "dtype", "architectures"}
    if extra:
        raise BadSchema(f"{what} holds {len(extra)} key(s) that {kind} does not declare")
    settings = {key: value for key, value in stated.items() if key not in {"dtype", "architectures", "model_type"}}
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(cls(**settings))
        model.tie_weights()
    except (*_MALFORMED, StrictDataclassError) as error:
        raise BadSchema(f"{what} does not describe a working {kind}") from error
    return model  # type: ignore[no-any-return]


def _narrow(model: PreTrainedModel, layout: Layout) -> None:
    """Give each middle block's MLP the declared number of channels; nothing else may differ from the architecture."""
    from offsite.modelling.blocks import find_mlp, linear_dims, linear_names, resize_mlp

    for canonical, module in layout.blocks.items():
        try:
            block = model.get_submodule(module)
        except AttributeError:
            raise BadSchema(f"the layout names block {module!r}, which the architecture does not have") from None
        if not canonical.startswith("middle."):
            continue
        dims = {name: layout.linears.get(f"{canonical}.{name}") for name in linear_names(block)}
        if all(dim is None or dim == linear_dims(block.get_submodule(name)) for name, dim in dims.items()):
            continue
        try:
            mlp = find_mlp(block)
        except UnsupportedModel as error:
            raise WrongShape(f"{canonical} has other shapes than its architecture: {error}") from None
        stated = dims[mlp.output]
        if stated is None or not 1 <= stated[0] <= mlp.num_channels:
            raise WrongShape(f"{canonical}: the stated MLP width is not between 1 and {mlp.num_channels}")
        resize_mlp(block, stated[0])


def _check_tensors(folder: Path, manifest: PackageManifest, expected: Mapping[str, TensorSpec]) -> None:
    """Return only if the declared tensors are the model's, floating where it has floating ones."""
    what = f"package {folder.name!r}"
    declared = manifest.tensors
    check_exact(what, _without_dtype(declared), _without_dtype(expected))
    for name, spec in declared.items():
        if torch_dtype(spec.dtype).is_floating_point != torch_dtype(expected[name].dtype).is_floating_point:
            raise WrongShape(
                f"{what}: tensor {name!r} declares dtype {spec.dtype}, the architecture has {expected[name].dtype}"
            )


def _without_dtype(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: spec.model_copy(update={"dtype": ""}) for name, spec in specs.items()}


def _check_linears(model: PreTrainedModel, layout: Layout) -> None:
    from offsite.modelling.blocks import linear_dims, linear_names

    for canonical, module in layout.blocks.items():
        block = model.get_submodule(module)
        prefix = f"{canonical}."
        stated = {name.removeprefix(prefix): dims for name, dims in layout.linears.items() if name.startswith(prefix)}
        found = {name: linear_dims(block.get_submodule(name)) for name in linear_names(block)}
        if stated != found:
            raise WrongShape(f"the layout's linears of {canonical} are not those of the architecture")
