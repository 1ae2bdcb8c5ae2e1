from itertools import pairwise

import pytest
import torch

from emulator.compression.choose import by_clusters, by_influence, measure_influences, measure_similarities, uniform
from offsite.errors import ConfigError


def test_uniform_keeps_first_and_last_and_is_even() -> None:
    for num_middle in range(2, 129):
        for num_kept in range(2, num_middle + 1):
            chosen = uniform(num_middle, num_kept)
            gaps = [after - before for before, after in pairwise(chosen)]
            assert len(chosen) == num_kept
            assert (chosen[0], chosen[-1]) == (0, num_middle - 1)
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 2


def test_uniform_is_the_papers_choice() -> None:
    # arXiv:2302.04870: OPT-6.7B with two blocks at either end, 18 of the 28 between them
    whole = [0, 1, 2, 4, 5, 7, 8, 10, 12, 13, 15, 16, 18, 19, 21, 23, 24, 26, 27, 29, 30, 31]
    chosen = [0, 1, *(2 + i for i in uniform(28, 18)), 30, 31]
    assert chosen[:6] == whole[:6]
    assert chosen[-3:] == whole[-3:]
    assert chosen == [0, 1, *(2 + round(i * 27 / 17) for i in range(18)), 30, 31]


def test_all_blocks_are_all_blocks() -> None:
    assert uniform(7, 7) == by_influence([0.0] * 7, 7) == tuple(range(7))
    assert uniform(1, 1) == by_influence([0.5], 1) == (0,)


@pytest.mark.parametrize(("num_middle", "num_kept"), [(5, 6), (5, 1), (5, 0), (1, 0), (2, 1)])
def test_impossible_counts_are_refused(num_middle: int, num_kept: int) -> None:
    with pytest.raises(ConfigError, match=f"{num_kept}.*{num_middle}|{num_middle}.*{num_kept}"):
        uniform(num_middle, num_kept)
    with pytest.raises(ConfigError):
        by_influence([1.0] * num_middle, num_kept)


def test_influence_keeps_the_largest_and_both_edges() -> None:
    assert by_influence([0.0, 0.3, 0.1, 0.9, 0.2, 0.0], 4) == (0, 1, 3, 5)
    assert by_influence([0.0, 0.5, 0.5, 0.5, 0.0], 3) == (0, 1, 4)


def test_measured_influence_is_one_minus_cosine_without_padding(tiny, batch) -> None:
    model = tiny("llama")
    blocks = list(model.model.layers)
    states = model.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    found = measure_influences(model, blocks[1:3], [batch, batch])
    for number, influence in zip((1, 2), found, strict=True):
        cosine = torch.cosine_similarity(states[number], states[number + 1], dim=-1)
        assert influence == pytest.approx(float((1 - cosine)[batch["attention_mask"].bool()].mean()), rel=1e-5)


def test_a_block_that_does_nothing_is_dropped_first(tiny, batch) -> None:
    model = tiny("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        torch.nn.init.zeros_(model.model.layers[2].get_submodule(name).weight)
    found = measure_influences(model, list(model.model.layers), [batch])
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert by_influence(found, 5) == (0, 1, 3, 4, 5)


def test_influence_needs_text(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="public text"):
        measure_influences(model, list(model.model.layers), [])


def merged_step_by_step(similarities: list[float], num_kept: int) -> tuple[int, ...]:
    """The paper's loop as it is told: merge the two neighbouring clusters whose touching blocks are most alike."""
    clusters = [[block] for block in range(len(similarities) + 1)]
    while len(clusters) > num_kept:
        touching = [similarities[left[-1]] for left, _ in pairwise(clusters)]
        at = touching.index(max(touching))
        clusters[at : at + 2] = [clusters[at] + clusters[at + 1]]
    return tuple(cluster[len(cluster) // 2] for cluster in clusters)


def test_clusters_merge_where_neighbours_are_most_alike() -> None:
    assert by_clusters([0.9, 0.8, 0.1, 0.9, 0.2], 3) == (1, 4, 5)
    generator = torch.Generator().manual_seed(2)
    for num_middle in range(2, 20):
        for num_kept in range(2, num_middle + 1):
            similarities = torch.randint(5, (num_middle - 1,), generator=generator).double().tolist()  # with equals
            found = by_clusters(similarities, num_kept)
            assert found == merged_step_by_step(similarities, num_kept)
            assert len(found) == num_kept


def test_impossible_clusters_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep 1 of 4"):
        by_clusters([0.5, 0.5, 0.5], 1)
    with pytest.raises(ConfigError, match="keep 5 blocks of the middle, which has 4"):
        by_clusters([0.5, 0.5, 0.5], 5)


def test_measured_similarity_is_linear_cka_of_rows_weighed_by_position(tiny, batch) -> None:
    """Against the formula on the features themselves: |Y'X|^2 / (|X'X| |Y'Y|), columns centred."""
    model = tiny("llama")
    ids = torch.randint(3, 128, (6, 12), generator=torch.Generator().manual_seed(4))
    texts = [batch, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    rows = []
    for text in texts:
        states = model.model(**text, output_hidden_states=True, use_cache=False).hidden_states
        for row, mask in enumerate(text["attention_mask"]):
            num = int(mask.sum())
            weight = torch.arange(1, num + 1, dtype=torch.float64)
            rows.append([(weight @ one[row, :num].double()) / weight.sum() for one in states[2:5]])
    features = [torch.stack(one) - torch.stack(one).mean(0) for one in zip(*rows, strict=True)]
    wanted = [float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())) for x, y in pairwise(features)]
    found = measure_similarities(model, list(model.model.layers)[1:4], texts)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert all(0 < one < 1 for one in found)
    with pytest.raises(ConfigError, match="at least two rows"):
        measure_similarities(model, list(model.model.layers)[1:4], [{k: v[:1] for k, v in batch.items()}])
    with pytest.raises(ConfigError, match="at least two rows"):
        measure_similarities(model, list(model.model.layers)[1:4], [])
