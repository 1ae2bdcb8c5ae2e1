"""Multiple-choice and generation tasks from local files, scored by lm-evaluation-harness.

The harness would load data through a cache in the home directory and can fetch data, metrics and
Python code by name. Here a task is data only: its rows are read by `offsite.text.records` and handed over
in memory, so that nothing is fetched, nothing is copied, and no task file runs code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from offsite.errors import ConfigError, DataError, RunFailed
from offsite.evaluation.beginnings import LEAST_TOKENS, Beginning, shares_beginnings
from offsite.modelling.context import context_of
from offsite.modelling.head import causal_lm
from offsite.text.calls import quietly
from offsite.text.prompts import for_prompts
from offsite.text.rows import Row, checked_string, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TaskSpec = Path | str | Mapping[str, Any]  # a YAML file, or what one of the two builders returns

QUESTION = "Question: {question}\nAnswer:"
_FORMATS = ("json", "csv")
_SPLIT = "test"
_KEYS = frozenset({"task", "task_alias", "tag", "metadata", "description", "output_type", "repeats"}) | {
    *("dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split", "fewshot_split"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter", "num_fewshot"),
    *("fewshot_config", "metric_list", "generation_kwargs", "filter_list"),
}


def multiple_choice_task(name: str, data_file: Path, *, prompt: str = QUESTION) -> dict[str, Any]:
    """A task whose rows are ``question``, ``choices`` (a list of texts) and ``answer`` (index or text).

    The choice with the highest log-likelihood after the prompt is the model's (``acc``); ``acc_norm``
    divides by the length of the choice in characters.

    Args:
        prompt: text before the choice, with ``{question}`` where the question goes.
    """
    path = Path(data_file)
    return {
        "task": name,
        "custom_dataset": _Rows({_SPLIT: [path]}, lambda row: _choice_row(row, prompt)),
        "test_split": _SPLIT,
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [_mean_of("acc"), _mean_of("acc_norm")],
    }


def generation_task(
    name: str, data_file: Path, *, max_new_tokens: int = 64, stop: Sequence[str] = ("\n",)
) -> dict[str, Any]:
    """A task whose rows are ``prompt`` and ``answer``; greedy text up to `stop` is compared with the answer.

    ``exact_match`` ignores case and punctuation.

    Args:
        max_new_tokens: longest answer, in tokens.
        stop: texts that end an answer.
    """
    path = Path(data_file)
    return {
        "task": name,
        "custom_dataset": _Rows({_SPLIT: [path]}, _answer_row),
        "test_split": _SPLIT,
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "generation_kwargs": {"until": list(stop), "max_gen_toks": max_new_tokens, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{**_mean_of("exact_match"), "ignore_case": True, "ignore_punctuation": True}],
    }


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskSpec],
    *,
    batch_size: int,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Every task's metrics, ``{"arc": {"acc": 0.31, "acc_norm": 0.33, "num_rows": 300}}``.

    A YAML task file has the harness's own keys, with ``dataset_path`` "json" or "csv" and
    ``dataset_kwargs.data_files`` naming local files (relative ones lie beside the YAML).

    Args:
        tasks: YAML files, or what `multiple_choice_task` and `generation_task` return.
        batch_size: rows at a time.
        limit: score the first so many rows of each task only.

    Raises:
        ConfigError: the ``eval`` extra is not installed; a task file is missing or asks for more than
            local data.
        DataError: a row of a task's data has the wrong form.
        RunFailed: the model's output is not finite.
    """
    harness = _harness()
    configs = [_from_file(Path(task)) if isinstance(task, (str, Path)) else dict(task) for task in tasks]
    names = [config["task"] for config in configs]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"tasks {names}, expected one or more, each with a name of its own")
    with _quiet(), _finite(model):
        loaded = harness.TaskManager(include_defaults=False).load([_loadable(config, harness) for config in configs])
        lm = harness.HFLM(
            pretrained=model,
            tokenizer=for_prompts(tokenizer),
            batch_size=batch_size,
            max_length=context_of(model),  # the harness knows some of the names under which a model states it
        )
        results = quietly(
            lambda: harness.evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False),
            lambda kind: DataError(
                f"tasks {', '.join(names)}: the harness fails on a row ({kind})",
                hint="check the task file's templates and its rows; a smaller --batch-size if memory ran out",
            ),
        )
    return {name: _figures(results, name) for name in names}


# --- rows of a task


class _Rows:
    """What the harness calls to get its data sets: ``{split: Dataset}``, held in memory."""

    def __init__(self, files: Mapping[str, Sequence[Path]], convert: Callable[[Row], Mapping[str, Any]]) -> None:
        self._files, self._convert = files, convert

    def __call__(self, **_kwargs: object) -> dict[str, Any]:
        import datasets

        splits = {}
        for split, paths in self._files.items():
            rows = [dict(self._convert(row)) for path in paths for row in read_rows(path)]
            if not rows:
                raise DataError(f"{paths[0].name}: empty, expected at least one row")
            try:
                splits[split] = datasets.Dataset.from_list(rows)
            except (TypeError, ValueError):  # pyarrow's, which quote the value
                raise DataError(f"{paths[0].name}: a column holds values of different types") from None
        return splits

    def __deepcopy__(self, _memo: object) -> _Rows:
        return self


def _choice_row(row: Row, prompt: str) -> dict[str, Any]:
    choices = row.values.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise row.error("field 'choices' is not a list of two texts or more")
    texts = [checked_string(choice, f"choice {number}", row) for number, choice in enumerate(choices, 1)]
    answer = row.values.get("answer")
    if isinstance(answer, str) and answer in texts:
        answer = texts.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise row.error(f"field 'answer' is neither one of the choices nor a number from 0 to {len(texts) - 1}")
    return {"prompt": prompt.replace("{question}", row.string("question")), "choices": texts, "answer": answer}


def _answer_row(row: Row) -> dict[str, Any]:
    return {"prompt": row.string("prompt"), "answer": row.string("answer")}


def _mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


# --- task files


def _from_file(path: Path) -> dict[str, Any]:
    """The task in a YAML file, checked to be data and to name local data only."""
    try:
        config = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path.name}: no such task file", hint="tasks are local YAML files") from None
    except OSError as error:
        raise ConfigError(f"{path.name}: cannot be read: {(error.strerror or 'i/o error').lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(
            f"{path.name}: not plain YAML", hint="a task file is data: !function and other tags are not supported"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise ConfigError(f"{path.name}: holds no task, expected a mapping with the key 'task'")
    unknown = sorted(str(key) for key in set(config) - _KEYS)
    if unknown:
        raise ConfigError(f"{path.name}: key(s) {', '.join(unknown)} not supported in a task file")
    if config.get("dataset_path") not in _FORMATS:
        raise ConfigError(
            f"{path.name}: dataset_path is {config.get('dataset_path')!r}, expected one of: {', '.join(_FORMATS)}",
            hint="tasks read local files only, named in dataset_kwargs.data_files",
        )
    files = _data_files(config, path)
    kept = {key: value for key, value in config.items() if not key.startswith("dataset_")}
    return {"num_fewshot": 0, **kept, "custom_dataset": _Rows(files, lambda row: row.values)}


def _data_files(config: Mapping[str, Any], path: Path) -> dict[str, list[Path]]:
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    named = {"train": named} if isinstance(named, (str, list)) else named
    if not isinstance(named, dict) or not named:
        raise ConfigError(f"{path.name}: dataset_kwargs.data_files names no file")
    splits = {split: [files] if isinstance(files, str) else files for split, files in named.items()}
    for split, files in splits.items():
        if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
            raise ConfigError(f"{path.name}: data_files of split '{split}' are not file names")
        if any("://" in file for file in files):
            raise ConfigError(f"{path.name}: data_files of split '{split}' are not local")
    return {str(split): [path.parent / file for file in files] for split, files in splits.items()}


# --- the harness


class _Harness:
    """The parts of lm-evaluation-harness in use, imported on demand: it is an extra and slow to import."""

    def __init__(self) -> None:
        import lm_eval.api.metrics  # noqa: F401  fills the registry
        from lm_eval.api.registry import METRIC_REGISTRY
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        self.HFLM = _with_shared_contexts(HFLM)
        self.TaskManager, self.evaluate, self.metrics = TaskManager, evaluate, METRIC_REGISTRY


def _with_shared_contexts(plain: Any) -> Any:
    """Return the harness's model, which reads a context once for all of its choices where the model's cache allows it.

    The harness itself does so for choices of one token, which are left to it.
    """

    class Shared(plain):  # type: ignore[misc]
        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            places: dict[tuple[int, ...], list[int]] = {}
            for place, (_, context, _) in enumerate(requests):
                places.setdefault(tuple(context), []).append(place)
            groups = []
            for context, group in places.items():
                longest = max(len(requests[place][2]) for place in group)
                fits = LEAST_TOKENS <= len(context) <= self.max_length - longest
                if len(group) > 1 and longest > 1 and fits:
                    groups.append((context, group))
            if not groups or self.backend != "causal" or not shares_beginnings(self.model):
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # type: ignore[no-any-return]
            found: dict[int, tuple[float, bool]] = {}
            for context, group in groups:
                beginning = Beginning.read(causal_lm(self.model), context)
                answers = [requests[place][2] for place in group]
                scored = beginning.scores(answers, batch_size=self.batch_size, pad_id=0)
                for place, answer, scores_SV in zip(group, answers, scored, strict=True):
                    logs_SV = scores_SV.log_softmax(-1, dtype=self.softmax_dtype)
                    targets_S = torch.tensor(answer, device=logs_SV.device)
                    log = float(logs_SV.gather(1, targets_S[:, None]).sum())
                    found[place] = (log, bool((logs_SV.argmax(-1) == targets_S).all()))
            rest = [place for place in range(len(requests)) if place not in found]
            if rest:
                others = super()._loglikelihood_tokens([requests[place] for place in rest], disable_tqdm, override_bs)
                found |= dict(zip(rest, others, strict=True))
            return [found[place] for place in range(len(requests))]

    return Shared


def _harness() -> _Harness:
    try:
        import datasets  # noqa: F401

        return _Harness()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need lm-evaluation-harness, and module '{error.name}' is not installed",
            hint="pip install 'offsite-tuning[eval]'",
        ) from None


def _loadable(config: dict[str, Any], harness: _Harness) -> dict[str, Any]:
    """`config`, whose metrics are the harness's own: it looks for others on the network."""
    for metric in config.get("metric_list") or []:
        name = metric.get("metric") if isinstance(metric, dict) else None
        if not isinstance(name, str) or name not in harness.metrics or metric.get("hf_evaluate"):
            raise ConfigError(f"task '{config['task']}': metric {name!r} is not one of lm-evaluation-harness's own")
    return config


def _figures(results: Mapping[str, Any], name: str) -> dict[str, float]:
    """Metrics by bare name: the harness writes "acc,none" for metric and filter."""
    figures = {}
    for key, value in results["results"][name].items():
        metric, _, filtered = key.partition(",")
        if isinstance(value, (int, float)) and filtered and not metric.endswith("_stderr"):
            figures[metric if filtered == "none" else key] = float(value)
    return {**figures, "num_rows": float(results["n-samples"][name]["effective"])}


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs only what stops it; its remarks are about options that offsite does not use."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _finite(model: PreTrainedModel) -> Iterator[None]:
    """A model that puts out NaN stops the run: the harness would count its answers as wrong."""

    def check(_module: object, _args: object, output: Any) -> None:
        if not math.isfinite(output.logits[:, -1].float().sum().item()):
            raise RunFailed("the model's output is not finite", hint="check the model: a weight may be NaN")

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
