import subprocess
import sys
from pathlib import Path

import pytest

from emulator.distillation.config import DistillConfig
from offsite.config import build
from offsite.errors import ConfigError

GOOD = {"model": "m", "output": "out", "public": "text.txt"}


def test_defaults_are_width_with_distillation() -> None:
    config = build(DistillConfig, flags=GOOD)
    assert (config.method, config.width, config.channels, config.blocks) == ("width", 0.33, "obs", None)
    assert (config.bottom, config.top, config.public) == (2, 2, (Path("text.txt"),))
    assert config.steps > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "drop", "blocks": "8"},
        {"method": "drop", "blocks": "8", "choice": "influence", "steps": "0"},
        {"method": "drop", "blocks": "8", "steps": "0", "public": None},
        {"method": "keep-all", "steps": "0", "public": None},
        {"method": "width", "width": "1", "steps": "0"},
        {"channels": "activation", "refit": "false"},
        {"learning_rate": "1e-3", "kl_weight": "0"},
        {"method": "drop", "blocks": "8", "choice": "crash", "steps": "0"},
        {"channels": "gradot", "gradot_lambda": "0.5", "refit": "false"},
        {"elevate": "2", "elevate_steps": "10"},
        {"refit_jacobian": "0.1", "width": "0.5", "wider": "2-8:0.67, 12:1"},
        {"variant": "3", "variant_noise": "1", "channels": "activation"},
    ],
)
def test_what_goes_together(changes: dict[str, str | None]) -> None:
    flags = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    assert build(DistillConfig, flags=flags).model == "m"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"public": None}, "--public is missing: --steps above 0 and method width need public text"),
        ({"public": None, "steps": "0"}, "--public is missing: method width needs public text"),
        ({"public": None, "steps": "0", "method": "drop", "blocks": "3", "choice": "influence"}, "--choice influence"),
        ({"method": "drop"}, "--blocks is missing"),
        ({"method": "drop", "blocks": "3", "width": "0.5"}, "--width belongs to method width, not to drop"),
        ({"method": "drop", "blocks": "3", "channels": "obs"}, "--channels belongs to method width, not to drop"),
        ({"refit": "false"}, "--channels obs leaves out what refitting makes up for"),
        ({"refit_jacobian": "0.1", "channels": "activation"}, "--refit-jacobian chooses and refits at once"),
        ({"method": "drop", "blocks": "3", "refit_jacobian": "0.1"}, "--refit-jacobian belongs to method width"),
        ({"method": "drop", "blocks": "3", "variant": "1"}, "--variant belongs to method width, not to drop"),
        ({"wider": "2-8:0.2"}, "--wider 2-8:0.2: expected a share above --width 0.33"),
        ({"wider": "2-8"}, "'2-8' is not of the form FIRST-LAST:SHARE"),
        ({"wider": "2-8:0.5,8:0.6"}, "block 8 is named already"),
        ({"variant_noise": "1"}, "--variant-noise says how far a --variant strays"),
        ({"gradot_lambda": "1"}, "--gradot-lambda belongs to --channels gradot"),
        ({"channels": "gradot", "refit_jacobian": "1"}, "--refit-jacobian chooses and refits at once"),
        ({"public": None, "steps": "0", "method": "drop", "blocks": "3", "choice": "crash"}, "--choice crash needs"),
        ({"elevate": "2", "steps": "0"}, "--elevate goes on from a distillation in one process"),
        ({"elevate": "2", "launch": "2"}, "--elevate goes on from a distillation in one process"),
        ({"elevate_steps": "5"}, "--elevate-steps belongs to --elevate"),
        ({"variant": "-1"}, "--variant: "),
        ({"blocks": "3"}, "--blocks belongs to method drop, not to width"),
        ({"method": "keep-all"}, "nothing to distil"),
        ({"width": "1"}, "nothing to distil"),
        ({"method": "shrink"}, "unknown method 'shrink', expected one of drop, keep-all, low-rank, packed, width"),
        ({"method": "low-rank", "steps": "1"}, "factors of method low-rank are not distilled, expected 0"),
        ({"method": "low-rank", "steps": "0", "public": None}, "method low-rank needs public text"),
        ({"method": "low-rank", "steps": "0", "width": "0.5"}, "--width belongs to method width, not to low-rank"),
        ({"rank_share": "0.5"}, "--rank-share belongs to method low-rank, not to width"),
        ({"method": "low-rank", "steps": "0", "rank_share": "1.1"}, "--rank-share: "),
        ({"method": "packed", "steps": "0"}, "--pack is missing: method packed packs the middle"),
        ({"method": "packed", "pack": "nf4", "steps": "1"}, "packed leaves nothing to distil, expected 0"),
        ({"method": "keep-all", "steps": "0", "resume": True}, "nothing to resume"),
        ({"method": "keep-all", "pack": "nf4", "steps": "0"}, "to pack it say --method packed"),
        ({"pack": "nf2"}, "--pack: "),
        ({"width": "0"}, "--width: "),
        ({"width": "1.5"}, "--width: "),
        ({"method": "drop", "blocks": "0"}, "--blocks: "),
        ({"method": "drop", "blocks": "2", "steps": "0", "resume": True}, "nothing to resume"),
        ({"hidden_weight": "0", "kl_weight": "0"}, "nothing to learn"),
        ({"top": "0"}, "--top: "),
        ({"model": None}, "MODEL is missing"),
        ({"learning_rate": "fast"}, "--learning-rate: "),
        ({"learning_rate": "inf"}, "--learning-rate: "),
        ({"batch_size": "2", "accumulate": "3"}, "--accumulate 3: a batch of 2 cannot be cut into more parts"),
    ],
)
def test_contradictions_give_one_line(changes: dict[str, object], message: str) -> None:
    flags = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=message) as caught:
        build(DistillConfig, flags=flags)
    assert "\n" not in str(caught.value)


def test_settings_need_no_torch() -> None:
    code = "import sys, emulator.distillation.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
