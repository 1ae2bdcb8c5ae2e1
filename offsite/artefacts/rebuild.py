"""From an opened package to a model and a tokenizer: from declared shapes and settings, never from code.

The architecture is looked up by ``model_type`` in transformers' own table; every block of the middle may have
fewer MLP channels than it, and nothing else may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.artefacts.encodings import decode
from offsite.artefacts.layout import (
    TOKENIZER_CLASS,
    TOKENIZER_KEYS,
    Layout,
    PackageManifest,
    config_keys,
    read_json,
    saved_tensors,
    shard_headers,
    stored_tensors,
    undeclared,
)
from offsite.artefacts.patterns import check_patterns, patterns_of, try_patterns
from offsite.errors import BadSchema, UnsupportedModel, WrongNames, WrongShape
from offsite.seq2seq.models import empty_seq2seq, is_seq2seq_config, untie
from offsite.tensors import TensorSpec, check_exact, check_finite, read_tensors, spec_of, torch_dtype
from offsite.text.calls import quietly

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Parameters that modules may register for each declared tensor, and beside them: some are set twice or tied later.
_ROOM, _ROOM_BESIDE = 4, 1000

# What transformers' constructors are seen to raise on settings that make no sense.
_MALFORMED = (ArithmeticError, AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError)


def load_model(folder: Path, manifest: PackageManifest, dtype: str, device: str) -> PreTrainedModel:
    """Return the package's ends and emulator as one model, in evaluation mode.

    Args:
        dtype: dtype of the floating tensors in memory, whatever the file holds, but for those that the architecture
            or the file keeps finer.

    Raises:
        BadSchema: when ``config.json`` does not describe a model of the layout's blocks, or one that is neither causal
            nor an encoder.
        WrongNames, WrongShape, NotFinite: when the tensors are not exactly the architecture's, and finite.
    """
    from offsite.modelling.dtypes import finer

    model = empty_model(folder, manifest.layout, manifest.tensors)
    check_tensors(f"package {folder.name!r}", manifest.tensors, model)
    tensors = read_declared(folder, manifest)
    target = torch_dtype(dtype)
    stay = finer(model, {name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()}, target)
    fill(
        model,
        {
            name: tensor.to(stay.get(name, target)) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        },
    )
    _check_linears(model, manifest.layout)
    model.eval()
    model.to(device)  # type: ignore[arg-type]
    _require_causal(folder, model)
    return model


def read_declared(
    folder: Path, manifest: PackageManifest, names: Iterable[str] | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors that the package declares, the encoded ones decoded, on the CPU.

    Args:
        names: read these alone; default: all.

    Raises:
        WrongNames, WrongShape, NotFinite, BadSchema: when the files do not hold what the package declares.
    """
    from safetensors import SafetensorError, safe_open

    what = f"package {folder.name!r}"
    wanted = manifest.tensors.keys() if names is None else set(names)
    if missing := wanted - manifest.tensors.keys():
        raise WrongNames(f"{what} declares no tensor {min(missing)!r}")
    only = manifest.model_copy(
        update={
            "tensors": {name: spec for name, spec in manifest.tensors.items() if name in wanted},
            "encodings": {name: one for name, one in manifest.encodings.items() if name in wanted},
        }
    )
    expected = stored_tensors(what, only)
    held: dict[str, torch.Tensor] = {}
    for shard, specs in shard_headers(folder, manifest).items():
        if names is None:
            held.update(read_tensors(folder / shard, specs))
            continue
        try:
            with safe_open(folder / shard, framework="pt") as handle:
                held.update({name: handle.get_tensor(name) for name in specs if name in expected})
        except SafetensorError:
            raise WrongNames(f"{what}: {shard!r} lacks a tensor that it declares") from None
    check_exact(what, {name: spec_of(tensor) for name, tensor in held.items()}, expected)
    if names is not None:
        check_finite(what, held)
    for name, encoding in only.encodings.items():
        spec = only.tensors[name]
        parts = {suffix: held.pop(f"{name}.{suffix}") for suffix in encoding.parts(name, spec)}
        held[name] = decode(name, spec, encoding, parts)
    return held


def fill(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors in place, as the same memory; their names are those of `check_tensors`, and tied ones follow."""
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights(recompute_mapping=False)  # what is untied stays so


def _require_causal(folder: Path, model: PreTrainedModel) -> None:
    from offsite.encoders.trunk import is_encoder
    from offsite.modelling.causal import reads_ahead

    what = f"package {folder.name!r}"
    try:
        is_ahead = reads_ahead(model)  # whatever it is, it has run then
    except _MALFORMED as error:
        raise BadSchema(f"{what} holds a model that does not run") from error
    if is_ahead and not is_encoder(model):
        raise BadSchema(
            f"{what} holds a model that is not causal: next-token text cannot be learnt on it",
            hint="ask the owner for a package of a causal language model, or of an encoder that is known here",
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer that the package's files describe; no class is looked up by name.

    Raises:
        BadSchema: when they do not describe a working tokenizer.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings = read_json(folder / "tokenizer_config.json")
    if settings.pop("tokenizer_class", None) != TOKENIZER_CLASS or not settings.keys() <= TOKENIZER_KEYS:
        raise BadSchema(f"tokenizer_config.json of {folder.name!r} holds keys that a package may not hold")

    def build() -> PreTrainedTokenizerBase:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)
        template = folder / "chat_template.jinja"
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        return tokenizer

    def refusal(_: str) -> BadSchema:
        return BadSchema(f"the tokenizer files of {folder.name!r} do not describe a working tokenizer")

    core = quietly(lambda: Tokenizer.from_file(str(folder / "tokenizer.json")), refusal, compiled=True)
    patterns, what = quietly(lambda: patterns_of(core), refusal), f"tokenizer.json of {folder.name!r}"
    check_patterns(what, patterns)
    if patterns:
        try_patterns(what, patterns, core)
    return quietly(build, refusal, compiled=True)


def empty_model(folder: Path, layout: Layout, declared: Mapping[str, TensorSpec]) -> PreTrainedModel:
    """Return the architecture of ``config.json`` in the declared widths, in storage that nothing has written to yet.

    Args:
        declared: the tensors that the package declares; building stops when it comes to many more.

    Raises:
        BadSchema: when the settings do not describe a model of the layout's blocks.
        WrongShape: when the declared widths are none that the architecture can be given.
    """
    model = _built(folder, layout, len(declared))
    if layout.encoder is not None:
        _require_stacks(folder, model, layout.encoder.stack, layout.stack)
        untie(model, declared)
    _narrow(model, layout, declared)
    return model


def meta_model(folder: Path, manifest: PackageManifest) -> PreTrainedModel:
    """Return the package's model without memory, every tensor on the meta device: what can be done with it, shows.

    Raises:
        BadSchema, WrongNames, WrongShape: as `load_model`, but for what only the tensors' values could tell.
    """
    import torch

    with torch.device("meta"):
        model = empty_model(folder, manifest.layout, manifest.tensors)
    check_tensors(f"package {folder.name!r}", manifest.tensors, model)
    _check_linears(model, manifest.layout)
    return model


def _built(folder: Path, layout: Layout, num_tensors: int) -> PreTrainedModel:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from offsite.encoders.trunk import empty_encoder, is_encoder_config

    what = f"config.json of {folder.name!r}"
    stated = read_json(folder / "config.json")
    kind = layout.model_type
    if stated.get("model_type") != kind or kind not in CONFIG_MAPPING:
        raise BadSchema(f"{what} does not name the layout's architecture, or one that transformers does not know")
    cls = CONFIG_MAPPING[kind]
    extra = stated.keys() - config_keys(cls) - {"model_type", "dtype", "architectures"} - undeclared(stated)
    if extra:
        raise BadSchema(f"{what} holds {len(extra)} key(s) that {kind} does not declare")
    settings = {key: value for key, value in stated.items() if key not in {"dtype", "architectures", "model_type"}}
    try:
        config = cls(**settings)
        for side in layout.sides:
            _require_depth(what, config, len(side))
        if is_seq2seq_config(config) != (layout.encoder is not None):
            raise BadSchema(f"{what} and the layout differ in whether there is an encoder beside the decoder")
        with no_init_weights(), _no_more_than(_ROOM * num_tensors + _ROOM_BESIDE, what):
            if is_seq2seq_config(config):
                model = empty_seq2seq(config)
            else:
                model = empty_encoder(config) if is_encoder_config(config) else AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except (*_MALFORMED, StrictDataclassError) as error:
        raise BadSchema(f"{what} does not describe a working {kind}") from error
    return model


def _require_stacks(folder: Path, model: PreTrainedModel, *stated: str) -> None:
    """Return only if the layout's stacks are those of the architecture: no block is counted twice, or left out."""
    from offsite.modelling.blocks import text_stacks

    try:
        found = tuple(stack.name for stack in text_stacks(model))
    except UnsupportedModel as error:
        raise BadSchema(
            f"config.json of {folder.name!r} describes other stacks than an encoder's and a decoder's"
        ) from error
    if found != stated:
        raise BadSchema(f"config.json of {folder.name!r} describes stacks of other names than the layout")


def _require_depth(what: str, config: PreTrainedConfig, num_blocks: int) -> None:
    """Return only if a field of the configuration that holds depths says the layout's number of blocks."""
    from offsite.modelling.blocks import depths_of

    stated = depths_of(config)
    if num_blocks not in stated:
        shown = max(stated) if stated else "no number of"
        raise BadSchema(f"{what} describes {shown} blocks, the layout counts {num_blocks}")


@contextmanager
def _no_more_than(limit: int, what: str) -> Iterator[None]:
    """Inside, building modules stops at `limit` parameters: a few settings could ask for billions."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    num = 0

    def count(_module: object, _name: str, _parameter: object) -> None:
        nonlocal num
        num += 1
        if num > limit:
            raise BadSchema(f"{what} describes a model of many more tensors than the package declares")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _narrow(model: PreTrainedModel, layout: Layout, declared: Mapping[str, TensorSpec]) -> None:
    """Give each MLP of a middle block the declared number of channels; nothing else may differ from the architecture.

    Every expert of a mixture has as many as the declared shape of the first says.
    """
    from offsite.modelling.mlps import find_mlps, resize_mlp, width_name

    for canonical, module in layout.blocks.items():
        try:
            block = model.get_submodule(module)
        except AttributeError:
            raise BadSchema(f"the layout names block {module!r}, which the architecture does not have") from None
        stated = {name: declared.get(f"{module}.{name}") for name in block.state_dict()}
        own = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
        if not canonical.startswith("middle.") or all(
            spec is None or spec.shape == own[name] for name, spec in stated.items()
        ):
            continue
        try:
            parts = find_mlps(block)
        except UnsupportedModel as error:
            raise WrongShape(f"{canonical} has other shapes than its architecture: {error}") from None
        for part in parts:
            name, axis = width_name(block, part)
            spec = stated.get(name)
            num = spec.shape[axis] if spec is not None and len(spec.shape) == len(own[name]) else 0
            if not 1 <= num <= part.num_channels:
                raise WrongShape(f"{canonical}: the stated MLP width is not between 1 and {part.num_channels}")
            if num < part.num_channels:
                resize_mlp(block, part, num)


def check_tensors(what: str, declared: Mapping[str, TensorSpec], model: PreTrainedModel) -> None:
    """Return only if the declared tensors are the model's, floating where it has floating ones.

    Raises:
        WrongNames, WrongShape: naming the first that differs.
    """
    expected = {name: spec_of(tensor) for name, tensor in saved_tensors(model).items()}
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
