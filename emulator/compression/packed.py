"""A middle in fewer bits: the weights of its linears packed in groups, each group with a scale of its own.

Packing is for bytes. It withholds next to nothing: who unpacks the middle has the full model's, but for rounding.
Beside a method that withholds, it makes what that leaves smaller: a narrowed middle, kept blocks, the factors of lower
rank.

Sources: absmax scales and normal levels, QLoRA, arXiv:2305.14314; the scale of least squared error among a few, as in
GPTQ's and AWQ's searches (arXiv:2210.17323, arXiv:2306.00978).

Shapes: L rows (of all experts), I inputs, G groups of a row, J entries of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.compress import Compressed, Recipe, adaptable, middle_blocks, register_compressor
from emulator.compression.matrices import Matrix, matrices, require_known
from offsite.artefacts.encodings import BITS, Encoded, Encoding, decode, levels, pack_codes
from offsite.console import progress
from offsite.errors import ConfigError
from offsite.mapped import let_go
from offsite.modelling.split import Plan, extract
from offsite.tensors import spec_of

GROUP = 64
"""Entries of a row that share a scale."""

RATIOS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
"""Scales that are tried, as shares of the one that reaches a group's largest entry; int8 takes that one."""

_AT_ONCE = 2**21  # entries that are looked at together


@dataclass(frozen=True)
class Packed:
    """What packing did.

    Attributes:
        encoded: every packed tensor, by the emulator's names, and those that were encoded before and stayed.
        error: norm of what packing changed over the norm of what was packed, of the tensors as the model uses them.
        num_numbers: how many were packed, weights or entries of factors.
        num_bytes: what they came to, scales included.
    """

    encoded: Mapping[str, Encoded] = field(repr=False)
    error: float
    num_numbers: int
    num_bytes: int

    def figures(self) -> dict[str, float]:
        """Return these as the owner's record keeps them."""
        return {
            "packing_error": self.error,
            "packed_bytes": float(self.num_bytes),
            "packed_bits": 8 * self.num_bytes / max(1, self.num_numbers),
        }


@register_compressor("packed")
def packed(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> Compressed:
    """Every linear of the middle in few bits a weight, and nothing left out. Source: arXiv:2305.14314."""
    if recipe.packing not in BITS:
        raise ConfigError(f"method packed needs a packing, expected one of {', '.join(BITS)}")
    kept = (*plan.bottom, *plan.middle, *plan.top)
    emulator = extract(model, {plan.stack.name: kept})
    done = pack_middle(emulator, plan, recipe.packing, {}, recipe=recipe)
    return Compressed(
        emulator,
        kept,
        {},
        adaptable(middle_blocks(emulator, plan)),
        {"pack": recipe.packing},
        encoded=done.encoded,
        figures=done.figures(),
    )


@torch.no_grad()
def pack_middle(
    emulator: PreTrainedModel,
    plan: Plan,
    packing: str,
    encoded: Mapping[str, Encoded],
    *,
    recipe: Recipe | None = None,
) -> Packed:
    """The linears of the emulator's middle hold what packing leaves of them; return how each is to be stored.

    What is shared with another model is untouched there. What would take no less than 16 bits a number stays as it is.

    Args:
        encoded: tensors that are stored as factors: the factors are packed.
        recipe: where blocks that are done are kept, in which dtype the emulator computes, and whether it is to hold
            what is left of its weights.

    Raises:
        UnsupportedModel: when the experts of a block are in a form that is not known here.
    """
    blocks = middle_blocks(emulator, plan)
    require_known(blocks, "packed")
    told = recipe or Recipe()
    found, changed, whole, num_numbers, num_bytes = dict(encoded), 0.0, 0.0, 0, 0
    with progress(len(blocks), f"packing linears as {packing}, blocks") as bar:
        for number, block in enumerate(blocks):
            prefix = f"{plan.stack.name}.{plan.num_bottom + number}."
            parts = told.finished.tensors(number)
            if parts is None:
                parts = told.finished.keep_tensors(number, _parts(block, prefix, packing, encoded))
            for one in matrices(block):
                name = f"{prefix}{one.name}"
                held = block.get_parameter(one.name)
                stored = encoded.get(name)
                encoding = _encoding(packing, one, stored)
                spec = spec_of(held)
                new = Encoded(
                    encoding, {suffix: parts[f"{one.name}.{suffix}"] for suffix in encoding.parts(name, spec)}
                )
                numbers = held.numel() if stored is None else sum(part.numel() for part in stored.parts.values())
                size = sum(part.nbytes for part in new.parts.values())
                if size >= 2 * numbers:
                    continue
                exact = spec_of(held, dtype=told.compute_name)
                decoded = decode(name, exact, new.encoding, new.parts).to(held.device)
                before = held.detach()
                if stored is not None and not told.decoded:  # then the emulator does not hold what its factors make up
                    before = decode(name, exact, stored.encoding, stored.parts)
                changed += float((decoded.double() - before.double()).square().sum())
                whole += float(before.double().square().sum())
                num_numbers, num_bytes = num_numbers + numbers, num_bytes + size
                found[name] = new
                if told.decoded:
                    held.data = decoded
                let_go([before, *new.parts.values()])
            bar.update(number + 1)
    return Packed(found, math.sqrt(changed / whole) if whole else 0.0, num_numbers, num_bytes)


def _parts(block: nn.Module, prefix: str, packing: str, encoded: Mapping[str, Encoded]) -> dict[str, Tensor]:
    """Return what every matrix of the block is stored as, by its name in the block and the part's."""
    found: dict[str, Tensor] = {}
    for one in matrices(block):
        held, stored = block.get_parameter(one.name), encoded.get(f"{prefix}{one.name}")
        if stored is not None:
            new = {
                f"{side}.{key}": tensor
                for side in stored.parts
                for key, tensor in quantised(stored.parts[side], packing).items()
            }
        else:
            new = quantised(held.detach().mT if one.turned else held.detach(), packing)
        found |= {f"{one.name}.{suffix}": tensor for suffix, tensor in new.items()}
    return found


def _encoding(packing: str, one: Matrix, stored: Encoded | None) -> Encoding:
    """Return how a matrix is stored once it is packed, or its factors are."""
    if stored is None:
        return Encoding.model_validate({"kind": packing, "group": GROUP, "turned": one.turned})
    return Encoding.model_validate({**stored.encoding.model_dump(), "group": GROUP, "factors": packing})


@torch.no_grad()
def quantised(weight: Tensor, packing: str, group: int = GROUP) -> dict[str, Tensor]:
    """Return the ``codes`` and ``scales`` of a matrix or a stack of matrices, packed along its last axis, on the CPU.

    A group's scale is the one of `RATIOS` that leaves the least squared error, as bfloat16 holds it; codes are those of
    the nearest levels.
    """
    rows_LI = weight.reshape(-1, weight.shape[-1]).contiguous()
    at_once = max(1, _AT_ONCE // rows_LI.shape[1])
    pairs = [_quantised(rows.float(), packing, group) for rows in rows_LI.split(at_once)]
    codes = torch.cat([codes for codes, _ in pairs])
    scales = torch.cat([scales for _, scales in pairs])
    return {
        "codes": pack_codes(codes, packing).cpu(),
        "scales": scales.view(*weight.shape[:-1], scales.shape[-1]).cpu(),
    }


def _quantised(rows_LI: Tensor, packing: str, group: int) -> tuple[Tensor, Tensor]:
    num_inputs = rows_LI.shape[1]
    rows_LGJ = torch.nn.functional.pad(rows_LI, (0, -num_inputs % group)).view(len(rows_LI), -1, group)
    table = torch.tensor(levels(packing), device=rows_LI.device)
    is_integer = packing.startswith("int")
    table = table[1:] if is_integer else table  # the code 0 of integers is none
    between = (table[1:] + table[:-1]) / 2
    largest_LG = rows_LGJ.abs().amax(-1)
    best_LG = torch.full_like(largest_LG, torch.inf)
    codes_LGJ = torch.zeros_like(rows_LGJ, dtype=torch.uint8)
    scales_LG = torch.zeros_like(largest_LG, dtype=torch.bfloat16)
    for ratio in RATIOS if packing != "int8" else RATIOS[:1]:
        tried_LG = (ratio * largest_LG / table[-1]).to(torch.bfloat16)
        by_LG1 = tried_LG.float()[..., None]
        found = torch.bucketize(rows_LGJ / torch.where(by_LG1 > 0, by_LG1, 1.0), between)
        error_LG = (table[found] * by_LG1 - rows_LGJ).square().sum(-1)
        better = error_LG < best_LG
        best_LG = torch.where(better, error_LG, best_LG)
        scales_LG = torch.where(better, tried_LG, scales_LG)
        codes_LGJ = torch.where(better[..., None], (found + is_integer).to(torch.uint8), codes_LGJ)
    return codes_LGJ.flatten(1)[:, :num_inputs].contiguous(), scales_LG
