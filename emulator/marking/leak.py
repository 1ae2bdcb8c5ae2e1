"""``offsite trace``: whose marked package a model comes from, with the odds of being wrong.

The suspect minus the unmarked package is compared with what each recipient's mark would have added. For somebody whose
mark is not in it, the directions are fresh coins, whatever was done to the weights and whatever others' marks it holds:
given the difference, the score is a sum of independent terms with mean 0, known variance and a known largest value.
Over many places z is close to standard normal. Over few it is not, as one rare direction can be worth eleven
deviations: so the odds are Bernstein's bound, which holds for any number of places and any weights.
Fine-tuning, rounding and noise make the difference larger, not the coins.

In every tensor the difference is clipped at three times its median size, so that no few values decide, and weighs as
much as the mark stands out of it. What leaves a model's function as it is and hides its weights is undone first: rows
or columns in another order (channels, heads), scale or sign. That looks at the package alone, never at a mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emulator.marking.config import TraceConfig
from emulator.marking.mark import MIN_PLACES, MarkKey, Places, carriers, open_key, places, read_marks, refuse_marked
from offsite.artefacts.layout import shard_headers
from offsite.artefacts.package import Package, open_package
from offsite.console import say
from offsite.errors import BadSchema, ConfigError, UnsupportedModel
from offsite.keys.files import check_folder
from offsite.tensors import TensorSpec, read_header, read_tensors

LEVEL = 1e-6
"""A mark is found when its p-value, times the number of questions asked, is below this."""
MIN_COSINE = 0.5
"""Weights less alike than this are not the package's, whatever was done to them since."""
_CLIP = 3.0
_SCALED, _SMALLEST_SCALE = 0.01, 1e-3
_SMALLEST = 1e-300


@dataclass(frozen=True)
class Score:
    """How far the suspect leans towards a mark.

    Attributes:
        z: in standard deviations from what is expected where that mark is not in it.
        largest: the most that one place could add to z; small where many places weigh alike.
    """

    z: float
    largest: float

    @property
    def p_value(self) -> float:
        """A bound on the chance of such a score without the mark, at least 1e-300.

        Source: Bernstein's inequality, as in Boucheron et al., "Concentration Inequalities", 2013, corollary 2.11.
        """
        if self.z <= 0:
            return 1.0
        return max(math.exp(-(self.z**2) / (2 + 2 * self.largest * self.z / 3)), _SMALLEST)


@dataclass(frozen=True)
class Comparison:
    """What a suspect has to do with a package.

    Attributes:
        scores: by recipient.
        owner: for any mark with this key, whoever its recipient.
        num_tensors: tensors compared; `num_missing`: the middle's others, absent or of another shape in the suspect.
        num_places: entries compared; `num_changed`: those that differ from the unmarked package's.
        cosine: the median over tensors of the cosine of suspect and package; 0 without any.
    """

    scores: dict[str, Score]
    owner: Score
    num_tensors: int
    num_missing: int
    num_places: int
    num_changed: int
    cosine: float

    @property
    def obstacle(self) -> str | None:
        """Why nothing can be said, if so."""
        if not self.num_tensors:
            return "no weight matrix of the suspect has the name and shape of one in the package's middle"
        if self.num_places < MIN_PLACES:
            return f"only {self.num_places} entries can be compared, expected at least {MIN_PLACES}"
        if self.cosine < MIN_COSINE:
            return f"the suspect's weights are not the package's (cosine {self.cosine:.2f}): unrelated, or rearranged"
        return None

    @property
    def found(self) -> tuple[str, ...]:
        """The recipients whose mark is in the suspect, the clearest first."""
        ordered = sorted(self.scores, key=lambda recipient: -self.scores[recipient].z)
        return tuple(one for one in ordered if self._is_clear(self.scores[one]))

    @property
    def owner_found(self) -> bool:
        """Whether some mark made with this key is in the suspect."""
        return self._is_clear(self.owner)

    def corrected(self, score: Score) -> float:
        """Return the p-value times the number of questions asked: one a recipient, and one for the owner's."""
        return min(1.0, score.p_value * (len(self.scores) + 1))

    def _is_clear(self, score: Score) -> bool:
        return self.num_places >= MIN_PLACES and self.corrected(score) < LEVEL


def compare(package: Package, suspect: Path, key: MarkKey, recipients: Sequence[str]) -> Comparison:
    """Return how the suspect leans towards the mark of each recipient.

    Args:
        package: the package without a mark.
        suspect: folder with safetensors files: a package or a checkpoint. Only its tensors are looked at.

    Raises:
        ConfigError, UnsupportedModel: when the folder holds no safetensors weights.
        BadSchema, TooLarge: when a file in it is not a sound safetensors file.
    """
    there = _suspect_tensors(suspect)
    sums, owner_sum, squares = torch.zeros(len(recipients), dtype=torch.float64), 0.0, 0.0
    largest = owner_largest = 0.0
    cosines: list[float] = []
    num_places = num_changed = num_missing = 0
    for name, weight in _carried(package):
        if name not in there or there[name][1].shape != tuple(weight.shape):
            num_missing += 1
            continue
        other = _restored(weight.float(), _read(there[name][0], name).float())
        cosines.append(_cosine(weight, other))
        where = places(key, package.digest, name, weight)
        difference = (other.reshape(-1) - weight.reshape(-1).float())[where.index]
        lean = _lean(difference, where)
        up, down = where.worth_up, -where.worth_down
        towards = [float(lean @ torch.where(where.up(recipient), up, down)) for recipient in recipients]
        sums += torch.tensor(towards, dtype=torch.float64)  # leans times each recipient's standardised directions
        owner_sum += float(lean @ where.tendency)
        squares += float(lean.square().sum())
        largest = max(largest, _most(lean * torch.maximum(up, -down)))
        owner_largest = max(owner_largest, _most(lean * where.tendency))
        num_places += len(lean)
        num_changed += int((difference != 0).sum())
    scale = math.sqrt(squares) or 1.0
    return Comparison(
        scores={
            recipient: Score(float(one) / scale, largest / scale)
            for recipient, one in zip(recipients, sums, strict=True)
        },
        owner=Score(owner_sum / scale, owner_largest / scale),
        num_tensors=len(cosines),
        num_missing=num_missing,
        num_places=num_places,
        num_changed=num_changed,
        cosine=float(torch.tensor(cosines).median()) if cosines else 0.0,
    )


def _lean(difference: Tensor, where: Places) -> Tensor:
    """Return each place's weight in the score, with the sign of its difference, float64."""
    size = difference.nan_to_num(0.0).abs()
    typical = float(size[size > 0].double().median()) if bool((size > 0).any()) else 0.0
    if typical == 0 or math.isinf(typical):
        return torch.zeros(len(difference), dtype=torch.float64)
    clipped = (difference.double().nan_to_num(0.0) / typical).clamp(-_CLIP, _CLIP)
    return clipped * (where.step.double() / (typical * clipped.square().mean()))


def _most(values: Tensor) -> float:
    return float(values.abs().max()) if len(values) else 0.0


def _restored(weight: Tensor, other: Tensor) -> Tensor:
    """Return the suspect's matrix with rows and columns in the package's order and of its scale, as far as found."""
    if weight.dim() != 2:
        return other
    if _cosine(weight, other) < MIN_COSINE:
        other = _reordered(weight, other)
    for axis in (1, 0):
        ratio = torch.where(weight == 0, math.nan, other / weight)
        fit = ratio.nanmedian(axis, keepdim=True).values  # which pruning and single values leave at 1
        scaled = fit.isfinite() & (fit.abs() > _SMALLEST_SCALE) & ((fit - 1).abs() > _SCALED)
        other = other / torch.where(scaled, fit, 1.0)
    return other


def _reordered(weight: Tensor, other: Tensor) -> Tensor:
    for axis in (0, 1):
        rows, mixed = (torch.nn.functional.normalize(one.movedim(axis, 0), dim=1) for one in (weight, other))
        likeness = (rows @ mixed.T).abs().max(dim=1)
        order = likeness.indices
        if len(order.unique()) == len(order) and float(likeness.values.median()) > MIN_COSINE:
            return other.index_select(axis, order)
    return other


def _cosine(one: Tensor, other: Tensor) -> float:
    flat, fitting = one.reshape(-1).double(), other.reshape(-1).double()
    return float(torch.nn.functional.cosine_similarity(flat, fitting, dim=0).nan_to_num(0.0))


def _carried(package: Package) -> Iterator[tuple[str, Tensor]]:
    names = set(carriers(package))
    for shard, specs in shard_headers(package.path, package.manifest).items():
        tensors = read_tensors(package.path / shard, specs)
        for name in sorted(names & tensors.keys()):
            yield name, tensors[name]


def _suspect_tensors(folder: Path) -> dict[str, tuple[Path, TensorSpec]]:
    if not folder.is_dir():
        raise ConfigError(f"no suspect folder named {folder.name!r}", hint="name a package or a checkpoint folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if any(folder.glob("*.bin")):
            raise UnsupportedModel(
                f"suspect {folder.name!r} has pickled weights, which can run code", hint="save it as safetensors first"
            )
        raise ConfigError(f"suspect {folder.name!r} holds no safetensors weights", hint="name a checkpoint's folder")
    return {name: (path, spec) for path in files for name, spec in read_header(path).items()}


def _read(path: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]
    except (OSError, SafetensorError):
        raise BadSchema(f"file {path.name!r} is not one that safetensors reads") from None


def run(config: TraceConfig) -> dict[str, object]:
    """Carry out ``offsite trace``."""
    check_folder(config.keys)
    key = open_key(config.keys, create=False)
    package = open_package(config.package)
    refuse_marked(config.keys, package)
    recipients = tuple(dict.fromkeys(config.recipient or _remembered(config, package)))
    result = compare(package, config.suspect, key, recipients)
    verdict = _verdict(result)
    say(f"trace: {config.suspect.name}: {verdict}")
    for one in sorted(recipients, key=lambda recipient: -result.scores[recipient].z):
        say(f"trace:   {one}  z {result.scores[one].z:.1f}")
    if result.obstacle is None and result.num_missing:
        say(f"trace: {result.num_missing} of the middle's matrices are not in the suspect, or of another shape")
    return {"verdict": verdict, **_told(result)}


def _remembered(config: TraceConfig, package: Package) -> list[str]:
    found = [mark.recipient for mark in read_marks(config.keys) if mark.package == package.digest]
    if not found:
        raise ConfigError(
            f"these keys remember nobody whom {package.path.name!r} was marked for",
            hint="name the package that 'offsite mark' was given, or recipients with --recipient FINGERPRINT",
        )
    return found


def _verdict(result: Comparison) -> str:
    if result.found:
        return f"marked for {', '.join(result.found)}"
    if result.owner_found:
        return "marked with these keys, for nobody looked for"
    if result.obstacle:
        return f"cannot be compared: {result.obstacle}"
    return f"no mark found at p < {LEVEL:g}"


def _told(result: Comparison) -> dict[str, object]:
    return {
        "comparable": result.obstacle is None,
        "marked": bool(result.found) or result.owner_found,
        "recipients": [
            {
                "recipient": recipient,
                "z": round(score.z, 3),
                "p_value": score.p_value,
                "p_corrected": result.corrected(score),
                "marked": recipient in result.found,
            }
            for recipient, score in result.scores.items()
        ],
        "owner": {
            "z": round(result.owner.z, 3),
            "p_value": result.owner.p_value,
            "p_corrected": result.corrected(result.owner),
            "marked": result.owner_found,
        },
        "level": LEVEL,
        "cosine": round(result.cosine, 6),
        "tensors": result.num_tensors,
        "tensors_missing": result.num_missing,
        "places": result.num_places,
        "places_changed": result.num_changed,
    }
