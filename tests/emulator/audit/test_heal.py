import pytest
import torch

from emulator.audit.heal import LORA, healing, mean_loss
from offsite.evaluation.measure import perplexity
from offsite.text.batches import collate, encode
from offsite.text.records import read_records


def test_what_learns(speaker, pack_speaker):
    package = pack_speaker("width", width=0.25)
    model = package.load_model().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    healed, trainable = healing(model, "all", seed=0)
    assert healed is model
    assert {name for name in before if name not in trainable} == {"model.embed_tokens.weight", "lm_head.weight"}
    model = package.load_model().requires_grad_(False)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    healed, trainable = healing(model, "lora", seed=0)
    assert len(trainable) == 2 * 7 * 6
    assert {tensor.shape[0] for name, tensor in trainable.items() if name.endswith("lora_A")} == {LORA.rank}
    with torch.no_grad():
        assert torch.equal(healed(ids).logits, wanted)
    assert [one.requires_grad for one in healed.parameters()].count(True) == len(trainable)


def test_the_loss_is_what_perplexity_measures(speaker, heldout_speech, tokenizer):
    examples = encode(read_records(heldout_speech), tokenizer, context=64).examples[:10]
    batches = [collate(examples[:3], 0), collate(examples[3:], 0)]
    wanted = perplexity(speaker, examples, batch_size=4, pad_id=0).loss
    assert mean_loss(speaker, batches) == pytest.approx(wanted, rel=1e-5)
