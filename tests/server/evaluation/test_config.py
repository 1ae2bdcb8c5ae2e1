"""The settings of plug-in and evaluate: from flags, and every problem at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from offsite.config import build
from offsite.errors import ConfigError
from server.evaluation.config import EvaluateConfig, named_paths
from server.plugging.config import PlugConfig

NEEDED = {"model": "m", "output": "results", "package": "package", "bundle": ["bundle"], "data": "held.jsonl"}


def test_plug_in_reads_words_and_flags():
    config = build(PlugConfig, flags={"model": "m", "id": "0" * 16, "registry": "r", "output": "out", "merge": True})
    assert (config.model, config.id, config.registry, config.output) == ("m", "0" * 16, Path("r"), Path("out"))
    assert config.merge
    assert config.package is None


def test_evaluate_reads_repeated_flags():
    flags = {**NEEDED, "bundle": ["seed0=a", "seed1=b"], "reference": ["ceiling=c", "lora_full=d", "ceiling=e"]}
    config = build(EvaluateConfig, flags=flags)
    assert named_paths(config.bundle) == [("seed0", Path("a")), ("seed1", Path("b"))]
    assert [name for name, _ in named_paths(config.reference)] == ["ceiling", "lora_full", "ceiling"]


def test_a_bare_path_is_named_after_its_folder(tmp_path):
    (tmp_path / "a=b").mkdir()
    words = ["runs/bundle-1", str(tmp_path / "a=b"), "seed0=runs/x=y"]
    assert named_paths(words) == [
        ("bundle-1", Path("runs/bundle-1")),
        ("a=b", tmp_path / "a=b"),
        ("seed0", Path("runs/x=y")),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bundle": []}, ["--bundle"]),
        ({"bundle": ["0123456789abcdef"]}, ["--bundle: an id of a bundle needs --registry"]),
        ({"bundle": ["latset"], "registry": "registry"}, ["--bundle: 'latset' is neither a folder nor an id in the"]),
        ({"bundle": ["one/bundle", "two/bundle"]}, ["--bundle: the name 'bundle' is given twice", "seed0=PATH"]),
        ({"log": ["tune=a", "tune=b"]}, ["--log: the name 'tune' is given twice"]),
        ({"reference": ["best=x"]}, ["--reference: found 'best=x'", "ceiling or lora_full or full"]),
        ({"reference": ["x"], "outcome": ["t=a", "t=b"]}, ["--reference: found 'x'", "--outcome"]),
        ({"block_tokens": "1"}, ["--block-tokens", "at least 2"]),
        ({"precision": "fp8", "batch_size": "0"}, ["--precision", "--batch-size"]),
        ({"answer_tokens": "many"}, ["--answer-tokens"]),
    ],
)
def test_every_problem_of_evaluate_is_one_line(changes, words):
    with pytest.raises(ConfigError) as caught:
        build(EvaluateConfig, flags={**NEEDED, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_settings_are_named_together():
    with pytest.raises(ConfigError) as caught:
        build(EvaluateConfig, flags={"model": "m"})
    assert all(flag in str(caught.value) for flag in ("--output", "--package", "--bundle", "--data"))


def test_the_settings_load_without_torch():
    code = "import sys, server.evaluation.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
