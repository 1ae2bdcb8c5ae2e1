"""Answers that are written together, against each adapter plugged in alone; who joins, who leaves, who waits."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from row_adapters import adapters_of, fitted
from tiny_architectures import tiny
from transformers import GPT2Config, GPT2LMHeadModel

from offsite.errors import RunFailed
from offsite.generation.generate import Answer, next_tokens
from offsite.generation.sampling import Settings
from server.batching.batch import Batch, Queue, Row
from server.batching.batches import cost_of
from server.batching.cache import RowCache, padded
from server.batching.rows import Rows
from server.plugging.fit import plugged

ENDS = frozenset({2})


class Told(list):
    """What one row was told."""

    @property
    def tokens(self):
        return [piece.token for piece in self]


def batch_of(model, rows, **limits):
    num_layers, bytes_per_token = cost_of(model)
    return Batch(model, rows, num_layers=num_layers, bytes_per_token=bytes_per_token, **limits)


def row(tokenizer, prompt, num, *, adapter=None, tenant="", told=None, **settings):
    settings = Settings(limit_tokens=num, **{"temperature": 0.0, **settings})
    told = Told() if told is None else told
    answer = Answer(tokenizer, prompt, settings, end_ids=ENDS)
    return Row(tuple(prompt), settings, answer, told.append, adapter, tenant), told


def alone(model, adapter, prompt, num):
    """The tokens of today's engine, one request at a time, with the adapter plugged in."""
    found = []
    with plugged(model, adapter) if adapter is not None else nullcontext(model) as one:
        for token in next_tokens(one, prompt, Settings(limit_tokens=num, temperature=0.0)):
            found.append(token)
            if token in ENDS or len(found) == num:
                return found
    raise AssertionError("not reached")


def prompt_of(seed, size):
    return torch.randint(3, 250, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_answer_is_what_its_adapter_gives_alone(full_llama, letters_tokenizer):
    model = copy.deepcopy(full_llama)
    known = adapters_of(model)
    names = [*known, "lora", "none", "blocks"]
    prompts = [prompt_of(seed, 1 + seed * 5 % 23) for seed in range(len(names))]
    lengths = [1 + seed * 7 % 19 for seed in range(len(names))]
    expected = [alone(model, known[name], *one) for name, *one in zip(names, prompts, lengths, strict=True)]
    assert len({tuple(tokens[:1]) for tokens in expected}) > 3
    rows = Rows(model)
    put = {name: None if adapter is None else rows.put_on(adapter) for name, adapter in known.items()}
    batch = batch_of(model, rows, limit_rows=7, prefill_tokens=9)
    made = [
        row(letters_tokenizer, prompt, num, adapter=put[name])
        for name, prompt, num in zip(names, prompts, lengths, strict=True)
    ]
    most = 0
    for one, _ in made:  # they come one after another, and join and leave in the middle of others
        batch.submit(one)
        batch.step()
        most = max(most, len(batch.inside))
    while not batch.is_idle:
        batch.step()
        most = max(most, len(batch.inside))
    assert most == 7
    assert [told.tokens for _, told in made] == expected
    assert batch.num_cache_bytes == 0


def test_an_adapter_that_does_not_mix_is_written_beside_the_others(letters_tokenizer):
    model = tiny("mixtral")
    known = {
        "experts": fitted(model, "blocks", 1, at=(0, 5)),
        "lora": fitted(model, "lora", 2, at=(0, 5)),
        "none": None,
    }
    expected = {name: alone(model, adapter, [7, 8, 9], 6) for name, adapter in known.items()}
    rows = Rows(model)
    put = {name: None if adapter is None else rows.put_on(adapter) for name, adapter in known.items()}
    batch = batch_of(model, rows)
    made = {name: [row(letters_tokenizer, [7, 8, 9], 6, adapter=put[name]) for _ in range(2)] for name in known}
    for pairs in made.values():
        for one, _ in pairs:
            batch.submit(one)
    while not batch.is_idle:
        batch.step()
    assert {name: [told.tokens for _, told in pairs] for name, pairs in made.items()} == {
        name: [tokens, tokens] for name, tokens in expected.items()
    }


def test_a_long_prompt_is_read_in_pieces_and_starves_nobody(full_llama, letters_tokenizer):
    batch = batch_of(full_llama, Rows(full_llama), prefill_tokens=8)
    long, heard_long = row(letters_tokenizer, prompt_of(1, 90), 2)
    short, heard = row(letters_tokenizer, prompt_of(2, 5), 40)
    late, heard_late = row(letters_tokenizer, prompt_of(3, 5), 3)
    batch.submit(long)
    batch.step()
    batch.submit(short)
    batch.submit(late)
    for _ in range(5):
        batch.step()
    assert not heard_long
    assert len(heard) >= 2
    assert len(heard_late) >= 2
    while not batch.is_idle:
        batch.step()
    assert heard_long.tokens == alone(full_llama, None, list(long.prompt), 2)


def test_who_leaves_frees_the_place_before_the_next_token(full_llama, letters_tokenizer):
    batch = batch_of(full_llama, Rows(full_llama), limit_rows=2)
    made = [row(letters_tokenizer, prompt_of(seed, 4), 60) for seed in range(3)]
    for one, _ in made:
        batch.submit(one)
    for _ in range(3):
        batch.step()
    assert [bool(told) for _, told in made] == [True, True, False]
    made[0][0].leave()
    batch.step()
    assert made[0][0] not in batch.inside
    assert made[2][0] in batch.inside
    num = len(made[0][1])
    waiting, heard = row(letters_tokenizer, [5], 5)
    batch.submit(waiting)
    waiting.leave()
    while not batch.is_idle:
        batch.step()
    assert len(made[0][1]) == num
    assert heard == []
    assert [told.tokens for _, told in made[1:]] == [
        alone(full_llama, None, list(one.prompt), 60) for one, _ in made[1:]
    ]


def test_scores_that_are_no_numbers_end_one_row_and_spoil_no_place(full_llama, letters_tokenizer):
    model = copy.deepcopy(full_llama)
    rows = Rows(model)
    bad = fitted(model, "lora", 1)
    broken = rows.put_on(
        type(bad)(bad.spec, {name: torch.full_like(t, torch.nan) for name, t in bad.tensors.items()}, bad.sites)
    )
    batch = batch_of(model, rows, limit_rows=2)
    first, heard_bad = row(letters_tokenizer, prompt_of(1, 9), 5, adapter=broken)
    good, heard = row(letters_tokenizer, prompt_of(2, 4), 12)
    after, heard_after = row(letters_tokenizer, prompt_of(3, 3), 12)
    for one in (first, good, after):
        batch.submit(one)
    while not batch.is_idle:
        batch.step()
    assert [type(one) for one in heard_bad] == [RunFailed]
    assert heard.tokens == alone(full_llama, None, list(good.prompt), 12)
    assert heard_after.tokens == alone(full_llama, None, list(after.prompt), 12)


def test_a_forward_pass_that_fails_ends_its_rows_and_the_next_go_on(full_llama, letters_tokenizer):
    model = copy.deepcopy(full_llama)
    batch = batch_of(model, Rows(model))
    one, heard = row(letters_tokenizer, [5, 6], 4)
    batch.submit(one)

    def fail(*_):
        raise RuntimeError("out of memory\nat great length")

    hook = model.register_forward_pre_hook(fail)
    batch.step()
    hook.remove()
    assert [str(error) for error in heard] == ["the model failed at this batch: out of memory"]
    assert batch.is_idle
    two, again = row(letters_tokenizer, [5, 6], 4)
    batch.submit(two)
    while not batch.is_idle:
        batch.step()
    assert again.tokens == alone(full_llama, None, [5, 6], 4)


def test_the_cache_stays_within_its_bytes(full_llama, letters_tokenizer):
    num_layers, cost = cost_of(full_llama)
    assert (num_layers, cost) == (8, 8 * 2 * 2 * 8 * 4)  # layers, keys and values, heads, width, float32
    limit = 3 * padded(60) * cost
    batch = batch_of(full_llama, Rows(full_llama), limit_bytes=limit)
    assert batch.fits(3 * padded(60))
    assert not batch.fits(3 * padded(60) + 1)
    made = [row(letters_tokenizer, prompt_of(seed, 20), 41) for seed in range(5)]
    made.append(row(letters_tokenizer, prompt_of(9, 70), 20))
    for one, _ in made:
        batch.submit(one)
    most = 0
    while not batch.is_idle:
        batch.step()
        most = max(most, batch.num_cache_bytes)
    assert 0 < most <= limit
    assert all(told[-1].finish for _, told in made)


def test_tenants_join_in_turn(letters_tokenizer):
    queue, order = Queue(), []
    for tenant, num in (("a", 4), ("b", 1), ("c", 2)):
        for _ in range(num):
            queue.add(row(letters_tokenizer, [5], 1, tenant=tenant)[0])
    while (one := queue.next([])) is not None:
        queue.take(one)
        order.append(one.tenant)
    assert "".join(order) == "abcacaa"
    inside = [row(letters_tokenizer, [5], 1, tenant="a")[0]]
    for tenant in "ab":
        queue.add(row(letters_tokenizer, [5], 1, tenant=tenant)[0])
    assert queue.next(inside).tenant == "b"
    assert len(queue) == 2


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("bamba", {}, "recurrent"),
        ("starcoder2", {}, "sliding window"),
        ("mpt", {}, "positions of its tokens"),
        (
            "stablelm",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 1.0,
                }
            },
            "longest text",
        ),
    ],
)
def test_models_whose_state_is_not_kept_row_by_row_are_told(architecture, changes, reason):
    assert reason in cost_of(tiny(architecture, **changes))


def test_a_row_that_others_disturb_is_found_by_trying(full_llama):
    model = copy.deepcopy(full_llama)
    model.model.register_forward_pre_hook(
        lambda _, args, given: (args, {**given, "position_ids": given["position_ids"] + given["position_ids"].max()}),
        with_kwargs=True,
    )
    assert "together" not in cost_of(full_llama)
    assert isinstance(cost_of(full_llama), tuple)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, found: found + found.mean(0))
    assert "change its logits" in cost_of(model)


def test_a_cache_gives_back_what_was_written_in_each_row():
    cache, generator = RowCache(1, torch.device("cpu")), torch.Generator().manual_seed(0)
    cache.reserve(3, 10)
    written = {number: torch.zeros(0, 2, 4) for number in range(3)}
    for rows, lengths in (((0, 1, 2), (3, 1, 5)), ((2, 0), (1, 1)), ((1,), (4,)), ((0, 1, 2), (1, 1, 1))):
        new = torch.randn(len(rows), 2, max(lengths), 4, generator=generator)
        starts = [len(written[number]) for number in rows]
        positions, seen = cache.at(rows, starts, lengths)
        keys, values = cache.past.update(new, -new, 0)
        for at, (number, length) in enumerate(zip(rows, lengths, strict=True)):
            written[number] = torch.cat([written[number], new[at, :, :length].transpose(0, 1)])
            held = len(written[number])
            assert positions[at, :length].tolist() == list(range(held - length, held))
            assert seen[at, 0, length - 1].nonzero().flatten().tolist() == list(range(held))
            assert torch.equal(keys[at, :, :held], written[number].transpose(0, 1))
            assert torch.equal(values[at, :, :held], -written[number].transpose(0, 1))
    cache.swap(0, 2)
    cache.at((2,), (len(written[0]),), (1,))
    keys, _ = cache.past.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert torch.equal(keys[0, :, :-1], written[0].transpose(0, 1))
    cache.clear()
    assert cache.num_bytes == 0


def test_a_draw_that_fails_ends_its_own_answer_alone(full_llama, letters_tokenizer, monkeypatch):
    batch = batch_of(full_llama, Rows(full_llama))
    broken, heard_broken = row(letters_tokenizer, prompt_of(1, 5), 9)
    sound, heard = row(letters_tokenizer, prompt_of(2, 5), 9)

    def fail(_logits):
        raise RuntimeError("probability tensor contains nan")

    monkeypatch.setattr(broken.sampler, "pick", fail)
    for one in (broken, sound):
        batch.submit(one)
    while not batch.is_idle:
        batch.step()
    assert [type(told) for told in heard_broken] == [RunFailed]
    assert heard.tokens == alone(full_llama, None, list(sound.prompt), 9)


def test_the_least_temperature_takes_the_likeliest_token(full_llama, letters_tokenizer):
    batch = batch_of(full_llama, Rows(full_llama))
    one, heard = row(letters_tokenizer, prompt_of(3, 5), 6, temperature=1e-300)
    batch.submit(one)
    while not batch.is_idle:
        batch.step()
    assert heard.tokens == alone(full_llama, None, list(one.prompt), 6)


def test_what_fills_a_row_up_has_no_position_past_the_table(letters_tokenizer):
    torch.manual_seed(0)
    most = 64
    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=most, n_embd=32, n_layer=2, n_head=4)).eval()
    piece = most * 3 // 4
    batch = batch_of(model, Rows(model), prefill_tokens=piece)
    long, heard_long = row(letters_tokenizer, prompt_of(4, most - 2), 2)
    short, heard = row(letters_tokenizer, prompt_of(5, piece // 2), 2)
    batch.submit(long)
    batch.step()  # what is left of it is shorter than the other, beside which it is read
    batch.submit(short)
    while not batch.is_idle:
        batch.step()
    assert heard_long.tokens == alone(model, None, list(long.prompt), 2)
    assert heard.tokens == alone(model, None, list(short.prompt), 2)


def test_caches_of_several_lanes_keep_the_limit_together(letters_tokenizer):
    model = tiny("mixtral")
    rows = Rows(model)
    experts = rows.put_on(fitted(model, "blocks", 1, at=(0, 5)))
    _, bytes_per_token = cost_of(model)
    limit = 8 * padded(20) * bytes_per_token
    batch = batch_of(model, rows, limit_bytes=limit)
    first = [row(letters_tokenizer, [7, 8, 9], 17 if number else 3, adapter=experts)[0] for number in range(8)]
    second = [row(letters_tokenizer, [7, 8, 9], 17)[0] for _ in range(8)]
    for one in [*first, *second]:
        batch.submit(one)
    most = 0
    for number in range(200):
        batch.step()
        most = max(most, batch.num_cache_bytes)
        if number == 2:
            for one in first[1:]:
                one.leave()
        if batch.is_idle:
            break
    assert batch.is_idle
    assert 0 < most <= limit
