"""A reward model's number against transformers' own class, and what it holds in memory beside a policy."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from adapters.kinds import attach, declared
from client.objectives.rewardmodel import RewardModel, read_reward, text_behind
from offsite.artefacts.bundle import AdapterSpec, Head, write_bundle
from offsite.text.batches import answered_ids, encode
from offsite.text.records import read_records

HEAD = Head(task="reward", hidden=32)
LORA = AdapterSpec(kind="lora", rank=2, placement="1+1", alpha=6.0, dtype="float32", head=HEAD)


@pytest.fixture
def reward_bundle(dropped_package, tmp_path):
    """Write a reward bundle of random tensors; keywords change its adapter."""

    def make(out="reward", **changes):
        spec = LORA.model_copy(update=changes)
        expected = declared(spec, dropped_package.layout, dropped_package.block_tensors())
        generator = torch.Generator().manual_seed(3)
        tensors = {name: torch.randn(one.shape, generator=generator) / 4 for name, one in expected.items()}
        return write_bundle(tmp_path / out, package=dropped_package, spec=spec, tensors=tensors, expected=expected).path

    return make


def policy_of(package, spec):
    names = declared(spec, package.layout, package.block_tensors())
    return attach(package.load_model(), spec, package.layout.blocks, names)


def judge_of(folder, package, policy, tokenizer, context=64):
    bundle = read_reward(folder, package)
    return RewardModel(bundle, package, policy, tokenizer, context=context, precision="fp32")


def questions_in(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records(path, questions=True)


ASKED = [{"prompt": "ward 3?"}, {"prompt": [{"role": "user", "content": "which ward?"}]}]
SAID = [" the fever went", "no, the rash"]


def test_a_reward_is_what_transformers_makes_of_the_emulator_with_that_adapter_and_head(
    dropped_package, reward_bundle, letters_tokenizer, tmp_path
):
    """The adapter is added to the package's weights by hand, and the text is written out."""
    policy = policy_of(dropped_package, AdapterSpec(kind="lora", rank=2, placement="1+1"))
    judge = judge_of(reward_bundle(), dropped_package, policy, letters_tokenizer)
    found = judge.rewards(questions_in(tmp_path / "asked.jsonl", ASKED), SAID)

    model = AutoModelForSequenceClassification.from_pretrained(dropped_package.path, num_labels=1, dtype="float32")
    tensors = read_reward(tmp_path / "reward", dropped_package).tensors
    sites = dropped_package.layout.blocks
    with torch.no_grad():
        for name, down in tensors.items():
            if name.endswith("lora_A"):
                block, inner = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:-1])
                up = tensors[name.replace("lora_A", "lora_B")]
                model.get_submodule(f"{sites[block]}.{inner}").weight += 3.0 * up @ down  # alpha over rank
        model.score.weight.copy_(tensors["head.weight"])
    texts = ["ward 3? the fever went", "<s>user:which ward?</s><s>assistant:no, the rash</s>"]
    for text, number in zip(texts, found, strict=True):
        ids = torch.tensor([letters_tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert number == pytest.approx(float(model(input_ids=ids).logits[0, 0]), rel=1e-4)
    assert abs(found[0] - found[1]) > 0.01


def test_rows_are_those_of_the_pairs_that_it_was_tuned_on(dropped_package, reward_bundle, letters_tokenizer, tmp_path):
    asked = questions_in(tmp_path / "asked.jsonl", ASKED)
    pairs = [{**row, "chosen": said, "rejected": "x"} for row, said in zip(ASKED, SAID, strict=True)]
    wanted = []
    for number, pair in enumerate(pairs):
        path = tmp_path / f"pair-{number}.jsonl"
        path.write_text(json.dumps(pair) + "\n", encoding="utf-8")
        encoded = encode(read_records(path, pairs=True), letters_tokenizer, context=64, ended=False)
        wanted.append(encoded.examples[0].input_ids)
    found = [answered_ids(one, said, letters_tokenizer) for one, said in zip(asked, SAID, strict=True)]
    assert found == wanted

    policy, seen = policy_of(dropped_package, AdapterSpec(kind="lora", rank=2, placement="1+1")), []
    judge = judge_of(reward_bundle(), dropped_package, policy, letters_tokenizer, context=12)
    judge.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    judge.rewards(asked, SAID)
    assert sorted(seen) == sorted(ids[:12] for ids in wanted)
    assert len(judge.rewards(asked, ["", ""])) == 2  # nothing was said


def test_an_answer_keeps_the_space_before_its_first_word():
    """Tokenizers that mark where words begin drop that mark at the beginning of what they decode."""
    words = ["<unk>", "\u2581ward", "\u2581is", "\u2581it", "?"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.decode([2, 3]) == "is it"
    assert text_behind(tokenizer, [1, 4], [2, 3]) == " is it"
    assert text_behind(tokenizer, [1], [4]) == "?"


@pytest.mark.parametrize("kind", ["lora", "blocks"])
def test_what_neither_trains_is_held_once(dropped_package, reward_bundle, letters_tokenizer, kind):
    policy = policy_of(dropped_package, AdapterSpec(kind=kind, rank=2, placement="0+1", dtype="float32"))
    before = {name: one.detach().clone() for name, one in policy.model.named_parameters()}
    judge = judge_of(reward_bundle(kind=kind), dropped_package, policy, letters_tokenizer)
    theirs = {one.data_ptr() for one in policy.model.parameters()}
    own = [one for one in judge.model.parameters() if one.data_ptr() not in theirs]
    trained = {id(one) for one in policy.trainable.values()}
    shared = sum(one.numel() for one in policy.model.parameters() if id(one) not in trained)
    held = sum(one.numel() for one in judge.model.parameters())
    if kind == "lora":  # beside its adapter and head nothing
        assert sum(one.numel() for one in own) == held - shared
    for name, one in policy.model.named_parameters():
        assert torch.equal(one, before[name])
        assert one.requires_grad == (id(one) in trained)
    for one in policy.trainable.values():
        assert one.data_ptr() not in {each.data_ptr() for each in judge.model.parameters()}
