"""The frontier benchmark's jobs: packages, runs of a client on them, and what means of runs do in either model.

A job is a pure function of its description. Runs train with the client's own batches, schedule, starts and objectives
(`offsite.training.step.rate`, `client.tuning`), in a loop of this file that can do what the product's does not offer;
frozen linears compute in bfloat16, everything else in float32.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from adapters.kinds import Attached
from adapters.lift import lift
from adapters.norms import scale_of
from client.objectives import tokens
from client.objectives.anchor import Anchor
from client.objectives.channels import ChannelDropout
from client.tuning.data import TrainingText, prepare
from client.tuning.tune import attach_to_package
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.owner import OwnerRecord, owner_record_path, read_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.evaluation.measure import evaluating
from offsite.modelling.head import scores_at
from offsite.modelling.load import load_model, load_tokenizer
from offsite.text.batches import IGNORED, Batches, collate, encode, pack, pad_id
from offsite.text.records import read_records
from offsite.training.config import LoopConfig
from offsite.training.step import rate
from server.plugging import sparing
from server.plugging.fit import Fitted, corrected_against
from server.plugging.offset import moved

BLOCK_TOKENS = 256
HELDOUT_BLOCKS = 40
VALIDATION = 0.012

_STATE: dict[str, Any] = {}


def start(model: str, threads: int, client: str, heldout: str, work: str) -> None:
    """Prepare a worker process."""
    torch.set_num_threads(threads)
    _STATE.update(model=model, client=client, heldout=heldout, work=Path(work))


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Return the job with what it found and the seconds it took."""
    began = time.monotonic()
    kinds = {"zero_shot": zero_shot, "package": make_package, "run": run, "mean": mean, "ways": ways, "fit": fit}
    found = kinds[job["kind"]](job)
    return {**job, "found": found, "seconds": round(time.monotonic() - began, 1), "arithmetic": arithmetic()}


# --- jobs


def zero_shot(_job: Mapping[str, Any]) -> dict[str, Any]:
    """The full model as it is."""
    with half(full_model()) as model:
        return {"perplexity": measure(model)}


def make_package(job: Mapping[str, Any]) -> dict[str, Any]:
    """The package stands under the work folder. Returns its zero-shot perplexity, its price and what a dial said."""
    from emulator.dial.config import DialConfig
    from emulator.dial.verb import run as distill

    out = package_path(job["package"])
    began = time.monotonic()
    if not owner_record_path(out).is_file():
        shutil.rmtree(out, ignore_errors=True)
        settings = {"bottom": 2, "top": 2, "steps": 0, "batch_size": 4, "block_tokens": 256, **job["distill"]}
        if "public" in settings:
            settings["public"] = tuple(Path(one) for one in settings["public"])
        if "target" in settings:
            settings["explore_size"] = tuple(settings["explore_size"])
        distill(DialConfig(model=_STATE["model"], output=out, **settings))
    seconds = time.monotonic() - began
    package, dial = open_package(out), read_owner_record(owner_record_path(out)).dial
    with half(package.load_model(dtype="float32")) as model:
        found = measure(model)
    return {
        "perplexity": found,
        "package_digest": package.digest,
        "package_bytes": package.num_bytes,
        "make_seconds": round(seconds, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **({} if dial is None else {"dial": dial.model_dump(mode="json")}),
    }


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """One client's adapter stands under the work folder, in bfloat16 as a bundle holds it."""
    how = job["how"]
    package = open_package(package_path(job["package"]))
    spec = spec_for(how)
    data_seed, start_seed = how.get("data_seed", job["seed"]), how.get("start_seed", job["seed"])
    text = client_text(_STATE["client"], how.get("batch_size", 4), data_seed)
    attached = attach_to_package(package, spec, device=torch.device("cpu"), seed=start_seed)
    losses: list[float] = []
    with half(attached.model):
        averaged = train(attached, package, text, how, losses, seed=start_seed)
        validation = measure_examples(attached.model, text.validation[:8], text.pad_id)
    tensors = {name: tensor.bfloat16() for name, tensor in attached.tensors().items()}
    path = adapter_path(job["key"])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    for name, more in averaged.items():
        save_file({key: one.bfloat16() for key, one in more.items()}, adapter_path(f"{job['key']}~{name}"))
    return {"first_loss": losses[0], "final_loss": losses[-1], "validation_loss": math.log(validation)}


def mean(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the mean of these runs' updates gives: the emulator with all of it, the full model with shares of it."""
    spec = spec_for(job["how"])
    runs = [(one["package"], load_file(adapter_path(one["key"]))) for one in job["runs"]]
    shares = job.get("shares", [1.0, 0.75, 0.5])
    found: dict[str, Any] = {}
    full = full_model()
    is_corrected = job.get("correct", False)
    update = average([lifted(package, spec, tensors, full, is_corrected=is_corrected) for package, tensors in runs])
    if job.get("rank"):
        found["cut_error"] = cut(update, job["rank"])
    found["plugged_in"] = {}
    for share in shares:
        with added(full, update, share), half(full) as model:
            found["plugged_in"][f"{share:g}"] = measure(model)
    if job.get("reference"):
        return found
    found["emulator_tuned"] = {}
    for name in dict.fromkeys(package for package, _ in runs):
        package = open_package(package_path(name))
        emulator = package.load_model(dtype="float32")
        own = [local(package, spec, tensors) for held, tensors in runs if held == name]
        with added(emulator, average(own), 1.0), half(emulator) as model:
            found["emulator_tuned"][name] = measure(model)
    return found


def ways(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the mean of these runs' updates gives in the full model, plugged in in several ways."""
    spec, full = spec_for(job["how"]), full_model()
    runs = [(one["package"], load_file(adapter_path(one["key"]))) for one in job["runs"]]
    update = average([lifted(package, spec, tensors, full) for package, tensors in runs])
    found: dict[str, Any] = {}
    betas = [way["offset"] for way in job["ways"] if "offset" in way]
    by_beta = offsets(runs, spec, betas) if betas else {}
    for way in job["ways"]:
        if "offset" in way:
            found[way["name"]] = by_beta[way["offset"]]
            continue
        changed = spared(update, way["spare"], way["text"]) if "spare" in way else update
        parts = {name: way.get(_part_of(name), way.get("share", 1.0)) * delta for name, delta in changed.items()}
        with added(full, parts, 1.0), half(full) as model:
            if "mix" in way:
                found[way["name"]] = mixed(model, parts, way["mix"])
            else:
                found[way["name"]] = measure(model)
    return {"plugged_in": found}


def _part_of(name: str) -> str:
    return "attention" if "attn" in name else "mlp"


def spared(update: Mapping[str, Tensor], strength: float, text: str) -> dict[str, Tensor]:
    """Return the update with less of it along inputs that public text uses: times lambda (C + lambda I)^-1.

    Args:
        strength: lambda over the mean eigenvalue of C, the mean of x x^T over the layer's inputs in the full model.
    """
    known = moments(text)
    return {name: sparing.spared(delta, known[name], strength).float() for name, delta in update.items()}


class Shared(nn.Module):
    """A halved linear with a low-rank update, of which each direction or the whole counts by a share."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, by: str) -> None:
        """Begin with half of the update; `by` is ``module`` or ``direction``."""
        super().__init__()
        self.base, self.by = base, by
        self.down, self.up = down.bfloat16(), up.bfloat16()
        self.share = nn.Parameter(torch.full((len(down) if by == "direction" else 1,), 0.5))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the linear does, and its share of what the update does."""
        inner = functional.linear(hidden.bfloat16(), self.down).float() * self.share
        found: Tensor = self.base(hidden) + functional.linear(inner.bfloat16(), self.up).float()
        return found


def fit(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the mean of these runs' updates gives when the owner fits shares of it, in [0, 1], on text of its own."""
    spec, full, num = spec_for(job["how"]), full_model(), len(job["runs"])
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for one in job["runs"]:
        for name, pair in lifted_factors(one["package"], spec, load_file(adapter_path(one["key"])), full).items():
            factors.setdefault(name, []).append(pair)
    batches, how = public_batches(job["fit"]["text"]), job["fit"]
    with half(full) as model:
        put: list[tuple[nn.Module, str, Shared]] = []
        for name, pairs in factors.items():
            place, _, last = name.removesuffix(".weight").rpartition(".")
            parent = model.get_submodule(place)
            down, up = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1) / num
            shared = Shared(parent._modules[last], down, up, how["by"])
            parent._modules[last] = shared
            put.append((parent, last, shared))
        optimizer = torch.optim.Adam([one.share for _, _, one in put], lr=how.get("rate", 0.05))
        losses = []
        for number in range(how.get("steps", 30)):
            loss = torch.stack(
                [token_losses(model, batches.batch(2 * number + part)).mean() for part in range(2)]
            ).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            for _, _, one in put:
                one.share.data.clamp_(0, 1)
        found = measure(model)
        groups: dict[str, list[float]] = {}
        for (_, _, one), name in zip(put, factors, strict=True):
            third = int(name.split(".")[2]) // 10
            groups.setdefault(f"{_part_of(name)} {10 * third}-{10 * third + 9}", []).append(float(one.share.mean()))
        for parent, last, one in put:
            parent._modules[last] = one.base
    shares = {group: sum(values) / len(values) for group, values in sorted(groups.items())}
    return {"plugged_in": found, "shares": shares, "first_loss": losses[0], "final_loss": sum(losses[-5:]) / 5}


@lru_cache(maxsize=2)
def moments(text: str) -> dict[str, Tensor]:
    """Return, for every linear of the full model's blocks, the mean of x x^T over 8,192 tokens of public text."""
    model = full_model()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    sums: dict[str, Tensor] = {}
    num = 0

    def see(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            product = rows.T @ rows
            sums[name] = sums[name] + product if name in sums else product

        return hook

    handles = [module.register_forward_pre_hook(see(name)) for name, module in linears.items()]
    with torch.no_grad():
        for number in range(16):
            batch = public_batches(text).batch(number)
            num += batch["input_ids"].numel()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": total / num for name, total in sums.items()}


@torch.no_grad()
def mixed(plugged: Any, update: Mapping[str, Tensor], share: float) -> float:
    """Return the perplexity of `share` of the plugged model's probabilities and the rest of the full model's.

    Args:
        plugged: the full model with the update in it.
    """
    total, num = 0.0, 0
    both = []
    for part in (1.0, 0.0):
        if not part:  # the update is taken out of the halved linears again
            for name in update:
                plugged.get_parameter(name).data = full_weight(name).bfloat16()
        both.append([token_losses(plugged, collate(heldout()[i : i + 4], pad_id(tokenizer())))
                     for i in range(0, len(heldout()), 4)])  # fmt: skip
    for with_update, without in zip(*both, strict=True):
        pair = torch.stack([math.log(share) - with_update, math.log(1 - share) - without])
        losses = -torch.logsumexp(pair, 0)
        total, num = total + float(losses.double().sum()), num + len(losses)
    return math.exp(total / num)


@torch.no_grad()
def offsets(
    runs: Sequence[tuple[str, Mapping[str, Tensor]]], spec: AdapterSpec, betas: Sequence[float]
) -> dict[float, float]:
    """Return the perplexity of the full model's scores plus beta (tuned emulator's - emulator's), for each beta.

    The runs are on one package; of several the emulator carries the mean. Nothing is plugged into the full model.
    """
    (name,) = {package for package, _ in runs}
    package = open_package(package_path(name))
    untuned, tuned = (package.load_model(dtype="float32") for _ in range(2))
    update = average([local(package, spec, tensors) for _, tensors in runs])
    totals, num = dict.fromkeys(betas, 0.0), 0
    with added(tuned, update, 1.0), half(full_model()) as full, half(untuned), half(tuned):
        for first in range(0, len(heldout()), 4):
            batch = collate(heldout()[first : first + 4], pad_id(tokenizer()))
            targets_BT = batch["labels"][:, 1:]
            chosen_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
            chosen_BT[:, :-1] = targets_BT != IGNORED
            targets_N = targets_BT[targets_BT != IGNORED]
            passes = [scores_at(model, batch, chosen_BT) for model in (full, tuned, untuned)]
            for (rows, full_nV), (_, tuned_nV), (_, untuned_nV) in zip(*passes, strict=True):
                for beta in betas:
                    scores_nV = moved(full_nV, tuned_nV, untuned_nV, beta)
                    losses_n = functional.cross_entropy(scores_nV, targets_N[rows], reduction="none")
                    totals[beta] += float(losses_n.double().sum())
            num += len(targets_N)
    return {beta: math.exp(total / num) for beta, total in totals.items()}


@lru_cache(maxsize=1)
def _untouched() -> dict[str, Tensor]:
    return dict(load_model(_STATE["model"], dtype="float32").named_parameters())


def full_weight(name: str) -> Tensor:
    """Return a weight of the full model as it was."""
    return _untouched()[name].data


# --- training


def spec_for(how: Mapping[str, Any]) -> AdapterSpec:
    """Return the adapter that an arm tunes."""
    return AdapterSpec(
        kind="lora",
        placement="all",
        rank=how.get("rank", 8),
        alpha=how.get("alpha", 16.0),
        targets=how.get("targets", "all-linear"),
    )


def train(
    attached: Attached, package: Package, text: TrainingText, how: Mapping[str, Any], losses: list[float], *, seed: int
) -> dict[str, dict[str, Tensor]]:
    """The adapter is trained as `how` says. Returns averages of its weights by name, where they were asked for."""
    steps = how.get("steps", 40)
    config = LoopConfig(
        steps=steps,
        learning_rate=how.get("rate", 8e-3),
        warmup_steps=min(10, max(1, steps // 10)),
        schedule="cosine",
    )
    trainable = {name: one for name, one in attached.trainable.items() if _is_in(name, how, attached)}
    for name, one in attached.trainable.items():
        one.requires_grad_(name in trainable)
    optimizer = torch.optim.AdamW(trainable.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    attached.model.train()
    channels = None
    if how.get("channel_dropout"):
        channels = ChannelDropout(attached, package, probability=how["channel_dropout"], seed=seed)
    sums: dict[str, Tensor] = {}
    tail = how.get("tail", 0)
    anchors = public_batches(how["anchor_text"]) if how.get("anchor") else None
    anchor = Anchor(attached)
    batches: Batches = text.batches
    for number in range(1, steps + 1):
        batch = batches.batch(number - 1)
        if channels is not None:
            channels.begin(number - 1)
        total, count = 0.0, int((batch["labels"][:, 1:] != IGNORED).sum())
        for rows in range(0, len(batch["input_ids"]), 4):
            part = {name: value[rows : rows + 4] for name, value in batch.items()}
            summed = tokens.dft_loss(attached.model, part)[0] if how.get("weight") == "dft" else None
            loss = (token_losses(attached.model, part).sum() if summed is None else summed) / count
            loss.backward()
            total += float(loss.detach())
        if anchors is not None:
            public = anchors.batch(number - 1)
            found = anchor.divergence(attached.model, public["input_ids"], public["attention_mask"])
            (how["anchor"] * found / public["attention_mask"].sum()).backward()
        norm = nn.utils.clip_grad_norm_(trainable.values(), config.clip_norm or math.inf)
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            raise SystemExit(f"loss {total}, gradient norm {float(norm)} at step {number}")
        for group in optimizer.param_groups:
            group["lr"] = rate(config, number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        if tail and number > steps - tail:
            for name, one in attached.tensors().items():
                sums[name] = sums[name] + one / tail if name in sums else one / tail
    attached.model.eval()
    return {"tail": sums} if tail else {}


def _is_in(name: str, how: Mapping[str, Any], attached: Attached) -> bool:
    """Tell whether an arm trains this tensor: `only` names blocks by number from the bottom, and a part of each."""
    if "only" not in how:
        return True
    order = list(attached.sites)
    number = order.index(".".join(name.split(".")[:2]))
    return any(first <= number <= last and part in name for first, last, part in how["only"])


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return (N,): the loss of every position that counts."""
    return tokens.token_losses(model, batch)[0]


# --- updates


def local(package: Package, spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter's update by the package's own weight names, dense."""
    names = package.layout.blocks
    return {f"{names[block]}.{inner}.weight": delta for (block, inner), delta in _deltas(spec, tensors)}


def lifted_factors(
    name: str, spec: AdapterSpec, tensors: Mapping[str, Tensor], full: nn.Module
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the adapter's factors, the scale in the second, by the full model's weight names."""
    record, wide = _wide(name, tensors, full)
    found = {}
    for part in wide:
        module, _, kind = part.rpartition(".")
        if kind == "lora_A":
            role, number, inner = module.split(".", 2)
            pair = (wide[part].float(), scale_of(spec) * wide[f"{module}.lora_B"].float())
            found[f"{record.sites[f'{role}.{number}']}.{inner}.weight"] = pair
    return found


def lifted(
    name: str, spec: AdapterSpec, tensors: Mapping[str, Tensor], full: nn.Module, *, is_corrected: bool = False
) -> dict[str, Tensor]:
    """Return the adapter's update by the full model's weight names, dense, zero where the package has no channel."""
    record, wide = _wide(name, tensors, full)
    if is_corrected:
        wide = corrected_against(open_package(package_path(name)), full, Fitted(spec, wide, record.sites))
    return {f"{record.sites[block]}.{inner}.weight": delta for (block, inner), delta in _deltas(spec, wide)}


def _wide(name: str, tensors: Mapping[str, Tensor], full: nn.Module) -> tuple[OwnerRecord, dict[str, Tensor]]:
    record = read_owner_record(owner_record_path(package_path(name)))
    dims = {}
    for module in record.layout.linears:
        role, number, inner = module.split(".", 2)
        linear: Any = full.get_submodule(f"{record.sites[f'{role}.{number}']}.{inner}")
        dims[module] = (linear.in_features, linear.out_features)
    return record, lift(tensors, record.channels, dims)


def _deltas(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, str], Tensor]]:
    scale = scale_of(spec)
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "lora_A":
            role, number, inner = module.split(".", 2)
            down, up = tensors[name].float(), tensors[f"{module}.lora_B"].float()
            yield (f"{role}.{number}", inner), scale * (up @ down)


def average(updates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of the updates."""
    return {name: sum(one[name] for one in updates) / len(updates) for name in updates[0]}  # type: ignore[misc]


def cut(update: dict[str, Tensor], rank: int) -> float:
    """Every matrix of the update has at most this rank, in place. Returns the share of its norm that was lost."""
    lost = whole = 0.0
    for name, delta in update.items():
        left, sizes, right = torch.svd_lowrank(delta, q=min(64, *delta.shape), niter=4)
        kept = (left[:, :rank] * sizes[:rank]) @ right[:, :rank].T
        lost += float((delta - kept).square().sum())
        whole += float(delta.square().sum())
        update[name] = kept
    return math.sqrt(lost / whole)


@contextmanager
def added(model: nn.Module, update: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Inside, the model has this share of the update in its weights, which are float32."""
    before = {name: model.get_parameter(name).data for name in update}
    for name, delta in update.items():
        model.get_parameter(name).data = before[name] + share * delta
    try:
        yield
    finally:
        for name, data in before.items():
            model.get_parameter(name).data = data


# --- models and text


class Half(nn.Module):
    """A frozen linear in bfloat16 between float32 activations."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take the linear's weights over, rounded."""
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the linear does."""
        return functional.linear(hidden.bfloat16(), self.weight, self.bias).float()


@lru_cache(maxsize=1)
def arithmetic() -> str:
    """Return what frozen linears compute in: bfloat16, or float32 where this processor is faster in that."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = torch.randn(1024, 576).to(dtype), torch.randn(1536, 576).to(dtype)
        functional.linear(hidden, weight)
        began = time.process_time()
        functional.linear(hidden, weight)
        seconds[dtype] = time.process_time() - began
    return str(min(seconds, key=seconds.__getitem__)).removeprefix("torch.")


@contextmanager
def half(model: Any) -> Iterator[Any]:
    """Inside, every frozen linear of the model but adapters' own computes in bfloat16, where that is faster."""
    if arithmetic() == "float32":
        yield model
        return
    changed = [
        (parent, name, child)
        for parent in list(model.modules())
        if not isinstance(parent, nn.ModuleDict)  # an adapter's own factors
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, child in changed:
        parent._modules[name] = Half(child)
    try:
        yield model
    finally:
        for parent, name, child in changed:
            parent._modules[name] = child


@lru_cache(maxsize=1)
def full_model() -> Any:
    """Return the full model, float32, frozen."""
    model = load_model(_STATE["model"], dtype="float32")
    return model.requires_grad_(False).eval()


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """Return the full model's tokenizer."""
    return load_tokenizer(_STATE["model"])


@lru_cache(maxsize=2)
def heldout() -> Any:
    """Return the held-out blocks, evenly spaced over the file."""
    encoded = encode(read_records(Path(_STATE["heldout"])), tokenizer(), context=BLOCK_TOKENS, whole_text=True)
    blocks = pack(encoded.examples, block_tokens=BLOCK_TOKENS)
    num = min(HELDOUT_BLOCKS, len(blocks))
    return [blocks[i * len(blocks) // num] for i in range(num)]


@lru_cache(maxsize=4)
def client_text(client: str, batch_size: int, seed: int) -> TrainingText:
    """Return the client's text as ``offsite tune`` prepares it."""
    return prepare(
        read_records(Path(client)),
        tokenizer(),
        block_tokens=BLOCK_TOKENS,
        batch_size=batch_size,
        validation=VALIDATION,
        seed=seed,
    )


@lru_cache(maxsize=2)
def public_batches(path: str) -> Batches:
    """Return batches of two blocks of public text."""
    encoded = encode(read_records(Path(path)), tokenizer(), context=BLOCK_TOKENS, whole_text=True)
    blocks = pack(encoded.examples, block_tokens=BLOCK_TOKENS)
    return Batches(blocks, batch_size=2, seed=0, pad_id=pad_id(tokenizer()))


def measure(model: Any) -> float:
    """Return the perplexity on the held-out answers."""
    return measure_examples(model, heldout(), pad_id(tokenizer()))


@torch.no_grad()
def measure_examples(model: Any, examples: Sequence[Any], pad: int) -> float:
    """Return the perplexity over every position that counts."""
    total, num = 0.0, 0
    with evaluating(model):
        for first in range(0, len(examples), 4):
            losses = token_losses(model, collate(examples[first : first + 4], pad))
            total, num = total + float(losses.double().sum()), num + len(losses)
    return math.exp(total / num)


def package_path(name: str) -> Path:
    """Return where a package stands."""
    found: Path = _STATE["work"] / "packages" / name
    return found


def adapter_path(key: str) -> Path:
    """Return where a run's adapter stands."""
    found: Path = _STATE["work"] / "adapters" / f"{key.replace('/', '+')}.safetensors"
    return found


def shown(found: Mapping[str, Any]) -> str:
    """Return what was found, short."""
    return json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()})
