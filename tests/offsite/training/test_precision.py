"""Which arithmetic "auto" is: timed once, kept by whoever goes on, one answer for all that is compared."""

from __future__ import annotations

import pytest
import torch

from offsite.errors import ConfigError
from offsite.training import precision as module
from offsite.training.checkpoints import State, write_checkpoint
from offsite.training.precision import CLEARLY, settled, speedup, uses_bf16
from offsite.training.processes import world

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch):
    """Return a function that makes bfloat16 so many times as fast, on a processor that has it; it counts timings."""
    calls: list[bool] = []

    def make(ratio, **capabilities):
        given = capabilities or {"avx512_bf16": True, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: given, raising=False)

        def seconds(is_bf16):
            calls.append(is_bf16)
            return 0.03 / ratio if is_bf16 else 0.03

        monkeypatch.setattr(module, "_seconds", seconds)
        module._measured.cache_clear()
        return calls

    yield make
    module._measured.cache_clear()


def test_auto_is_bf16_only_where_it_is_clearly_faster_and_times_once(timed) -> None:
    calls = timed(CLEARLY + 0.01)
    assert uses_bf16("auto", CPU)
    num = len(calls)
    assert uses_bf16("auto", CPU)
    assert len(calls) == num
    timed(CLEARLY - 0.01)
    assert not uses_bf16("auto", CPU)
    assert uses_bf16("bf16", CPU)
    calls = timed(5.0, avx2=True, amx_bf16=False)
    calls.clear()
    assert not uses_bf16("auto", CPU), "without an instruction nothing is timed"
    assert not uses_bf16("fp32", CPU)
    assert not calls


def test_one_disturbed_turn_decides_nothing(timed) -> None:
    timed(1.0)
    turns = iter([1.0, 1.0, 1.0, 1.0, 50.0, 1.0, 1.0, 1.0])  # warming up, then three turns of two
    assert speedup(lambda _: next(turns)) == 1.0
    assert next(turns, None) is None


def test_the_product_that_is_timed_takes_time() -> None:
    assert module._seconds(False) > 0
    assert module._seconds(True) > 0


def test_a_gpu_without_bf16_refuses_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert not uses_bf16("auto", torch.device("cuda"))
    with pytest.raises(ConfigError, match="no bf16"):
        uses_bf16("bf16", torch.device("cuda"))


def test_a_run_that_is_gone_on_with_keeps_its_own(timed, tmp_path, capsys) -> None:
    timed(5.0)
    assert settled("auto", CPU) == "bf16"
    assert "arithmetic: bf16; one product ran 5.0 times as fast in bf16" in capsys.readouterr().err
    work = tmp_path / "work"
    work.mkdir()
    write_checkpoint(work, State(settings={"precision": "fp32"}, step=1), {}, {}, with_best=False)
    assert settled("auto", CPU, works=[tmp_path / "none", work]) == "fp32"
    assert capsys.readouterr().err.startswith("arithmetic: fp32; as before")
    assert settled("bf16", CPU, works=[work]) == "bf16", "what is asked for is the loop's to compare"
    assert settled("auto", CPU, stated="fp32") == "fp32"
    assert capsys.readouterr().err.startswith("arithmetic: fp32; as before")


def test_a_note_is_everybodys_answer(timed, tmp_path) -> None:
    note = tmp_path / "stages" / "precision"
    timed(5.0)
    assert settled("auto", CPU, note=note) == "bf16"
    timed(0.5)
    assert settled("auto", CPU, note=note) == "bf16"
    assert settled("auto", CPU) == "fp32"


def test_other_processes_take_the_main_ones_answer(timed, monkeypatch) -> None:
    calls = timed(0.5)

    class Other(type(world())):
        def from_main(self, _value):
            return 1.0

    monkeypatch.setattr(module, "world", lambda: Other(1, 2, CPU, False))
    assert settled("auto", CPU) == "bf16"
    assert not calls, "only the main one times"
