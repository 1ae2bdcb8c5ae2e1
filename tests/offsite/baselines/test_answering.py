from __future__ import annotations

import colours
import pytest
import torch

from offsite.baselines.answering import Answerer, first_object
from offsite.tasks.forms import up_to


@pytest.mark.parametrize("scoring", ["sum", "per-token", "per-character"])
def test_the_likeliest_label_is_that_of_its_own_forward_passes(scoring, full_llama, letters_tokenizer) -> None:
    task = colours.task(("labels: [red, green, blue]", f"labels: [red, green, blue]\n  scoring: {scoring}"))
    answerer = Answerer(full_llama, letters_tokenizer, task, batch_size=2)
    prompts = [f"Thing: {word}\nColour:" for word in ("a", "sky blue", "coal", "q")]
    expected = []
    for prompt in prompts:
        scores = []
        for label in task.labels_of({}):
            before = letters_tokenizer(prompt, add_special_tokens=False)["input_ids"]
            whole = letters_tokenizer(f"{prompt} {label}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = full_llama(torch.tensor([whole])).logits[0].log_softmax(-1)
            total = sum(float(logs[place - 1, whole[place]]) for place in range(len(before), len(whole)))
            divisor = {"sum": 1, "per-token": len(whole) - len(before), "per-character": len(label)}[scoring]
            scores.append(total / divisor)
        expected.append(task.labels_of({})[scores.index(max(scores))])
    assert answerer.answers(prompts, [task.labels_of({})] * len(prompts)) == expected


def test_text_ends_where_the_model_or_the_task_ends_it(full_llama, letters_tokenizer) -> None:
    answerer = Answerer(full_llama, letters_tokenizer, colours.task())
    ids = letters_tokenizer("what", add_special_tokens=False)["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(full_llama(torch.tensor([ids])).logits[0, -1].argmax()))
    (text,) = answerer.texts(["what"], num_tokens=6)
    drawn = ids[4:]
    drawn = drawn[: drawn.index(2)] if 2 in drawn else drawn
    assert text == letters_tokenizer.decode(drawn, skip_special_tokens=True).strip()
    assert up_to("\n one two\nthree", ("\n", "two")) == "one"
    assert first_object('{"a": {"b": 1}} and so on') == '{"a": {"b": 1}}'
    assert first_object('{"a": ') == '{"a": '
