"""The full model with an adapter merged in, made and written without ever being held: a weight at a time.

What is merged goes to a file as soon as it is there and is mapped from it; what is not stays mapped from the full
model's own files. The checkpoint is written a tensor at a time from both. Its bytes are those that transformers' own
``save_pretrained`` writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.kinds import Attached
from offsite.errors import BadSchema, RunFailed
from offsite.mapped import let_go
from offsite.tensors import check_dtype, spec_of, write_tensors
from server.plugging.fit import plain_model, unplug

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_SIZE = "50GB"
"""Most bytes of one file of a checkpoint: what transformers itself takes."""

_WEIGHTS = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"


def merge(attached: Attached, folder: Path | None = None) -> PreTrainedModel:
    """Return the full model with the adapter merged into its own weights, in their dtype; `attached` is used up.

    Args:
        folder: exists; each merged weight is written there and is the file's from then on, so that memory holds one
            at a time. The files are needed as long as the model is. None: all of them are in memory.

    Raises:
        RunFailed: when a merged weight is not finite, or the disk is full.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = plain_model(attached)
    if not hasattr(attached.model, "merge_and_unload"):
        return model
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for number, layer in enumerate(layers):
        held = [(one, one.data) for one in layer.get_base_layer().parameters()]
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise RunFailed(
                "a merged weight is not finite in the model's dtype", hint="plug in without --merge"
            ) from error
        changed = [parameter for parameter, before in held if parameter.data_ptr() != before.data_ptr()]
        let_go(before for _, before in held)
        if folder is not None:
            _spill(folder / f"{number:05d}.safetensors", changed)
    unplug(attached)
    return model


def _spill(path: Path, parameters: list[nn.Parameter]) -> None:
    """These parameters hold what they held as the file's: it takes no memory."""
    tensors = {str(number): one.detach().contiguous() for number, one in enumerate(parameters)}
    if not tensors or any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return
    try:
        save_file(tensors, path)
        with safe_open(path, framework="pt") as file:
            for number, parameter in enumerate(parameters):
                parameter.data = file.get_tensor(str(number))
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"cannot keep merged weights: {str(error).strip()[:160]}") from None


def write_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    """The model stands in `folder` as its own ``save_pretrained`` writes it, byte for byte; memory holds one tensor.

    Weights that transformers converted as it loaded them are converted back first, and those are held in memory. Of a
    dtype that artefacts do not hold all are, and with a transformers that calls its functions for this otherwise.

    Raises:
        RunFailed: when the disk is full.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        state = _stored(model)
        for name, tensor in state.items():
            check_dtype(name, spec_of(tensor))
    except (BadSchema, ImportError):
        model.save_pretrained(folder)
        return
    _write_settings(model, folder)
    split = split_torch_state_dict_into_shards(state, filename_pattern=_WEIGHTS, max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: state[name] for name in names})
    if split.is_sharded:
        told = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": told, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of the model holds, by the names that they have there."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state: dict[str, Tensor] = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    untied: Any = remove_tied_weights_from_state_dict(state, model)
    found: Any = revert_weight_conversion(model, untied)
    return dict(found)


def _write_settings(model: PreTrainedModel, folder: Path) -> None:
    """The configuration stands in `folder`, and what is set for writing text."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
