"""How like the full model a package is, by its weights and by what passes through its blocks.

*Verbatim*: the owner's parameters that stand in the package bit for bit, in the package's dtype, wherever they stand:
by whole tensors, and by rows or columns of matrices, which is what a narrowed MLP keeps. *Within rounding*: those that
are where the owner's record says and no further than one step of bfloat16 from the owner's, by whole tensors, rows or
columns: a mark (`emulator.marking.mark`) moves entries by that much and withholds nothing. *Alignment*: for each block
of the emulator, how like the one of the owner's blocks it is that it is most like. Which one that is is not told.

Shapes: B rows, T tokens, N of them compared, D hidden.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, forward, hidden_after, on_device, real_tokens
from offsite.artefacts.owner import OwnerRecord
from offsite.audits.record import BlockAlignment, Similarity
from offsite.console import progress
from offsite.mapped import let_go
from offsite.modelling.blocks import EXPERTS
from offsite.modelling.mlps import find_mlps, matrix_channels

_TINY = 1e-12


def similarity(
    full: PreTrainedModel,
    emulator: PreTrainedModel,
    record: OwnerRecord,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype,
) -> Similarity:
    """Return what of `full` is in `emulator`: nothing in it says which block or channel is which.

    Args:
        full: the full model, in its checkpoint's dtype or one that holds that and the package's values. Mapped from its
            files and inside of `offsite.blockwise.block_by_block` it is read a block at a time.
        emulator: the package's model.
        record: the owner's, of this package.
        batches: held-out text on which hidden states are compared.
        dtype: floating dtype of the package's tensors.
    """
    owned, sent = _Parameters(full, dtype), _Parameters(emulator, dtype)
    num_whole, num_lines = verbatim(owned, sent)
    num_near = within_rounding(owned, sent, full, record)
    cosines = block_cosines(full, emulator, record)
    ckas = block_ckas(full, emulator, record, batches)
    return Similarity(
        num_parameters=sum(math.prod(shape) for shape in owned.shapes()),
        num_verbatim=num_whole,
        num_verbatim_by_row=num_whole + num_lines,
        num_within_rounding=max(num_near, num_whole + num_lines),
        blocks=tuple(BlockAlignment(block=name, cosine=cosines[name], cka=ckas[name]) for name in record.layout.blocks),
    )


# --- bit for bit


def verbatim(owned: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many of the owner's parameters are among those sent: by whole tensors, and by lines of the others.

    A tensor that was sent accounts for one of the owner's. A line is a row or a column of a matrix; a matrix counts by
    whichever it has more of among the lines of the matrices that were not accounted for whole.

    Args:
        owned: parameters of the full model; `sent`: of the package. All in one dtype.
    """
    digests = {name: _digest(tensor) for name, tensor in sent.items()}
    left = Counter(digests.values())
    rest, num_whole = [], 0
    for name, tensor in owned.items():
        digest = _digest(tensor)
        if left[digest]:
            left[digest] -= 1
            num_whole += tensor.numel()
        elif tensor.dim() == 2:
            rest.append(name)
        _done_with(owned, [name])
    lines: tuple[set[bytes], set[bytes]] = set(), set()
    for name, tensor in sent.items():
        if tensor.dim() == 2 and left[digests[name]]:
            lines[0].update(_lines(tensor))
            lines[1].update(_lines(tensor.T))
    num_lines = 0
    for name in rest:
        num_lines += _num_in_lines(owned[name], *lines)
        _done_with(owned, [name])
    return num_whole, num_lines


def _done_with(parameters: Mapping[str, Tensor], names: Iterable[str]) -> None:
    if isinstance(parameters, _Parameters):
        parameters.done_with(names)


def _num_in_lines(matrix: Tensor, rows: set[bytes], columns: set[bytes]) -> int:
    num_rows = sum(line in rows for line in _lines(matrix)) if rows else 0
    num_columns = sum(line in columns for line in _lines(matrix.T)) if columns else 0
    return max(num_rows * matrix.shape[1], num_columns * matrix.shape[0])


# --- but for rounding


def within_rounding(
    owned: Mapping[str, Tensor], sent: Mapping[str, Tensor], full: PreTrainedModel, record: OwnerRecord
) -> int:
    """Return how many of the owner's parameters were sent to within a step of bfloat16, where the record says.

    A tensor counts whole, otherwise a matrix by whichever it has more of: whole rows or whole columns.

    Args:
        owned: parameters of `full`; `sent`: of the package. All in one dtype.
    """
    num_near, inside = 0, tuple(f"{module}." for module in record.layout.blocks.values())
    for name, tensor in sent.items():
        if not name.startswith(inside) and name in owned:
            num_near += _num_near(owned[name], tensor, owned[name].shape)
    for canonical, module in record.layout.blocks.items():
        site = record.sites[canonical]
        theirs = _inside(owned, site)
        narrowed = _narrowed(theirs, full.get_submodule(site), record, canonical)
        for name, tensor in _inside(sent, module).items():
            if name in narrowed:
                num_near += _num_near(narrowed[name], tensor, theirs[name].shape)
        _done_with(owned, [f"{site}.{name}" for name in theirs])
    return num_near


def _inside(parameters: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{module}."): parameters[name] for name in parameters if name.startswith(f"{module}.")}


def _num_near(owned: Tensor, sent: Tensor, whole: torch.Size) -> int:
    """Return the entries sent in whole tensors, rows or columns; `whole` is the owner's shape before narrowing."""
    if owned.shape != sent.shape:
        return 0
    near = is_near(owned, sent)
    if sent.shape == whole and bool(near.all()):
        return sent.numel()
    if sent.dim() != 2:
        return 0
    num_rows, num_columns = (int(near.all(axis).sum()) * sent.shape[axis] for axis in (1, 0))
    return max(num_rows * (sent.shape[1] == whole[1]), num_columns * (sent.shape[0] == whole[0]))


def is_near(one: Tensor, other: Tensor) -> Tensor:
    """Return which entries differ by no more than one step of bfloat16 at the larger of the two, bool."""
    one, other = one.float(), other.float()
    larger = torch.maximum(one.abs(), other.abs())
    step = torch.ldexp(torch.ones_like(larger), torch.frexp(larger).exponent - 8)  # bfloat16 keeps 7 bits
    return (one - other).abs() <= torch.where(larger == 0, 0.0, step)


class _Parameters(Mapping[str, Tensor]):
    """A model's parameters, tied ones once, as they stand in a package of that dtype; each made when it is asked for.

    Names are those of `_apart`. Nothing is held: a model that is mapped from its files stays so.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._found = _apart({name: parameter.detach() for name, parameter in model.named_parameters()})
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name].to("cpu", self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def shapes(self) -> Iterator[torch.Size]:
        """Yield the shape of each, without making it."""
        return (tensor.shape for tensor in self._found.values())

    def done_with(self, names: Iterable[str]) -> None:
        """What is mapped of these parameters takes no memory until it is asked for again."""
        let_go(self._found[name] for name in names)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each expert's matrix of its own where one tensor holds those of all: ``NAME.3``."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        is_stack = tensor.dim() == 3 and min(tensor.shape[1:]) > 1  # a convolution by channel is no stack of matrices
        found.update({f"{name}.{e}": one for e, one in enumerate(tensor)} if is_stack else {name: tensor})
    return found


def _lines(matrix: Tensor) -> Iterator[bytes]:
    for row in matrix.contiguous().view(torch.uint8).numpy():
        yield hashlib.blake2b(row.data, digest_size=16).digest()


def _digest(tensor: Tensor) -> tuple[torch.Size, bytes]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor.shape, hashlib.sha256(raw.data).digest()


# --- alike


@torch.no_grad()
def block_cosines(full: PreTrainedModel, emulator: PreTrainedModel, record: OwnerRecord) -> dict[str, float]:
    """Return, for every block of the emulator, the largest cosine of its matrices with those of a block of the owner's.

    All matrices whose shapes agree are taken as one long vector. Where channels were left out, the owner's are those
    that the record says were kept: whoever narrowed the block could not come nearer by another choice.
    """
    owned = [_matrices(block) for block in full.get_submodule(record.layout.stack).children()]
    found = {}
    with progress(len(record.layout.blocks), "similarity: weights") as bar:
        for number, (name, module) in enumerate(record.layout.blocks.items(), 1):
            mine = _matrices(emulator.get_submodule(module))
            block = full.get_submodule(record.sites[name])
            cosines = []
            for theirs in owned:
                cosines.append(_cosine(mine, _narrowed(theirs, block, record, name)))
                let_go(theirs.values())
            found[name] = max(cosines)
            bar.update(number)
    return found


def _matrices(block: nn.Module) -> dict[str, Tensor]:
    return _apart({name: parameter.detach() for name, parameter in block.named_parameters() if parameter.dim() > 1})


def _narrowed(
    matrices: Mapping[str, Tensor], block: nn.Module, record: OwnerRecord, canonical: str
) -> dict[str, Tensor]:
    """Return the matrices with the channels alone that the record says were kept of that block of the package.

    Args:
        matrices: of any block of the full model, `_apart`.
        block: the full model's block that the record is of, for the names.
    """
    found = dict(matrices)
    inside = [name for name in (*record.channels, *record.experts) if f"{name}.".startswith(f"{canonical}.")]
    if not inside:
        return found
    for part in find_mlps(block):
        lists = record.experts.get(f"{canonical}.{part.place}")
        if lists is None and not EXPERTS.search(part.place) and canonical in record.channels:
            lists = (record.channels[canonical],)
        for number, kept in enumerate(lists or ()):
            for name, axis, wanted in matrix_channels(block, part, number, torch.tensor(kept)):
                if name in found and found[name].shape[axis] > int(wanted.max()):  # else a block of another kind
                    found[name] = found[name].index_select(axis, wanted.to(found[name].device))
    return found


def _cosine(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    dot = square = other = 0.0
    for name, tensor in mine.items():
        if name in theirs and theirs[name].shape == tensor.shape:
            a, b = tensor.float().flatten(), theirs[name].float().flatten()
            dot, square, other = dot + float(a @ b), square + float(a @ a), other + float(b @ b)
    return dot / (math.sqrt(square) * math.sqrt(other) + _TINY)


@torch.no_grad()
def block_ckas(
    full: PreTrainedModel, emulator: PreTrainedModel, record: OwnerRecord, batches: Sequence[Batch]
) -> dict[str, float]:
    """Return, for every block of the emulator, the largest linear CKA of its hidden states with a block of the owner's.

    Each token's hidden state counts by its direction: where a few tokens carry massive activations, those would decide
    alone, and every block would look like every other.

    Source: arXiv:1905.00414.
    """
    owned = _grams(full, list(full.get_submodule(record.layout.stack).children()), batches)
    mine = _grams(emulator, [emulator.get_submodule(name) for name in record.layout.blocks.values()], batches)
    return {
        name: max(float((gram * other).sum()) for other in owned)
        for name, gram in zip(record.layout.blocks, mine, strict=True)
    }


def _grams(model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> list[Tensor]:
    """Return, block by block, the (N, N) float64 products of centred hidden states over all text, of norm 1."""
    numbered = dict(enumerate(blocks))
    seen: dict[int, list[Tensor]] = {number: [] for number in numbered}
    device = next(model.parameters()).device
    for batch in batches:
        here = on_device(batch, device)
        with hidden_after(numbered) as states_BTD:
            forward(model, here)
        for number, state_BTD in states_BTD.items():
            seen[number].append(state_BTD[real_tokens(here)].float())
    return [_gram(torch.cat(states)) for states in seen.values()]


def _gram(hidden_ND: Tensor) -> Tensor:
    directed_ND = hidden_ND.double() / (hidden_ND.double().norm(dim=1, keepdim=True) + _TINY)
    centred_ND = directed_ND - directed_ND.mean(0)
    gram_NN = centred_ND @ centred_ND.T
    found: Tensor = gram_NN / (gram_NN.norm() + _TINY)
    return found
