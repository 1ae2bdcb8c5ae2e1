"""``offsite evaluate``: what plugging in was worth, on text neither side trained on. Nothing is trained here.

The full model, then the emulator, is loaded once; adapters are put on and taken off. Reference rows are bundles that
were tuned, by the owner, on packages that keep every block. The figures are defined in
``server/evaluation/metrics.py``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offsite.console import progress, say
from offsite.digests import joined_digest, model_digest, sha256_file
from offsite.errors import ConfigError
from offsite.evaluation.measure import perplexity
from offsite.evaluation.results import (
    LOGS_NAME,
    ROWS,
    Answer,
    Data,
    DataFile,
    Parameters,
    Results,
    Row,
    RowName,
    Summary,
    read_log,
    write_results,
)
from offsite.evaluation.sampling import continuations
from offsite.evaluation.tasks import multiple_choice_task, run_tasks
from offsite.modelling.context import require_context
from offsite.modelling.dtypes import cast_model
from offsite.modelling.load import load_model, load_tokenizer
from offsite.staging import refuse_existing, staged_folder
from offsite.text.batches import Encoded, Example, encode, pack, pad_id
from offsite.text.calls import decoded
from offsite.text.prompts import prompt_ids
from offsite.text.records import Record, read_files, require_files
from offsite.training.devices import choose_device
from server.evaluation.candidates import Candidate, Candidates, open_candidates
from server.evaluation.config import EvaluateConfig, named_paths
from server.evaluation.metrics import compare, compare_nats, summarise
from server.evaluation.summary import crossings, flat, parameters, read_outcomes, reproduce, show, versions
from server.plugging.fit import Fitted, fit, plugged, require_base, require_correctable
from server.plugging.shares import require_way, taken
from server.plugging.sparing import public_text
from server.plugging.ways import Way

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ONCE = "once"
"""Stands in place of a seed where there is none."""

Score = dict[str, float]
"""What one model scored: ``perplexity``, and ``TASK/METRIC`` for every task."""


@dataclass(frozen=True)
class Ruler:
    """How every model is measured: the same examples, tasks and arithmetic for all."""

    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example] = field(repr=False)
    tasks: Sequence[Path] = ()
    task_limit: int = 0
    batch_size: int = 8
    bf16: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of every model measured."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def score(self, model: PreTrainedModel, label: str) -> Score:
        """Return the model's perplexity and its task metrics; `label` is shown meanwhile."""
        with progress(len(self.examples), label) as bar:
            found = perplexity(
                model,
                self.examples,
                batch_size=self.batch_size,
                pad_id=pad_id(self.tokenizer),
                precision="bf16" if self.bf16 else "fp32",
                progress=lambda done, _: bar.update(done),
            )
        scores = {"perplexity": found.perplexity}
        if self.tasks:
            tasks = [multiple_choice_task(p.stem, p) if p.suffix != ".yaml" else p for p in self.tasks]
            limit = self.task_limit or None
            by_task = run_tasks(model, self.tokenizer, tasks, batch_size=self.batch_size, limit=limit)
            scores.update({f"{task}/{name}": value for task, row in by_task.items() for name, value in row.items()})
        return scores


@dataclass(frozen=True)
class Measured:
    """Everything that models were needed for."""

    base_digest: str
    counts: Parameters
    scores: dict[RowName, dict[str, Score]]
    answers: tuple[Answer, ...]


def run(config: EvaluateConfig) -> dict[str, object]:
    """Run the verb: open, measure every row, write the results folder, show the table.

    Raises:
        ConfigError, DataError: when settings, text or logs are not as needed, or artefacts do not belong together.
        ArtefactError: when the package or a bundle is rejected.
        RunFailed: when a model's output is not finite.
    """
    began = time.monotonic()
    refuse_existing(config.output)
    require_files(config.data)
    require_files(config.spare)
    _require_files(config)
    candidates = open_candidates(config)
    for candidate in candidates.bundles.values():
        require_way(candidate.verified.spec, config.way)
        if config.correct:
            require_correctable(candidate.verified.spec, candidates.package)
    bundles = {seed: candidate.bundle for seed, candidate in candidates.bundles.items()}
    runs = read_outcomes(named_paths(config.outcome))
    records = read_files(
        config.data, fields=config.fields, document_field=config.document_field, separator=config.separator
    )
    tokenizer = load_tokenizer(config.model)
    encoded, examples = held_out(records, tokenizer, config)
    public, spare_text = (
        public_text(config.spare, tokenizer, limit_tokens=config.spare_tokens) if config.spare else ([], "")
    )
    bf16 = config.precision == "bf16"
    ruler = Ruler(tokenizer, examples, config.task, config.task_limit, config.batch_size, bf16)
    device = choose_device(config.device)
    found = measure(config, candidates, ruler, device, public)
    rows, tasks = to_rows(found.scores)
    settings, command = reproduce(config)
    method = candidates.package.manifest.method
    results = Results(
        model=Path(config.model).name,
        base_digest=found.base_digest,
        method={"name": method.name, **method.settings},
        adapter=next(iter(bundles.values())).manifest.adapter,
        scale=config.way.scale,
        way=config.way.word,
        spare_text=spare_text,
        corrected=config.correct,
        data=data_of(config.data, records, encoded, examples),
        rows=rows,
        metrics=perplexity_metrics(rows),
        tasks=tasks,
        task_metrics=task_metrics(rows),
        parameters=found.counts,
        **crossings(candidates.package, bundles),
        references={
            row: tuple(candidate.bundle.digest for candidate in seeds.values())
            for row, seeds in candidates.references.items()
        },
        runs=runs,
        answers=found.answers,
        config=settings,
        command=command,
        versions=versions(),
        device=describe(device),
        seconds=round(time.monotonic() - began, 1),
    )
    with staged_folder(config.output) as stage:
        write_results(stage, results)
        (stage / LOGS_NAME).mkdir()
        for name, path in named_paths(config.log):
            (stage / LOGS_NAME / f"{name}.jsonl").write_bytes(path.read_bytes())
    show(results)
    say(f"a page of it: offsite report run {config.output.name} -o report.html")
    return {"results": config.output.name, **flat(results)}


def measure(
    config: EvaluateConfig,
    candidates: Candidates,
    ruler: Ruler,
    device: torch.device,
    public: Sequence[Example] = (),
) -> Measured:
    """Return every row's scores, one model in memory at a time.

    Args:
        public: text whose directions are spared, where the settings' way does that.

    Raises:
        WrongBinding: when the full model is not the one the package was made of.
        RunFailed: when a model's output is not finite.
    """
    model = load_model(config.model)
    digest = model_digest(model)
    require_base(model, digest, candidates.record.base_digest, f"package {candidates.package.path.name!r}")
    counts = parameters(model, candidates.record, candidates.package, next(iter(candidates.bundles.values())).bundle)
    cast_model(model, ruler.dtype)
    model.to(device)  # type: ignore[arg-type]
    scores, answers = measure_full(model, candidates, ruler, digest, config, public)
    del model
    emulator = candidates.package.load_model(dtype=str(ruler.dtype).removeprefix("torch."), device=str(device))
    return Measured(digest, counts, scores | measure_emulator(emulator, candidates, ruler), answers)


def held_out(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig
) -> tuple[Encoded, list[Example]]:
    """Return the text as it is measured: blocks filled across rows or one row each, up to the limit of tokens."""
    encoded = encode(records, tokenizer, context=config.block_tokens, whole_text=config.pack)
    examples = pack(encoded.examples, block_tokens=config.block_tokens) if config.pack else list(encoded.examples)
    if not config.limit_tokens:
        return encoded, examples
    kept: list[Example] = []
    num_tokens = 0
    for example in examples:
        num_tokens += len(example.input_ids)
        if kept and num_tokens > config.limit_tokens:
            break
        kept.append(example)
    return encoded, kept


def measure_full(
    model: PreTrainedModel,
    candidates: Candidates,
    ruler: Ruler,
    digest: str,
    config: EvaluateConfig,
    public: Sequence[Example] = (),
) -> tuple[dict[RowName, dict[str, Score]], tuple[Answer, ...]]:
    """Return the scores of every row that is the full model, by row and seed, and the answers before and after."""
    scores: dict[RowName, dict[str, Score]] = {"zero_shot": {ONCE: ruler.score(model, "zero-shot")}}
    before = [continuation(model, ruler.tokenizer, prompt, config.answer_tokens) for prompt in config.prompt]
    after: list[str] = []
    to_measure: list[tuple[RowName, str, Candidate]] = [
        ("plugged_in", seed, candidate) for seed, candidate in candidates.bundles.items()
    ]
    for row, seeds in candidates.references.items():
        to_measure += [(row, seed, candidate) for seed, candidate in seeds.items()]
    for row, seed, candidate in to_measure:
        way = config.way if row == "plugged_in" else Way()
        emulator = candidates.package if config.correct and row == "plugged_in" else None
        fitted = fit(model, candidate.verified, candidate.record, base_digest=digest, emulator=emulator)
        with plugged(model, taken(model, fitted, way, public), mix=way.mix) as adapted:
            scores.setdefault(row, {})[seed] = ruler.score(adapted, f"{row.replace('_', ' ')}, {seed}")
            if row == "plugged_in" and not after:
                after = [continuation(adapted, ruler.tokenizer, text, config.answer_tokens) for text in config.prompt]
    triples = zip(config.prompt, before, after, strict=True)
    return scores, tuple(Answer(prompt=prompt, before=one, after=two) for prompt, one, two in triples)


def measure_emulator(
    emulator: PreTrainedModel, candidates: Candidates, ruler: Ruler
) -> dict[RowName, dict[str, Score]]:
    """Return the scores of the package's model as sent and with each bundle's adapter on it."""
    scores: dict[RowName, dict[str, Score]] = {
        "emulator_zero_shot": {ONCE: ruler.score(emulator, "emulator zero-shot")}
    }
    scores["emulator_tuned"] = {}
    for seed, candidate in candidates.bundles.items():
        adapter = Fitted(candidate.verified.spec, candidate.verified.tensors, candidates.package.layout.blocks)
        with plugged(emulator, adapter) as tuned:
            scores["emulator_tuned"][seed] = ruler.score(tuned, f"emulator tuned, {seed}")
    return scores


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int) -> str:
    """Return the text with which the model goes on from `prompt`, greedily, up to its end token or `num_tokens`."""
    ids = prompt_ids(tokenizer, prompt)
    require_context(model, len(ids) + num_tokens, "a prompt and its answer")
    (made,) = continuations(model, [ids], num_tokens=num_tokens, batch_size=1)
    upto = made.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in made else len(made)
    return decoded(tokenizer, made[:upto], what="an answer", skip_special=True).strip()


def to_rows(scores: Mapping[RowName, Mapping[str, Score]]) -> tuple[dict[RowName, Row], dict[str, int]]:
    """Return every row's summaries over its seeds, in the table's order, and the rows scored of each task."""
    rows: dict[RowName, Row] = {}
    sizes: dict[str, int] = {}
    for name in ROWS:
        if name not in scores:
            continue
        seeds = scores[name]
        tasks: dict[str, dict[str, Summary]] = {}
        for key in next(iter(seeds.values())):
            task, _, metric = key.partition("/")
            if metric == "num_rows":
                sizes[task] = int(next(iter(seeds.values()))[key])
            elif metric:
                tasks.setdefault(task, {})[metric] = summarise({seed: score[key] for seed, score in seeds.items()})
        whole = summarise({seed: score["perplexity"] for seed, score in seeds.items()})
        rows[name] = Row(perplexity=whole, tasks=tasks)
    return rows, sizes


def perplexity_metrics(rows: Mapping[RowName, Row]) -> dict[str, Summary | None]:
    """Return recoveries and gap of the perplexities, and what is withheld."""
    perplexities: dict[str, Summary] = {name: row.perplexity for name, row in rows.items()}
    return compare(perplexities) | compare_nats(perplexities)


def task_metrics(rows: Mapping[RowName, Row]) -> dict[str, dict[str, dict[str, Summary | None]]]:
    """Return recoveries and gap of every metric of every task."""
    return {
        task: {metric: compare({name: row.tasks[task][metric] for name, row in rows.items()}) for metric in metrics}
        for task, metrics in rows["zero_shot"].tasks.items()
    }


def describe(device: torch.device) -> str:
    """Return what people call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _require_files(config: EvaluateConfig) -> None:
    for _, path in named_paths(config.log):
        read_log(path)
    for path in config.task:
        if not path.is_file():
            raise ConfigError(f"--task: no file {path.name!r}")
    if config.task:
        from importlib.util import find_spec

        if find_spec("lm_eval") is None or find_spec("datasets") is None:
            raise ConfigError("--task needs the eval extra", hint="pip install 'offsite-tuning[eval]'")


def data_of(paths: Sequence[Path], records: Sequence[Record], encoded: Encoded, examples: Sequence[Example]) -> Data:
    """Return what is said of the text measured on: names, digests, counts."""
    digests = [sha256_file(path) for path in paths]
    several = zip(paths, digests, strict=True) if len(paths) > 1 else ()
    return Data(
        name=", ".join(path.name for path in paths),
        sha256=joined_digest(digests),
        files=tuple(DataFile(name=path.name, sha256=digest) for path, digest in several),
        num_records=len(records),
        num_examples=len(examples),
        num_tokens=sum(example.num_loss_tokens for example in examples),
        num_truncated=encoded.num_truncated,
    )
