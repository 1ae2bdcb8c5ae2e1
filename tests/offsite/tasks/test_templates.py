from __future__ import annotations

from offsite.tasks.templates import problem_of, render


def test_values_are_put_in_once_and_never_read_as_templates() -> None:
    values = {"a": "{{b}} {% x %}", "b": ("one", "two")}
    assert render("{{a}}|{{ b }}|{{a}}", values) == "{{b}} {% x %}|- one\n- two|{{b}} {% x %}"


def test_only_plain_names_are_taken() -> None:
    assert problem_of("{{a}} and {one: brace}", ["a"]) is None
    for wrong in (
        "{{a.b}}",
        "{{a|upper}}",
        "{{ a",
        "a }}",
        "{% for x in a %}",
        "{# a #}",
        "{{b}}",
        "no field",
        "{{a}}{{a}}{{a}}",
        "{{{a}}}x{{",
    ):
        assert problem_of(wrong, ["a"]) is not None, wrong
