"""Distilling encoders: masks are BERT's, scores are those of transformers' masked-token models, and it is learnt."""

from __future__ import annotations

import json

import pytest
import torch
from encoders_lab import CHANGES, saved, separating_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import emulator.distillation.imitation as module
from emulator.distillation.masked import MASKED, SHARE, MaskedBatches, MaskedHead, Masking, Masks, scored
from emulator.distillation.objective import Pair
from offsite import cli
from offsite.artefacts.package import open_package
from offsite.encoders.outputs import outputs
from offsite.encoders.trunk import is_encoder
from offsite.errors import RunFailed
from offsite.modelling.load import load_masked_head, load_model
from offsite.modelling.split import extract, make_plan
from offsite.text.batches import Example

MASK = 259
MASKING = Masking(mask_id=MASK, special_ids=(0, 1, 2, MASK), num_tokens=260, seed=3)


def test_masks_are_drawn_as_berts_are():
    """15 % of what is neither special nor padding; of them 80 % the mask, 10 % another token, 10 % as they were."""
    ids = torch.randint(3, 259, (64, 128), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 99] = 1, 2
    mask = torch.ones_like(ids)
    mask[:, 100:], ids[:, 100:] = 0, 0
    found = MASKING.masked({"input_ids": ids, "attention_mask": mask}, "train/7")
    chosen, changed = found[MASKED], found["input_ids"] != ids
    assert not (changed & ~chosen).any()
    assert not chosen[:, [0, 99, *range(100, 128)]].any()
    assert float(chosen[:, 1:99].float().mean()) == pytest.approx(SHARE, abs=0.01)
    became = found["input_ids"][chosen]
    assert float((became == MASK).float().mean()) == pytest.approx(0.8, abs=0.03)
    others = became[(became != MASK) & changed[chosen]]
    assert len(others) / len(became) == pytest.approx(0.1, abs=0.03)
    assert not torch.isin(others, torch.tensor(MASKING.special_ids)).any()
    again = MASKING.masked({"input_ids": ids, "attention_mask": mask}, "train/7")
    assert all(torch.equal(found[key], again[key]) for key in found)
    assert not torch.equal(found[MASKED], MASKING.masked({"input_ids": ids}, "train/8")[MASKED])


def test_every_row_has_something_to_say():
    ids = torch.tensor([[1, 5, 2, 0], [1, 2, 0, 0], [7, 8, 9, 10]])
    mask = (ids != 0).long()
    for step in range(20):
        chosen = MASKING.masked({"input_ids": ids, "attention_mask": mask}, str(step))[MASKED]
        assert chosen.any(1).all()
        assert not (chosen & (mask == 0)).any()
        assert chosen[0].tolist() == [False, True, False, False]


def test_batches_are_a_function_of_the_step():
    rows = [Example(list(range(3, 3 + length)), list(range(3, 3 + length))) for length in (5, 9, 7, 12)]
    one, two = (MaskedBatches(rows, batch_size=2, seed=1, pad_id=0, masking=MASKING) for _ in range(2))
    for step in (5, 0):
        assert torch.equal(one.batch(step)["input_ids"], two.batch(step)["input_ids"])
    later = MaskedBatches(rows, batch_size=2, seed=1, pad_id=0, masking=MASKING, first_step=2)
    assert torch.equal(later.batch(3)[MASKED], one.batch(5)[MASKED])


@pytest.mark.parametrize("name", [*CHANGES, "deberta-v2 of today"])
def test_scores_are_those_of_transformers(name, tmp_path):
    family, changes = (name.split()[0], {"legacy": False}) if " " in name else (name, {})
    folder = saved(tmp_path / "model", family, separating_tokenizer(), **changes)
    whole = AutoModelForMaskedLM.from_pretrained(folder).eval()
    trunk = load_model(str(folder), encoders=True)
    head = MaskedHead(load_masked_head(str(folder)))
    ids = torch.randint(5, 259, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits
        states = outputs(trunk, ids, torch.ones_like(ids))
        torch.testing.assert_close(head(states[1]), wanted[1], atol=1e-5, rtol=1e-4)


def test_the_loss_is_that_of_two_whole_passes(tmp_path):
    """KL of the masked tokens through both whole models, and its gradient; hidden states at every token."""
    folder = saved(tmp_path / "bert", "bert", separating_tokenizer(), vocab_size=260)
    full = load_model(str(folder), encoders=True)
    plan = make_plan(full, num_bottom=1, num_top=1)
    kept = (0, 1, 4, 5)
    emulator = extract(full, {plan.stack.name: kept})
    theirs, mine = (AutoModelForMaskedLM.from_pretrained(folder).eval() for _ in range(2))
    mine.bert.encoder.layer = torch.nn.ModuleList(mine.bert.encoder.layer[number] for number in kept)
    ids = torch.randint(3, 259, (3, 16), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = MASKING.masked({"input_ids": ids, "attention_mask": mask}, "x")
    weight = emulator.encoder.layer[1].output.dense.weight.requires_grad_(True)
    with scored(Masks(MASKING, MaskedHead(load_masked_head(str(folder)))), (full, emulator)):
        terms = Pair(full, emulator, plan, kept)(batch, 0.25)
    assert "before_head" not in vars(full)
    with torch.no_grad():
        wanted = theirs(input_ids=batch["input_ids"], attention_mask=mask).logits.log_softmax(-1)[batch[MASKED]]
    own = mine.bert.encoder.layer[1].output.dense.weight
    said = mine(input_ids=batch["input_ids"], attention_mask=mask).logits.log_softmax(-1)[batch[MASKED]]
    kl = (wanted.exp() * (wanted - said)).sum(-1).mean() * mask.sum()
    torch.testing.assert_close(terms.kl, kl, rtol=1e-4, atol=1e-5)
    (found,), (expected,) = torch.autograd.grad(terms.kl, [weight]), torch.autograd.grad(kl, [own])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float(terms.hidden.detach()) > 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint with its masked-token head, one without, and public text."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = separating_tokenizer(with_mask=True)
    saved(folder / "masked", "bert", tokenizer, vocab_size=260)
    saved(folder / "bare", "bert", tokenizer, head="classifier", vocab_size=260)
    organs, beings = ("heart", "liver", "lung", "eye"), ("cats", "dogs", "people")
    lines = [f"The {a} of {b} is known by its {c}." for a in organs for b in beings for c in "abcdefgh"]
    (folder / "public.txt").write_text("\n\n".join(lines))
    return folder


def distil(world, model, out, *words, code=0):
    stated = "--bottom 1 --top 1 --block-tokens 32 --batch-size 8 --device cpu --precision fp32 --holdout 0.2"
    stated += " --method drop --blocks 2 --learning-rate 3e-3 --warmup-steps 2 --evaluate-every 10"
    public = ["--public", str(world / "public.txt")]
    assert cli.run(["distill", str(world / model), "-o", str(out), *public, *stated.split(), *words]) == code


@pytest.mark.parametrize(
    ("model", "figure", "said"),
    [("masked", "held_out_masked_kl", ""), ("bare", "held_out_hidden_error", "has no masked-token head")],
)
def test_an_encoder_learns_and_says_what_was_matched(world, model, figure, said, tmp_path, capsys):
    distil(world, model, tmp_path / "package", "--steps", "20")
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert (f"hidden states alone are matched: the checkpoint {said}" in err) == bool(said)
    assert told["final_loss"] < 0.75 * told["first_loss"]
    assert told["best_loss"] < told["evaluations"][0][1]
    assert told["best_loss"] == told[figure]
    package = open_package(tmp_path / "package")
    stated = {"distillation_steps", "distillation_tokens", "held_out_hidden_error", figure}
    assert set(package.manifest.figures) == stated
    assert is_encoder(package.load_model())
    assert not any(name.startswith("cls") for name in load_file(tmp_path / "package" / "model.safetensors"))


def test_a_run_goes_on_as_it_was(world, tmp_path, monkeypatch, capsys):
    words = ("--steps", "6", "--checkpoint-every", "2")
    distil(world, "masked", tmp_path / "unbroken", *words)
    plain, calls = module.step_loss, iter(range(1, 100))

    def breaking(weights):
        loss = plain(weights)

        def broken(pair, batch):
            if next(calls) == 4:
                raise RunFailed("the power went")
            return loss(pair, batch)

        return broken

    with monkeypatch.context() as patch:
        patch.setattr(module, "step_loss", breaking)
        distil(world, "masked", tmp_path / "package", *words, code=5)
    capsys.readouterr()
    distil(world, "masked", tmp_path / "package", *words, "--resume")
    assert open_package(tmp_path / "package").digest == open_package(tmp_path / "unbroken").digest
