"""Tuning: exactly the adapter moves, nothing of this machine is in the bundle, and a failure leaves no output."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import socket

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import client.tuning.tune as module
from adapters.kinds import declared
from client.objectives.tokens import next_token_loss
from client.tuning.data import prepare
from client.tuning.ready import loop_settings, work_folder
from client.tuning.tune import attach_to_package, tune
from client.tuning.verb import run
from offsite import cli
from offsite.artefacts.bundle import DISCLOSABLE, AdapterSpec, open_bundle
from offsite.artefacts.job import Job, write_job
from offsite.artefacts.package import open_package
from offsite.audits.runs import read_run, run_path
from offsite.errors import ConfigError, RunFailed, WrongBinding, WrongNames
from offsite.text.records import read_records

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
ENDS = ("bottom.0", "bottom.1", "top.0", "top.1")
VECTORS = ("input_layernorm", "post_attention_layernorm")
PARTS = {"lora": ("lora_A", "lora_B"), "rslora": ("lora_A", "lora_B"), "dora": ("lora_A", "lora_B", "magnitude")}


def every(package) -> tuple[str, ...]:
    return ("bottom.0", "bottom.1", *(f"middle.{n}" for n in range(package.layout.num_middle)), "top.0", "top.1")


def whole_names(kind: str, blocks: tuple[str, ...]) -> set[str]:
    inner = VECTORS if kind == "bitfit" else (*VECTORS, *ATTENTION, *MLP)
    return {f"{block}.{name}.weight" for block in blocks for name in inner}


def low_rank_names(kind: str, blocks: tuple[str, ...], modules=(*ATTENTION, *MLP)) -> set[str]:
    return {f"{block}.{name}.{part}" for block in blocks for name in modules for part in PARTS[kind]}


@pytest.fixture
def fixed(monkeypatch):
    """Keep what `tune` returned to `run`, copied."""
    kept = {}

    def keeping(attached, *args, **kwargs):
        kept["before"] = {name: tensor.clone() for name, tensor in attached.model.state_dict().items()}
        kept["names"] = {name: id(parameter) for name, parameter in attached.trainable.items()}
        outcome = tune(attached, *args, **kwargs)
        kept["attached"], kept["outcome"] = attached, outcome
        return outcome

    monkeypatch.setattr(module, "tune", keeping)
    return kept


PLACED = [
    ("blocks", "dropped", "2+2"),
    ("blocks", "dropped", "0+2"),
    ("blocks", "narrow", "1+1"),
    ("blocks", "whole", "all"),
    ("bitfit", "dropped", "2+2"),
    ("bitfit", "dropped", "0+2"),
    ("bitfit", "whole", "all"),
    *[(kind, "dropped", placement) for kind in PARTS for placement in ("2+2", "0+2")],
    *[(kind, package, "all") for kind in PARTS for package in ("narrow", "whole")],
]


@pytest.mark.parametrize(("kind", "package_name", "placement"), PLACED)
def test_exactly_the_adapter_moves_and_the_bundle_holds_it(request, settings, fixed, kind, package_name, placement):
    package = request.getfixturevalue(f"{package_name}_package")
    before = {path.name: path.read_bytes() for path in package.path.iterdir()}
    config = settings(package.path, adapter=kind, placement=placement, rank=2, learning_rate=0.02)
    told = run(config)

    blocks = {"2+2": ENDS, "0+2": ENDS[2:], "1+1": ("bottom.0", "top.1"), "all": every(package)}[placement]
    if kind in PARTS:
        expected = low_rank_names(kind, blocks)
        if (kind, package_name) == ("dora", "narrow"):  # its magnitudes cannot be lifted from fewer channels
            expected -= low_rank_names(kind, every(package)[2:-2], MLP)
    else:
        expected = whole_names(kind, blocks)
    bundle = open_bundle(config.output)
    assert set(bundle.manifest.tensors) == expected
    assert bundle.digest == told["bundle_digest"]

    model, outcome = fixed["attached"].model, fixed["outcome"]
    identities = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {identities[number] for number in fixed["names"].values()}
    after = model.state_dict()
    moved = {name for name, tensor in fixed["before"].items() if not torch.equal(after[name], tensor)}
    tied = {name for name in moved if after[name].data_ptr() in {after[other].data_ptr() for other in trained}}
    assert moved == trained | tied
    assert len(trained) == len(expected)

    tensors = bundle.load_tensors(declared(config.spec(), package.layout, package.block_tensors()))
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, outcome.tensors[name].to(torch.bfloat16)), name
    assert told["first_loss"] > told["best_loss"]
    assert {path.name: path.read_bytes() for path in package.path.iterdir()} == before


@pytest.mark.parametrize(("targets", "modules"), [("attention", ATTENTION), ("mlp", MLP)])
def test_low_rank_on_some_modules(settings, dropped_package, targets, modules):
    config = settings(dropped_package.path, adapter="lora", targets=targets, placement="1+2", adapter_dtype="float32")
    run(config)
    bundle = open_bundle(config.output)
    assert set(bundle.manifest.tensors) == low_rank_names("lora", ("bottom.0", "top.0", "top.1"), modules)
    assert {spec.dtype for spec in bundle.manifest.tensors.values()} == {"float32"}


def test_other_architectures_take_other_modules(settings, make_package, tmp_path):
    torch.manual_seed(2)
    small = {"vocab_size": 259, "n_embd": 16, "n_layer": 5, "n_head": 2, "n_positions": 64}
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **small)).eval()
    package = make_package(tmp_path / "gpt2", model=gpt2, kept=(0, 1, 2, 4), ends=(1, 2))
    for kind in ("blocks", "lora", "bitfit"):
        told = run(settings(package.path, output=tmp_path / kind, adapter=kind, placement="1+1", learning_rate=0.02))
        names = open_bundle(tmp_path / kind).manifest.tensors
        assert {name.split(".")[0] + name.split(".")[1] for name in names} == {"bottom0", "top1"}
        assert told["first_loss"] > told["best_loss"]


def test_the_model_reads_like_the_package_with_the_bundle_in_it(settings, fixed, dropped_package):
    config = settings(dropped_package.path, adapter="lora", learning_rate=0.05, adapter_dtype="float32")
    told = run(config)
    spec = config.spec()
    names = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    fresh = attach_to_package(dropped_package, spec, device=torch.device("cpu"), seed=99)
    fresh.load(open_bundle(config.output).load_tensors(names))
    text = prepare(
        read_records(config.data[0]), dropped_package.load_tokenizer(), block_tokens=32, batch_size=4, seed=config.seed
    )
    total = count = 0
    with torch.no_grad():
        for example in text.validation:
            ids = torch.tensor([example.input_ids])
            logits = fresh.model(input_ids=ids).logits[0, :-1]
            total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(example.input_ids) - 1
    assert told["best_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_best_checkpoint_is_kept(settings, fixed, dropped_package, monkeypatch):
    losses = iter([4.0, 3.0, 1.0, 2.0])  # the first of the package as it came
    copies = []

    def scripted(model, *_args, **_kwargs):
        copies.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return type("Found", (), {"loss": next(losses)})

    monkeypatch.setattr(module, "perplexity", scripted)
    told = run(settings(dropped_package.path, evaluate_every=2))
    assert (told["best_step"], told["best_loss"]) == (4, 1.0)
    after = {name: p for name, p in fixed["attached"].model.named_parameters() if p.requires_grad}
    assert all(torch.equal(after[name], tensor) for name, tensor in copies[2].items())
    assert not all(torch.equal(after[name], tensor) for name, tensor in copies[3].items())
    assert told["before_loss"] == 4.0


# The loss


def test_the_loss_is_transformers_own_times_the_count(full_llama):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 250, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :5] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    with torch.no_grad():
        loss, count = next_token_loss(full_llama, batch)
        theirs = full_llama(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert int(count) == 8 + 5 + 4
    assert float(loss / count) == pytest.approx(float(theirs), rel=1e-6)


def test_a_few_steps_equal_a_loop_written_by_hand(settings, dropped_package):
    config = settings(
        dropped_package.path, adapter="blocks", placement="0+1", learning_rate=0.01, schedule="constant",
        warmup_steps=0, weight_decay=0.1, clip_norm=0.0, steps=3, evaluate_every=3, adapter_dtype="float32",
        cache_bytes=0,
    )  # fmt: skip
    run(config)
    found = open_bundle(config.output).load_tensors(
        declared(config.spec(), dropped_package.layout, dropped_package.block_tensors())
    )
    model = dropped_package.load_model()
    model.requires_grad_(False)
    block = model.model.layers[6].requires_grad_(True)
    matrices = [p for p in block.parameters() if p.dim() > 1]
    vectors = [p for p in block.parameters() if p.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}], 0.01
    )
    text = prepare(read_records(config.data[0]), dropped_package.load_tokenizer(), block_tokens=32, batch_size=4)
    for step in range(3):
        batch = text.batches.batch(step)
        optimiser.zero_grad()
        model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss.backward()
        optimiser.step()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(found[f"top.1.{name}"], parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["blocks", "lora"])
def test_activation_checkpointing_and_parts_change_nothing(settings, dropped_package, tmp_path, kind):
    def told(name, **changes):
        config = settings(dropped_package.path, output=tmp_path / name, adapter=kind, learning_rate=0.02, **changes)
        return run(config)

    plain, saving, parts = told("a"), told("b", gradient_checkpointing=True), told("c", accumulate=4)
    assert saving["bundle_digest"] == plain["bundle_digest"]
    assert saving["evaluations"] == plain["evaluations"]
    assert parts["best_loss"] == pytest.approx(plain["best_loss"], rel=1e-4)


@pytest.mark.proves("rows", "text; prompts with answers", "next-token")
def test_packing_or_not_both_learn(settings, dropped_package, answers_file, tmp_path):
    def told(name, pack):
        return run(settings(dropped_package.path, data=answers_file, output=tmp_path / name, pack=pack, block_tokens=64,
                            adapter="lora", learning_rate=0.02, steps=12))  # fmt: skip

    packed, plain = told("a", True), told("b", False)
    for each in (packed, plain):
        assert each["best_loss"] < 0.9 * each["first_loss"]
    assert 12 * 4 * 64 >= packed["tokens"] > plain["tokens"]
    assert packed["bundle_digest"] != plain["bundle_digest"]


# What is in the bundle


def test_the_same_seed_gives_the_same_bundle(settings, dropped_package, tmp_path):
    def digest(name, **changes):
        told = run(
            settings(dropped_package.path, output=tmp_path / name, adapter="lora", dropout=0.1, steps=4, **changes)
        )
        return told["bundle_digest"]

    torch.manual_seed(1)
    first = digest("a", seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert digest("elsewhere", seed=3, checkpoint_every=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert digest("c", seed=4) != first


@pytest.mark.parametrize("kind", ["blocks", "lora"])
def test_nothing_of_this_machine_or_the_data_is_in_the_bundle(
    settings, dropped_package, tmp_path, monkeypatch, kind, notes
):
    for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME"):
        monkeypatch.setenv(name, f"{name.lower()}-of-the-client")
    monkeypatch.setattr(socket, "gethostname", lambda: "host-of-the-client")
    monkeypatch.chdir(tmp_path)
    config = settings(dropped_package.path, adapter=kind, output=tmp_path / "returned", disclose=DISCLOSABLE)
    told = run(config)
    assert sorted(path.name for path in config.output.iterdir()) == ["adapter.safetensors", "offsite.json"]
    written = b"".join(path.read_bytes() for path in config.output.iterdir())
    host = [*tmp_path.parts[1:], str(dropped_package.path), "secret-ward-notes", "of-the-client", "returned", "bundle_"]
    words = [*notes, "fever", "cough", "ward ", "case "]
    for word in (*host, *words):
        if len(word) > 4:  # shorter ones stand in random bytes by chance
            assert word.encode() not in written, word
    for place in (str(tmp_path), "secret-ward", "fever"):
        assert place not in json.dumps(told)
    log = (tmp_path / "returned.log.jsonl").read_text()
    assert all(isinstance(value, int | float) for line in log.splitlines() for value in json.loads(line).values())


def test_only_what_is_named_is_disclosed(settings, dropped_package, tmp_path):
    nothing = run(settings(dropped_package.path, output=tmp_path / "a"))
    assert open_bundle(tmp_path / "a").manifest.disclosed == {}
    all_of_it = run(settings(dropped_package.path, output=tmp_path / "b", disclose=DISCLOSABLE))
    stated = open_bundle(tmp_path / "b").manifest.disclosed
    assert stated == {
        "num_records": all_of_it["num_records"],
        "num_tokens": all_of_it["tokens"],
        "steps": 6,
        "validation_loss": all_of_it["best_loss"],
    }
    assert nothing["bundle_digest"] != all_of_it["bundle_digest"]
    some = settings(dropped_package.path, output=tmp_path / "c", disclose=("steps",))
    run(some)
    assert open_bundle(some.output).manifest.disclosed == {"steps": 6}


def test_no_socket_is_needed(settings, dropped_package, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("tuning reached for the network")

    for name in ("socket", "create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    assert run(settings(dropped_package.path, adapter="lora"))["steps"] == 6


# Beside the bundle


def test_the_log_stands_beside_the_bundle_and_the_work_is_gone(settings, dropped_package):
    config = settings(dropped_package.path, evaluate_every=3)
    told = run(config)
    folder = config.output.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        *("bundle", "bundle.log.jsonl", "bundle.run.json", "secret-ward-notes.txt")
    ]
    records = [json.loads(line) for line in (folder / "bundle.log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert [[r["step"], r["evaluation_loss"]] for r in records if "evaluation_loss" in r] == [
        list(pair) for pair in told["evaluations"]
    ]


def nan_at(step):
    calls = iter(range(1, 1000))

    def loss(model, batch):
        total, count = next_token_loss(model, batch)
        return (total * math.nan if next(calls) == step else total), count

    return loss


def test_a_nan_stops_the_run_keeps_its_work_and_can_be_gone_on_from(settings, dropped_package, tmp_path, monkeypatch):
    unbroken = run(settings(dropped_package.path, output=tmp_path / "unbroken"))
    config = settings(dropped_package.path)
    monkeypatch.setattr(module, "next_token_loss", nan_at(5))
    with pytest.raises(RunFailed, match="loss is nan at step 5") as caught:
        run(config)
    assert "checkpoint-4 is kept" in caught.value.hint
    assert not config.output.exists()
    assert (work_folder(config.output) / "checkpoint-4").is_dir()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="holds an unfinished run") as caught:
        run(config)
    assert "--resume" in caught.value.hint
    told = run(config.model_copy(update={"resume": True}))
    assert told["bundle_digest"] == unbroken["bundle_digest"]
    assert told["evaluations"] == unbroken["evaluations"]
    assert not work_folder(config.output).exists()


OTHER_RUNS = [
    ({"block_tokens": 16}, r"block_tokens '32' \(now '16'\)"),
    ({"pack": False, "block_tokens": 64}, r"pack 'True' \(now 'False'\)"),
    ({"validation": 0.2}, r"validation '0.1' \(now '0.2'\)"),
    ({"rank": 4}, r"adapter.rank '2' \(now '4'\)"),
    ({"targets": "mlp"}, r"adapter.targets 'all-linear' \(now 'mlp'\)"),
    ({"learning_rate": 0.1}, r"learning_rate 0.002 \(now 0.1\)"),
    ({"steps": 9}, r"steps 6 \(now 9\)"),
    ({"seed": 1}, r"seed 0 \(now 1\)"),
    ({"package": "whole"}, r"package 'sha256:\w+' \(now 'sha256:\w+'\)"),
    ({"data": "other"}, r"data 'sha256:\w+' \(now 'sha256:\w+'\)"),
]


def test_another_run_is_not_gone_on_from(settings, dropped_package, whole_package, tmp_path, monkeypatch):
    given = {"adapter": "lora", "rank": 2}
    monkeypatch.setattr(module, "next_token_loss", nan_at(5))
    with pytest.raises(RunFailed):
        run(settings(dropped_package.path, **given))
    monkeypatch.undo()
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"other ward {n} is closed until day {n}" for n in range(60)))
    for row, told in OTHER_RUNS:
        changes = {**row, "data": other} if "data" in row else dict(row)
        package = whole_package if changes.pop("package", None) else dropped_package
        with pytest.raises(ConfigError, match=told) as caught:
            run(settings(package.path, **{**given, **changes, "resume": True}))
        assert "ward" not in str(caught.value).replace("secret-ward", ""), row
        assert not (tmp_path / "bundle").exists(), row
    run(settings(dropped_package.path, **given, resume=True))  # the run itself can still be gone on from
    assert (tmp_path / "bundle").exists()


def test_no_weight_moved(settings, dropped_package, monkeypatch):
    for name, told in {"float32": "no weight moved during training", "bfloat16": "no weight moved"}.items():
        config = settings(dropped_package.path, learning_rate=1e-30, adapter_dtype=name)
        with pytest.raises(RunFailed, match=told) as caught:
            run(config)
        assert "--learning-rate" in caught.value.hint
        assert not config.output.exists()
        shutil.rmtree(work_folder(config.output))


def test_a_change_too_small_for_the_bundle_is_refused(settings, make_package, tmp_path):
    package = make_package(tmp_path / "package", dtype="bfloat16")
    config = settings(package.path, adapter="blocks", learning_rate=1e-9, steps=2)
    with pytest.raises(RunFailed, match="no weight moved far enough to show in bfloat16") as caught:
        run(config)
    assert "--adapter-dtype float32" in caught.value.hint
    finer = settings(package.path, adapter="blocks", learning_rate=1e-9, steps=2, adapter_dtype="float32", resume=True)
    shutil.rmtree(work_folder(config.output))
    assert run(finer)["steps"] == 2


def test_a_rate_far_too_high_is_told_with_the_step(settings, dropped_package):
    config = settings(dropped_package.path, learning_rate=1e30)
    with pytest.raises(RunFailed, match=r"loss is (inf|nan) at step \d") as caught:
        run(config)
    assert "lower the learning rate" in caught.value.hint
    assert not config.output.exists()


def test_an_output_that_exists_is_not_touched(settings, dropped_package, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="output 'bundle' already exists"):
        run(settings(dropped_package.path))
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["mine.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="already exists"):
        run(settings(dropped_package.path, output=tmp_path / "link"))


def test_outputs_below_a_file(settings, dropped_package, tmp_path, notes_file):
    with pytest.raises(ConfigError, match="the parent of output 'bundle' is not a folder"):
        run(settings(dropped_package.path, output=notes_file / "bundle"))
    with pytest.raises(RunFailed, match=r"cannot write 'deep\.work': not a directory"):
        run(settings(dropped_package.path, output=notes_file / "bundle" / "deep"))
    run(settings(dropped_package.path, output=tmp_path / "new" / "folder" / "bundle", steps=2))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        *("bundle", "bundle.log.jsonl", "bundle.run.json")
    ]


def test_a_full_disk_at_the_end_keeps_the_work(settings, dropped_package, monkeypatch):
    config = settings(dropped_package.path)

    def full(*_args, **_kwargs):
        raise RunFailed("cannot write 'bundle': no space left on device")

    monkeypatch.setattr("client.tuning.verb.write_bundle", full)
    with pytest.raises(RunFailed, match="no space left"):
        run(config)
    monkeypatch.undo()
    assert not config.output.exists()
    assert run(config.model_copy(update={"resume": True}))["steps"] == 6


def test_several_processes_are_started_by_the_command_line_only(settings, dropped_package):
    with pytest.raises(ConfigError, match="--launch"):
        run(settings(dropped_package.path, launch=2))


# What a package carries


@pytest.mark.parametrize(
    ("package_name", "changes", "told"),
    [
        ("dropped", {"placement": "all", "adapter": "lora"}, "keeps no module one to one"),
        ("dropped", {"placement": "all", "adapter": "blocks"}, "whose middle blocks are whole|keeps no module"),
        ("narrow", {"placement": "all", "adapter": "blocks"}, "whose middle blocks are whole"),
        ("narrow", {"placement": "all", "adapter": "bitfit"}, "whose middle blocks are whole"),
        ("dropped", {"placement": "3+2"}, r"ends have 2\+2 blocks"),
        ("dropped", {"placement": "0+3", "adapter": "lora"}, r"ends have 2\+2 blocks"),
        ("dropped", {"block_tokens": 200, "batch_size": 1}, "sequences of 200 tokens, the package's context is 128"),
        ("dropped", {"adapter": "nope", "learning_rate": 1.0}, "no kind 'nope'"),
        ("dropped", {"device": "meta"}, "'meta' is not a device"),
    ],
)
def test_what_the_package_cannot_carry(request, settings, tmp_path, package_name, changes, told):
    package = request.getfixturevalue(f"{package_name}_package")
    with pytest.raises(ConfigError, match=told) as caught:
        run(settings(package.path, **changes))
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["secret-ward-notes.txt"]


# Steps, warm-up and validations


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 100}, (100, 10, 10)),
        ({"steps": 6}, (6, 1, 1)),
        ({"steps": 1000, "warmup_steps": 25, "evaluate_every": 7}, (1000, 25, 7)),
        ({"steps": 40, "warmup_steps": 0}, (40, 0, 4)),
        ({"steps": None, "epochs": 2.0}, (2 * 20, 4, 4)),
        ({"steps": None, "epochs": 0.01}, (1, 1, 1)),
    ],
)
def test_steps_warmup_and_validations_follow_from_each_other(settings, letters_tokenizer, changes, expected, tmp_path):
    config = settings(tmp_path, **changes)
    text = prepare(read_records(config.data[0]), letters_tokenizer, block_tokens=32, batch_size=4)
    assert text.batches.num_steps_per_epoch == 20
    found = loop_settings(config, text)
    assert (found.steps, found.warmup_steps, found.evaluate_every) == expected
    assert found.learning_rate == config.rate()


def test_validations_take_no_longer_than_training_but_for_three(settings, letters_tokenizer, tmp_path):
    """Of a text of which half is held out a short run would spend its time on validations."""
    config = settings(tmp_path, steps=40, batch_size=1)
    text = prepare(read_records(config.data[0]), letters_tokenizer, block_tokens=32, batch_size=1, validation=0.5)
    held = sum(len(example.input_ids) for example in text.validation)
    assert 10 * held > 3 * 40 * 32
    expected = max(3, 3 * 40 * text.batches.num_tokens(0) // held)
    assert loop_settings(config, text).evaluate_every == -(-40 // expected) > 4
    assert loop_settings(config.model_copy(update={"evaluate_every": 4}), text).evaluate_every == 4


# The command line


def transcript(capsys, *words):
    code = cli.run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def bad_inputs():
    good = '{"prompt": "sesame", "completion": "opens"}\n'
    return {
        "empty.txt": (b"", "empty.txt: empty, expected at least one row"),
        "blank.jsonl": (b"\n\n", "blank.jsonl: empty"),
        "empty.csv": (b"", "empty.csv: empty"),
        "list.json": (b"[]", "list.json: empty"),
        "missing.jsonl": ((good + '{"prompt": "sesame"}').encode(), "missing.jsonl: line 2: field 'completion' is"),
        "other.csv": (b"body\nsesame\n", "other.csv: row 1: a field is missing, expected 'text'; or"),
        "latin.txt": ("sesame\n\nopen s\xe9same\n".encode("latin-1"), "latin.txt: line 3: byte 7 is not UTF-8"),
        "latin.csv": ("text\nsesame\ns\xe9same\n".encode("latin-1"), "latin.csv: line 3: byte 2 is not UTF-8"),
        "torn.jsonl": (b'{"text": "sesame"}\n{"text": "ses', "torn.jsonl: line 2: not valid JSON"),
        "zipped.txt.gz": (b"sesame, not gzip", "zipped.txt.gz: not a gzip file"),
        "broken.jsonl.gz": (gzip.compress(good.encode() * 50)[:-9], "broken.jsonl.gz: the gzip file breaks off"),
        "notes.docx": (b"sesame", "notes.docx: unknown kind of file"),
        "single.txt": (b"sesame", "1 document(s), expected at least two to hold one out"),
        "little.txt": (b"sesame\n\nopens", "too little text: 1 sequences"),
        "chat.jsonl": (b'{"messages": [{"role": "user", "content": "same"}]}', "chat.jsonl: line 1: no message of"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(bad_inputs()))
def test_a_bad_file_is_one_line_and_no_output(capsys, dropped_package, tmp_path, name):
    content, expected = bad_inputs()[name]
    path = tmp_path / name
    path.write_bytes(content)
    words = ["tune", dropped_package.path, "--data", path, "-o", tmp_path / "bundle", "--block-tokens", "32"]
    code, out, lines = transcript(capsys, *words)
    assert (code, out) == (2, "")
    assert lines[0].startswith(f"offsite: error: {expected}")
    assert [line.startswith("offsite: hint: ") for line in lines[1:]] in ([True], [])
    shown = "\n".join(lines)
    assert "same" not in shown
    assert str(tmp_path) not in shown
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_missing_files_and_too_long_rows(capsys, dropped_package, tmp_path, answers_file):
    words = ["tune", dropped_package.path, "-o", tmp_path / "bundle", "--block-tokens", "32", "--data"]
    code, out, lines = transcript(capsys, *words, tmp_path / "nothing.jsonl")
    assert (code, out) == (2, "")
    assert lines == ["offsite: error: nothing.jsonl: no such file", "offsite: hint: check the path"]
    (tmp_path / "empty").mkdir()
    code, out, lines = transcript(capsys, *words, tmp_path / "empty")
    assert (code, out, len(lines)) == (2, "", 2)
    assert lines[0] == "offsite: error: empty: a folder without a file of text"
    (tmp_path / "empty").rmdir()
    code, out, lines = transcript(capsys, *words, answers_file, "--on-long", "error")
    assert (code, out, len(lines)) == (2, "", 2)
    assert lines[0].startswith("offsite: error: answers.jsonl: line ")
    assert lines[1] == "offsite: hint: --on-long truncate cuts such rows and counts them"
    code, out, lines = transcript(capsys, *words, answers_file, "--fields", "prompt=question")
    assert (code, out, len(lines)) == (2, "", 2)
    assert not any(word in "\n".join(lines) for word in ("ward", "case", "fever"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl"]


def test_rows_that_were_cut_are_counted_and_told(capsys, dropped_package, tmp_path, answers_file):
    words = ["tune", dropped_package.path, "--data", answers_file, "-o", tmp_path / "bundle", "--no-pack"]
    code, out, lines = transcript(capsys, *words, "--block-tokens", "40", "--steps", "2", "--precision", "fp32")
    assert code == 0
    assert "60 rows were longer than the context and were cut" in lines
    assert json.loads(out.splitlines()[-1])["num_truncated"] == 60
    assert not any(word in "\n".join([out, *lines]) for word in ("fever", "case 1"))


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


def broken_packages():
    return {
        "a flipped bit": lambda folder: flip(folder / "model.safetensors"),
        "a file missing": lambda folder: (folder / "tokenizer.json").unlink(),
        "a file added": lambda folder: (folder / "modeling.py").write_text("print('ran')"),
        "another config": lambda folder: (folder / "config.json").write_text("{}"),
        "no manifest": lambda folder: (folder / "offsite.json").unlink(),
        "a torn manifest": lambda folder: (folder / "offsite.json").write_bytes(b'{"format": "offsite/package/1"'),
        "another format": lambda folder: (folder / "offsite.json").write_bytes(b'{"format": "offsite/package/9"}'),
    }


@pytest.mark.parametrize("name", list(broken_packages()))
def test_a_broken_package_is_rejected_before_anything_is_made(capsys, dropped_package, tmp_path, notes_file, name):
    shutil.copytree(dropped_package.path, tmp_path / "package")
    broken_packages()[name](tmp_path / "package")
    code, out, lines = transcript(
        capsys, "tune", tmp_path / "package", "--data", notes_file, "-o", tmp_path / "bundle", "--block-tokens", "32"
    )
    assert (code, out) == (3, "")
    assert [line.startswith("offsite: error: ") for line in lines] in ([True], [True, False])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package", notes_file.name]


def test_tensors_that_are_not_finite_are_rejected_before_training(settings, dropped_package, tamper, tmp_path):
    from safetensors.torch import load_file, save_file

    def poison(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] = math.nan
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    from offsite.errors import NotFinite

    package = tamper(dropped_package.path, change=poison)
    with pytest.raises(NotFinite, match=r"model\.norm\.weight"):
        run(settings(package))
    assert not (tmp_path / "bundle.work").exists()


def test_a_bundle_is_not_a_package(settings, dropped_package, tmp_path):
    config = settings(dropped_package.path, steps=2)
    run(config)
    code = cli.run(["tune", str(config.output), "--data", str(config.data[0]), "-o", str(tmp_path / "again")])
    assert code == 3


def test_the_last_line_is_json(capsys, dropped_package, tmp_path, notes_file):
    words = ["tune", dropped_package.path, "--data", notes_file, "-o", tmp_path / "bundle", "--block-tokens", "32"]
    code, out, lines = transcript(capsys, *words, "--steps", "2", "--disclose", "steps")
    assert code == 0
    assert len(out.splitlines()) == 1
    told = json.loads(out)
    assert told["bundle"] == "bundle"
    assert told["bundle_digest"] == open_bundle(tmp_path / "bundle").digest
    assert told["adapter_bytes"] == (tmp_path / "bundle" / "adapter.safetensors").stat().st_size
    assert {"steps", "tokens", "seconds", "tokens_per_second", "peak_bytes", "best_loss"} <= told.keys()
    assert not any(line.startswith("offsite: error") for line in lines)


def test_a_bundle_fits_its_own_adapter_only(settings, dropped_package):
    config = settings(dropped_package.path, placement="0+2", steps=2)
    run(config)
    package = open_package(dropped_package.path)
    others = declared(config.spec().model_copy(update={"placement": "2+2"}), package.layout, package.block_tensors())
    with pytest.raises(WrongNames, match="missing"):
        open_bundle(config.output).load_tensors(others)


# Under a job


@pytest.fixture
def job_folder(tmp_path):
    """Write the terms for a package: LoRA of rank 3 on all blocks, unless told otherwise."""

    def make(package, **changes):
        adapter = AdapterSpec(kind="lora", placement="all", rank=3, dtype="float32")
        terms = {
            "job_id": "0" * 32,
            "owner": "-".join(["aaaa"] * 13),
            "client": "-".join(["bbbb"] * 13),
            "package_digest": package.digest,
            "base_digest": package.manifest.base_digest,
            "adapter": adapter,
            "created": 0,
            "expires": 2**33,
            **changes,
        }
        write_job(tmp_path / "job", Job(**terms))
        return tmp_path / "job"

    return make


def test_a_jobs_adapter_is_the_one_that_is_tuned(settings, narrow_package, job_folder):
    config = settings(narrow_package.path, job=job_folder(narrow_package), steps=2)
    run(config)
    adapter = open_bundle(config.output).manifest.adapter
    assert (adapter.kind, adapter.placement, adapter.rank, adapter.dtype) == ("lora", "all", 3, "float32")


def test_a_setting_that_is_not_the_jobs_is_refused(settings, narrow_package, job_folder):
    folder = job_folder(narrow_package)
    config = settings(narrow_package.path, job=folder, rank=4, adapter="lora")
    with pytest.raises(ConfigError, match=r"--rank 4: the job says 3$"):
        run(config)
    assert not config.output.exists()
    assert not work_folder(config.output).exists()


@pytest.mark.parametrize(
    ("given", "used", "said"),
    [
        (None, 0.004, "learning rate 0.004, as the job advises; --learning-rate takes another"),
        (0.02, 0.02, "the job advises learning rate 0.004; 0.02 is used"),
    ],
)
def test_the_rate_that_a_job_advises_is_used_where_none_is_given(
    given, used, said, settings, narrow_package, job_folder, capsys
):
    config = settings(narrow_package.path, job=job_folder(narrow_package, learning_rate=0.004), steps=2)
    run(config.model_copy(update={"learning_rate": given}))
    assert read_run(run_path(config.output)).learning_rate == used
    err = capsys.readouterr().err
    assert said in err
    assert ("warning" in err) is (given == 0.02)  # ten times the usual


def test_a_rate_far_beyond_the_usual_is_warned_of(settings, narrow_package, job_folder, capsys):
    config = settings(narrow_package.path, job=job_folder(narrow_package, learning_rate=0.011), steps=2)
    run(config.model_copy(update={"learning_rate": None}))
    assert "warning: learning rate 0.011 is 6 times the usual 0.002 of lora" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["package_digest", "base_digest"])
def test_a_job_for_another_package_is_refused(settings, narrow_package, job_folder, field):
    folder = job_folder(narrow_package, **{field: "sha256:" + "0" * 64})
    with pytest.raises(WrongBinding, match=r"job 'job' is for .* sha256:000000000000"):
        run(settings(narrow_package.path, job=folder))
    assert not (folder.parent / "bundle.work").exists()
