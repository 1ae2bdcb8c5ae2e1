from __future__ import annotations

import colours
import torch

from offsite.baselines.asking import STEPS, THEREFORE, Asker
from offsite.tasks.rows import test_rows as rows_of_tests


class Scripted:
    """Stands for a model: goes on with what it is told, and notes what it was asked."""

    def __init__(self, task, said: dict[str, str], room: int = 10_000) -> None:
        self.task, self.said, self.room, self.read = task, said, room, []

    def texts(self, prompts, *, num_tokens, stop=()):
        self.read += prompts
        return [next(text for ending, text in self.said.items() if prompt.endswith(ending)) for prompt in prompts]

    def answers(self, prompts, labels):
        self.read += prompts
        return ["green" for _ in prompts]

    def fits(self, prompt, labels, *, more_tokens=0):
        return len(prompt) + more_tokens <= self.room

    def near(self, texts):
        order = ["Thing: blood\nColour:", "Thing: grass\nColour:", "Thing: sky\nColour:"]
        points = {text: torch.eye(3)[number] for number, text in enumerate(order)}
        return torch.stack([points.get(text, torch.tensor([0.1, 0.2, 0.3])) for text in texts])


QUESTION = "Name the colour.\n\nThing: frog\nColour:"


def asked(method, said=None, **settings):
    room = settings.pop("room", 10_000)
    model = Scripted(colours.task(), said or {}, room)
    given = Asker(model, method, **settings).ask(rows_of_tests(model.task)[1:])
    return model.read, given[0]


def test_zero_shot_is_the_description_and_the_question() -> None:
    read, given = asked("zero-shot")
    assert read == [QUESTION]
    assert given.text == "green"
    _, given = asked("zero-shot", room=10)
    assert given.too_long
    assert given.text == ""


def test_samples_are_chosen_and_ordered_by_the_seed() -> None:
    (one,), _ = asked("in-context", shots=2, seed=0)
    assert one == asked("in-context", shots=2, seed=0)[0][0]
    assert len({asked("in-context", shots=2, seed=seed)[0][0] for seed in range(20)}) == 6  # all orders of two of three
    assert one.startswith("Name the colour.\n\nThing: ")
    assert one.endswith("\n\nThing: frog\nColour:")
    (cut,), given = asked("in-context", shots=2, room=len(QUESTION) + 32)
    assert given.short
    assert cut.count("Colour:") == 2


def test_the_nearest_sample_stands_last() -> None:
    (read,), _ = asked("nearest", shots=2)
    assert read == (
        "Name the colour.\n\nThing: grass\nColour: green\n\nThing: sky\nColour: blue\n\nThing: frog\nColour:"
    )


def test_a_chain_of_thought_takes_two_passes() -> None:
    read, _ = asked("chain-of-thought", {STEPS: "Frogs are green."})
    assert read == [f"{QUESTION} {STEPS}", f"{QUESTION} {STEPS} Frogs are green.\n{THEREFORE}"]


def test_parts_are_answered_one_after_another_and_the_question_last() -> None:
    said = {"\n1.": " What is a frog?\n2. Where does it live?\n2. Where does it live?", "frog?\nAnswer:": "an animal",
            "live?\nAnswer:": "in ponds"}  # fmt: skip
    read, given = asked("least-to-most", said)
    first = "Question: What is a frog?\nAnswer:"
    second = "Question: Where does it live?\nAnswer:"
    assert read[1] == f"{QUESTION}\n\n{first}"
    assert read[2] == f"{QUESTION}\n\n{first} an animal\n\n{second}"
    assert read[3] == f"Name the colour.\n\n{first} an animal\n\n{second} in ponds\n\nThing: frog\nColour:"
    assert not given.short
    assert asked("least-to-most", {"\n1.": ""})[1].short
