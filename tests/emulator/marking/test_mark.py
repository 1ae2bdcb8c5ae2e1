import json
import math
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import emulator.marking.mark
from emulator.audit.similarity import is_near
from emulator.marking.leak import Score, compare
from emulator.marking.mark import KEY_NAME, MARKS_NAME, MarkKey, carriers, mark, nudged, open_key, places, read_marks
from offsite import cli
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.errors import RunFailed

ALICE, BOB, CAROL, DAVE = ("-".join([letter * 4] * 13) for letter in "abcd")
KEY, OTHER_KEY = MarkKey(b"k" * 32), MarkKey(b"o" * 32)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def full_model() -> LlamaForCausalLM:
    """A random llama of eight blocks, wide enough for ten thousand marked entries in its middle; read only."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def package(tmp_path_factory, make_package, full_model) -> Package:
    """A width package in bfloat16; read only."""
    out = tmp_path_factory.mktemp("mark") / "package"
    channels = {f"middle.{number}": tuple(range(number, 96, 2 + number % 2)) for number in range(4)}
    return make_package(out, model=full_model, kept=tuple(range(8)), channels=channels, dtype="bfloat16")


@pytest.fixture
def keys(tmp_path) -> Path:
    (tmp_path / "keys").mkdir(mode=0o700)
    return tmp_path / "keys"


@pytest.fixture
def make_marked(tmp_path, package) -> Callable[..., Tensors]:
    """Mark the package in memory."""

    def made(recipient: str, key: MarkKey = KEY) -> Tensors:
        tensors = load_file(package.path / "model.safetensors")
        for name in carriers(package):
            tensors[name] = nudged(tensors[name], places(key, package.digest, name, tensors[name]), recipient)
        return tensors

    return made


@pytest.fixture
def find(tmp_path, package) -> Callable[..., "object"]:
    """Compare tensors, saved as a checkpoint, with the package."""
    counter = iter(range(10_000))

    def found(tensors: Tensors, recipients=(ALICE, BOB), key: MarkKey = KEY):
        folder = tmp_path / f"suspect{next(counter)}"
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return compare(package, folder, key, recipients)

    return found


def noisy(tensors: Tensors, relative: float, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std(correction=0) * relative
        out[name] = (tensor.float() + noise).to(tensor.dtype)
    return out


def tuned(package: Package, tensors: Tensors, *, steps: int, seed: int = 0, rate: float = 1e-3) -> Tensors:
    """Fine-tune every weight of the package's model with these tensors, and round to their dtype."""
    model = package.load_model()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        ids = torch.randint(3, 259, (4, 32), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    state = model.state_dict()
    return {name: state[name].detach().to(tensor.dtype) for name, tensor in tensors.items()}


def test_the_mark_is_exactly_the_pattern_and_only_in_the_middles_matrices(package, make_marked):
    before, after = load_file(package.path / "model.safetensors"), make_marked(ALICE)
    assert {name.split(".")[2] for name in carriers(package)} == {"2", "3", "4", "5"}
    assert not any("norm" in name for name in carriers(package))
    moved = 0
    for name, weight in before.items():
        if name not in carriers(package):
            assert torch.equal(weight, after[name])
            continue
        where = places(KEY, package.digest, name, weight)
        expected = torch.zeros(weight.numel())
        expected[where.index] = torch.where(where.up(ALICE), where.step, -where.step)
        assert torch.equal((after[name].float() - weight.float()).flatten(), expected)
        value = weight.float().flatten()[where.index].abs()
        assert bool(((where.step / value > 2**-8) & (where.step / value <= 2**-7)).all())
        moved += len(where.index)
    assert moved / sum(before[name].numel() for name in carriers(package)) == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_mark_survives_every_dtype_of_storage(dtype):
    kind = getattr(torch, dtype)
    values = [0.0, 1.0, -1.0, 3.14159, 1e-6, torch.finfo(kind).max, torch.finfo(kind).tiny]
    weight = torch.cat([torch.randn(5000), torch.tensor(values).repeat(100)]).to(kind).reshape(100, -1)
    where = places(KEY, "sha256:0", "name", weight)
    marked = nudged(weight, where, ALICE)
    assert marked.dtype == kind
    assert bool(marked.isfinite().all())
    assert not torch.equal(marked, weight)
    rounded = (marked.to(torch.bfloat16).float() - weight.float()).flatten()[where.index]
    normal = weight.float().flatten()[where.index].abs()
    plain = (normal > 1e-2) & (normal < 1e3)
    agree = (rounded[plain] > 0) == where.up(ALICE)[plain]
    assert agree.float().mean() > 0.95


def test_no_entry_moves_further_than_a_step():
    """Below 2**-17, entries of float16 lie wider than a step of bfloat16, and half of a width rounds to all of it."""
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        weight = (torch.arange(1, 4097).float() * 2.0**-24).to(kind).reshape(64, 64)
        marked = nudged(weight, places(MarkKey(bytes(32)), "sha256:" + "0" * 64, "a.weight", weight), ALICE)
        assert not torch.equal(marked, weight)
        assert is_near(weight, marked).all()


def test_directions_are_one_recipients_own_and_places_the_owners(package):
    weight = torch.randn(400, 400)
    where = places(KEY, package.digest, "name", weight)
    assert not torch.equal(where.up(ALICE), where.up(BOB))
    assert torch.equal(where.index, places(KEY, package.digest, "name", weight).index)
    for other in (
        places(OTHER_KEY, package.digest, "name", weight),
        places(KEY, "sha256:0", "name", weight),
        places(KEY, package.digest, "eman", weight),
    ):
        assert not torch.equal(where.index[: len(other.index)], other.index[: len(where.index)])
    for level in range(8):
        chosen = where.level == level
        share = where.share[chosen][0]
        assert chosen.float().mean() == pytest.approx(1 / 8, abs=0.01)
        assert where.up(ALICE)[chosen].float().mean() == pytest.approx(float(share), abs=0.03)
    assert float(where.tendency.mean()) == pytest.approx(0, abs=0.03)
    assert float(where.tendency.square().mean()) == pytest.approx(1, abs=0.03)


def test_the_marked_model_says_nearly_the_same(package, make_marked):
    plain = package.load_model()
    ids = torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        plain.load_state_dict({name: tensor.float() for name, tensor in make_marked(ALICE).items()}, strict=False)
        after = plain(input_ids=ids).logits
    assert float((after - before).norm() / before.norm()) < 0.02
    assert not torch.equal(after, before)


def test_marked_copies_are_found_and_nobody_else(package, make_marked, find):
    found = find(make_marked(ALICE), (ALICE, BOB, CAROL))
    assert found.found == (ALICE,)
    assert found.owner_found
    assert found.obstacle is None
    assert max(abs(found.scores[one].z) for one in (BOB, CAROL)) < 5
    other = find(make_marked(ALICE), (ALICE, BOB), key=OTHER_KEY)
    assert not other.found
    assert not other.owner_found
    untouched = find(load_file(package.path / "model.safetensors"))
    assert untouched.found == ()
    assert not untouched.owner_found
    assert untouched.num_changed == 0


def test_a_copy_for_somebody_not_looked_for_is_still_the_owners(make_marked, find):
    found = find(make_marked(CAROL))
    assert found.found == ()
    assert found.owner_found


def test_unmarked_controls_score_as_the_null_says(package, find):
    plain = load_file(package.path / "model.safetensors")
    suspects = [noisy(plain, 10.0 ** (-3 + seed % 3), seed) for seed in range(24)]
    suspects += [tuned(package, plain, steps=3, seed=seed) for seed in range(4)]
    scores = []
    for suspect in suspects:
        found = find(suspect, (ALICE, BOB, CAROL, DAVE))
        assert not found.found
        assert not found.owner_found
        scores += [score.z for score in found.scores.values()]
        scores.append(found.owner.z)
    z = torch.tensor(scores)
    assert abs(float(z.mean())) < 4 / math.sqrt(len(z))
    assert 0.8 < float(z.std()) < 1.2
    assert float(z.abs().max()) < 4.5


def test_wrong_recipients_score_as_the_null_says_against_a_tuned_copy(package, make_marked, find):
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    names = ["".join(letters[number >> 5 * i & 31] for i in range(4)) for number in range(400)]
    wrong = ["-".join([name] * 13) for name in names if name != "aaaa"]
    found = find(tuned(package, make_marked(ALICE), steps=3), [ALICE, *wrong])
    assert found.found == (ALICE,)
    z = torch.tensor([found.scores[one].z for one in wrong])
    assert abs(float(z.mean())) < 4 / math.sqrt(len(z))
    assert 0.9 < float(z.std()) < 1.1


@pytest.mark.parametrize("num", [1, 10, 100, 1000])
def test_nobody_is_accused_of_few_changes(package, find, num):
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    names = ["-".join([f"{letters[number >> 5]}{letters[number & 31]}zz"] * 13) for number in range(400)]
    plain = load_file(package.path / "model.safetensors")
    generator = torch.Generator().manual_seed(num)
    for trial in range(4):
        key = MarkKey(bytes([trial]) * 32)
        suspect = {name: tensor.clone() for name, tensor in plain.items()}
        marked = {name: places(key, package.digest, name, plain[name]).index for name in carriers(package)}
        spots = [(name, int(one)) for name, index in marked.items() for one in index]
        for spot in torch.randperm(len(spots), generator=generator)[:num].tolist():
            name, at = spots[spot]
            suspect[name].view(-1)[at] *= 1.05 if spot % 2 else 0.95
        found = find(suspect, names, key=key)
        assert found.num_changed == num
        assert found.found == ()
        assert not found.owner_found


def test_odds_are_a_bound_whatever_the_weights():
    shares = torch.tensor([2, 22, 57, 103, 153, 199, 234, 254]).double() / 256
    generator = torch.Generator().manual_seed(0)
    for num, spread in ((1, 0.0), (10, 0.0), (100, 0.0), (100, 2.0), (1000, 1.0), (10_000, 0.0)):
        share = shares[torch.arange(num) % 8]
        lean = (spread * torch.randn(num, generator=generator, dtype=torch.float64)).exp() * (0.5 - share).sign()
        up, down = ((1 - share) / share).sqrt(), -(share / (1 - share)).sqrt()  # the most skewed that it can be
        draws = torch.rand(4_000_000 // max(num, 100), num, generator=generator) < share
        z = torch.where(draws, up, down) @ lean / lean.norm()
        largest = float((lean.abs() * torch.maximum(up, -down)).max() / lean.norm())
        p = torch.tensor([Score(float(one), largest).p_value for one in z])
        for level in (0.3, 0.1, 0.03, 0.01, 1e-3):
            expected = level * len(p)
            assert int((p <= level).sum()) <= expected + 4 * math.sqrt(expected)
        assert float(p.min()) > 1e-2 / len(p)
        assert num > 1 or float(z.max()) > 11  # which the normal tail would call one in 10**28
    assert Score(5.7, 0.01).p_value * 3 < 1e-6 < Score(5.2, 0.0).p_value
    assert Score(-9.0, 0.0).p_value == 1
    assert Score(1e9, 0.0).p_value == 1e-300


def test_fine_tuning_noise_and_rounding_leave_the_mark(package, make_marked, find):
    copy = make_marked(ALICE)
    for suspect in (
        tuned(package, copy, steps=5),
        noisy(copy, 0.01),
        noisy({name: tensor.float() for name, tensor in copy.items()}, 0.01),
        {name: tensor.half() for name, tensor in copy.items()},
        _int8(copy),
        {name: torch.where(tensor.abs() > 0.1, tensor, 0.0) for name, tensor in copy.items()},
    ):
        assert find(suspect, (ALICE, BOB)).found == (ALICE,)


def test_a_few_huge_or_broken_values_do_not_decide(package, make_marked, find):
    copy, plain = make_marked(ALICE), load_file(package.path / "model.safetensors")
    for value in (1e30, math.inf, math.nan):
        for tensors, expected in ((copy, (ALICE,)), (plain, ())):
            spoilt = {name: tensor.clone() for name, tensor in noisy(tensors, 1e-3).items()}
            for name in carriers(package):
                spoilt[name].view(-1)[:3] = value
            assert find(spoilt, (ALICE, BOB)).found == expected


@pytest.mark.parametrize("mix", ["average", "either", "extremes"])
def test_two_who_mix_their_copies_are_both_found(make_marked, find, mix):
    one, two = make_marked(ALICE), make_marked(BOB)
    mixed = {}
    for name in one:
        a, b = one[name].float(), two[name].float()
        coin = torch.rand(a.shape, generator=torch.Generator().manual_seed(len(name))) < 0.5
        mixed[name] = {"average": (a + b) / 2, "either": torch.where(coin, a, b), "extremes": torch.maximum(a, b)}[mix]
    assert set(find(mixed, (ALICE, BOB, CAROL)).found) == {ALICE, BOB}


@pytest.mark.parametrize("mix", ["majority", "minority", "average"])
def test_three_who_mix_their_copies_are_found(make_marked, find, mix):
    copies = [make_marked(one) for one in (ALICE, BOB, CAROL)]
    mixed = {}
    for name in copies[0]:
        stacked = torch.stack([copy[name].float() for copy in copies])
        low, middle, high = stacked.sort(dim=0).values
        mixed[name] = {"majority": middle, "minority": low + high - middle, "average": stacked.mean(0)}[mix]
    found = find(mixed, (ALICE, BOB, CAROL, DAVE))
    assert found.owner_found
    assert found.found
    assert set(found.found) <= {ALICE, BOB, CAROL}
    if mix != "minority":  # which points at the group, and at single members only weakly
        assert set(found.found) == {ALICE, BOB, CAROL}


def test_channels_in_another_order_or_scale_are_put_right(package, make_marked, find):
    copy = make_marked(ALICE)
    generator = torch.Generator().manual_seed(0)
    for name in carriers(package):
        if name.endswith("up_proj.weight"):
            order = torch.randperm(len(copy[name]), generator=generator)
            scale = torch.randn(len(order), generator=generator).sign() * 2 ** torch.randn(
                len(order), generator=generator
            )
            down, gate = name.replace("up_proj", "down_proj"), name.replace("up_proj", "gate_proj")
            copy[name] = copy[name].float()[order] * scale[:, None]
            copy[gate] = copy[gate][order]
            copy[down] = copy[down].float()[:, order] / scale
    found = find(copy)
    assert found.found == (ALICE,)
    assert found.cosine > 0.99


def test_another_model_is_not_compared(package, make_marked, find):
    copy = make_marked(ALICE)
    others = {name: torch.randn(tensor.shape) for name, tensor in copy.items()}
    assert "unrelated" in find(others).obstacle
    assert "no weight matrix" in find({"other.weight": torch.ones(3)}).obstacle
    assert "no weight matrix" in find({name: tensor[..., :-1] for name, tensor in copy.items()}).obstacle
    first = carriers(package)[0]
    small = find({first: copy[first]})
    assert "only" in small.obstacle
    assert small.found == ()
    assert small.num_missing == len(carriers(package)) - 1


def test_the_same_key_and_recipient_give_the_same_bytes(package, keys, tmp_path, make_marked):
    one = mark(package, tmp_path / "one", recipient=ALICE, keys=keys)
    two = mark(package, tmp_path / "two", recipient=ALICE, keys=keys)
    three = mark(package, tmp_path / "three", recipient=BOB, keys=keys)
    assert one.digest == two.digest != package.digest
    assert len({one.digest, three.digest, package.digest}) == 3
    assert one.manifest.model_dump(exclude={"files"}) == package.manifest.model_dump(exclude={"files"})
    assert [(item.recipient, item.marked) for item in read_marks(keys)] == [(ALICE, one.digest), (BOB, three.digest)]
    secret = keys / KEY_NAME
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE((keys / MARKS_NAME).stat().st_mode) == 0o600
    assert secret.read_bytes().hex() not in repr(open_key(keys, create=False))
    expected = make_marked(ALICE, MarkKey(secret.read_bytes()))
    found = load_file(one.path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_owner_record(owner_record_path(one.path)).package_digest == one.digest


def test_a_failed_mark_leaves_nothing(package, keys, tmp_path, monkeypatch):
    def full(*_):
        raise RunFailed("disk full")

    monkeypatch.setattr(emulator.marking.mark, "write_owner_record", full)
    with pytest.raises(RunFailed):
        mark(package, tmp_path / "out", recipient=ALICE, keys=keys)
    assert {path.name for path in tmp_path.iterdir()} == {"keys"}


@pytest.fixture
def verb(tmp_path, package, monkeypatch, capsys, make_party) -> Callable[..., tuple[int, dict, str]]:
    """Run the command line in a folder with a package and the owner's keys."""
    shutil.copytree(package.path, tmp_path / "package")
    shutil.copy(owner_record_path(package.path), tmp_path)
    make_party("owner").keys.rename(tmp_path / "keys")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, dict, str]:
        code = cli.run(line.split())
        shown = capsys.readouterr()
        return code, json.loads(shown.out.splitlines()[-1]) if code == 0 else {}, shown.err

    return run


def test_the_verbs_from_marking_to_tracing(verb, package, tmp_path):
    code, told, shown = verb(f"mark package --recipient {ALICE.upper()} --keys keys -o for-alice")
    assert code == 0
    assert told["recipient"] == ALICE
    assert told["package_digest"] == open_package(tmp_path / "for-alice").digest
    assert "do not trust" in shown
    assert verb(f"mark package --recipient {BOB} --keys keys -o for-bob")[0] == 0

    code, told, shown = verb("trace for-alice --package package --keys keys")
    assert code == 0
    assert told["marked"]
    assert told["comparable"]
    assert told["verdict"] == f"marked for {ALICE}"
    assert {one["recipient"]: one["marked"] for one in told["recipients"]} == {ALICE: True, BOB: False}

    model = open_package(tmp_path / "for-bob").load_model()
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="60KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    assert verb("trace checkpoint --package package --keys keys")[1]["verdict"] == f"marked for {BOB}"

    _, told, _ = verb(f"trace package --package package --recipient {CAROL} --keys keys")
    assert told["verdict"] == "no mark found at p < 1e-06"
    assert not told["marked"]
    _, told, _ = verb(f"trace for-bob --package package --recipient {CAROL} --keys keys")
    assert told["verdict"] == "marked with these keys, for nobody looked for"


def test_a_suspect_of_another_architecture_cannot_be_compared(verb, tiny, tmp_path):
    assert verb(f"mark package --recipient {ALICE} --keys keys -o for-alice")[0] == 0
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    code, told, shown = verb("trace gpt2 --package package --keys keys")
    assert code == 0
    assert not told["comparable"]
    assert not told["marked"]
    assert told["verdict"].startswith("cannot be compared: no weight matrix")
    assert "cannot be compared" in shown


REFUSALS = {
    f"mark nowhere --recipient {ALICE} --keys keys -o out": (3, "no package folder named 'nowhere'"),
    "mark package --recipient someone --keys keys -o out": (3, "nobody called 'someone' is trusted here"),
    "mark package --keys keys -o out": (2, "--recipient is missing"),
    f"mark package --recipient {ALICE} --keys keys -o package": (2, "output 'package' already exists"),
    f"mark package --recipient {ALICE} --keys keys -o taken": (2, "output 'taken.owner.json' already exists"),
    f"mark package --recipient {ALICE} --keys nokeys -o out": (2, "no keys folder at 'nokeys'"),
    f"mark package --recipient {ALICE} --keys open -o out": (3, "keys folder 'open' is open to others"),
    f"mark shipped --recipient {ALICE} --keys keys -o out": (3, "no owner's record 'shipped.owner.json'"),
    f"mark foreign --recipient {ALICE} --keys keys -o out": (3, "'foreign.owner.json' is the record of another"),
    f"mark for-alice --recipient {BOB} --keys keys -o out": (2, "package 'for-alice' is marked already"),
    f"mark small --recipient {ALICE} --keys keys -o out": (2, "a mark needs 16000"),
    "trace for-alice --package for-alice --keys keys": (2, "package 'for-alice' is marked already"),
    "trace for-alice --package nowhere --keys keys": (3, "no package folder named 'nowhere'"),
    "trace for-alice --keys keys": (2, "--package is missing"),
    "trace nowhere --package package --keys keys": (2, "no suspect folder named 'nowhere'"),
    "trace taken --package package --keys keys": (2, "suspect 'taken' holds no safetensors weights"),
    "trace pickled --package package --keys keys": (2, "suspect 'pickled' has pickled weights"),
    "trace broken --package package --keys keys": (3, "file 'model.safetensors' is not a safetensors file"),
    "trace for-alice --package foreign --keys keys": (2, "remember nobody whom 'foreign' was marked for"),
    "trace for-alice --package package --keys fresh": (2, "keys folder 'fresh' holds no mark.key"),
    "trace for-alice --package package --keys short": (3, "key of marks 'mark.key' has 3 bytes"),
    "trace for-alice --package package --keys bare": (3, "key of marks 'mark.key' is open to others"),
    "trace for-alice --package package --keys garbled": (3, "list of marks"),
}


def test_refusals_take_one_line_and_leave_nothing(verb, tmp_path, make_package):
    assert verb(f"mark package --recipient {ALICE} --keys keys -o for-alice")[0] == 0
    for name in ("taken", "pickled", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken.owner.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"xx")
    for name in ("open", "fresh", "short", "bare", "garbled"):
        (tmp_path / name).mkdir(mode=0o755 if name == "open" else 0o700)
    for name, content, mode in (("short", b"abc", 0o600), ("bare", b"k" * 32, 0o644), ("garbled", b"k" * 32, 0o600)):
        (tmp_path / name / KEY_NAME).write_bytes(content)
        (tmp_path / name / KEY_NAME).chmod(mode)
    (tmp_path / "garbled" / MARKS_NAME).write_text("[]")
    (tmp_path / "garbled" / MARKS_NAME).chmod(0o600)
    shutil.copytree(tmp_path / "package", tmp_path / "shipped")
    make_package(tmp_path / "foreign")
    make_package(tmp_path / "small", kept=(0, 1, 2, 6, 7))
    shutil.copy(tmp_path / "package.owner.json", tmp_path / "foreign.owner.json")
    for line, (code, message) in REFUSALS.items():
        if "-o taken" in line:  # where a record stands, and no folder
            (tmp_path / "taken").rmdir()
        before = _listing(tmp_path)
        found, _, shown = verb(line)
        assert found == code, line
        lines = shown.splitlines()
        assert lines[0].startswith("offsite: error: "), line
        assert message in lines[0], line
        assert len(lines) <= 2, line
        assert _listing(tmp_path) == before, line
        (tmp_path / "taken").mkdir(exist_ok=True)


def test_a_marked_package_is_opened_tuned_and_plugged_in(verb, full_model, letters_tokenizer, tmp_path, shelve):
    assert verb(f"mark package --recipient {ALICE} --keys keys -o for-alice")[0] == 0
    assert verb("inspect for-alice")[0] == 0
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"row {n} " * 20}) + "\n" for n in range(40)))
    tune = "--data text.jsonl --device cpu --adapter lora --placement 2+2 --steps 2 --batch-size 2 --block-tokens 32"
    code, _, shown = verb(f"tune for-alice {tune} -o bundle")
    assert code == 0, shown
    full_model.save_pretrained(tmp_path / "model")
    letters_tokenizer.save_pretrained(tmp_path / "model")
    named = shelve(tmp_path / "bundle", tmp_path / "for-alice", tmp_path / "side")
    registry = f"--registry {named['registry']} --keys {named['keys']}"
    code, _, shown = verb(f"plug-in ./model {named['id']} --package for-alice {registry} -o adapted")
    assert code == 0, shown


def _int8(tensors: Tensors) -> Tensors:
    def rounded(weight: torch.Tensor) -> torch.Tensor:
        if weight.dim() < 2:
            return weight
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
        return (weight.float() / scale).round() * scale

    return {name: rounded(weight) for name, weight in tensors.items()}


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
