"""Every verb given something it must refuse: one line, a hint at most, the exit code, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from offsite import cli

ROWS = '{"text": "a few words to train on"}\n' * 40


@pytest.fixture(scope="module")
def world(tmp_path_factory, full_llama, letters_tokenizer, make_package):
    """A folder with a model, two packages, texts and things that are none of these."""
    folder = tmp_path_factory.mktemp("world")
    full_llama.save_pretrained(folder / "model")
    letters_tokenizer.save_pretrained(folder / "model")
    make_package(folder / "package")
    make_package(folder / "shipped")
    (folder / "shipped.owner.json").unlink()
    make_package(folder / "changed")
    with (folder / "changed" / "config.json").open("a") as handle:
        handle.write(" ")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"row {n} " * 20}) + "\n" for n in range(40)))
    (folder / "broken.jsonl").write_text(ROWS + '{"txt": "the secret row"}\n')
    (folder / "bytes.txt").write_bytes(b"fine\n\nthe secret \xff row\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "text.pdf").write_text("x")
    (folder / "taken").mkdir()
    (folder / "bad.yaml").write_text("stepz: 3\n")
    (folder / "coded").mkdir()
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "coded" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    return folder


TUNE = "tune package --data text.jsonl -o out --device cpu"
DISTILL = "distill ./model --public text.jsonl -o out --device cpu --bottom 2 --top 2"
REFUSALS = {
    f"{TUNE} --steps 0": (2, "--steps: expected at least 1, found 0"),
    "tune nowhere --data text.jsonl -o out": (3, "no package folder named 'nowhere'"),
    "tune model --data text.jsonl -o out": (3, "folder 'model' holds no offsite.json"),
    "tune changed --data text.jsonl -o out": (3, "'config.json' has"),
    "tune package --data nowhere.jsonl -o out": (2, "nowhere.jsonl"),
    "tune package --data empty.jsonl -o out": (2, "empty.jsonl: empty"),
    "tune package --data broken.jsonl -o out": (2, "broken.jsonl: line 41"),
    "tune package --data bytes.txt -o out": (2, "bytes.txt: line 3"),
    "tune package --data text.pdf -o out": (2, "text.pdf"),
    "tune package --data text.jsonl -o taken": (2, "output 'taken' already exists"),
    f"{TUNE} --placement 3+3": (2, "the package's ends have 2+2 blocks"),
    f"{TUNE} --placement all": (2, "--placement all: this package's middle keeps no module"),
    f"{TUNE} --placement most": (2, "placement"),
    f"{TUNE} --adapter prefix": (2, "--adapter: no kind 'prefix'"),
    f"{TUNE} --disclose names": (2, "--disclose: 'names' is not one of"),
    f"{TUNE} --block-tokens 100000": (2, "100000"),
    f"{TUNE} --config bad.yaml": (2, "unknown setting 'stepz'"),
    f"{TUNE} --config nowhere.yaml": (2, "cannot read configuration 'nowhere.yaml'"),
    "distill ./nowhere --public text.jsonl -o out": (2, "no model folder './nowhere'"),
    "distill ./coded --public text.jsonl -o out": (2, "brings code of its own"),
    "distill ./model --public empty.jsonl -o out": (2, "empty.jsonl: empty"),
    "distill ./model -o out": (2, "--public is missing"),
    f"{DISTILL} --method shrink": (2, "unknown method 'shrink'"),
    f"{DISTILL} --method drop": (2, "--blocks is missing"),
    f"{DISTILL} --block-tokens 64 --method drop --blocks 99 --steps 0": (2, "99"),
    "distill ./model --public text.jsonl -o out --device cpu --bottom 4 --top 4": (2, "leave no middle"),
    f"{DISTILL} --block-tokens 100000": (2, "100000"),
    "inspect nowhere": (3, "no file or folder named 'nowhere'"),
    "inspect changed": (3, "'config.json' has"),
    "plug-in ./model 0123456789abcdef --registry nowhere --keys package -o out": (2, "'nowhere' is no registry"),
    "plug-in ./model package --registry nowhere --keys nokeys -o out": (2, "no keys folder at 'nokeys'"),
    "plug-in ./model": (2, "--registry is missing; ID is missing; --output is missing"),
    "registry list --registry nowhere --keys package": (2, "'nowhere' is no registry"),
    "log verify --registry package --keys package": (2, "'package' is no registry"),
    "intake sealed --registry nowhere --keys nokeys": (2, "no keys folder at 'nokeys'"),
    "job create package --client x --registry r --keys nokeys -o out": (2, "no keys folder at 'nokeys'"),
    "evaluate ./model --package package --data text.jsonl -o out": (2, "--bundle is missing"),
    "evaluate ./model --package shipped --bundle package --data text.jsonl -o out": (3, "no owner's record"),
    "report run nowhere -o out.html": (3, "nowhere"),
    "report run package -o taken": (2, "output 'taken' already exists"),
    "serve nowhere": (3, "nowhere"),
    "fetch gpt5": (2, "no model 'gpt5' to fetch"),
    "demo --seed -1": (2, "--seed: expected at least 0"),
}


@pytest.mark.parametrize("line", REFUSALS)
def test_refused_in_one_line_with_nothing_left(world, monkeypatch, capsys, line):
    code, message = REFUSALS[line]
    monkeypatch.chdir(world)
    before = sorted(path for path in world.rglob("*"))
    assert cli.run(line.split()) == code
    out, err = capsys.readouterr()
    errors = [row for row in err.splitlines() if row.startswith("offsite: error: ")]
    assert out == ""
    assert len(errors) == 1
    assert message in errors[0]
    first = errors[0].removeprefix("offsite: error: ").split()[0]
    assert first[0].islower() or first[0] in "'-" or first.isupper()  # a word's name on the command line
    assert "secret" not in err
    assert str(world) not in err
    assert "Traceback" not in err
    work = Path("out.work")
    if work.exists():
        shutil.rmtree(work)  # what a run that had begun keeps for --resume
    assert sorted(path for path in world.rglob("*")) == before
