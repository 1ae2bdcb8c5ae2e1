"""What ``make fuzz`` starts from, and a little of what it does, without atheris."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
CHECKS = {name: runpy.run_path(str(HERE / f"fuzz_{name}.py"))["check"] for name in ("header", "sealed")}
SEEDS = {name: {path.name: path.read_bytes() for path in sorted((HERE / "corpus" / name).iterdir())} for name in CHECKS}
SOUND = {
    "header": {"one", "noted", "none", "noted-none", "scalar", "three", "blanks", "eight-dimensions"},
    "sealed": {"bundle", "job", "package", "report", "with-signatures"},
}
TOKENS = [
    line[1:-1].encode().decode("unicode_escape").encode("latin-1")
    for line in (HERE / "tokens.dict").read_text().splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("target", CHECKS)
def test_the_corpus_is_read_as_before(target):
    assert {name for name, data in SEEDS[target].items() if CHECKS[target](data)} == SOUND[target]


@pytest.mark.parametrize("target", CHECKS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_edited_inputs_are_refused_or_mean_what_they_say(target, data):
    content = bytearray(data.draw(st.sampled_from(sorted(SEEDS[target].values()))))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(content)))
        until = where + data.draw(st.integers(0, 8))
        content[where:until] = data.draw(st.sampled_from(TOKENS) | st.binary(max_size=3))
    CHECKS[target](bytes(content))
