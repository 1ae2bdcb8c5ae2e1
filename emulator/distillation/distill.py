"""``offsite distill``: the full model and public text in, a package out.

The Python API, in order: `emulator.distillation.public.prepare` makes batches of public text,
`emulator.compression.compress.compress` gives a training-free emulator, `emulator.distillation.imitation.distill`
trains its middle to stand in for the full model's, and `emulator.distillation.publish.publish` writes what leaves and
what stays. `run` is the verb: it does all of them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from emulator.compression.compress import Compressed, Recipe, compress, middle_blocks
from emulator.compression.finished import FinishedBlocks
from emulator.compression.lowrank import low_rank  # noqa: F401 - registers the method
from emulator.compression.packed import pack_middle
from emulator.compression.unequal import wider_blocks
from emulator.distillation.config import DistillConfig
from emulator.distillation.elevate import elevate
from emulator.distillation.imitation import Distilled, distill
from emulator.distillation.launched import in_processes
from emulator.distillation.masked import Masks, masks_for, scored
from emulator.distillation.objective import Pair, Weights, measure
from emulator.distillation.public import PublicText, prepare
from emulator.distillation.publish import publish, read_terms, try_out
from emulator.distillation.refusals import require_fitting
from emulator.distillation.selfwritten import forget, own_text
from offsite.artefacts.package import Package
from offsite.blockwise import block_by_block
from offsite.console import say
from offsite.digests import model_digest, sha256_bytes
from offsite.encoders.trunk import is_encoder
from offsite.modelling.causal import refuse_uncausal
from offsite.modelling.dtypes import main_dtype, stored_in
from offsite.modelling.load import load_model, load_reader
from offsite.modelling.split import Plan, make_plan
from offsite.seq2seq.models import is_seq2seq, require_start
from offsite.staging import refuse_existing
from offsite.text.records import Record, read_files, require_files
from offsite.training.checkpoints import require_work
from offsite.training.config import LoopConfig
from offsite.training.devices import choose_device
from offsite.training.precision import settled, uses_bf16
from offsite.training.processes import Processes, is_launched, world
from offsite.training.trackers import require_trackers
from offsite.vision.reader import ImageReader, Reader

_LARGE = 10**9
"""Parameters of a model that is too large to be held in memory without a word."""


def run(config: DistillConfig) -> dict[str, object]:
    """Do what ``offsite distill`` says: PACKAGE and PACKAGE.owner.json stand when it returns.

    Without training, on the CPU, the full model stays mapped from its files and memory holds a few blocks of it: see
    `emulator.compression.passage`. After a distillation its log is PACKAGE.log.jsonl. What is done is in
    ``PACKAGE.work`` meanwhile, and stays there when the run fails.

    Returns:
        the figures that the verb prints.

    Raises:
        OffsiteError: with the reason; no package then stands.
    """
    refuse_existing(config.output)
    require_files(() if config.writes_itself else config.public)
    require_files(config.field_text)
    require_trackers(config.report_to)
    say(f"loading {Path(config.model).name!r}")
    require_fitting(config)
    if config.launch > 1 and not is_launched():
        return in_processes(config)
    began, terms = time.monotonic(), read_terms(config.terms)
    processes = replace(world(), device=choose_device(config.device))
    if processes.is_main:  # before it writes anything there itself
        require_work(_work(config), resume=config.resume)
    works = [_work(config)] if config.resume else []
    config = config.model_copy(update={"precision": settled(config.precision, processes.device, works=works)})
    own = own_text(config) if config.writes_itself else None
    torch.manual_seed(config.seed)
    owned = _open(config, processes)
    if is_encoder(owned.full) and config.steps:
        owned = replace(owned, masks=masks_for(config, owned.full, owned.tokenizer))
    text = _public_text(config, owned, own)
    recipe = _recipe(config, text, owned, processes)
    compressed = compress(owned.full, owned.plan, config.method, recipe)
    try_out(owned.plan, compressed)
    sizes = _sizes(owned, compressed)
    if processes.is_main:
        say("distill: middle of {:,} parameters, emulator of {:,}".format(*sizes.values()))
    distilled = None
    if config.steps and text is not None:
        distilled = _distilled(config, owned, text, compressed, processes)
        if compressed.compute is None:  # its middle is float32 by now, the rest what the checkpoint has
            compressed = replace(compressed, compute=torch.float32)
    margin: dict[str, object] = {}
    if config.elevate and text is not None and distilled is not None:
        distilled, nats = _elevated(config, owned, text, compressed, distilled, processes)
        margin = {"elevated_nats": nats}
    measured = _field_kl(config, owned, compressed, distilled, processes)
    package = None
    if processes.is_main:
        compressed = _packed(config, owned, compressed, distilled, recipe)
        package = _published(config, owned, compressed, distilled, terms)
    processes.wait()
    return {
        **_told(config, owned, package, distilled),
        **margin,
        **measured,
        **compressed.settings,
        **sizes,
        **compressed.figures,
        "seconds": round(time.monotonic() - began, 3),
    }


@dataclass(frozen=True)
class _Owned:
    """The full model and what is known of it before anything is done to it."""

    full: PreTrainedModel
    tokenizer: Reader
    plan: Plan
    digest: str
    dtype: str
    dtypes: Mapping[str, str]
    compute: torch.dtype | None
    masks: Masks | None = None


def _open(config: DistillConfig, processes: Processes) -> _Owned:
    full = load_model(config.model, encoders=True, seq2seq=True)
    plan = make_plan(full, num_bottom=config.bottom, num_top=config.top, stacks=config.stacks)
    if is_seq2seq(full):
        require_start(full)
    compute = _compute(full, config, processes)
    refuse_uncausal(full, compute)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in full.state_dict().items()}
    main = str(main_dtype(stored_in(full).values())).removeprefix("torch.")
    owned = _Owned(full, load_reader(config.model), plan, model_digest(full), main, dtypes, compute)
    _place(full, config, processes)
    return replace(owned, compute=_compute(full, config, processes))


def _public_text(config: DistillConfig, owned: _Owned, own: Path | None) -> PublicText | None:
    if not config.public:
        return None
    say(f"reading the public {'images' if (images := isinstance(owned.tokenizer, ImageReader)) else 'text'}")
    return prepare(
        _records(config, config.public, images=images) if own is None else read_files([own]),
        owned.tokenizer,
        owned.full,
        block_tokens=config.block_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        holdout=config.holdout if config.steps else None,
        evaluation_tokens=config.evaluation_tokens,
        calibration_tokens=config.calibration_tokens,
        masking=None if owned.masks is None else owned.masks.masking,
    )


def _records(config: DistillConfig, paths: Sequence[Path], *, images: bool = False) -> list[Record]:
    return read_files(
        paths, fields=config.fields, document_field=config.document_field, separator=config.separator, images=images
    )


def _field_kl(
    config: DistillConfig,
    owned: _Owned,
    compressed: Compressed,
    distilled: Distilled | None,
    processes: Processes,
) -> dict[str, object]:
    """Return KL(full || emulator) on text of the field, in nats per token, if any was given: the owner's alone."""
    if not config.field_text:
        return {}
    text = prepare(
        _records(config, config.field_text),
        owned.tokenizer,
        owned.full,
        block_tokens=config.block_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        holdout=None,
        evaluation_tokens=config.evaluation_tokens,
        calibration_tokens=config.evaluation_tokens,
    )
    model = compressed.model if distilled is None or distilled.model is None else distilled.model
    model.to(processes.device)  # type: ignore[arg-type]
    full = owned.full
    with torch.no_grad(), block_by_block(full, owned.compute), block_by_block(model, compressed.compute):
        found = measure(Pair(owned.full, model, owned.plan, compressed.kept), text.calibration, processes)
    say(f"distill: KL(full || emulator) on text of the field {found.kl:.4f} nats per token")
    return {"field_kl" if config.pack is None or config.method == "packed" else "field_kl_before_packing": found.kl}


def _place(full: PreTrainedModel, config: DistillConfig, processes: Processes) -> None:
    """`full` is where and in the dtype that the work needs; several processes: on the CPU, to be sharded from there.

    Where it can be, it stays mapped from its files as it is, and only computes in that dtype.
    """
    if _is_streamed(config, processes) and not is_seq2seq(full):
        return
    if full.num_parameters() > _LARGE:
        say("distill: training, gradients and other devices than the CPU hold the whole model in memory")
    if _compute(full, config, processes) is not None:
        full.float()
    if processes.size == 1:
        full.to(processes.device)  # type: ignore[arg-type]


def _compute(full: PreTrainedModel, config: DistillConfig, processes: Processes) -> torch.dtype | None:
    """Return the dtype to compute in; None for the one that the model has.

    Where bfloat16 is not fast it is float32, also to calibrate alone: a processor without instructions for bfloat16
    took 8 to 70 times as long for its products (one core, AVX2, torch 2.13).
    """
    if uses_bf16(config.precision, processes.device) and full.dtype in (torch.bfloat16, torch.float32):
        return None
    has_it = all(one.dtype == torch.float32 for one in full.parameters() if one.is_floating_point())
    return None if has_it else torch.float32


def _is_streamed(config: DistillConfig, processes: Processes) -> bool:
    """Say whether one block at a time is enough: without training, and without gradients through the whole model."""
    needs_gradients = config.method == "width" and (config.refit_jacobian > 0 or config.channels == "gradot")
    return not config.steps and not needs_gradients and processes.device.type == "cpu" and processes.size == 1


def _recipe(config: DistillConfig, text: PublicText | None, owned: _Owned, processes: Processes) -> Recipe:
    calibration = () if text is None else text.calibration
    compute = owned.full.dtype if owned.compute is None else owned.compute
    depends = [owned.digest, str(compute), config.bottom, config.top, config.width, config.channels]
    depends += [config.refit, None if text is None else text.digest, len(calibration), config.batch_size, config.seed]
    depends += [sorted(wider_blocks(config.wider).items()), config.variant, config.variant_noise, config.refit_jacobian]
    depends += [config.gradot_lambda]
    depends += [] if owned.plan.encoder is None else [config.stacks]
    depends += [config.method, config.rank_share] if config.method == "low-rank" else []
    depends += [config.method, config.pack] if config.method == "packed" else []
    return Recipe(
        blocks=config.blocks,
        choice=config.choice,
        width=config.width,
        wider=wider_blocks(config.wider),
        channels=config.channels,
        gradot_lambda=config.gradot_lambda,
        variant=config.variant,
        variant_noise=config.variant_noise,
        refit=config.refit,
        refit_jacobian=config.refit_jacobian,
        seed=config.seed,
        rank_share=config.rank_share,
        packing=config.pack or "",
        calibration=calibration,
        finished=FinishedBlocks(
            _work(config) / "compression",
            sha256_bytes(json.dumps(depends).encode()),
            writes=processes.is_main,
        ),
        compute=owned.compute,
        decoded=bool(config.steps or config.field_text),
    )


def _sizes(owned: _Owned, compressed: Compressed) -> dict[str, object]:
    stored = sum(
        one.encoding.num_stored(shape := compressed.model.get_parameter(name).shape) - shape.numel()
        for name, one in compressed.encoded.items()
    )
    return {
        "middle_parameters": _num_parameters(middle_blocks(owned.full, owned.plan)),
        "emulator_parameters": _num_parameters(middle_blocks(compressed.model, owned.plan)) + stored,
    }


def _num_parameters(blocks: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())


def _work(config: DistillConfig) -> Path:
    return config.output.with_name(config.output.name + ".work")


def _distilled(
    config: DistillConfig, owned: _Owned, text: PublicText, compressed: Compressed, processes: Processes
) -> Distilled:
    with scored(owned.masks, (owned.full, compressed.model)):
        return distill(
            owned.full,
            compressed,
            owned.plan,
            text,
            _loop(config),
            weights=Weights(config.hidden_weight, config.kl_weight, config.kl_share),
            work=_work(config),
            resume=True,  # what the folder holds is of this run: that was asked before anything was loaded
            binding={"full model": owned.digest, "emulator": _identity(config, compressed)},
            processes=processes,
            cache_bytes=config.cache_bytes,
        )


def _elevated(
    config: DistillConfig,
    owned: _Owned,
    text: PublicText,
    compressed: Compressed,
    distilled: Distilled,
    processes: Processes,
) -> tuple[Distilled, float]:
    """The distilled emulator is worse by the margin; returns it and by how much it is."""
    say(f"distill: raising the emulator's loss to {config.elevate:g} nats above the full model's")
    steps = config.elevate_steps
    rates = {"learning_rate": config.learning_rate / 4, "warmup_steps": min(config.warmup_steps, steps // 4)}
    return elevate(
        owned.full,
        compressed,
        owned.plan,
        text,
        distilled,
        _loop(config).model_copy(update={"steps": steps, **rates}),
        margin_nats=config.elevate,
        work=_work(config) / "elevation",
        binding={"full model": owned.digest, "emulator": _identity(config, compressed), "distilled": _bound(config)},
        processes=processes,
    )


def _bound(config: DistillConfig) -> str:
    """Return what the distillation before an elevation was made of."""
    return json.dumps([config.steps, config.learning_rate, config.hidden_weight, config.kl_weight, config.kl_share])


def _loop(config: DistillConfig) -> LoopConfig:
    return LoopConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
        precision=config.precision,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        evaluate_every=config.evaluate_every,
        tensorboard=config.tensorboard,
        report=config.report(config.output),
    )


def _identity(config: DistillConfig, compressed: Compressed) -> str:
    chosen = [config.method, config.refit, compressed.kept, sorted(compressed.channels.items())]
    if config.refit_jacobian:  # the same channels may be fitted otherwise
        chosen.append(config.refit_jacobian)
    return json.dumps([*chosen, sorted(compressed.experts.items())] if compressed.experts else chosen)


def _published(
    config: DistillConfig, owned: _Owned, compressed: Compressed, distilled: Distilled | None, terms: str
) -> Package:
    """The package stands, its record beside it; the log has moved and the work folder is gone."""
    package = publish(
        config.output,
        model=_emulator(compressed, distilled),
        tokenizer=owned.tokenizer,
        plan=owned.plan,
        compressed=compressed,
        method=config.method,
        base_digest=owned.digest,
        figures=_disclosed(config, owned, distilled),
        dtype=owned.dtype if config.dtype == "auto" else config.dtype,
        dtypes=owned.dtypes if config.dtype == "auto" else None,
        licence=config.licence,
        terms=terms,
    )
    if distilled is not None:
        (_work(config) / "log.jsonl").replace(config.output.with_name(config.output.name + ".log.jsonl"))
    shutil.rmtree(_work(config), ignore_errors=True)
    if config.writes_itself:
        forget(config)
    say(f"distill: {config.output.name} of {package.num_bytes:,} bytes is written")
    say(f"distill: keep {config.output.name}.owner.json: plug-in needs it, and it is not to be sent")
    return package


def _emulator(compressed: Compressed, distilled: Distilled | None) -> PreTrainedModel:
    found = distilled.model if distilled is not None else None
    return compressed.model if found is None else found


def _packed(
    config: DistillConfig, owned: _Owned, compressed: Compressed, distilled: Distilled | None, recipe: Recipe
) -> Compressed:
    """Return what is written of the emulator, whose middle is distilled by now and packed where that is asked."""
    if config.pack is None:
        return compressed
    if config.method != "packed":
        own = replace(recipe, finished=_packing(config, compressed, distilled, recipe))
        done = pack_middle(_emulator(compressed, distilled), owned.plan, config.pack, compressed.encoded, recipe=own)
        compressed = replace(
            compressed,
            settings={**compressed.settings, "pack": config.pack},
            encoded=done.encoded,
            figures={**compressed.figures, **done.figures()},
        )
    told = compressed.figures
    say(
        f"distill: the middle's linears are packed as {config.pack}: {told['packed_bytes']:,.0f} bytes, "
        f"{told['packed_bits']:.2f} bits a number, with a relative error of {told['packing_error']:.2g}"
    )
    return compressed


def _packing(
    config: DistillConfig, compressed: Compressed, distilled: Distilled | None, recipe: Recipe
) -> FinishedBlocks:
    """Return where packed blocks are kept; those of a middle that was trained are not."""
    if distilled is not None:
        return FinishedBlocks(None, "")
    depends = [recipe.finished.binding, config.pack, config.blocks, config.choice, _identity(config, compressed)]
    return FinishedBlocks(_work(config) / "packing", sha256_bytes(json.dumps(depends).encode()))


def _disclosed(config: DistillConfig, owned: _Owned, distilled: Distilled | None) -> dict[str, float]:
    """Return the figures that the package states: nothing of time or machine, so that a resumed run's are the same."""
    if distilled is None:
        return {"distillation_steps": 0.0}
    when = "" if config.pack is None else "_before_packing"
    return {
        "distillation_steps": float(distilled.outcome.steps),
        "distillation_tokens": float(distilled.outcome.tokens),
        **{f"{name}{when}": _rounded(value) for name, value in _fidelity(owned, distilled).items()},
    }


def _fidelity(owned: _Owned, distilled: Distilled) -> dict[str, float]:
    """Return how near the emulator came, under names that say what was compared: an encoder has no next tokens."""
    found = {"held_out_hidden_error": distilled.fidelity.hidden}
    if not is_encoder(owned.full):
        found["held_out_kl"] = distilled.fidelity.kl
    elif owned.masks is not None:
        found["held_out_masked_kl"] = distilled.fidelity.kl
    return found


def _told(
    config: DistillConfig, owned: _Owned, package: Package | None, distilled: Distilled | None
) -> dict[str, object]:
    """Return the figures for the person who ran the verb."""
    told: dict[str, object] = {"method": config.method, "steps": 0, "tokens": 0}
    if package is not None:
        told |= {"package": package.path.name, "package_digest": package.digest, "package_bytes": package.num_bytes}
    if distilled is not None:
        told |= distilled.outcome.figures()
        told |= _fidelity(owned, distilled)
    return told


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
