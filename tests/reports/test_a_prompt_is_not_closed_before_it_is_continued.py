"""A tokenizer that closes every text with an end made models answer as after the end.

What people met: prompts and the stems of multiple-choice questions that end in the end-of-sequence token, so that the
model is asked what comes after a finished text. The answers read as if the model were worse than it is.
"""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from recurrent import uncached
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from offsite.audits.extraction import secret_examples
from offsite.evaluation.tasks import generation_task, multiple_choice_task, run_tasks
from offsite.text.batches import encode
from offsite.text.records import Record
from server.evaluation.evaluate import continuation
from server.serving.engine import Engine
from server.serving.protocol import ChatAsk, CompletionAsk, Message

CLOSERS = {"an end": "<s> $A </s>", "a separator": "<s> $A <pad>"}


@pytest.fixture(params=CLOSERS)
def closing(request, letters_tokenizer):
    """A tokenizer that begins every text with <s> and closes it."""
    core = type(letters_tokenizer.backend_tokenizer).from_str(letters_tokenizer.backend_tokenizer.to_str())
    special = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    core.post_processor = processors.TemplateProcessing(single=CLOSERS[request.param], special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = letters_tokenizer.chat_template
    assert tokenizer("a")["input_ids"][-1] in (0, 2)
    return tokenizer


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def admitted(engine, ask):
    async def prompts():
        async with engine.admitted(ask) as job:
            return [list(prompt) for prompt in job.prompts]

    return asyncio.run(prompts())


def test_served_prompts(full_llama, closing):
    engine = Engine(full_llama, closing)
    found = admitted(engine, CompletionAsk(model="m", prompt=["fever", "the cough</s>"]))
    assert found == [[1, *plain(closing, "fever")], [1, *plain(closing, "the cough"), 2]]


def test_served_chats_are_what_the_template_says_and_no_more(full_llama, closing):
    engine = Engine(full_llama, closing)
    turns = [Message(role="user", content="fever")]
    rendered = closing.apply_chat_template([{"role": "user", "content": "fever"}], tokenize=False)
    assert admitted(engine, ChatAsk(model="m", messages=turns)) == [plain(closing, rendered)]


def test_answers_of_an_evaluation(full_llama, closing):
    expected = uncached(full_llama, [1, *plain(closing, "fever")], 8)
    upto = expected.index(2) if 2 in expected else len(expected)
    assert continuation(full_llama, closing, "fever", 8) == closing.decode(expected[:upto]).strip()


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, choice):
    stem, whole = [1, *plain(tokenizer, prompt)], [1, *plain(tokenizer, prompt + " " + choice)]
    log_probs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_probs[place - 1, whole[place]].item() for place in range(len(stem), len(whole)))


def test_multiple_choice(full_llama, closing, tmp_path):
    choices = ["ab", "zq", "Mk", "e!"]
    rows, right = [], 0
    for number in range(12):
        question, answer = f"what of {chr(97 + number) * 3}", number % 4
        stem = f"Question: {question}\nAnswer:"
        scores = [log_likelihood(full_llama, closing, stem, choice) for choice in choices]
        right += scores.index(max(scores)) == answer
        rows.append({"question": question, "choices": choices, "answer": answer})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_tasks(full_llama, closing, [multiple_choice_task("mc", file)], batch_size=4)
    assert found["mc"]["acc"] == pytest.approx(right / len(rows))


def test_generation_tasks(full_llama, closing, tmp_path):
    prompts = ["fever", "a cough", "the doctor"]
    answers = []
    for prompt in prompts:
        made = uncached(full_llama, [1, *plain(closing, prompt)], 6)
        answers.append(closing.decode(made[: made.index(2)] if 2 in made else made, skip_special_tokens=True))
    rows = [{"prompt": prompt, "answer": text or "x"} for prompt, text in zip(prompts, answers, strict=True)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = generation_task("gen", file, max_new_tokens=6, stop=("\x00",))
    found = run_tasks(full_llama, closing, [task], batch_size=1)
    assert found["gen"]["exact_match"] == 1.0


def test_secrets_that_are_asked_for(closing):
    (example,) = secret_examples(closing, [("The code is", "green lamp")])
    assert example.input_ids == [1, *plain(closing, "The code is green lamp")]
    assert example.num_loss_tokens == len(" green lamp")


def test_what_is_learnt_still_ends(closing):
    record = Record((("fever", True),), "d", 1)
    (example,) = encode([record], closing, context=64).examples
    assert example.input_ids[-1] == 2
    assert example.input_ids.count(2) == 1
