"""No verb of text runs on a model of images, and none of images on rows of text: each refuses in a line.

Of a vision encoder's package the one that would need text is told before a weight is read, and nothing is left.
"""

from __future__ import annotations

import json
import shlex

import pytest
from vision_lab import saved, write_rows

from offsite import cli

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
CUT = "--public images.jsonl --bottom 1 --top 1 --batch-size 4 --device cpu"
TUNE = "tune package --placement 1+1 --steps 2 --batch-size 4 --device cpu"
CLASSIFY = f"{TUNE} --objective classify --labels red,green,blue"
HERE = "--registry registry --keys keys"
EVALUATE = f"evaluate eye --package package --bundle ID {HERE} --device cpu -o out"
REFUSALS = {
    f"distill eye {CUT} --steps 4 --elevate 0.1 -o out": "is an encoder: --elevate would need scores of next tokens",
    f"distill eye {CUT} --steps 0 --refit-jacobian 1 -o out": "--refit-jacobian would need scores of next tokens",
    f"distill eye {CUT} --explore -o out": "model 'eye' is an encoder: it writes no text",
    f"distill eye {CUT.replace('images.jsonl', 'public.txt')} --steps 0 -o out": "expected rows of an image",
    f"{TUNE} --data images.jsonl -o out": "an encoder, which has no next tokens: --objective next-token cannot",
    f"{TUNE} --data images.jsonl --objective dpo -o out": "no next tokens: --objective dpo cannot be learnt",
    f"{CLASSIFY} --data public.txt -o out": "public.txt: plain text, expected rows of an image",
    f"{CLASSIFY} --data text.jsonl -o out": "text.jsonl: line 1: an image or its label is missing",
    f"{CLASSIFY} --data bad.jsonl -o out": "bad.jsonl: line 3: its image is no PNG or JPEG, or breaks off",
    f"{CLASSIFY} --data images.jsonl --dp epsilon=8 -o out": "--dp has no clipped gradient",
    "canaries package -o out": "holds an encoder, which writes no text: canaries goes with models that do",
    "audit package package --model eye --heldout public.txt -o out": "writes no text: audit package goes with models",
    "rehearse eye --package package --data public.txt -o out": "writes no text: rehearse goes with models that do",
    "realign package round --model eye --public public.txt -o out": "writes no text: realign goes with models that do",
    "generate package --prompt hello": "holds an encoder, which writes no text: generate goes with models that do",
    "generate eye --prompt hello": "model 'eye' is an encoder: it writes no text",
    "task baseline task.yaml --model package -o out": "writes no text: task baseline goes with models that do",
    "task baseline task.yaml --model eye -o out": "model 'eye' is an encoder: it writes no text",
    "export adapted --to vllm -o out": "vLLM loads adapters for text, this one is for classify",
    "serve eye --device cpu --port 0": "'eye' reads images and has no head to tell them apart by",
    f"plug-in eye ID {HERE} --spare public.txt -o out": "--spare: it goes by text, this model reads images",
    f"{EVALUATE} --data public.txt": "public.txt: plain text, expected rows of an image",
    f"{EVALUATE} --data images.jsonl --prompt hello": "--task and --prompt: an encoder writes no text and ranks none",
    f"{EVALUATE} --data images.jsonl --spare public.txt": "--spare: it goes by text, this model reads images",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, shelve):
    """A model, its package, a classifier tuned on it, plugged in."""
    folder = tmp_path_factory.mktemp("world")
    saved(folder / "eye", "vit")
    (folder / "public.txt").write_text("\n\n".join(f"what of number {number} now" for number in range(40)))
    lines = write_rows(folder / "images.jsonl", 0, 40).read_text().splitlines()
    broken = json.dumps({**json.loads(lines[2]), "image": json.loads(lines[2])["image"][:100]})
    (folder / "bad.jsonl").write_text("\n".join([*lines[:2], broken, *lines[3:]]))
    (folder / "text.jsonl").write_text('{"text": "a red one", "label": "red"}\n' * 9)
    (folder / "task.yaml").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run(shlex.split(f"distill eye {CUT} --steps 0 --method keep-all -o package")) == 0
        small = "--adapter lora --rank 2 --adapter-dtype float32 --data images.jsonl -o bundle"
        assert cli.run(shlex.split(f"{CLASSIFY} {small}")) == 0
        named = shelve(folder / "bundle", folder / "package", folder / "shelf")
        for part in ("registry", "keys"):
            (folder / part).symlink_to(folder / "shelf" / part)
        assert cli.run(shlex.split(f"plug-in eye {named['id']} {HERE} -o adapted")) == 0
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
    assert str(folder) not in err
    assert sorted(folder.rglob("*")) == before


def test_what_is_said_of_the_folder_can_be_done_with_it(world):
    folder, _ = world
    told = (folder / "adapted" / "README.md").read_text()
    assert "image-classification" in told
    assert 'AutoImageProcessor.from_pretrained("adapted")' in told
