from __future__ import annotations

import subprocess
import sys

import pytest

from emulator.dial.config import DialConfig
from offsite.config import build
from offsite.errors import ConfigError

GOOD = {"model": "m", "output": "o", "public": "p.txt"}


def test_without_a_target_it_is_distill_as_ever():
    config = build(DialConfig, flags=GOOD)
    assert not config.is_dial
    assert (config.steps, config.width) == (300, 0.33)


def test_a_client_is_settings_inside_one():
    config = build(DialConfig, flags={**GOOD, "explore": True, "client": "steps=3,rank=2"})
    assert config.is_dial
    assert config.asked is None
    assert (config.client.steps, config.client.rank, config.client.learning_rate) == (3, 2, 0.004)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": "recovery=2"}, "--target recovery=2: expected more than 0 and at most 1"),
        ({"target": "recovry=0.8"}, "no figure 'recovry'"),
        ({"target": ""}, "expected NAME=VALUE"),
        ({"target": "bytes=60XB"}, "expected a number and B, kB, MB or GB"),
        ({"target": "gap=1.5", "width": "0.5"}, "--width: --target finds the size itself"),
        ({"explore": True, "width": "0.5"}, "--width: --explore finds the size itself"),
        ({"target": "gap=1.5", "method": "drop", "blocks": "4"}, "--method: --target finds the size itself"),
        ({"target": "gap=1.5", "steps": "3"}, "--steps: --target makes training-free packages"),
        ({"target": "gap=1.5", "launch": "2"}, "--launch: --target plays verbs as processes"),
        ({"target": "gap=1.5", "public": None}, "--public is missing"),
        ({"explore": True, "explore_method": ["widht"]}, "no sizes are known of 'widht'.*did you mean 'width'"),
        ({"explore": True, "explore_method": ["keep-all"]}, "no sizes are known of 'keep-all'"),
        ({"explore": True, "explore_method": ["width", "width"]}, "expected each method once"),
        ({"explore": True, "explore_size": ["0.2", "0.5"]}, "at least three sizes"),
        (
            {"explore": True, "explore_size": ["0.2", "0.5", "1.5"]},
            "--explore-size: expected more than 0 and at most 1",
        ),
        ({"explore": True, "choice": "influence"}, "--choice belongs to method drop"),
        ({"explore": True, "client": "adapter=blocks"}, "expected placement=BOTTOM.TOP with it"),
        ({"explore": True, "client": "steps=0"}, "--client"),
        ({"explore": True, "client": "placement=3"}, "--client"),
        ({"explore": True, "parallel": "0"}, "--parallel: expected at least 1"),
        ({"explore_size": ["0.2", "0.5", "0.8"]}, "--explore-size belongs to --target or --explore"),
        ({"explore_method": ["width"]}, "--explore-method belongs to --target or --explore"),
        ({"parallel": "2"}, "--parallel belongs to --target or --explore"),
        ({"client": "steps=3"}, "--client belongs to --target or --explore"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(changes, told):
    flags = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=told) as caught:
        build(DialConfig, flags=flags)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_settings_load_nothing_heavy():
    code = "import sys, emulator.dial.config as c; sys.exit('torch' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
