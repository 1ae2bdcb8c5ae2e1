"""A conversation was refused, or ended in a traceback, because its beginning could not be written by itself.

People met templates that want the user to speak first, that open a thought when they ask for an answer, that drop
earlier thoughts, move white space, or close the last turn in another way than those before. What is learnt must be the
assistant's words and what closes its turns, whatever surrounds them; what cannot be learnt is refused with its row and
the reason that is true of it.
"""

from __future__ import annotations

import pytest
from chat_templates import BRACKETS, CHATML, HEADERS, MANNERS, PAIRS, THOUGHT_OPENED, THOUGHTS_DROPPED, tokenizer_of

from offsite.errors import DataError
from offsite.text.batches import IGNORED, encode
from offsite.text.records import Record

ONE = [("user", "What is it?"), ("assistant", "A thing, é.")]
TWO = [*ONE, ("user", "A thing?"), ("assistant", "Yes: a thing")]
THREE = [*TWO, ("user", "Yes: a thing"), ("assistant", "Yes: a thing")]  # the user says what the assistant says


def learnt(template: str, eos: str, turns) -> str:
    tokenizer = tokenizer_of(template, eos)
    record = Record((), "chat", 7, tuple(turns), place="a.jsonl: line 7")
    (example,) = encode([record], tokenizer, context=2000).examples
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def expected(manner, turns, *, before_last: str = "") -> str:
    """What the assistant says, each time followed by what closes its turn."""
    said = [text for role, text in turns if role == "assistant"]
    closes = manner.closes_last if turns[-1][0] == "assistant" else manner.closes
    return "".join(text + manner.closes for text in said[:-1]) + before_last + said[-1] + closes


@pytest.mark.parametrize("turns", [ONE, TWO, THREE], ids=["one", "two", "three"])
@pytest.mark.parametrize("name", sorted(set(MANNERS) - {"thoughts dropped", "brackets"}))
def test_what_is_learnt_is_the_assistants_words_and_what_closes_them(name, turns):
    manner = MANNERS[name]
    assert learnt(manner.template, manner.eos, turns) == expected(manner, turns)


@pytest.mark.parametrize("turns", [ONE, TWO, THREE], ids=["one", "two", "three"])
def test_a_space_that_the_template_writes_before_an_answer_belongs_to_it(turns):
    spaced = [(role, " " + text if role == "assistant" else text) for role, text in turns]
    assert learnt(BRACKETS.template, BRACKETS.eos, turns) == expected(BRACKETS, spaced)


@pytest.mark.parametrize("turns", [ONE, TWO, THREE], ids=["one", "two", "three"])
def test_an_empty_thought_is_learnt_where_the_model_has_to_write_it(turns):
    found = learnt(THOUGHTS_DROPPED.template, THOUGHTS_DROPPED.eos, turns)
    assert found == expected(THOUGHTS_DROPPED, turns, before_last="<think>\n\n</think>\n\n")


def test_thoughts_are_learnt_as_far_as_they_are_shown():
    turns = [("user", "q"), ("assistant", "<think>\nhm\n</think>\n\none"), ("user", "r")]
    turns += [("assistant", "<think>\noh\n</think>\n\ntwo")]
    found = learnt(THOUGHTS_DROPPED.template, THOUGHTS_DROPPED.eos, turns)
    assert found == "one<|im_end|>\n<think>\noh\n</think>\n\ntwo<|im_end|>\n"
    assert learnt(THOUGHT_OPENED.template, THOUGHT_OPENED.eos, turns) == (
        "\n\none<|end_of_sentence|>\n\ntwo<|end_of_sentence|>"
    )


@pytest.mark.parametrize("manner", [CHATML, HEADERS, THOUGHT_OPENED], ids=["chatml", "headers", "thought opened"])
def test_a_first_turn_of_the_assistants_is_learnt_too(manner):
    turns = [("assistant", "Hello!"), *TWO]
    assert learnt(manner.template, manner.eos, turns) == expected(manner, turns)


@pytest.mark.parametrize("manner", [CHATML, HEADERS, BRACKETS, THOUGHT_OPENED])
def test_the_systems_words_are_not_learnt_wherever_they_are_put(manner):
    turns = [("system", "A thing, é."), *ONE]
    found = learnt(manner.template, manner.eos, turns)
    assert found.strip() == expected(manner, ONE).strip()


def test_two_answers_in_a_row_and_an_unanswered_question():
    turns = [("user", "q"), ("assistant", "one"), ("assistant", "two"), ("user", "r")]
    assert learnt(CHATML.template, CHATML.eos, turns) == "one<|im_end|>\ntwo<|im_end|>\n"


def test_white_space_that_a_template_strips_is_not_missed():
    turns = [("user", " q "), ("assistant", " \n one "), ("user", "r"), ("assistant", "two\n\n")]
    assert learnt(HEADERS.template, HEADERS.eos, turns) == "one<|eot|>two<|eot|>"
    assert learnt(CHATML.template, CHATML.eos, turns) == " \n one <|im_end|>\ntwo\n\n<|im_end|>\n"


def test_nothing_that_the_user_says_is_learnt_where_half_a_pair_is_not_written():
    assert learnt(PAIRS.template, PAIRS.eos, ONE) == "A thing, é.</s>"


def test_a_template_that_looks_at_how_a_turn_begins():
    template = (
        "{% for m in messages %}{% if m.content.startswith('<think>') %}{{ '[T]' + m.content + '[E]' }}"
        "{% else %}{{ '[' + m.role + ']' + m.content + '[E]' }}{% endif %}{% endfor %}"
    )
    turns = [("assistant", "<think>a</think>b"), ("user", "c"), ("assistant", "<think>d</think>e")]
    found = learnt(template, "[E]", turns)
    assert found == "<think>a</think>b[E][T]<think>d</think>e[E]"  # nothing asks for the second but the model itself


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (BRACKETS.template, [("assistant", "SECRET"), *ONE], "the chat template refuses the conversation"),
        (MANNERS["no system"].template, [("system", "SECRET"), *ONE], "the chat template refuses the conversation"),
        (
            "{% for m in messages %}{{ m.content if loop.last else '.' }}{% endfor %}",
            [("user", "a"), ("assistant", "SECRET"), ("user", "b"), ("assistant", "c")],
            "the chat template renders turn 2 differently when others follow",
        ),
        (
            "{% for m in messages %}{{ m.content | length }}.{% endfor %}",
            [("assistant", "SECRET"), ("user", "b")],
            "the chat template does not write the text of turn 1 as it stands",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
            [("user", "SECRET"), ("assistant", "b")],
            "the chat template marks nothing of the conversation as generated",
        ),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_its_row_and_the_true_reason(template, turns, reason):
    with pytest.raises(DataError) as caught:
        learnt(template, "</s>", turns)
    assert str(caught.value) == f"a.jsonl: line 7: {reason}"
    assert caught.value.hint
