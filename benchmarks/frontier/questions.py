"""Jobs of the comparison beside the paper: packages, a client's run on a set of questions, and accuracies.

A question's choices are scored as lm-evaluation-harness scores them: the log-likelihood of " choice" after
"Question: ...\\nAnswer:", tokenised as one text. ``right`` is the harness's ``acc`` (the highest sum), ``by_length``
its ``acc_norm``; WebQuestions' ``right`` is its ``exact_match`` (some right answer is what greedy decoding writes).
Which questions were answered rightly is kept, one character a question, so that two models can be compared in pairs.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import work as frontier
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from client.tuning.tune import attach_to_package
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run as distill
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.evaluation.measure import evaluating
from offsite.evaluation.tasks import QUESTION, multiple_choice_task, run_tasks
from offsite.text.batches import pad_id

TOKENS_AT_ONCE = 2048


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job with what it found and the seconds it took."""
    began = time.monotonic()
    found = {
        "zero_shot": zero_shot,
        "package": make_package,
        "emulator": emulator,
        "tune": tune,
        "tuned": tuned,
        "plugged": plugged,
    }[job["kind"]](job)
    return {**job, "found": found, "seconds": round(time.monotonic() - began, 1)}


# --- jobs


def zero_shot(job: Mapping[str, Any]) -> dict[str, Any]:
    """The full model as it is."""
    with frontier.half(frontier.full_model()) as model:
        return scored(model, questions(job))


def make_package(job: Mapping[str, Any]) -> dict[str, Any]:
    """The package stands under the work folder; a distillation that was killed goes on."""
    out = frontier.package_path(job["package"])
    began = time.monotonic()
    if not owner_record_path(out).is_file():
        shutil.rmtree(out, ignore_errors=True)
        settings = {"bottom": 2, "top": 2, "batch_size": 4, "block_tokens": 256, **job["distill"]}
        settings["public"] = tuple(Path(one) for one in settings.get("public", ()))
        resume = out.with_name(out.name + ".work").is_dir()
        distill(DistillConfig(model=job["model"], output=out, resume=resume, **settings))
    package = open_package(out)
    return {
        "package_digest": package.digest,
        "package_bytes": package.num_bytes,
        "figures": dict(package.manifest.figures),
        "make_seconds": round(time.monotonic() - began, 1),
    }


def emulator(job: Mapping[str, Any]) -> dict[str, Any]:
    """The package as it leaves."""
    package = open_package(frontier.package_path(job["package"]))
    with frontier.half(package.load_model(dtype="float32")) as model:
        return scored(model, questions(job))


def tune(job: Mapping[str, Any]) -> dict[str, Any]:
    """One client's adapter stands under the work folder, in bfloat16; validated as such on the client's own rows."""
    how, spec = job["how"], AdapterSpec(**job["how"]["adapter"])
    package = open_package(frontier.package_path(job["package"]))
    text = frontier.client_text(job["client"], how["batch_size"], job["seed"])
    attached = attach_to_package(package, spec, device=torch.device("cpu"), seed=job["seed"])
    losses: list[float] = []
    with half_where_frozen(attached.model):
        frontier.train(attached, package, text, how, losses, seed=job["seed"])
    tensors = {name: tensor.bfloat16() for name, tensor in attached.tensors().items()}
    path = frontier.adapter_path(job["adapter_key"])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    attached.load(tensors)
    attached.model.requires_grad_(False)
    with frontier.half(attached.model) as model:
        validation = math.log(frontier.measure_examples(model, text.validation, text.pad_id))
    return {"first_loss": losses[0], "final_loss": losses[-1], "validation_loss": validation}


def tuned(job: Mapping[str, Any]) -> dict[str, Any]:
    """The emulator with its adapter: what the client is left with."""
    spec = AdapterSpec(**job["how"]["adapter"])
    package = open_package(frontier.package_path(job["package"]))
    attached = attach_to_package(package, spec, device=torch.device("cpu"), seed=job["seed"])
    attached.load(load_file(frontier.adapter_path(job["adapter_key"])))
    attached.model.requires_grad_(False)
    with frontier.half(attached.model) as model:
        return scored(model, questions(job))


def plugged(job: Mapping[str, Any]) -> dict[str, Any]:
    """The full model with shares of the adapter's update."""
    full, spec = frontier.full_model(), AdapterSpec(**job["how"]["adapter"])
    tensors = load_file(frontier.adapter_path(job["adapter_key"]))
    update = update_of(job["package"], spec, tensors, full)
    found = {}
    for share in job["shares"]:
        with frontier.added(full, update, share), frontier.half(full) as model:
            found[f"{share:g}"] = scored(model, questions(job))
    return found


def update_of(package: str, spec: AdapterSpec, tensors: Mapping[str, Tensor], full: nn.Module) -> dict[str, Tensor]:
    """Return what the adapter changes in the full model's weights, by their names, dense."""
    if spec.kind == "lora":
        return frontier.lifted(package, spec, tensors, full)
    sites = read_owner_record(owner_record_path(frontier.package_path(package))).sites
    update = {}
    for name, tensor in tensors.items():
        role, number, inner = name.split(".", 2)
        path = f"{sites[f'{role}.{number}']}.{inner}"
        update[path] = tensor.float() - full.get_parameter(path).detach()
    return update


@contextmanager
def half_where_frozen(model: nn.Module) -> Iterator[None]:
    """Inside, linears compute in bfloat16 wherever nothing around them is trained as it stands (LoRA's bases too)."""
    with ExitStack() as stack:
        lora = any("lora_" in name for name, _ in model.named_parameters())
        for module in [model] if lora else [one for one in model.modules() if not trains(one)]:
            stack.enter_context(frontier.half(module))
        yield


def trains(module: nn.Module) -> bool:
    """Tell whether any of its parameters is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


# --- questions and scores


@lru_cache(maxsize=8)
def read_questions(path: str, num: int) -> tuple[dict[str, Any], ...]:
    """Return the first so many questions of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return tuple(json.loads(line) for line in lines)[:num]


def questions(job: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """Return the questions that a job is scored on."""
    return read_questions(job["questions"], job["num_questions"])


@torch.no_grad()
def scored(model: Any, asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return which questions the model answers rightly, and the mean loss of the right answers in nats per token.

    Returns:
        ``right`` and, where there are choices, ``by_length``: a string of 0 and 1, a character a question; ``loss``:
        of the right choice, or of the right answer that the model finds likeliest.
    """
    encoded = [encoded_question(one) for one in asked]
    found_by_question = likelihoods(model, encoded)
    right, by_length, losses = "", "", []
    for one, each, (sums, greedy) in zip(asked, encoded, found_by_question, strict=True):
        if "choices" in one:
            normal = [value / len(text) for value, text in zip(sums, one["choices"], strict=True)]
            right += str(int(sums.index(max(sums)) == one["answer"]))
            by_length += str(int(normal.index(max(normal)) == one["answer"]))
            told = one["answer"]
        else:
            right += str(int(any(greedy)))
            told = sums.index(max(sums))
        losses.append(-sums[told] / len(each[1][told]))
    found: dict[str, Any] = {
        "right": right,
        "accuracy": right.count("1") / len(right),
        "loss": sum(losses) / len(losses),
    }
    return {**found, "by_length": by_length} if by_length else found


Encoded = tuple[list[int], list[list[int]]]
"""The tokens of a prompt, and of every answer after it."""


def encoded_question(one: Mapping[str, Any]) -> Encoded:
    """Return prompt and answers, each pair tokenised as one text and split as the harness splits it.

    Raises:
        ValueError: when a tokenizer joins the prompt's last token with an answer's first.
    """
    tokenizer, prompt = frontier.tokenizer(), QUESTION.replace("{question}", one["question"])
    start, answers = tokenizer(prompt, add_special_tokens=False)["input_ids"], []
    for text in one.get("choices", one.get("answers")):
        whole = tokenizer(f"{prompt} {text}", add_special_tokens=False)["input_ids"]
        if whole[: len(start)] != start:
            raise ValueError("a prompt's tokens depend on the answer")
        answers.append(whole[len(start) :])
    return start, answers


def likelihoods(model: Any, encoded: Sequence[Encoded]) -> list[tuple[list[float], list[bool]]]:
    """Return of every answer its log-likelihood, and whether greedy decoding would write it.

    A question is one row, read once: its prompt, then all its answers, none of which sees another. An answer's last
    token is predicted and not read.
    """
    order = sorted(range(len(encoded)), key=lambda place: -_num_read(encoded[place]))
    found: list[tuple[list[float], list[bool]]] = [([], [])] * len(encoded)
    with evaluating(model):
        while order:
            num = max(1, TOKENS_AT_ONCE // _num_read(encoded[order[0]]))
            places, order = order[:num], order[num:]
            for place, own in zip(places, _likelihoods(model, [encoded[place] for place in places]), strict=True):
                found[place] = own
    return found


def _num_read(one: Encoded) -> int:
    return len(one[0]) + sum(len(answer) - 1 for answer in one[1])


def _likelihoods(model: Any, rows: Sequence[Encoded]) -> list[tuple[list[float], list[bool]]]:
    num_tokens = max(map(_num_read, rows))
    ids_BT = torch.full((len(rows), num_tokens), pad_id(frontier.tokenizer()))
    positions_BT = torch.zeros((len(rows), num_tokens), dtype=torch.int64)
    seen_BTT = torch.eye(num_tokens, dtype=torch.bool).repeat(len(rows), 1, 1)
    asked: list[tuple[int, int, int]] = []  # row, place whose logits predict, the token predicted
    for row, (prompt, answers) in enumerate(rows):
        num = len(prompt)
        ids_BT[row, :num], positions_BT[row, :num] = torch.tensor(prompt), torch.arange(num)
        seen_BTT[row, :num, :num] = torch.ones(num, num).tril().bool()
        first = num
        for answer in answers:
            read = len(answer) - 1
            own = slice(first, first + read)
            ids_BT[row, own] = torch.tensor(answer[:-1], dtype=torch.int64)
            positions_BT[row, own] = torch.arange(num, num + read)
            seen_BTT[row, own, :num] = True
            seen_BTT[row, own, own] = torch.ones(read, read).tril().bool()
            places = [num - 1, *range(first, first + read)]
            asked += [(row, place, token) for place, token in zip(places, answer, strict=True)]
            first += read
    rows_N, places_N, targets_N = torch.tensor(asked).T
    with head_at(model, rows_N, places_N):
        output = model(input_ids=ids_BT, attention_mask=seen_BTT[:, None], position_ids=positions_BT, use_cache=False)
    logits_NV = output.logits[0].float()
    losses = functional.cross_entropy(logits_NV, targets_N, reduction="none").double().tolist()
    same = (logits_NV.argmax(-1) == targets_N).tolist()
    found, first = [], 0
    for _, answers in rows:
        sums, greedy = [], []
        for answer in answers:
            own = slice(first, first + len(answer))
            sums.append(-sum(losses[own]))
            greedy.append(all(same[own]))
            first += len(answer)
        found.append((sums, greedy))
    return found


@contextmanager
def head_at(model: Any, rows_N: Tensor, places_N: Tensor) -> Iterator[None]:
    """Inside, the model's logits are (1, N, V), at these places of these rows: the head is its largest product."""
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, arguments: (arguments[0][rows_N, places_N].unsqueeze(0),)
    )
    try:
        yield
    finally:
        handle.remove()


# --- the harness, to compare with


def some_right(asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the questions; where there are no choices, every second one has what the full model writes as an answer.

    A small model answers next to none of these by itself, and two scorers that find nothing agree on anything.
    """
    if "choices" in asked[0]:
        return [dict(one) for one in asked]
    tokenizer, found = frontier.tokenizer(), []
    for number, one in enumerate(asked):
        prompt = tokenizer(
            QUESTION.replace("{question}", one["question"]), add_special_tokens=False, return_tensors="pt"
        )
        told = frontier.full_model().generate(
            **prompt, max_new_tokens=3, do_sample=False, pad_token_id=pad_id(tokenizer)
        )
        text = tokenizer.decode(told[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        more = [text.removeprefix(" ")] if number % 2 and text.startswith(" ") and text.strip() else []
        found.append({**one, "answers": [*one["answers"], *more]})
    return found


def harness_says(asked: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, float]:
    """Return what lm-evaluation-harness finds of the full model on these questions: ``right``, ``by_length``."""
    path = folder / "asked.jsonl"
    listed = [
        one if "choices" in one else {"question": one["question"], "choices": ["a", "b"], "answer": 0} for one in asked
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    task = multiple_choice_task("asked", path)
    if "choices" in asked[0]:
        found = run_tasks(frontier.full_model(), frontier.tokenizer(), [task], batch_size=4)["asked"]
        return {"right": found["acc"], "by_length": found["acc_norm"]}
    import datasets

    rows = [
        {"prompt": QUESTION.replace("{question}", one["question"]), "answers": one["answers"],
         "gold": list(range(len(one["answers"])))} for one in asked
    ]  # fmt: skip
    task |= {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}, "doc_to_choice": "answers"}
    task |= {"doc_to_target": "gold", "metric_list": [{"metric": "exact_match"}]}
    found = run_tasks(frontier.full_model(), frontier.tokenizer(), [task], batch_size=4)["asked"]
    return {"right": found["exact_match"]}
