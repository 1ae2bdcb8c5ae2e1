"""Tasks through lm-evaluation-harness against a loop written by hand, offline, from data only."""

from __future__ import annotations

import gzip
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import offsite.evaluation.tasks as module
from offsite.errors import ConfigError, DataError, OffsiteError, RunFailed
from offsite.evaluation.tasks import generation_task, multiple_choice_task, run_tasks

# the harness and the data library it needs, as they are imported
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TASK = """
task: by_file
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    made = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=256)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    return made


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def questions() -> list[dict]:
    words = ["a", "bb cc", "d e f g", "hé", "i" * 9, "jk"]
    made = []
    for number in range(24):
        choices = [words[(number + i) % 6] for i in range(3)]
        made.append({"question": f"what {{{{ {number} }}}} is", "choices": choices, "answer": number % 3})
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = "".join(json.dumps(row) + "\n" for row in questions())
    (tmp_path / "questions.jsonl").write_text(rows)
    by_text = [{**row, "answer": row["choices"][row["answer"]]} for row in questions()]
    (tmp_path / "by_text.json.gz").write_bytes(gzip.compress(json.dumps(by_text).encode()))
    (tmp_path / "task.yaml").write_text(TASK)
    return tmp_path


def log_likelihood(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, ending: str) -> float:
    ids, start = tokenizer(prompt + ending)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[position - 1, ids[position]].item() for position in range(start, len(ids)))


def by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[float, float]:
    right = right_by_length = 0
    for row in questions():
        prompt = f"Question: {row['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, prompt, f" {choice}") for choice in row["choices"]]
        scaled = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["answer"]
        right_by_length += scaled.index(max(scaled)) == row["answer"]
    return right / 24, right_by_length / 24


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("batch_size", [1, 5])
def test_multiple_choice_is_what_the_plain_loop_finds(model, tokenizer, folder: Path, batch_size: int) -> None:
    tasks = [
        multiple_choice_task("by_index", folder / "questions.jsonl"),
        multiple_choice_task("by_text", folder / "by_text.json.gz"),
        folder / "task.yaml",
    ]
    results = run_tasks(model, tokenizer, tasks, batch_size=batch_size)
    acc, acc_norm = by_hand(model, tokenizer)
    assert 0 < acc < 1
    assert acc != acc_norm
    for name in ("by_index", "by_text", "by_file"):
        assert results[name] == pytest.approx({"acc": acc, "acc_norm": acc_norm, "num_rows": 24.0})


@pytest.mark.usefixtures("offline")
def test_a_context_is_read_once_and_figures_stay(model, tokenizer, folder: Path, monkeypatch) -> None:
    task = multiple_choice_task("by_index", folder / "questions.jsonl")
    assert module.shares_beginnings(model)
    read, plain = [], module.Beginning.read.__func__
    counted = classmethod(lambda cls, lm, ids: read.append(tuple(ids)) or plain(cls, lm, ids))
    monkeypatch.setattr(module.Beginning, "read", counted)
    shared = run_tasks(model, tokenizer, [task], batch_size=4)
    assert len(read) == len(set(read)) == 24
    monkeypatch.setattr(module, "shares_beginnings", lambda _model: False)
    assert run_tasks(model, tokenizer, [task], batch_size=4) == shared
    assert len(read) == 24


@pytest.mark.usefixtures("offline")
def test_generation_is_compared_with_the_answer(model, tokenizer, tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        prompt = f"write {number}:"
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        answer = tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True).strip() or "-"
        rows.append({"prompt": prompt, "answer": answer.upper() if number % 2 else f"not {answer}"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = generation_task("write", tmp_path / "rows.jsonl", max_new_tokens=6, stop=["STOP"])
    assert run_tasks(model, tokenizer, [task], batch_size=2) == {"write": {"exact_match": 0.5, "num_rows": 4.0}}


def test_a_limit_scores_the_first_rows_and_nothing_is_changed(model, tokenizer, folder: Path) -> None:
    task = multiple_choice_task("few", folder / "questions.jsonl")
    tokenizer_before, hooks_before = tokenizer.pad_token, len(model._forward_hooks)
    state = torch.random.get_rng_state()
    assert run_tasks(model, tokenizer, [task], batch_size=2, limit=5)["few"]["num_rows"] == 5
    assert (tokenizer.pad_token, len(model._forward_hooks)) == (tokenizer_before, hooks_before)
    assert torch.equal(torch.random.get_rng_state(), state)


QUESTION = {"question": "SECRET", "choices": ["SECRET", "x"], "answer": 0}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**QUESTION, "answer": 2}, "line 1: field 'answer' is neither one of the choices nor a number from 0 to 1"),
        ({**QUESTION, "answer": "SECRETS"}, "line 1: field 'answer' is neither"),
        ({**QUESTION, "answer": True}, "line 1: field 'answer' is neither"),
        ({**QUESTION, "choices": ["SECRET"]}, "line 1: field 'choices' is not a list of two"),
        ({**QUESTION, "choices": ["SECRET", 3]}, "line 1: choice 2 is a number, expected text"),
        ({**QUESTION, "question": None}, "line 1: field 'question' is missing"),
        (None, "q.jsonl: empty"),
    ],
)
def test_a_bad_row_is_named_and_not_told(model, tokenizer, tmp_path: Path, row: dict | None, expected: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n" if row else "")
    with pytest.raises(DataError, match=expected) as caught:
        run_tasks(model, tokenizer, [multiple_choice_task("bad", tmp_path / "q.jsonl")], batch_size=2)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("dataset_path: json", "dataset_path: allenai/ai2_arc", "expected one of: json, csv"),
        ("questions.jsonl", "https://example.org/questions.jsonl", "are not local"),
        ("questions.jsonl", "3", "are not file names"),
        ("{data_files: {test: questions.jsonl}}", "{}", "names no file"),
        ("doc_to_target: answer", "doc_to_target: !function code.answer", "not plain YAML"),
        ("doc_to_target: answer", "include: other.yaml", "key.s. include not supported"),
        ("doc_to_target: answer", "process_docs: code.run", "key.s. process_docs not supported"),
        ("doc_to_target: answer", "metric_list: [{metric: bertscore_from_afar}]", "is not one of"),
        ("doc_to_target: answer", "metric_list: [{metric: acc, hf_evaluate: true}]", "is not one of"),
        ("task: by_file", "group: by_file", "holds no task"),
        ("task: by_file", "[", "not plain YAML"),
        ("questions.jsonl", "absent.jsonl", "absent.jsonl: no such file"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_a_task_file_can_only_name_local_data(
    model, tokenizer, folder: Path, old: str, new: str, expected: str
) -> None:
    assert old in TASK
    (folder / "code.py").write_text("raise SystemExit('code of a task file ran')\n")
    (folder / "task.yaml").write_text(TASK.replace(old, new))
    with pytest.raises(OffsiteError, match=expected) as caught:
        run_tasks(model, tokenizer, [folder / "task.yaml"], batch_size=2)
    assert caught.value.exit_code == 2


def test_an_absent_task_or_a_name_taken_twice_is_refused(model, tokenizer, folder: Path) -> None:
    for tasks in ([], [folder / "absent.yaml"], [folder / "task.yaml", folder / "task.yaml"]):
        with pytest.raises(ConfigError):
            run_tasks(model, tokenizer, tasks, batch_size=2)


def test_a_broken_model_stops_the_run(model, tokenizer, folder: Path) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not finite"):
        run_tasks(model, tokenizer, [folder / "task.yaml"], batch_size=2)
    assert not model._forward_hooks


@pytest.mark.parametrize("missing", ["lm_eval", "datasets"])
def test_without_the_extra_the_hint_installs_it(model, tokenizer, folder: Path, missing: str, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=missing) as caught:
        run_tasks(model, tokenizer, [folder / "task.yaml"], batch_size=2)
    assert caught.value.hint == "pip install 'offsite-tuning[eval]'"
