import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite.mapped import LEAST_BYTES, let_go

NUM = 4 * LEAST_BYTES


@pytest.fixture
def mapped(tmp_path):
    save_file({"x": torch.arange(NUM, dtype=torch.float32)}, tmp_path / "x.safetensors")
    return load_file(tmp_path / "x.safetensors")["x"]


def resident(tensor):
    """Bytes of the tensor's mapping that are in memory."""
    wanted, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            first, _, end = line.split(" ")[0].partition("-")
            inside = int(first, 16) <= wanted < int(end, 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel says only there whose a page is")
def test_pages_of_a_file_are_let_go_and_read_again(mapped):
    expected = torch.arange(NUM, dtype=torch.float32)
    assert torch.equal(mapped, expected)
    before = resident(mapped)
    assert let_go([mapped]) > mapped.nbytes - 2 * 65536
    assert resident(mapped) < before - mapped.nbytes // 2
    assert torch.equal(mapped, expected)


def test_what_was_written_to_stays(mapped):
    mapped[NUM // 2] = -1.0
    assert let_go([mapped]) == 0
    assert mapped[NUM // 2] == -1.0


def test_memory_of_no_file_and_small_tensors_stay(mapped):
    own = torch.arange(NUM, dtype=torch.float32)
    assert let_go([own, own[:4], mapped[:4], torch.empty(0)]) == 0
    assert torch.equal(own, torch.arange(NUM, dtype=torch.float32))


def test_a_kernel_that_does_not_say_is_asked_for_nothing(mapped, monkeypatch):
    monkeypatch.setattr("offsite.mapped._PAGES", Path("/nowhere"))
    assert let_go([mapped]) == 0
