import json
import math
from types import SimpleNamespace

import pytest

from emulator.audit.capability import (
    HeldOut,
    floor_by_halves,
    floor_by_public,
    held_out,
    require_same,
    share_kept,
    task_capabilities,
    task_chance,
    task_scores,
    text_capability,
    unigram,
    unigram_loss,
)
from offsite.errors import ConfigError, DataError
from offsite.evaluation.measure import perplexity
from offsite.text.batches import Example, encode, pack
from offsite.text.records import read_records

SETTINGS = {"packed": True, "block_tokens": 41, "limit_tokens": 0, "batch_size": 8}


@pytest.fixture
def text(heldout_speech, tokenizer):
    return held_out(read_records(heldout_speech), tokenizer, **SETTINGS)


def test_a_package_that_keeps_all_keeps_all_skill(speaker, pack_speaker, text, public_speech, tokenizer):
    public = encode(read_records(public_speech), tokenizer, context=64).examples
    full = text.loss(speaker, "full")
    floor = floor_by_public(text, public, 128)
    whole = text.loss(pack_speaker("keep-all").load_model(), "whole")
    assert whole == full < floor
    assert text_capability(text, chance=floor, full=full, emulator=whole).kept == 1
    less = [text.loss(pack_speaker("width", width=width).load_model(), "narrow") for width in (0.75, 0.25)]
    kept = [text_capability(text, chance=floor, full=full, emulator=loss).kept for loss in less]
    assert 1 > kept[0] > kept[1]


def test_text_is_cut_as_evaluate_cuts_it(speaker, heldout_speech, tokenizer, text):
    records = read_records(heldout_speech)
    encoded = encode(records, tokenizer, context=41, whole_text=True)
    expected = perplexity(speaker, pack(encoded.examples, block_tokens=41), batch_size=3, pad_id=0)
    assert text.loss(speaker, "full") == pytest.approx(expected.loss, rel=1e-5)
    assert text.num_tokens == expected.num_tokens
    some = held_out(records, tokenizer, **{**SETTINGS, "limit_tokens": 100})
    assert list(some.examples) == list(text.examples)[:2]
    assert len(held_out(records, tokenizer, **{**SETTINGS, "limit_tokens": 1}).examples) == 1
    rows = held_out(records, tokenizer, **{**SETTINGS, "packed": False})
    assert len(rows.examples) == len(records)


def test_the_unigram_model_is_add_one_smoothed_counts_of_what_counts():
    examples = [Example([1, 2, 2, 3], [-100, 2, 2, -100]), Example([2, 1], [2, 1])]
    logs = unigram(examples, 4)
    assert logs.exp().tolist() == pytest.approx([1 / 7, 2 / 7, 3 / 7, 1 / 7])
    assert unigram_loss(examples, logs) == pytest.approx(-(2 * math.log(3 / 7) + math.log(2 / 7)) / 3)


def test_no_unigram_model_is_better_than_the_floor_by_much(text, public_speech, heldout_speech, tokenizer):
    public = encode(read_records(public_speech), tokenizer, context=64).examples
    by_public = floor_by_public(text, public, 128)
    by_halves = floor_by_halves(text, 128)
    entropy = unigram_loss(text.examples, unigram(text.examples, 128))  # fitted on what it is measured on
    assert entropy <= by_public < entropy + 0.3
    assert by_halves == pytest.approx(by_public, abs=0.2)


def test_halves_are_of_the_tokens_that_are_measured(heldout_speech, tokenizer):
    examples = [Example([1, 2, 2], [-100, 2, 2]), Example([9, 3, 2], [-100, -100, 3])]
    text = HeldOut([Example([0, 9, 2, 2, 3, 3], [9, -100, 2, 2, 3, 3])], 0, 1)
    expected = -(2 * math.log(1 / 6) + 2 * math.log(1 / 6)) / 4  # a half knows nothing of the other's token
    assert floor_by_halves(text, 4) == pytest.approx(expected)
    assert floor_by_halves(HeldOut(examples, 0, 1), 4) == pytest.approx(-(2 * math.log(1 / 5) + math.log(1 / 6)) / 3)
    some = held_out(read_records(heldout_speech), tokenizer, **{**SETTINGS, "limit_tokens": 500})
    whole = held_out(read_records(heldout_speech), tokenizer, **SETTINGS)
    assert floor_by_halves(some, 128) != floor_by_halves(whole, 128)


def test_one_token_has_no_halves():
    with pytest.raises(DataError, match=r"1 token\(s\)"):
        floor_by_halves(HeldOut([Example([1, 2], [1, 2])], 0, 1), 128)


def test_a_model_without_skill_is_refused_and_leaves_nothing_to_withhold(text):
    with pytest.raises(DataError, match=r"has 5.00 nats per token on the held-out text, a unigram model 4.00"):
        text_capability(text, chance=4.0, full=5.0, emulator=6.0)
    assert share_kept(0.25, 0.25, 0.2) == 1
    assert share_kept(4.0, 2.0, 3.0) == 0.5
    assert share_kept(0.25, 0.75, 0.5) == 0.5


def results(**changes):
    values = {"package": "sha256:a", "data": "sha256:b", "num_tokens": 10, "zero_shot": {"once": 8.0}, **changes}
    rows = {"zero_shot": values["zero_shot"], "emulator_tuned": {"0": 10.0, "1": 40.0}, "plugged_in": {"0": 5.0}}
    return SimpleNamespace(
        package=SimpleNamespace(digest=values["package"]),
        data=SimpleNamespace(sha256=values["data"], num_tokens=values["num_tokens"]),
        rows={name: SimpleNamespace(perplexity=SimpleNamespace(values=row)) for name, row in rows.items()},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"package": "sha256:c"}, "measured with another package"),
        ({"data": "sha256:c"}, "measured on another text than --heldout"),
        ({"num_tokens": 11}, "another cut of the text: 11 tokens, here"),
        ({"zero_shot": {"once": 9.0}}, r"the full model measured otherwise: 2.197 nats per token, here 2.079"),
    ],
)
def test_results_of_something_else_are_refused(text, changes, message):
    same = {"package_digest": "sha256:a", "data_sha256": "sha256:b", "text": text, "full": math.log(8.0)}
    tokens = {"num_tokens": text.num_tokens}
    require_same(results(**tokens), **same)
    with pytest.raises(ConfigError, match=message) as caught:
        require_same(results(**{**tokens, **changes}), **same)
    assert "evaluate this package" in caught.value.hint


def test_results_fill_in_what_the_client_and_the_owner_end_up_with(text):
    found = text_capability(text, chance=4.0, full=2.0, emulator=3.0, results=results())
    assert found.emulator_tuned == pytest.approx((math.log(10) + math.log(40)) / 2)
    assert found.plugged_in == pytest.approx(math.log(5))


# --- tasks


@pytest.fixture
def choices(tmp_path):
    path = tmp_path / "riddles.jsonl"
    rows = [
        {"question": f"what {number}", "choices": ["aa", "bb", "cc", "dd"][: 2 + 2 * (number % 2)], "answer": 0}
        for number in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def generated(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"say {n}", "a": "x"}) + "\n" for n in range(3)))
    path = tmp_path / "sums.yaml"
    path.write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 3}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return path


def test_chance_is_one_over_the_choices_and_nothing_for_generated_text(choices, generated, tmp_path):
    assert task_chance(choices, 0) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert task_chance(choices, 1) == 1 / 2
    assert task_chance(generated, 0) == 0
    stated = {"task": "t", "output_type": "multiple_choice", "dataset_kwargs": {"data_files": "riddles.jsonl"}}
    for content, chance in ({"doc_to_choice": ["yes", "no", "maybe"]}, 1 / 3), ({"doc_to_choice": "choices"}, 3 / 8):
        path = tmp_path / "t.yaml"
        path.write_text(json.dumps({**stated, **content}))
        assert task_chance(path, 0) == pytest.approx(chance)
    path.write_text(json.dumps({**stated, "doc_to_choice": "{{a}}"}))
    with pytest.raises(ConfigError, match=r"t\.yaml: does not show how many choices a row has"):
        task_chance(path, 0)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"output_type": "loglikelihood_rolling"}, "output_type loglikelihood_rolling"),
        ({"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "acc"}]}, "loglikelihood_rolling"),
        ({"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}, "bits_per_byte"),
        ({"output_type": "loglikelihood"}, "perplexity"),
        ({"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]}, "perplexity"),
        ({"output_type": "generate_until", "metric_list": [{"metric": "wer", "higher_is_better": False}]}, "wer"),
        ({"output_type": "multiple_choice", "metric_list": [{"metric": "brier_score"}]}, "brier_score"),
    ],
)
def test_tasks_that_are_better_when_lower_are_refused(tmp_path, content, what):
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps({"task": "t", **content}))
    with pytest.raises(ConfigError, match=rf"t\.yaml: .*{what} is better when lower"):
        task_chance(path, 0)


def test_tasks_are_scored_for_both_models(speaker, pack_speaker, tokenizer, choices, generated):
    tasks = [choices, generated]
    full, whole, narrow = (
        task_scores(model, tokenizer, tasks, batch_size=4, limit=0)
        for model in (
            speaker,
            pack_speaker("keep-all").load_model(),
            pack_speaker("width", width=0.25).load_model(),
        )
    )
    assert full == whole
    found = task_capabilities(tasks, full, narrow, limit=0)
    names = [(one.name, one.metric, one.num_rows, one.chance) for one in found]
    assert names == [("riddles", "acc", 6, 0.375), ("riddles", "acc_norm", 6, 0.375), ("sums", "exact_match", 3, 0)]
    assert task_scores(speaker, tokenizer, [], batch_size=4, limit=0) == {}


def test_shares_of_task_scores_and_names_that_are_taken(choices, tmp_path):
    full, emulator = {"riddles": {"acc": 0.875, "num_rows": 6.0}}, {"riddles": {"acc": 0.5, "num_rows": 6.0}}
    (found,) = task_capabilities([choices], full, emulator, limit=0)
    assert found.kept == pytest.approx(0.25)
    (found,) = task_capabilities([choices], {"riddles": {"acc": 0.25, "num_rows": 6.0}}, emulator, limit=0)
    assert found.kept == 1  # no better than chance: nothing is withheld
    with pytest.raises(ConfigError, match="has the name of another figure"):
        task_capabilities([choices], {"perplexity": {"acc": 0.5, "num_rows": 6.0}}, emulator, limit=0)
