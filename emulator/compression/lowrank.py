"""A middle of lower rank: every linear is replaced by two factors, the best for what reaches it on public text.

The outer shapes stay the full model's, so an adapter on any linear lifts into it as it is; none of the linears of the
middle stays bit for bit. Experts are factored one by one. Norms, biases, routers and convolutions stay whole.

Source: EMLoC, arXiv:2506.12015 (activation-aware truncated SVD, as in SVD-LLM, arXiv:2403.07378).

Shapes: I inputs, O outputs, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.compress import Compressed, Recipe, adaptable, middle_blocks, register_compressor
from emulator.compression.matrices import Matrix, matrices, moments, require_known
from offsite.artefacts.encodings import Encoded, Encoding, decode
from offsite.console import progress, say
from offsite.errors import ConfigError
from offsite.mapped import let_go
from offsite.modelling.split import Plan, extract
from offsite.tensors import spec_of

LEAST_EIGENVALUE = 1e-7
"""Eigenvalues of the inputs' moments count as at least this share of their mean."""


@register_compressor("low-rank")
def low_rank(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> Compressed:
    """Every linear of the middle as two factors that hold a share of its numbers. Source: arXiv:2506.12015.

    With a share of 1 all stay whole: factors that hold as many numbers as the linear save nothing.
    """
    if not 0 < recipe.rank_share <= 1:
        raise ConfigError(f"asked for a rank share of {recipe.rank_share}, expected above 0 and at most 1")
    full_blocks = middle_blocks(model, plan)
    require_known(full_blocks, "low-rank")
    kept = (*plan.bottom, *plan.middle, *plan.top)
    emulator = extract(model, {plan.stack.name: kept})
    blocks = middle_blocks(emulator, plan)
    ranks = [_ranks(block, recipe.rank_share) for block in full_blocks]
    if whole := sum(len(matrices(block)) - len(own) for block, own in zip(full_blocks, ranks, strict=True)):
        say(f"low-rank: {whole} linears of the middle stay whole: no lower rank holds that share of their numbers")
    encoded: dict[str, Encoded] = {}
    wanted = [number for number, own in enumerate(ranks) if own]
    before = {i: found for i in wanted if (found := recipe.finished.tensors(i)) is not None}
    left = [number for number in wanted if number not in before]
    with progress(len(wanted), "factoring linears, blocks", start=len(before)) as bar:
        for number, known in before.items():
            encoded |= _put(plan, number, blocks[number], ranks[number], known, recipe)
        if before:
            bar.update(len(before))
        measured: Iterator[dict[str, Tensor]] = iter(())
        if left:
            way = recipe.passage(model)
            measured = moments(model, [full_blocks[i] for i in left], recipe.calibration, passage=way)
        for done, (number, seen) in enumerate(zip(left, measured, strict=True), start=len(before) + 1):
            tensors = _factored(full_blocks[number], ranks[number], seen)
            tensors = recipe.finished.keep_tensors(number, tensors)
            encoded |= _put(plan, number, blocks[number], ranks[number], tensors, recipe)
            let_go(full_blocks[number].parameters())
            bar.update(done)
    return Compressed(
        emulator,
        kept,
        {},
        adaptable(blocks),
        {"rank_share": recipe.rank_share},
        middle_whole=not encoded,
        encoded=encoded,
    )


def rank_for(num_outputs: int, num_inputs: int, share: float) -> int | None:
    """Return the rank at which two factors hold at most `share` of the numbers of a matrix, at least 1.

    None where that is no lower rank than the matrix may have, and for a share of 1.
    """
    rank = max(1, int(share * num_outputs * num_inputs / (num_outputs + num_inputs)))
    return None if share >= 1 or rank >= min(num_outputs, num_inputs) else rank


@torch.no_grad()
def factors(weight_OI: Tensor, moment_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return left (O, R) and right (R, I), float64, whose product comes nearest to the weight on the inputs seen.

    Nearest is the least sum of squares of (W - left right) x over the inputs x, of moments sum x x^T = C. With
    C = S S^T and W S = U Sigma V^T, that is U_R Sigma_R V_R^T S^-1, which is U_R U_R^T W: only U_R is worked out, from
    the smaller one of W C W^T and S^T W^T W S. ``left`` is U_R, of orthonormal columns.

    Args:
        moment_II: what was seen counts by its eigenvalues, each at least `LEAST_EIGENVALUE` of their mean; zeros, where
            nothing was seen, count every direction alike.
    """
    weight, moment = weight_OI.double(), moment_II.double()
    moment = moment + moment.T
    moment /= 2
    least = float(moment.diagonal().mean()) * LEAST_EIGENVALUE
    if least <= 0:
        moment = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if weight.shape[0] <= weight.shape[1]:
        # what the floor adds to directions that were seen is less than any figure tells
        gram_OO = weight @ moment @ weight.T + max(least, 0.0) * (weight @ weight.T)
        left = torch.linalg.eigh(gram_OO).eigenvectors[:, -rank:].flip(1)
    else:
        eigenvalues, vectors = torch.linalg.eigh(moment)
        through_OI = weight @ (vectors * eigenvalues.clamp(min=max(least, 0.0)).sqrt())
        turned = torch.linalg.eigh(through_OI.T @ through_OI).eigenvectors[:, -rank:].flip(1)
        left = torch.linalg.qr(through_OI @ turned).Q
    return left, left.T @ weight


def _ranks(block: nn.Module, share: float) -> dict[Matrix, int]:
    found = {}
    for one in matrices(block):
        _, num_outputs, num_inputs = one.weight(block).shape
        if (rank := rank_for(num_outputs, num_inputs, share)) is not None:
            found[one] = rank
    return found


def _factored(block: nn.Module, ranks: Mapping[Matrix, int], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of a block's weights, bfloat16 on the CPU, by names inside it and ``left`` and ``right``."""
    found = {}
    for one, rank in ranks.items():
        pairs = [factors(w, c, rank) for w, c in zip(one.weight(block), seen[one.name], strict=True)]
        for side, several in zip(("left", "right"), zip(*pairs, strict=True), strict=True):
            stacked = torch.stack(several) if one.experts is not None else several[0]
            found[f"{one.name}.{side}"] = stacked.to("cpu", torch.bfloat16)
    return found


def _put(
    plan: Plan,
    number: int,
    block: nn.Module,
    ranks: Mapping[Matrix, int],
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
) -> dict[str, Encoded]:
    """Give the emulator's block the weights that the factors make up; return the factors by the emulator's names."""
    found = {}
    for one, rank in ranks.items():
        name = f"{plan.stack.name}.{plan.num_bottom + number}.{one.name}"
        held = block.get_parameter(one.name)
        parts = {side: tensors[f"{one.name}.{side}"] for side in ("left", "right")}
        found[name] = Encoded(Encoding(kind="low-rank", rank=rank, turned=one.turned), parts)
        if recipe.decoded:
            spec = spec_of(held, dtype=recipe.compute_name)
            held.data = decode(name, spec, found[name].encoding, parts).to(held.device)
    return found
