"""What public text does with a layer's inputs, and an adapter's update kept out of the directions that it uses.

A client's update changes what a weight does to every input, also to those that have nothing to do with the client's
text. With C = mean of x x^T over the layer's inputs in the full model on public text,

    DeltaW' = DeltaW lambda (C + lambda I)^-1        (inputs on the right)

keeps of a direction that the public text uses c much the share lambda / (c + lambda): all of it as lambda grows, and
what the public text does not use as it goes to 0. `lambda` is stated relative to the mean eigenvalue of C, so that one
number says as much of one layer as of another. No singular value of DeltaW grows by it: what was verified of the whole
update (``server/registry/verify.py``) holds of what is left. Of LoRA only the factor A changes, A' = A lambda
(C + lambda I)^-1, so its rank and its form stay.

The hard form, a projection onto the null space of C, is in LoRA-Null (arXiv:2503.02659) as a start of training, and of
one model's own activations in PAVE (arXiv:2510.14697); a soft one needs no rank to be chosen.

Shape letters: R rows, N inputs of a layer, M rows of inputs.
"""

from __future__ import annotations

import hashlib
import inspect
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite.blockwise import block_by_block
from offsite.console import progress
from offsite.digests import sha256_bytes
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.evaluation.measure import evaluating
from offsite.modelling.blocks import is_conv1d, is_linear, linear_dims
from offsite.modelling.context import context_of
from offsite.text.batches import Example, encode, pack
from offsite.text.records import read_files
from server.plugging.fit import Fitted, full_name
from server.plugging.ways import LEAST_SPARE, MOST_SPARE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIMIT_BYTES = 4 * 2**30
"""Most bytes of second moments that are held at once; with more, the text is read once for each part."""

BLOCK_TOKENS = 256
"""Length of the blocks that public text is read in; a model of a shorter context reads them in pieces."""

_PROBE_TOKENS = 8


def spared(delta_RN: Tensor, moment_NN: Tensor, strength: float) -> Tensor:
    """Return ``delta lambda (C + lambda I)^-1``, float64, for lambda = strength times the mean eigenvalue of C.

    Where C is zero nothing is used, and all of it is kept.

    Args:
        delta_RN: rows with the layer's inputs on the right: an update, or LoRA's factor A.
        moment_NN: C, symmetric and positive semi-definite.
        strength: larger keeps more; 1 keeps half of a direction that is used as much as the mean one.

    Raises:
        ConfigError: when `strength` is not between `LEAST_SPARE` and `MOST_SPARE`.
        RunFailed: when C is not finite.
    """
    (found,) = _spared([delta_RN], moment_NN, strength)
    return found


def public_text(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, *, limit_tokens: int
) -> tuple[list[Example], str]:
    """Return public text in blocks of one length, and a digest of its tokens, which names what was spared.

    Args:
        paths: files as every verb reads text, under their usual columns.
        limit_tokens: of it, at most, and at least one block.

    Raises:
        ConfigError, DataError: when a file is not as needed, or holds nothing.
    """
    encoded = encode(read_files(paths), tokenizer, context=BLOCK_TOKENS, whole_text=True)
    blocks = pack(encoded.examples, block_tokens=BLOCK_TOKENS)[: max(1, limit_tokens // BLOCK_TOKENS)]
    whole = hashlib.sha256(b"offsite/v1/spare-text\0")
    for block in blocks:
        whole.update(array("q", [len(block.input_ids), *block.input_ids]).tobytes())
    return blocks, sha256_bytes(whole.digest())


def spare_adapters(
    model: PreTrainedModel,
    adapters: Sequence[Fitted],
    examples: Sequence[Example],
    strengths: Sequence[float],
    *,
    batch_size: int = 8,
    limit_bytes: int = LIMIT_BYTES,
) -> list[dict[float, Fitted]]:
    """Return each adapter, spared at every strength; the text is read once for all of them where memory allows.

    Of whole blocks the linears' weights change; biases, norms and experts held in one tensor stay as they came.
    Changed tensors are float32.

    Args:
        model: the full model without an adapter, in any dtype and on any device; computed is in float32.
        adapters: fitted to it, with their whole updates; a share of them may be taken before or after.
        examples: public text as tokens.

    Raises:
        ConfigError: from `require_sparable`.
        DataError: when there is no text.
        RunFailed: when an input of a layer is not finite.
    """
    for adapter in adapters:
        require_sparable(adapter.spec.kind)
    places = [_places(model, adapter) for adapter in adapters]
    wanted = list(dict.fromkeys(path for found in places for path in found.values()))
    changed: list[dict[float, dict[str, Tensor]]] = [{strength: {} for strength in strengths} for _ in adapters]
    for moments in second_moments(model, wanted, examples, batch_size=batch_size, limit_bytes=limit_bytes):
        here = [
            (number, name, _delta(model, adapters[number], name, path))
            for number, found in enumerate(places)
            for name, path in found.items()
            if path in moments.modules
        ]
        for strength in strengths:
            kept = _spared([delta for _, _, delta in here], moments.mean, strength)
            for (number, name, _), rows in zip(here, kept, strict=True):
                changed[number][strength][name] = _undelta(model, adapters[number], name, rows)
    return [
        {strength: replace(adapter, tensors={**adapter.tensors, **changed[number][strength]}) for strength in strengths}
        for number, adapter in enumerate(adapters)
    ]


def require_sparable(kind: str) -> None:
    """Return only if such an adapter changes matrices, and adds to them.

    Raises:
        ConfigError: for DoRA, whose magnitudes are no part of an update, and for BitFit, which changes vectors alone.
    """
    if kind == "dora":
        raise ConfigError("--spare: a dora adapter is plugged in whole or not", hint="ask the client for lora")
    if kind == "bitfit":
        raise ConfigError("--spare: a bitfit adapter changes no matrix, so no direction of it can be spared")


@dataclass(frozen=True)
class Moments:
    """C of one input, and the modules that all read it.

    Attributes:
        mean: of x x^T, (N, N), over all tokens, float64; zeros where no token came (an expert that none was sent to).
        num_rows: over so many tokens.
    """

    modules: tuple[str, ...]
    mean: Tensor = field(repr=False)
    num_rows: int


@torch.no_grad()
def second_moments(
    model: PreTrainedModel,
    modules: Iterable[str],
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    limit_bytes: int = LIMIT_BYTES,
) -> Iterator[Moments]:
    """Yield C for every distinct input of the named linears, one after another: queries, keys and values share one.

    Modules that are handed one tensor share their C; that is found out on the text's first tokens. The text is read
    once, or as often as `limit_bytes` makes necessary.

    Raises:
        DataError: when there is no text.
        RunFailed: when an input is not finite.
    """
    if not examples:
        raise DataError("no public text: nothing tells which directions it uses")
    rows = _pieces(examples, context_of(model))
    paths = list(dict.fromkeys(modules))
    sizes = {path: linear_dims(model.get_submodule(path))[0] for path in paths}
    with evaluating(model), block_by_block(model, torch.float32):
        groups = _sharing(model, paths, rows[0])
        for some in _parts(groups, sizes, limit_bytes):
            leaders = [group[0] for group in some]
            sums = {path: torch.zeros(sizes[path], sizes[path], dtype=torch.float64) for path in leaders}
            counts = dict.fromkeys(leaders, 0)
            _add_up(model, sums, counts, rows, batch_size)
            for group in some:
                moment_NN = sums.pop(group[0])
                if not bool(torch.isfinite(moment_NN).all()):
                    raise RunFailed(f"an input of {group[0]!r} is not finite on the public text")
                yield Moments(tuple(group), moment_NN / max(counts[group[0]], 1), counts[group[0]])


def _add_up(
    model: PreTrainedModel,
    sums: Mapping[str, Tensor],
    counts: dict[str, int],
    rows: Sequence[Sequence[int]],
    batch_size: int,
) -> None:
    def see(path: str, inputs: Tensor) -> None:
        rows_MN = inputs.reshape(-1, inputs.shape[-1]).double()
        sums[path].add_((rows_MN.T @ rows_MN).cpu())
        counts[path] += rows_MN.shape[0]

    with progress(len(rows), "public text") as bar, _seen(model, sums, see):
        done = 0
        for ids_BT in _even(rows, batch_size):
            _forward(model, ids_BT)
            done += len(ids_BT)
            bar.update(done)


def _sharing(model: PreTrainedModel, paths: Sequence[str], ids: Sequence[int]) -> list[list[str]]:
    """Return the modules in groups that are handed the same tensors, in the order of their paths."""
    handed: dict[str, list[Tensor]] = {path: [] for path in paths}  # held, so that no identity comes twice
    versions: dict[str, list[tuple[int, int]]] = {path: [] for path in paths}

    def see(path: str, inputs: Tensor) -> None:
        handed[path].append(inputs)
        versions[path].append((id(inputs), inputs._version))

    with _seen(model, paths, see):
        _forward(model, torch.tensor([list(ids[:_PROBE_TOKENS])]))
    groups: dict[object, list[str]] = {}
    for path in paths:
        groups.setdefault(tuple(versions[path]) or path, []).append(path)
    return list(groups.values())


def _parts(groups: Sequence[list[str]], sizes: Mapping[str, int], limit_bytes: int) -> Iterator[list[list[str]]]:
    """Yield the groups in parts whose moments take at most so many bytes, or one group at a time."""
    part: list[list[str]] = []
    num_bytes = 0
    for group in groups:
        more = 8 * sizes[group[0]] ** 2
        if part and num_bytes + more > limit_bytes:
            yield part
            part, num_bytes = [], 0
        part.append(group)
        num_bytes += more
    if part:
        yield part


@contextmanager
def _seen(model: nn.Module, paths: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(path, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [model.get_submodule(p).register_forward_pre_hook(keep(p), with_kwargs=True) for p in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pieces(examples: Sequence[Example], context: int | None) -> list[Sequence[int]]:
    """Return the rows of tokens, those that are longer than the model reads in several."""
    found: list[Sequence[int]] = []
    for ids in (example.input_ids for example in examples):
        size = context or len(ids)
        found += [ids[start : start + size] for start in range(0, len(ids), size)]
    return found


def _even(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Tensor]:
    """Yield the text in batches of one length each, (B, T) int64: padding would count as text."""
    for _, group in groupby(sorted(rows, key=len, reverse=True), key=len):
        alike = [list(ids) for ids in group]
        for start in range(0, len(alike), batch_size):
            yield torch.tensor(alike[start : start + batch_size])


def _forward(model: PreTrainedModel, ids_BT: Tensor) -> None:
    least = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False, **least)


def _places(model: nn.Module, adapter: Fitted) -> dict[str, str]:
    """Return the adapter's tensors that inputs are on the right of, with their modules in the full model."""
    found = {}
    for name in adapter.tensors:
        path, _, part = full_name(name, adapter.sites).rpartition(".")
        wanted = "weight" if adapter.spec.kind == "blocks" else "lora_A"
        if part == wanted and is_linear(model.get_submodule(path)):
            found[name] = path
    return found


def _delta(model: nn.Module, adapter: Fitted, name: str, path: str) -> Tensor:
    """Return what is spared: LoRA's factor A, or W' - W of whole blocks; inputs on the right, float64."""
    tensor = adapter.tensors[name].double()
    if adapter.spec.kind != "blocks":
        return tensor
    module = model.get_submodule(path)
    change = tensor - _weight(model, adapter, name)
    return change.T if is_conv1d(module) else change


def _undelta(model: nn.Module, adapter: Fitted, name: str, rows_RN: Tensor) -> Tensor:
    if adapter.spec.kind != "blocks":
        return rows_RN.float().contiguous()
    module = model.get_submodule(full_name(name, adapter.sites).rpartition(".")[0])
    change = rows_RN.T if is_conv1d(module) else rows_RN
    return (_weight(model, adapter, name) + change).float().contiguous()


def _weight(model: nn.Module, adapter: Fitted, name: str) -> Tensor:
    return model.get_parameter(full_name(name, adapter.sites)).detach().to("cpu", torch.float64)


def _spared(deltas: Sequence[Tensor], moment_NN: Tensor, strength: float) -> list[Tensor]:
    if not LEAST_SPARE <= strength <= MOST_SPARE:
        raise ConfigError(f"spare: expected {LEAST_SPARE:g} to {MOST_SPARE:g}, found {strength:g}")
    moment_NN = moment_NN.double()
    if not bool(torch.isfinite(moment_NN).all()):
        raise RunFailed("the second moments of a layer's inputs are not finite")
    used = float(moment_NN.diagonal().mean()) * strength
    if used == 0:
        return [delta_RN.double() for delta_RN in deltas]
    root_NN = torch.linalg.cholesky(moment_NN + used * torch.eye(len(moment_NN), dtype=torch.float64))
    return [(used * torch.cholesky_solve(delta_RN.double().T, root_NN)).T for delta_RN in deltas]
