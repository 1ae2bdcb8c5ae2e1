from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from offsite.training.config import LoopConfig


def test_every_setting_has_a_default_and_a_description():
    LoopConfig()
    for name, info in LoopConfig.model_fields.items():
        assert not info.is_required(), name
        assert info.description, name


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"schedule": "step"},
        {"min_rate_share": 1.1},
        {"clip_norm": -1.0},
        {"accumulate": 0},
        {"precision": "fp16"},
        {"betas": 0.9},
    ],
)
def test_wrong_settings_are_refused(change):
    with pytest.raises(ValidationError):
        LoopConfig(**change)


def test_what_is_only_written_along_the_way_does_not_bind(tmp_path):
    assert LoopConfig(checkpoint_every=7, tensorboard=tmp_path).binding() == LoopConfig().binding()
    assert LoopConfig(evaluate_every=7).binding() != LoopConfig().binding()


def test_the_settings_need_no_torch():
    code = "import sys, offsite.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
