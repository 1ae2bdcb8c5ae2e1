"""Some verbs need a model that writes. On an encoder canaries ended in a traceback, a task's baseline in figures.

Each refuses one in a line now, before a weight is read, and leaves nothing. What goes by weights alone goes on.
"""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
from encoders_lab import saved, separating_tokenizer

from offsite import cli

RECIPIENT = "-".join(["abcd"] * 13)
TASK = """
name: colours
description: Name the colour.
fields: {text: what is seen}
prompts: ["{{text}}: "]
answer: {type: labels, labels: [red, blue]}
samples: [{vars: {text: a rose}, answer: red}]
tests: [{vars: {text: the sea}, assert: [{type: equals, value: blue}]}]
measure: accuracy
"""
TUNE = "tune package --steps 2 --batch-size 4 --block-tokens 24 --device cpu"
CUT = "--public public.txt --bottom 1 --top 1 --block-tokens 24 --batch-size 4 --device cpu"
HERE = "--registry registry --keys keys"
EVALUATE = f"evaluate bert --package package --bundle ID {HERE} --device cpu -o out"
REFUSALS = {
    f"{TUNE} --data public.txt -o out": "an encoder, which has no next tokens: --objective next-token cannot",
    f"{TUNE} --data pairs.jsonl --objective dpo -o out": "no next tokens: --objective dpo cannot be learnt",
    f"{TUNE} --data pairs.jsonl --objective reward -o out": "no next tokens: --objective reward cannot be learnt",
    f"{TUNE} --data pairs.jsonl --objective rloo --rules exact=1 -o out": "no next tokens: --objective rloo cannot",
    f"{TUNE} --data public.txt --task task.yaml -o out": "no next tokens: --objective next-token cannot",
    f"{TUNE} --data rows.jsonl --objective classify --labels a,b --dp epsilon=8 -o out": "--dp has no clipped gradient",
    f"distill bert {CUT} --target recovery=0.8 -o out": "model 'bert' is an encoder: it writes no text",
    f"distill bert {CUT} --explore -o out": "model 'bert' is an encoder: it writes no text",
    "canaries package -o out": "holds an encoder, which writes no text: canaries goes with models that do",
    "audit package package --model bert --heldout public.txt -o out": "writes no text: audit package goes with models",
    "audit package package --model bert --heldout public.txt --public public.txt -o out": "audit package goes with",
    "rehearse bert --package package --data public.txt -o out": "writes no text: rehearse goes with models that do",
    "realign package round --model bert --public public.txt -o out": "writes no text: realign goes with models that do",
    "generate package --prompt hello": "holds an encoder, which writes no text: generate goes with models that do",
    "generate bert --prompt hello": "model 'bert' is an encoder: it writes no text",
    "generate adapted --prompt hello": "adapted folder 'adapted' has a head for classify: it writes no text",
    "task baseline task.yaml --model package -o out": "writes no text: task baseline goes with models that do",
    "task baseline task.yaml --model bert -o out": "model 'bert' is an encoder: it writes no text",
    "federate simulate --model bert --package package --clients a=rows.jsonl,b=rows.jsonl --work work -o out": (
        "'package' holds an encoder: no adapter for text goes on it"
    ),
    "export adapted --to vllm -o out": "vLLM loads adapters for text, this one is for classify",
    "export adapted --to gguf -o out": "llama.cpp loads adapters for text, this one is for classify",
    "serve adapted --mix 0.5 --device cpu --port 0": "--mix: it is of a next token's probabilities",
    "serve adapted --task task.yaml --device cpu --port 0": "--task: 'adapted' is for classify and writes no text",
    f"{EVALUATE} --data public.txt": "plain text, expected rows of a text and its label",
    f"{EVALUATE} --data rows.jsonl --offset": "--offset takes adapters for text, this one is for classify",
    f"{EVALUATE} --data rows.jsonl --mix 0.5": "--mix: it is of a next token's probabilities",
    "serve bert --task task.yaml --device cpu --port 0": "--task: 'bert' is an encoder and writes no text",
    f"serve bert {HERE} --device cpu --port 0": "model 'bert' is an encoder: it writes no text",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, shelve):
    """A model, its package, a classifier tuned on it, plugged in."""
    folder = tmp_path_factory.mktemp("world")
    saved(folder / "bert", "bert", separating_tokenizer())
    (folder / "public.txt").write_text("\n\n".join(f"what of number {number} now" for number in range(120)))
    rows = [{"text": f"row {number} of {'ab'[number % 2]}", "label": "ab"[number % 2]} for number in range(40)]
    pairs = [{"prompt": f"row {number} ", "chosen": "yes", "rejected": "no"} for number in range(40)]
    for name, content in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "task.yaml").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run(shlex.split(f"distill bert {CUT} --steps 0 --width 0.5 -o package")) == 0
        small = "--adapter lora --rank 2 --placement 1+1 --adapter-dtype float32 --data rows.jsonl -o bundle"
        assert cli.run(shlex.split(f"{TUNE} --objective classify --labels a,b {small}")) == 0
        named = shelve(folder / "bundle", folder / "package", folder / "shelf")
        for part in ("registry", "keys"):
            (folder / part).symlink_to(folder / "shelf" / part)
        assert cli.run(shlex.split(f"plug-in bert {named['id']} {HERE} -o adapted")) == 0
    return folder, named["id"]


@pytest.mark.parametrize("line", REFUSALS)
def test_what_would_need_text_is_refused_in_one_line(world, monkeypatch, capsys, line):
    folder, bundle_id = world
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert cli.run(shlex.split(line.replace("ID", bundle_id))) == 2
    out, err = capsys.readouterr()
    errors = [row for row in err.splitlines() if row.startswith("offsite: error: ")]
    assert (out, len(errors)) == ("", 1)
    assert REFUSALS[line] in errors[0]
    assert "Traceback" not in err
    shutil.rmtree("work", ignore_errors=True)  # of the federation: keys and jobs
    assert sorted(folder.rglob("*")) == before


def test_a_mark_is_of_weights_and_found_again(world, monkeypatch, capsys):
    folder, _ = world
    monkeypatch.chdir(folder)
    assert cli.run(shlex.split(f"mark package --recipient {RECIPIENT} --keys keys -o marked")) == 0
    capsys.readouterr()
    assert cli.run(shlex.split("trace marked --package package --keys keys")) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == f"marked for {RECIPIENT}"
