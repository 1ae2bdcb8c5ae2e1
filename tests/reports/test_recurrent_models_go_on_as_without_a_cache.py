"""Models that mix state spaces with attention said other things when served than when run over the whole text.

What people met: a loop of one's own that hands on `past_key_values` and nothing else. Some models then place every new
token at position 0 and answer wrongly with a straight face; others keep their past under another name and fail.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from recurrent import SHAPES, tiny, uncached

from offsite.evaluation.sampling import continuations
from offsite.generation.generate import next_tokens
from offsite.generation.sampling import Settings
from offsite.modelling import steps
from offsite.modelling.steps import cache_is_right
from server.serving.engine import Engine

PROMPT = [5, 17, 40, 9, 33, 8, 100, 42]
GREEDY = Settings(12, temperature=0)
CACHE_FAILS = {"xlstm"}  # transformers' own generate fails on this model
CACHE_FAILS_IN_BATCHES = {"xlstm", "rwkv"}  # transformers mixes up the rows of rwkv's


@pytest.mark.parametrize("kind", SHAPES)
def test_served_and_sampled_tokens_are_those_of_whole_forwards(kind, capsys):
    model = tiny(kind)
    expected = uncached(model, PROMPT, 12)
    assert len(set(expected)) > 4
    cached = cache_is_right(model)
    assert cached == (kind not in CACHE_FAILS)
    assert list(itertools.islice(next_tokens(model, PROMPT, GREEDY, cached=cached), 12)) == expected
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:], PROMPT[1:4]]
    found = continuations(model, prompts, num_tokens=8, batch_size=2)
    assert found == [uncached(model, prompt, 8) for prompt in prompts]
    assert ("going on without it" in capsys.readouterr().err) == (kind in CACHE_FAILS_IN_BATCHES)


@pytest.mark.parametrize("kind", ["bamba", "mamba", "jamba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sound_cache_is_not_doubted_for_the_noise_of_its_precision(kind, dtype):
    assert cache_is_right(tiny(kind).to(dtype))


def forgetting(model):
    """Make the model's steps start at position 0 each, as loops did that hand on the cache alone."""
    prepare = model.prepare_inputs_for_generation

    def without_positions(*args, **given):
        return {name: value for name, value in prepare(*args, **given).items() if name != "position_ids"}

    model.prepare_inputs_for_generation = without_positions
    return model


def test_a_cache_that_goes_wrong_is_found_at_the_start_and_not_used(letters_tokenizer, capsys):
    model = forgetting(tiny("bamba"))
    expected = uncached(model, PROMPT, 12)
    assert list(itertools.islice(next_tokens(model, PROMPT, GREEDY), 12)) != expected
    engine = Engine(model, letters_tokenizer)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("the cache of this bamba model changes its logits by")
    assert list(itertools.islice(next_tokens(model, PROMPT, GREEDY, cached=engine._cached), 12)) == expected
    assert continuations(model, [PROMPT], num_tokens=12, batch_size=1) == [expected]


def test_the_wrong_positions_of_one_model_are_far_beyond_the_tolerance():
    assert steps._deviation(forgetting(tiny("bamba"))) > 10 * steps.TOLERANCE
