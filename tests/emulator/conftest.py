"""Tiny random models of every architecture that `width` treats, a tokenizer to go with them, and public text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emulator.compression.compress import Recipe, compress
from emulator.distillation.publish import publish
from offsite.artefacts.package import Package
from offsite.digests import model_digest
from offsite.modelling.split import make_plan
from offsite.text.batches import collate, encode
from offsite.text.records import read_records

VOCABULARY = 128
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": _PLAIN,
    "mistral": {**_PLAIN, "sliding_window": 8},
    "qwen2": {**_PLAIN, "tie_word_embeddings": True},
    "qwen3": _PLAIN,
    "gemma2": {**_PLAIN, "sliding_window": 8},
    "gemma3_text": {**_PLAIN, "sliding_window": 8},
    "phi": {**_PLAIN, "num_key_value_heads": 4},
    "phi3": _PLAIN,
    "gpt2": {**_COMMON, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64},
    "gpt_neox": {key: value for key, value in _PLAIN.items() if key not in {"num_key_value_heads", "head_dim"}},
    "opt": {
        **_COMMON,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "bloom": {**_COMMON, "hidden_size": 32, "n_layer": 6, "n_head": 4},
    "olmo2": _PLAIN,
    "mixtral": {**_PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bitnet": {key: value for key, value in _PLAIN.items() if key != "head_dim"},
}


def _tiny(architecture: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**{**ARCHITECTURES[architecture], **changes})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than a fresh model's, so that every block matters
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Make a tiny random model of an architecture, with changed settings if wanted."""
    return _tiny


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, the second padded after 9."""
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 9:], mask[1, 9:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character: 3 special tokens and 97 others."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(characters)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint of a tiny llama of six blocks, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    _tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def public_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents with something to learn in them."""
    path = tmp_path_factory.mktemp("text") / "public.txt"
    words = ["blue", "cold", "deep", "fast", "green", "high", "iron", "just"]
    lines = [" ".join(words[(i * 3 + j * j) % 8] for j in range(12)) for i in range(40)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- a model with something to say, for audits of packages


@pytest.fixture(scope="session")
def speaker() -> PreTrainedModel:
    """A tiny random llama that is sure of what comes next, so that text drawn from it is text it is good at."""
    model = _tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
    return model


@pytest.fixture(scope="session")
def speaker_folder(
    tmp_path_factory: pytest.TempPathFactory, speaker: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The checkpoint of `speaker`, with its tokenizer."""
    folder = tmp_path_factory.mktemp("speaker") / "speaker"
    speaker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def speech(
    tmp_path_factory: pytest.TempPathFactory, speaker: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """Write documents of 40 characters, 41 tokens with their end, that `speaker` said, one a row."""

    @torch.no_grad()
    def say(num: int, seed: int) -> Path:
        generator = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(4, 99, (num, 1), generator=generator)
        for _ in range(39):
            logits_BV = speaker(ids_BT).logits[:, -1, 4:99]
            ids_BT = torch.cat([ids_BT, 4 + torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)], 1)
        path = tmp_path_factory.mktemp("speech") / "speech.jsonl"
        rows = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in ids_BT.tolist()]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
        return path

    return say


@pytest.fixture(scope="session")
def heldout_speech(speech: Callable[..., Path]) -> Path:
    """Sixty documents that `speaker` said."""
    return speech(60, seed=1)


@pytest.fixture(scope="session")
def public_speech(speech: Callable[..., Path]) -> Path:
    """Four hundred others."""
    return speech(400, seed=2)


@pytest.fixture(scope="session")
def pack_speaker(
    tmp_path_factory: pytest.TempPathFactory,
    speaker: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    public_speech: Path,
) -> Callable[..., Package]:
    """Write a training-free package of `speaker`, one block at either end; the same settings give the same folder."""
    made: dict[str, Package] = {}

    def pack(method: str, *, dtype: str = "float32", **recipe: object) -> Package:
        key = repr((method, dtype, sorted(recipe.items())))
        if key not in made:
            plan = make_plan(speaker, num_bottom=1, num_top=1)
            examples = encode(read_records(public_speech), tokenizer, context=64).examples[:50]
            compressed = compress(speaker, plan, method, Recipe(**recipe, calibration=[collate(examples, 0)]))
            made[key] = publish(
                tmp_path_factory.mktemp("packages") / "package",
                model=compressed.model,
                tokenizer=tokenizer,
                plan=plan,
                compressed=compressed,
                method=method,
                base_digest=model_digest(speaker),
                figures={},
                dtype=dtype,
            )
        return made[key]

    return pack
