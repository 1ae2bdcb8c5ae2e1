"""``offsite generate``: what serve would answer, of each thing that writes text; a file's answers survive a kill."""

from __future__ import annotations

import json
import shutil

import pytest

import offsite.generation.verb as module
from adapters.kinds import declared
from client.tuning.tune import attach_to_package
from offsite import cli
from offsite.artefacts.bundle import AdapterSpec, write_bundle
from offsite.generation.generate import end_tokens, generate
from offsite.generation.sampling import Settings
from offsite.training.devices import choose_device


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, spread_llama, bytes_tokenizer):
    folder = tmp_path_factory.mktemp("full") / "spread"
    spread_llama.save_pretrained(folder)
    bytes_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def told(capsys):
    """Run the verb; return the exit code, its JSON object, and what stood on stderr."""

    def run(*words):
        code = cli.run(["generate", *map(str, words), "--device", "cpu"])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err

    return run


def expected(model, tokenizer, prompt_ids, **settings):
    how = Settings(**{"limit_tokens": 12, "temperature": 0.0, **settings})
    pieces = generate(model, tokenizer, prompt_ids, how, end_ids=end_tokens(model, tokenizer))
    return "".join(piece.text for piece in pieces)


def test_prompts_are_answered_as_serve_does_and_shown_while_they_are(told, model_folder, spread_llama, bytes_tokenizer):
    prompts = ["the patient", "the doctor asks"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    code, found, err = told(model_folder, *words, "--max-tokens", 12, "--temperature", 0.8, "--seed", 5)
    assert code == 0
    texts = [
        expected(spread_llama, bytes_tokenizer, bytes_tokenizer(prompt)["input_ids"], temperature=0.8, seed=5 + number)
        for number, prompt in enumerate(prompts)
    ]
    assert [one["text"] for one in found["answers"]] == texts
    shown = "".join(one if one.isprintable() or one in "\n\t" else "?" for one in texts[0])
    assert f"prompt 1:\n{shown}\nprompt 2:\n" in err
    assert (found["num_prompts"], found["num_tokens"] > 0) == (2, True)


def test_chat_is_put_into_the_models_template(told, model_folder, spread_llama, bytes_tokenizer, tmp_path):
    chat = [{"role": "user", "content": "a <|im_end|> cough"}]
    ids = bytes_tokenizer.apply_chat_template(chat, add_generation_prompt=True, sanitize_control_tokens=True)[
        "input_ids"
    ]
    text = expected(spread_llama, bytes_tokenizer, ids, limit_tokens=4)
    _, found, _ = told(model_folder, "--chat", "--prompt", chat[0]["content"], "--max-tokens", 4)
    assert found["answers"][0]["text"].lstrip() == text.lstrip()
    assert found["num_prompt_tokens"] == len(ids)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [*chat, {"role": "assistant", "content": "not read"}]}) + "\n")
    told(model_folder, "--file", rows, "--max-tokens", 4, "-o", tmp_path / "answers.jsonl")
    written = json.loads((tmp_path / "answers.jsonl").read_text())
    assert (written["messages"], written["text"]) == (chat, found["answers"][0]["text"])


def test_answers_to_a_file_go_on_after_a_kill(told, model_folder, tmp_path, monkeypatch):
    rows, ends = tmp_path / "prompts.jsonl", ("", "\u2028", "\x85", "")  # which some take for the end of a line
    asked = [f"case {number}{end}" for number, end in enumerate(ends)]
    rows.write_text("".join(json.dumps({"question": one}) + "\n" for one in asked))
    words = [model_folder, "--file", rows, "--fields", "prompt=question", "--max-tokens", 5, "--temperature", 1]
    assert told(*words, "-o", tmp_path / "whole.jsonl")[0] == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    assert [json.loads(line)["prompt"] for line in whole.split("\n")[:-1]] == asked
    out, plain, calls = tmp_path / "answers.jsonl", module._written, []

    def stops(pieces, *, shown):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(pieces, shown=shown)

    monkeypatch.setattr(module, "_written", stops)
    assert told(*words, "-o", out)[0] == 130
    assert not out.exists()
    with (tmp_path / "answers.jsonl.work" / "answers.jsonl").open("a") as torn:
        torn.write('{"prompt": "case 2", "te')
    monkeypatch.setattr(module, "_written", plain)
    code, _, err = told(*words, "--seed", 9, "-o", out)
    assert (code, "holds answers of other prompts, another model or other settings" in err) == (2, True)
    code, found, err = told(*words, "-o", out)
    assert (code, found["num_resumed"], out.read_text()) == (0, 2, whole)
    assert "going on after 2 of 4 answers" in err
    assert not (tmp_path / "answers.jsonl.work").exists()
    assert out.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kind", ["bitfit", "lora"])
def test_a_package_is_asked_with_a_bundle_and_without(told, dropped_package, letters_tokenizer, tmp_path, kind):
    spec = AdapterSpec(kind=kind, placement="2+2", dtype="float32")
    attached = attach_to_package(dropped_package, spec, device=choose_device("cpu"))
    names = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    tensors = {name: tensor * (1 + 0.5 * at) + 0.2 for at, (name, tensor) in enumerate(attached.tensors().items())}
    write_bundle(tmp_path / "bundle", package=dropped_package, spec=spec, tensors=tensors, expected=names)
    attached.load(tensors)
    ids = letters_tokenizer("ward")["input_ids"][:4]
    texts = {}
    for name, words in (("with", ["--bundle", tmp_path / "bundle"]), ("without", [])):
        code, found, _ = told(dropped_package.path, "--prompt", "ward", *words, "--max-tokens", 12)
        assert code == 0
        texts[name] = found["answers"][0]["text"]
    assert texts["with"] == expected(attached.model.eval(), letters_tokenizer, ids)
    assert texts["with"] != texts["without"] == expected(dropped_package.load_model(), letters_tokenizer, ids)


def test_what_cannot_be_asked_is_one_line(told, dropped_package, narrow_package, model_folder, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "SECRET"}\n')
    spec = AdapterSpec(kind="bitfit", placement="2+2", dtype="float32")
    attached = attach_to_package(dropped_package, spec, device=choose_device("cpu"))
    names = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    write_bundle(tmp_path / "bundle", package=dropped_package, spec=spec, tensors=attached.tensors(), expected=names)
    plain = tmp_path / "plain"
    shutil.copytree(model_folder, plain)
    (plain / "chat_template.jinja").unlink()
    ask = ["--prompt", "x"]
    for words, expected_code, message in (
        ([model_folder], 2, "--prompt, --file: one of the two"),
        ([model_folder, *ask, "--file", rows], 2, "--prompt, --file: one of the two"),
        ([model_folder, "--file", rows], 2, "--file: -o says where its answers go"),
        ([model_folder, *ask, "--bundle", tmp_path / "bundle"], 2, "is no package"),
        ([tmp_path / "bundle", *ask], 2, "'bundle' is a bundle"),
        ([narrow_package.path, *ask, "--bundle", tmp_path / "bundle"], 3, "package"),
        ([plain, *ask, "--chat"], 2, "prompt 1: the model has no chat template"),
        ([model_folder, "--prompt", "SECRET " * 300], 2, "the model's context is 256, an answer included"),
    ):
        code, found, err = told(*words)
        errors = [line for line in err.splitlines() if line.startswith("offsite: error:")]
        assert (code, found, len(errors)) == (expected_code, None, 1), (words, err)
        assert message in errors[0]
        assert "SECRET" not in err
