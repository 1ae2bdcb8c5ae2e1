"""A model that learned its canaries by heart is caught, one that never saw them is not."""

from __future__ import annotations

import copy
import math
import random
import string

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offsite.audits.canaries import CanarySet, CanaryText, Secret, candidates_of, records_of, words_of, write_canaries
from offsite.audits.canaryaudit import audit_canaries, canary_examples, score_canaries
from offsite.audits.extraction import exposures, extracted, secret_examples, verbatim
from offsite.audits.gates import plugged_gates
from offsite.errors import ConfigError, DataError
from offsite.text.batches import IGNORED, collate, encode

NUM, TOKENS, NUM_SECRETS = 120, 16, 12
COMMITMENT = "sha256:" + "d" * 64


def make_canaries(seed: int, **changes) -> CanarySet:
    draw = random.Random(seed)
    letters = string.ascii_letters + string.digits + " "
    texts = ["".join(draw.choices(letters, k=TOKENS)) for _ in range(NUM)]
    stated = {
        "nonce": draw.randbytes(32).hex(),
        "package_digest": "sha256:" + "a" * 64,
        "tokens": TOKENS,
        "temperature": 1.0,
        "synthetic": tuple(CanaryText(text=text, included=draw.random() < 0.5) for text in texts),
        "secrets": tuple(
            Secret(
                prefix=f"code of {words_of(draw.randbytes(1))} {n} is",
                secret=words_of(draw.randbytes(4)),
                included=draw.random() < 0.5,
            )
            for n in range(NUM_SECRETS)
        ),
        "num_candidates": 64,
    }
    return CanarySet(**{**stated, **changes})


@pytest.fixture(scope="module")
def canaries() -> CanarySet:
    return make_canaries(1)


@pytest.fixture(scope="module")
def fresh() -> LlamaForCausalLM:
    """A random llama of two blocks that learns quickly; read only."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def overfitted(fresh, letters_tokenizer, canaries):
    """The same after two hundred passes over the included canaries and nothing else."""
    model = copy.deepcopy(fresh).train()
    rows = encode(records_of(canaries), letters_tokenizer, context=128).examples
    num = canaries.num_included
    batches = [collate(rows[:num], 0), collate(rows[num:], 0)]  # short rows and long ones
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(200):
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED
            ).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def audit(canaries, tokenizer, tuned, untuned):
    before = score_canaries(untuned, tokenizer, canaries, label="before", extract=False, batch_size=64)
    after = score_canaries(tuned, tokenizer, canaries, label="after", extract=True, batch_size=64, num_samples=4)
    return audit_canaries(canaries, COMMITMENT, tuned=after, untuned=before, delta=1e-5)


def test_a_model_that_learned_by_heart_is_caught(overfitted, fresh, letters_tokenizer, canaries, capfd):
    found = audit(canaries, letters_tokenizer, overfitted, fresh)
    by_signal = {one.signal: one for one in found.membership}
    assert set(by_signal) == {"loss", "reference", "min-k", "min-k++"}
    assert by_signal["reference"].auc.low > 0.9
    assert by_signal["loss"].auc.low > 0.9
    assert found.bound is not None
    assert found.bound.signal == "reference"
    assert 2.0 < found.bound.epsilon <= found.bound.ceiling
    assert (found.num, found.num_included) == (NUM, canaries.num_included)
    exposure = found.exposure
    assert exposure is not None
    num = len(canaries.planted)
    assert exposure.bits == (6.0,) * num
    assert exposure.most_bits == 6.0
    assert (exposure.num_secrets, exposure.num_extracted_greedy) == (num, num)
    assert exposure.num_extracted_top_k > 0
    assert np.mean(exposure.bits_before) < 3.0
    verdicts = {gate.name: gate.verdict for gate in plugged_gates_of(found, claimed=1.0)}
    assert verdicts == {"epsilon": "failed"}
    assert {gate.verdict for gate in plugged_gates_of(found, claimed=None)} == {"failed"}
    shown = "".join(capfd.readouterr())
    texts = [canary.text for canary in canaries.synthetic] + [secret.secret for secret in canaries.secrets]
    assert not any(text in shown or text in repr(found) for text in texts)


def plugged_gates_of(found, claimed):
    from offsite.audits.record import PluggedAudit

    digest = "sha256:" + "e" * 64
    stated = PluggedAudit(bundle_digest=digest, package_digest=digest, base_digest=digest, canaries=found)
    return plugged_gates(stated, claimed)


def test_a_model_that_never_saw_them_is_not(fresh, letters_tokenizer, canaries):
    shaken = copy.deepcopy(fresh)
    generator = torch.Generator().manual_seed(2)
    for parameter in shaken.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    found = audit(canaries, letters_tokenizer, shaken, fresh)
    (reference,) = [one for one in found.membership if one.signal == "reference"]
    assert reference.auc.low < 0.5 < reference.auc.high
    assert found.bound is not None
    assert found.bound.epsilon < 0.5
    assert found.exposure is not None
    assert found.exposure.num_extracted_greedy == found.exposure.num_extracted_top_k == 0
    assert {gate.verdict for gate in plugged_gates_of(found, claimed=1.0)} == {"passed"}


def test_secrets_that_were_not_learned_have_under_two_bits_on_average(full_llama, letters_tokenizer):
    draw = random.Random(8)
    secrets = tuple(Secret(prefix=f"code {n} is", secret=words_of(draw.randbytes(4)), included=True) for n in range(60))
    canaries = make_canaries(3, secrets=secrets, num_candidates=32)
    bits = exposures(full_llama, letters_tokenizer, canaries, batch_size=64)
    assert bits.shape == (60,)
    assert 0.7 < bits.mean() < 2.4  # log2(e) = 1.44 is expected, with a deviation of 0.19
    assert bits.min() >= 0.0
    assert bits.max() <= 5.0


@torch.no_grad()
def total_loss(model, tokenizer, prefix: str, secret: str) -> float:
    before = tokenizer(prefix)["input_ids"]
    ids = tokenizer(f"{prefix} {secret}")["input_ids"]
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_probs[place - 1, ids[place]]) for place in range(len(before), len(ids)))


def test_exposure_is_the_rank_that_a_loop_finds(full_llama, letters_tokenizer):
    canaries = make_canaries(4, num_candidates=16)
    bits = exposures(full_llama, letters_tokenizer, canaries, batch_size=5)
    for secret, found in zip(canaries.planted, bits, strict=True):
        own = total_loss(full_llama, letters_tokenizer, secret.prefix, secret.secret)
        others = [
            total_loss(full_llama, letters_tokenizer, secret.prefix, other) for other in candidates_of(canaries, secret)
        ]
        assert found == math.log2(16) - math.log2(1 + sum(other < own for other in others))


def test_a_secret_counts_behind_its_prefix_alone(letters_tokenizer):
    (example,) = secret_examples(letters_tokenizer, [("the code is", "acid owl ink jar")])
    assert example.num_loss_tokens == len(" acid owl ink jar")
    assert letters_tokenizer.decode(example.input_ids) == "the code is acid owl ink jar"


def test_draws_find_what_greed_misses(overfitted, letters_tokenizer, canaries):
    planted = canaries.planted
    one = extracted(overfitted, letters_tokenizer, planted, num_samples=0)
    assert (one.num_secrets, one.num_greedy, one.num_top_k) == (len(planted), len(planted), 0)
    told: list[tuple[int, int]] = []
    extracted(overfitted, letters_tokenizer, planted, num_samples=3, progress=lambda *seen: told.append(seen))
    assert told[-1] == (4 * len(planted), 4 * len(planted))
    never = [secret for secret in canaries.secrets if not secret.included]
    assert extracted(overfitted, letters_tokenizer, never, num_samples=3).num_top_k == 0
    assert extracted(overfitted, letters_tokenizer, [], num_samples=3).num_secrets == 0


def test_rows_that_come_back_word_for_word(overfitted, fresh, letters_tokenizer, canaries):
    rows = encode(records_of(canaries)[canaries.num_included :], letters_tokenizer, context=128).examples
    others = canary_examples(fresh, letters_tokenizer, canaries)[:3]
    settings = {"prefix_tokens": 20, "continuation_tokens": 20}
    assert verbatim(overfitted, [*rows, *others], **settings).tolist() == [True] * len(rows)
    assert verbatim(fresh, [*rows, *others], **settings).tolist() == [False] * len(rows)
    assert verbatim(fresh, others, **settings).shape == (0,)
    with pytest.raises(ConfigError, match="at least 1 of both"):
        verbatim(fresh, rows, prefix_tokens=0, continuation_tokens=1)


def test_coins_all_on_one_side_tell_nothing(full_llama, letters_tokenizer):
    texts = tuple(CanaryText(text=f"text {n}", included=True) for n in range(3))
    found = audit(make_canaries(5, synthetic=texts, secrets=()), letters_tokenizer, full_llama, full_llama)
    assert (found.num, found.num_included, found.membership, found.bound, found.exposure) == (3, 3, (), None, None)


def test_the_same_model_twice_tells_nothing(fresh, letters_tokenizer, canaries):
    found = audit(canaries, letters_tokenizer, fresh, fresh)
    (reference,) = [one for one in found.membership if one.signal == "reference"]
    assert reference.auc.value == 0.5
    assert found.bound is not None
    assert found.bound.epsilon == 0.0


def test_long_canaries_are_cut_and_long_secrets_refused(full_llama, letters_tokenizer, tmp_path):
    long = make_canaries(6, tokens=500, synthetic=(CanaryText(text="ab" * 400, included=True),))
    write_canaries(tmp_path / "canaries", long)
    (example,) = canary_examples(full_llama, letters_tokenizer, long)
    assert len(example.input_ids) == 128
    prefix = Secret(prefix="a" * 120, secret=words_of(bytes(4)), included=True)
    with pytest.raises(DataError, match="the model's context is 128"):
        exposures(full_llama, letters_tokenizer, make_canaries(7, secrets=(prefix,)))
    with pytest.raises(DataError, match="the model's context is 128"):
        extracted(full_llama, letters_tokenizer, [prefix], num_samples=1)
