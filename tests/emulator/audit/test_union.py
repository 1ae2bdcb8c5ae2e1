import pytest

from emulator.audit.union import held, union_share
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import ConfigError


@pytest.fixture
def record(make_package, tmp_path):
    """Make a package of the llama of eight equal blocks and return its owner's record."""
    numbered = iter(range(100))

    def make(**parts):
        out = tmp_path / str(next(numbered))
        make_package(out, **parts)
        return read_owner_record(owner_record_path(out))

    return make


def test_blocks_unite_by_number(record):
    first, second = record(kept=(0, 1, 2, 5, 6, 7)), record(kept=(0, 1, 3, 5, 6, 7))
    found = union_share([first, second])
    assert (found.num_packages, found.share_single, found.share_union) == (2, 2 / 4, 3 / 4)
    assert union_share([first, first]).share_union == 2 / 4
    assert union_share([first, second, record(kept=(0, 1, 4, 6, 7))]).share_union == 1


def test_an_end_may_reach_into_another_packages_middle(record):
    first, second = record(kept=(0, 1, 2, 6, 7)), record(kept=(0, 1, 2, 3, 5, 6, 7), ends=(4, 2))
    found = union_share([first, second])
    assert (found.share_single, found.share_union) == (1 / 4, 3 / 4)
    swapped = union_share([second, first])  # the middle of the second: blocks 4 and 5
    assert (swapped.share_single, swapped.share_union) == (1 / 2, 1 / 2)


def test_channels_unite_by_number_and_the_rest_of_a_block_once(record, full_llama):
    all_blocks = tuple(range(8))
    first = record(kept=all_blocks, channels={f"middle.{n}": tuple(range(0, 20)) for n in range(4)})
    second = record(kept=all_blocks, channels={f"middle.{n}": tuple(range(10, 40)) for n in range(4)})
    block = full_llama.model.layers[3]
    whole = sum(parameter.numel() for parameter in block.parameters())
    per_channel = 3 * 32  # gate and up in, down out
    assert held(first)[3].per_channel == {("", 0): per_channel}
    found = union_share([first, second])
    assert found.share_single == pytest.approx((whole - 28 * per_channel) / whole)
    assert found.share_union == pytest.approx((whole - 8 * per_channel) / whole)
    dropped = record(kept=(0, 1, 3, 6, 7))  # this one has block 3 whole
    part = (whole - 28 * per_channel) / whole
    assert union_share([first, dropped]).share_union == pytest.approx((3 * part + 1) / 4)


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "opt"])
def test_biases_and_fused_projections_count_by_channel(make_package, tiny, tmp_path, architecture):
    full = tiny(architecture)
    records = []
    for name, kept in {"a": range(0, 24), "b": range(16, 48)}.items():
        numbers = range(full.config.num_hidden_layers)
        channels = {f"middle.{n}": tuple(kept) for n in range(4)}
        make_package(tmp_path / name, model=full, kept=tuple(numbers), channels=channels, ends=(1, 1))
        records.append(read_owner_record(owner_record_path(tmp_path / name)))
    channels = {f"middle.{n}": tuple(range(0, 48)) for n in range(4)}
    make_package(tmp_path / "both", model=full, kept=tuple(range(6)), channels=channels, ends=(1, 1))
    both = read_owner_record(owner_record_path(tmp_path / "both"))
    assert union_share(records).share_union == pytest.approx(union_share([both, both]).share_single, rel=1e-12)


def test_sizes_that_no_record_shows_can_be_given(record):
    first, second = record(kept=(0, 1, 2, 6, 7)), record(kept=(0, 1, 4, 6, 7))
    usual = held(first)[0].num_parameters
    found = union_share([first, second], sizes={number: usual * (6 if number == 3 else 1) for number in range(8)})
    assert found.share_union == pytest.approx(2 / 9)


def test_what_cannot_be_united_is_refused(record, make_package, tiny, tmp_path):
    first = record()
    with pytest.raises(ConfigError, match=r"1 package\(s\), expected at least two"):
        union_share([first])
    make_package(tmp_path / "other", model=tiny("llama"), kept=(0, 1, 2, 4, 5))
    other = read_owner_record(owner_record_path(tmp_path / "other"))
    with pytest.raises(ConfigError, match="different models"):
        union_share([first, other])
