"""A tokenizer with several chat templates under names, and tokenizers whose special tokens have names of their own.

People had a template called default beside one for tools, and the receiving side heard that there was none. Tokenizers
of models that also see pictures name tokens for them, and those names are nothing that a package may hold.
"""

from __future__ import annotations

import copy
import json
from itertools import permutations

import pytest
from checkpoints_lab import distill, save
from tokenizers import AddedToken

from offsite.artefacts.package import open_package
from offsite.modelling.load import load_tokenizer
from offsite.text.batches import encode
from offsite.text.records import Record

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
DEFAULT = "{% for m in messages %}<s>{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
TEMPLATES = {"default": DEFAULT, "rag": "{{ documents }}", "tool_use": "{{ tools }}"}


def with_templates(tokenizer, templates):
    named = copy.deepcopy(tokenizer)
    named.chat_template = templates
    return named


@pytest.mark.parametrize("order", list(permutations(TEMPLATES)))
def test_the_default_one_crosses(order, tmp_path, full_llama, letters_tokenizer):
    tokenizer = with_templates(letters_tokenizer, {name: TEMPLATES[name] for name in order})
    checkpoint = save(tmp_path / "model", full_llama, tokenizer)
    rendered = load_tokenizer(str(checkpoint)).apply_chat_template(CHAT, tokenize=False)
    assert rendered == "<s>user>hi</s><s>assistant>yes</s>"
    assert distill(checkpoint, tmp_path / "package") == 0
    received = open_package(tmp_path / "package").load_tokenizer()
    assert received.chat_template == DEFAULT
    turns = Record((), "", 1, place="row 1", messages=tuple((m["role"], m["content"]) for m in CHAT))
    assert encode([turns], received, context=64).examples[0].num_loss_tokens > 0


def test_the_older_form_within_the_configuration(tmp_path, full_llama, letters_tokenizer):
    checkpoint = save(tmp_path / "model", full_llama, with_templates(letters_tokenizer, None))
    path = checkpoint / "tokenizer_config.json"
    named = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    assert load_tokenizer(str(checkpoint)).chat_template == DEFAULT


def test_without_a_default_none_is_used_and_that_is_said(tmp_path, full_llama, letters_tokenizer, capsys):
    others = {name: text for name, text in TEMPLATES.items() if name != "default"}
    checkpoint = save(tmp_path / "model", full_llama, with_templates(letters_tokenizer, others))
    assert load_tokenizer(str(checkpoint)).chat_template is None
    assert "2 chat templates and none is called default" in capsys.readouterr().err


def test_what_is_saved_again_is_one_folder_without_others_in_it(tmp_path, full_llama, letters_tokenizer):
    """A merged model is written with the tokenizer that was read: every file of it is bound by its manifest."""
    checkpoint = save(tmp_path / "model", full_llama, with_templates(letters_tokenizer, TEMPLATES))
    load_tokenizer(str(checkpoint)).save_pretrained(tmp_path / "again")
    assert all(path.is_file() for path in (tmp_path / "again").iterdir())


@pytest.mark.parametrize(
    "extra",
    [
        {"image_token": "<image>", "boi_token": "<boi>"},
        ["<image>", "<boi>"],
        [AddedToken("<image>", special=True), AddedToken("<boi>", special=True)],
    ],
    ids=["named", "listed", "as objects"],
)
def test_special_tokens_beside_the_usual_ones(extra, tmp_path, full_llama, letters_tokenizer):
    tokenizer = copy.deepcopy(letters_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<boi>"]})
    kind = type(tokenizer)
    stated = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": extra}
    made = kind(tokenizer_object=tokenizer.backend_tokenizer, **stated)
    model = copy.deepcopy(full_llama)
    model.resize_token_embeddings(len(made), mean_resizing=False)
    checkpoint = save(tmp_path / "model", model, made)
    assert distill(checkpoint, tmp_path / "package") == 0
    received = open_package(tmp_path / "package").load_tokenizer()
    assert set(received.all_special_tokens) == {"<pad>", "<s>", "</s>", "<image>", "<boi>"}
    text = "a<image>b"
    assert received(text)["input_ids"] == made(text)["input_ids"]
    assert received.decode(received(text)["input_ids"], skip_special_tokens=True) == "ab"
