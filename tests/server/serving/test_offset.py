"""Serving with an offset: every answer is a loop over three models, batched or not, and what the verb refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import openai
import pytest
import torch
from pydantic import ValidationError
from row_adapters import fitted
from served import calling, serving
from tiny_architectures import tiny

import server.serving.serve
from offsite.errors import ConfigError
from offsite.generation.generate import Answer
from offsite.generation.sampling import Settings
from server.batching.batch import Batch, Row
from server.batching.batches import beside, cost_of
from server.batching.rows import Rows
from server.plugging.fit import plugged
from server.plugging.offset import Offset
from server.registry.registry import Registry
from server.serving.config import ServeConfig
from server.serving.serve import serve

ENDS = frozenset({2})
BUNDLE = "a" * 12


def offset_of(dropped_package, kind, beta=0.8):
    emulator = dropped_package.load_model()
    return Offset(emulator, fitted(emulator, kind, 1, at=(0, 6)), beta)


def scores(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def naive(model, offset, prompt, num, *, seed=None):
    """Tokens of three models, without a cache, one answer at a time."""
    ids, found, generator = list(prompt), [], torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    while len(found) < num and not ENDS & set(found):
        with plugged(offset.emulator, offset.adapter) as one:
            tuned = scores(one, ids)
        moved = scores(model, ids) + offset.beta * (tuned - scores(offset.emulator, ids))
        drawn = moved.argmax() if seed is None else torch.multinomial(torch.softmax(moved, -1), 1, generator=generator)
        found.append(int(drawn))
        ids.append(found[-1])
    return found


@pytest.mark.parametrize("kind", ["lora", "blocks"])
def test_rows_that_are_written_together_are_those_of_three_models(kind, full_llama, dropped_package, letters_tokenizer):
    model, offset = copy.deepcopy(full_llama), offset_of(dropped_package, kind)
    plans = [(list(range(3 + n, 5 + 4 * n)), 2 + 3 * n, n if n % 2 else None) for n in range(1, 6)]
    expected = [naive(model, offset, prompt, num, seed=seed) for prompt, num, seed in plans]
    assert expected[1] != naive(model, Offset(offset.emulator, offset.adapter, 1e-6), *plans[1][:2])
    num_layers, num_bytes = cost_of(model)
    other = beside(offset)
    total = num_bytes + 2 * other.bytes_per_token
    batch = Batch(
        model,
        Rows(model),
        num_layers=num_layers,
        bytes_per_token=total,
        limit_rows=3,
        prefill_tokens=6,
        beside=other,
    )
    heard = []
    for prompt, num, seed in plans:  # they join and leave in the middle of others
        settings = Settings(limit_tokens=num, temperature=0.0 if seed is None else 1.0, seed=seed)
        heard.append([])
        answer = Answer(letters_tokenizer, prompt, settings, end_ids=ENDS)
        batch.submit(Row(tuple(prompt), settings, answer, heard[-1].append))
        batch.step()
    most = 0
    while not batch.is_idle:
        batch.step()
        most = max(most, batch.num_cache_bytes)
    assert [[piece.token for piece in told] for told in heard] == expected
    assert 0 < most <= 3 * 64 * total
    assert batch.num_cache_bytes == 0


def test_over_http_with_and_without_batches_until_the_bundle_is_refused(full_llama, dropped_package, letters_tokenizer):
    stands, texts = [True], {}
    for num_rows in (4, 1):
        offset = offset_of(dropped_package, "lora")
        options = {"offset": offset, "stands": lambda: stands[0], "limit_rows": num_rows}
        with serving(copy.deepcopy(full_llama), letters_tokenizer, **options) as (address, engine):
            assert (engine.batch is None) == (num_rows == 1)
            with calling(address) as client:
                asks = [{"temperature": 0}, {"seed": 3}]
                texts[num_rows] = [
                    client.completions.create(model="tiny", prompt=[9, 8, 7], max_tokens=8, **ask).choices[0].text
                    for ask in [*asks, *asks]
                ]
                if num_rows == 1:
                    stands[0] = False
                    with pytest.raises(openai.NotFoundError):
                        client.completions.create(model="tiny", prompt=[9], max_tokens=1)
    greedy, drawn = texts[4][:2]
    assert texts[4] == texts[1] == [greedy, drawn, greedy, drawn]
    assert greedy != drawn
    offset = offset_of(dropped_package, "lora")
    ids = naive(full_llama, offset, [9, 8, 7], 8)
    assert greedy == letters_tokenizer.decode(ids, skip_special_tokens=True)


def test_an_emulator_that_cannot_be_batched_says_why():
    emulator = tiny("mixtral")
    assert "experts" in beside(Offset(emulator, fitted(emulator, "blocks", 1, at=(0, 5)), 0.5))


class Ended:
    """Stands for a process that is told to stop as soon as it runs."""

    should_exit = False

    def __init__(self, app):
        pass

    def run(self, sockets):
        pass


def test_the_verb_serves_an_accepted_bundle_and_the_registry_knows(
    shelve, make_bundle, dropped_package, llama_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OFFSITE_API_KEY", "k")
    monkeypatch.setattr(server.serving.serve, "Process", Ended)
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf")
    config = ServeConfig(
        adapted=llama_folder,
        offset=f"{dropped_package.path},{named['id']}",
        registry=named["registry"],
        keys=named["keys"],
        port=0,
    )
    done = serve(config)
    assert done["model"] == "llama"
    json.dumps(done, allow_nan=False)
    assert "moved by 0.5" in (told := capsys.readouterr().err)
    assert "two more forward passes" in told
    with Registry.open(named["registry"], named["keys"]) as registry:
        assert registry.ways(named["id"], "served") == [("offset=0.5", "")]
        assert registry.entry(named["id"]).state == "accepted"
    monkeypatch.setattr(server.serving.serve, "load_served", lambda _: pytest.fail("loaded"))
    adapted = tmp_path / "adapted"
    adapted.mkdir()
    (adapted / "offsite.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapted folder"):
        serve(config.model_copy(update={"adapted": adapted}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"offset": f"package,{BUNDLE}"}, "needs --registry"),
        ({"offset": BUNDLE, "registry": Path("r")}, "PACKAGE,ID"),
        ({"offset": "package,folder/bundle", "registry": Path("r")}, "PACKAGE,ID"),
        ({"offset": f"package,{BUNDLE}", "registry": Path("r"), "mix": 0.5}, "--mix does not go"),
        ({"offset": f"package,{BUNDLE}", "registry": Path("r"), "adapter": {"a": Path("b")}}, "--adapter does not go"),
        ({"beta": 0.5}, "--beta goes with --offset"),
        ({"offset": f"package,{BUNDLE}", "registry": Path("r"), "beta": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together(given, message):
    with pytest.raises(ValidationError, match=message):
        ServeConfig(adapted=Path("model"), **given)
