"""``offsite evaluate``: what plugging in was worth, on text neither side trained on. Nothing is trained here.

The full model, then the emulator, is loaded once; adapters are put on and taken off. Reference rows are bundles that
were tuned, by the owner, on packages that keep every block. The figures are defined in
``server/evaluation/metrics.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adapters.heads import require_no_head
from offsite.artefacts.bundle import Head
from offsite.console import progress, say
from offsite.digests import joined_digest, model_digest, sha256_file
from offsite.encoders.trunk import is_encoder
from offsite.errors import ConfigError
from offsite.evaluation.byhead import measure_head
from offsite.evaluation.heads import SCORE
from offsite.evaluation.measure import perplexity
from offsite.evaluation.preferences import log_probabilities, preferred
from offsite.evaluation.results import (
    LOGS_NAME,
    PREFERENCES,
    ROWS,
    SAFETY,
    VALUES,
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
from offsite.modelling.load import load_model, load_reader
from offsite.seq2seq.models import start_token
from offsite.seq2seq.refusals import refuse_settings
from offsite.staging import refuse_existing, staged_folder
from offsite.text.batches import Encoded, Example, encode, pack, pad_id
from offsite.text.calls import decoded
from offsite.text.forms import encode_answers, encode_images
from offsite.text.prompts import prompt_ids
from offsite.text.records import Record, read_files, require_files
from offsite.training.devices import choose_device
from offsite.vision.reader import ImageReader, Reader, tokenizer_in
from server.evaluation.byrules import ByRules, by_rules
from server.evaluation.bysafety import BySafety, by_safety, show_safety, told_of_safety
from server.evaluation.bytask import ByTask, by_task
from server.evaluation.candidates import Candidate, Candidates, open_candidates, with_whole_ids
from server.evaluation.config import EvaluateConfig, named_paths
from server.evaluation.metrics import compare, compare_nats, summarise
from server.evaluation.summary import crossings, flat, parameters, read_outcomes, reproduce, show, versions
from server.plugging.fit import fit, plugged, require_base, require_correctable
from server.plugging.offset import Offset, offset_by, on_emulator, require_same_tokens
from server.plugging.shares import as_rehearsed, require_way, taken
from server.plugging.sparing import public_text
from server.plugging.ways import Way

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONCE = "once"
"""Stands in place of a seed where there is none."""

_SMALLEST = 1e-30
"""Stands for an error of 0, of which no share can be taken."""

Score = dict[str, float]
"""What one model scored: ``perplexity``, and ``TASK/METRIC`` for every task, preferences among them."""


@dataclass(frozen=True)
class Ruler:
    """How every model is measured: the same examples, tasks and arithmetic for all.

    Examples that are pairs of answers are a task too; perplexity is that of the chosen ones. ``start`` has of each pair
    by how much the model as it was prefers the chosen answer, in nats. Of adapters with a head the task is that head's;
    a model without one has one of zeros.
    """

    tokenizer: Reader
    examples: Sequence[Example] = field(repr=False)
    tasks: Sequence[Path] = ()
    task_limit: int = 0
    batch_size: int = 8
    bf16: bool = False
    start: Sequence[float] = ()
    by_task: ByTask | None = None
    head: Head | None = None
    by_rules: ByRules | None = None
    by_safety: BySafety | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of every model measured."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def score(self, model: PreTrainedModel, label: str) -> Score:
        """Return the model's perplexity and its task metrics; `label` is shown meanwhile.

        Perplexity is of the next token, or of an encoder, which has none, of the label or the tag: exp of its mean loss
        in nats. Of an encoder's values the root mean squared error stands in its place.
        """
        if is_encoder(model):
            return self._answers(model, label)
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
            by_task = run_tasks(model, tokenizer_in(self.tokenizer), tasks, batch_size=self.batch_size, limit=limit)
            scores.update({f"{task}/{name}": value for task, row in by_task.items() for name, value in row.items()})
        for by in (self.by_task, self.by_rules, self.by_safety):
            if by is not None:
                scores |= by.score(
                    model, tokenizer_in(self.tokenizer), label, batch_size=self.batch_size, bf16=self.bf16
                )
        return scores | self._preferences(model, label) | self._answers(model, label)

    def started(self, model: PreTrainedModel, label: str) -> Ruler:
        """Return the ruler by which what is rewarded is what changes from this model as it is."""
        is_of_pairs = self.examples[0].rejected is not None and self.head is None
        return replace(self, start=self._margins(model, label)) if is_of_pairs else self

    def _answers(self, model: PreTrainedModel, label: str) -> Score:
        """Return how right the head is; one that was never trained is right by chance."""
        if self.head is None:
            return {}
        with progress(sum(len(one.sides) for one in self.examples), f"{label}: {self.head.task}") as bar:
            said = measure_head(
                model if hasattr(model, SCORE) else None,
                self.examples,
                self.head.labels,
                batch_size=self.batch_size,
                pad_id=pad_id(self.tokenizer),
                precision="bf16" if self.bf16 else "fp32",
                progress=lambda done, _: bar.update(done),
            )
        figures = {"num_rows": float(said.num), **said.figures}
        found = {f"{self.head.task}/{name}": value for name, value in figures.items()}
        if is_encoder(model):
            found["perplexity"] = max(figures["rmse"], _SMALLEST) if "rmse" in figures else math.exp(said.loss)
        return found

    def _preferences(self, model: PreTrainedModel, label: str) -> Score:
        if not self.start:
            return {}
        margins = self._margins(model, label)
        gains = [margin - before for margin, before in zip(margins, self.start, strict=True)]
        found = {"num_rows": float(len(margins)), "accuracy": preferred(margins), "reward_accuracy": preferred(gains)}
        return {f"{PREFERENCES}/{name}": value for name, value in found.items()}

    def _margins(self, model: PreTrainedModel, label: str) -> list[float]:
        """Return of each pair by how much the model prefers the chosen answer, in nats, summed over its tokens."""
        rows = [side for pair in self.examples for side in pair.sides]
        with progress(len(rows), f"{label}: answers") as bar:
            logs = log_probabilities(
                model,
                rows,
                batch_size=self.batch_size,
                pad_id=pad_id(self.tokenizer),
                precision="bf16" if self.bf16 else "fp32",
                progress=lambda done, _: bar.update(done),
            )
        return [chosen - rejected for chosen, rejected in zip(logs[::2], logs[1::2], strict=True)]


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
    config = with_whole_ids(config)
    candidates = open_candidates(config)
    first = next(iter(candidates.bundles.values()))
    config = as_rehearsed(config, first.verified.spec, first.record)
    for candidate in candidates.bundles.values():
        require_way(candidate.verified.spec, config.way)
        if config.correct:
            require_correctable(candidate.verified.spec, candidates.package)
    if candidates.package.pixels is not None and config.spare:
        raise ConfigError("--spare: it goes by text, this model reads images", hint="leave --spare out")
    if candidates.package.is_seq2seq:
        _require_answers_alone(config)
    if config.offset:
        require_no_head(first.verified.spec, "--offset")
        require_same_tokens(config.model, candidates.package)
        say(f"offset: two more passes beside the full model's, the emulator in memory with it; beta {config.beta:g}")
    bundles = {seed: candidate.bundle for seed, candidate in candidates.bundles.items()}
    runs = read_outcomes(named_paths(config.outcome))
    head = first.verified.spec.head
    if head is not None and head.encoder and (config.task or config.prompt):
        raise ConfigError(
            "--task and --prompt: an encoder writes no text and ranks none",
            hint="measure it on rows of a text, or an image, and a label",
        )
    if head is not None and config.way.mix != 1:
        raise ConfigError(f"--mix: it is of a next token's probabilities, these bundles are for {head.task}")
    if head is not None and config.task_file is not None:
        raise ConfigError(
            f"--task-file: its rows are prompts and answers, these bundles are for {head.task}",
            hint="leave --task-file out: rows of a text and a label, or pairs, are measured by themselves",
        )
    measured_by = by_task(config)
    records = (
        measured_by.records
        if measured_by is not None
        else read_files(
            config.data,
            fields=config.fields,
            document_field=config.document_field,
            separator=config.separator,
            pairs=None if head is None else head.task == "reward",
            labels=() if head is None else head.labels,
            of_head="" if head is None else head.task,
            images=candidates.package.pixels is not None,
        )
    )
    _require_apart(config, records, head)
    tokenizer = load_reader(config.model)
    start = start_token(candidates.package.empty_model().config) if candidates.package.is_seq2seq else None
    encoded, examples = held_out(records, tokenizer, config, head, start)
    public, spare_text = (
        public_text(config.spare, tokenizer_in(tokenizer), limit_tokens=config.spare_tokens)
        if config.spare
        else ([], "")
    )
    bf16 = config.precision == "bf16"
    ruler = Ruler(
        tokenizer,
        examples,
        config.task,
        config.task_limit,
        config.batch_size,
        bf16,
        by_task=measured_by,
        head=head,
        by_rules=by_rules(config, tokenizer, head),
        by_safety=by_safety(config, head),
    )
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
        beta=config.beta if config.offset else None,
        data=data_of(config.data, records, encoded, examples),
        rows=rows,
        metrics=perplexity_metrics(rows, is_error=head is not None and head.task == VALUES and bool(head.encoder)),
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
        safety=None if ruler.by_safety is None else ruler.by_safety.found(),
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
    show_safety(results)
    if measured_by is not None:
        measured_by.show(results)
    say(f"a page of it: offsite report run {config.output.name} -o report.html")
    told = told_of_safety(results) | ({} if measured_by is None else measured_by.told(results))
    return {"results": config.output.name, **flat(results), **told}


def measure(
    config: EvaluateConfig,
    candidates: Candidates,
    ruler: Ruler,
    device: torch.device,
    public: Sequence[Example] = (),
) -> Measured:
    """Return every row's scores, one model in memory at a time but for the offset, which takes both.

    Args:
        public: text whose directions are spared, where the settings' way does that.

    Raises:
        WrongBinding: when the full model is not the one the package was made of.
        RunFailed: when a model's output is not finite.
    """
    model = load_model(config.model, encoders=ruler.head is not None, seq2seq=candidates.package.is_seq2seq)
    digest = model_digest(model)
    require_base(model, digest, candidates.record.base_digest, f"package {candidates.package.path.name!r}")
    counts = parameters(model, candidates.record, candidates.package, next(iter(candidates.bundles.values())).bundle)
    cast_model(model, ruler.dtype)
    model.to(device)  # type: ignore[arg-type]
    scores, answers = measure_full(model, candidates, ruler, digest, config, public)
    dtype = str(ruler.dtype).removeprefix("torch.")
    if config.offset:
        emulator = candidates.package.load_model(dtype=dtype, device=str(device))
        scores |= measure_offset(model, emulator, candidates, ruler, config.beta)
        del model
    else:
        del model
        emulator = candidates.package.load_model(dtype=dtype, device=str(device), seq2seq=True)
    return Measured(digest, counts, scores | measure_emulator(emulator, candidates, ruler), answers)


def held_out(
    records: Sequence[Record],
    tokenizer: Reader,
    config: EvaluateConfig,
    head: Head | None = None,
    start: int | None = None,
) -> tuple[Encoded, list[Example]]:
    """Return the text as it is measured: blocks filled across rows or one row each, up to the limit of tokens.

    Args:
        start: token that an encoder-decoder's answers begin behind; None for any other model.
    """
    packed = config.pack and records[0].rejected is None and head is None and start is None
    if isinstance(tokenizer, ImageReader):
        encoded = encode_images(records, tokenizer)
    elif start is not None:
        encoded = encode_answers(records, tokenizer, start=start, context=config.block_tokens)
    else:
        encoded = encode(records, tokenizer, context=config.block_tokens, whole_text=packed, ended=head is None)
    examples = pack(encoded.examples, block_tokens=config.block_tokens) if packed else list(encoded.examples)
    if not config.limit_tokens:
        return encoded, examples
    kept: list[Example] = []
    num_tokens = 0
    for example in examples:
        num_tokens += sum(len(side.input_ids) + len(side.source) for side in example.sides)
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
    ruler = ruler.started(model, "zero-shot")
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


def measure_offset(
    model: PreTrainedModel, emulator: PreTrainedModel, candidates: Candidates, ruler: Ruler, beta: float
) -> dict[RowName, dict[str, Score]]:
    """Return the scores of the full model moved by what each bundle's adapter does to the emulator."""
    ruler = ruler.started(model, "zero-shot")
    found: dict[str, Score] = {}
    for seed, candidate in candidates.bundles.items():
        offset = Offset(emulator, on_emulator(candidates.package, candidate.verified), beta)
        with offset_by(model, offset) as moved:
            found[seed] = ruler.score(moved, f"offset, {seed}")
    return {"offset": found}


def measure_emulator(
    emulator: PreTrainedModel, candidates: Candidates, ruler: Ruler
) -> dict[RowName, dict[str, Score]]:
    """Return the scores of the package's model as sent and with each bundle's adapter on it."""
    ruler = ruler.started(emulator, "emulator zero-shot")
    scores: dict[RowName, dict[str, Score]] = {
        "emulator_zero_shot": {ONCE: ruler.score(emulator, "emulator zero-shot")}
    }
    scores["emulator_tuned"] = {}
    for seed, candidate in candidates.bundles.items():
        with plugged(emulator, on_emulator(candidates.package, candidate.verified)) as tuned:
            scores["emulator_tuned"][seed] = ruler.score(tuned, f"emulator tuned, {seed}")
    return scores


def continuation(model: PreTrainedModel, reader: Reader, prompt: str, num_tokens: int) -> str:
    """Return the text with which the model goes on from `prompt`, greedily, up to its end token or `num_tokens`."""
    tokenizer = tokenizer_in(reader)
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


def perplexity_metrics(rows: Mapping[RowName, Row], *, is_error: bool = False) -> dict[str, Summary | None]:
    """Return recoveries and gap of the perplexities, and what is withheld.

    Args:
        is_error: errors of values stand in their place, whose logarithms are no nats: none is told of those.
    """
    perplexities: dict[str, Summary] = {name: row.perplexity for name, row in rows.items()}
    nats = compare_nats(perplexities)
    return compare(perplexities) | (dict.fromkeys(nats) if is_error else nats)


def task_metrics(rows: Mapping[RowName, Row]) -> dict[str, dict[str, dict[str, Summary | None]]]:
    """Return recoveries and gap of every metric of every task."""
    return {
        task: {metric: compare({name: row.tasks[task][metric] for name, row in rows.items()}) for metric in metrics}
        for task, metrics in rows["zero_shot"].tasks.items()
        if task != SAFETY  # nothing that an adapter is tuned for, of which a share could be recovered
    }


def describe(device: torch.device) -> str:
    """Return what people call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _require_answers_alone(config: EvaluateConfig) -> None:
    """Return only if an encoder-decoder is to be measured by the perplexity of answers, and by nothing else.

    Raises:
        ConfigError: naming the settings.
    """
    asked = {
        "--task": bool(config.task),
        "--task-file": config.task_file is not None,
        "--prompt": bool(config.prompt),
        "--safety": config.safety,
        "--offset": config.offset,
        "--mix": config.way.mix != 1,
        "--spare": bool(config.spare),
        "--pack": config.pack and "pack" in config.model_fields_set,
    }
    hint = "measure it on rows of a prompt and an answer"
    refuse_settings(f"package {config.package.name!r}", asked, hint)


_ROWS_OF = {"regress": "texts with values", "tag": "words with tags"}


def _require_apart(config: EvaluateConfig, records: Sequence[Record], head: Head | None) -> None:
    """Return only if pairs of answers, or rows for a head, are not asked to be what they are not.

    Raises:
        ConfigError: when they are to be packed, or a task has their name.
    """
    if records[0].rejected is None and head is None:
        return
    name = PREFERENCES if head is None else head.task
    if config.pack and "pack" in config.model_fields_set:
        what = "pairs of answers" if records[0].rejected is not None else _ROWS_OF.get(name, "labelled rows")
        raise ConfigError(f"--pack: --data holds {what}, each in a row of its own")
    if any(path.stem == name for path in config.task):
        raise ConfigError(f"--task: {name!r} is what --data is measured as", hint="give the file another name")


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
        num_tokens=sum(side.num_loss_tokens for example in examples for side in example.sides),
        num_truncated=encoded.num_truncated,
    )
