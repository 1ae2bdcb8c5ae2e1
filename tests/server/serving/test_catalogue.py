"""What a registry's owner accepts is served, and what it refuses no longer, without a restart."""

from __future__ import annotations

import asyncio
import copy
import shutil
from contextlib import aclosing

import pytest
from shelf import Shelf

import server.serving.catalogue
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.digests import model_digest
from offsite.errors import ArtefactError, ConfigError
from offsite.generation.generate import generate
from offsite.generation.sampling import Settings
from server.evaluation.candidates import read_own
from server.plugging.fit import fit, plugged, scaled
from server.plugging.ways import Way
from server.serving.catalogue import Bundles, Catalogue, Served
from server.serving.engine import Engine
from server.serving.protocol import CompletionAsk


@pytest.fixture
def shelf(tmp_path, dropped_package, make_bundle):
    made = Shelf(tmp_path, dropped_package, make_bundle)
    yield made
    made.registry.close()


@pytest.fixture
def lines(monkeypatch):
    found = []
    monkeypatch.setattr(server.serving.catalogue, "say", found.append)
    monkeypatch.setattr(server.serving.catalogue, "_LOOK_SECONDS", 0)
    return found


async def here():
    return False


def text_of(model, tokenizer, adapter=None):
    settings = Settings(limit_tokens=8, temperature=0.0)
    if adapter is None:
        pieces = list(generate(model, tokenizer, [9, 8, 7], settings, end_ids=frozenset({2})))
    else:
        with plugged(model, adapter) as one:
            pieces = list(generate(one, tokenizer, [9, 8, 7], settings, end_ids=frozenset({2})))
    return "".join(piece.text for piece in pieces)


async def answered(engine, served):
    ask = CompletionAsk(model=served.name, prompt=[9, 8, 7], max_tokens=8, temperature=0)
    async with engine.admitted(ask, served.adapter) as job, aclosing(engine.answer(job, here)) as pieces:
        return "".join([piece.text async for _, piece in pieces])


def test_accepting_and_refusing_change_what_is_served(shelf, lines, full_llama, letters_tokenizer, dropped_package):
    model, plain = copy.deepcopy(full_llama), copy.deepcopy(full_llama)

    def alone(bundle_id, share=1.0):
        record = read_owner_record(owner_record_path(dropped_package.path))
        fitted = fit(plain, read_own(shelf.bundles[bundle_id], record), record)
        return text_of(plain, letters_tokenizer, scaled(plain, fitted, share))

    async def run():
        engine = Engine(model, letters_tokenizer)
        bundles = Bundles(shelf.registry, model, model_digest(model))
        catalogue = Catalogue(engine, {"base": Served("base")}, bundles)
        assert set(await catalogue.names()) == {"base"}
        anna = shelf.put("b", "anna", kind="lora", rank=2, placement="1+1")
        waiting = shelf.put("c", "bert", kind="bitfit", placement="1+1", accept=False)
        shelf.put("d", "of another model", base_digest="sha256:" + "0" * 64)
        named = await catalogue.names()
        assert set(named) == {"base", "anna"}
        assert await answered(engine, named["anna"]) == alone(anna) != text_of(plain, letters_tokenizer)
        assert await answered(engine, named["base"]) == text_of(plain, letters_tokenizer)
        shelf.registry.advance(waiting, "accepted")
        named = await catalogue.names()
        assert set(named) == {"base", "anna", "bert"}
        assert await answered(engine, named["bert"]) == alone(waiting)
        assert shelf.registry.ways(waiting, "served") == [("1", "")]
        shelf.registry.refuse(anna)  # a way that is noted does not stand in the way of that
        assert set(await catalogue.names()) == {"base", "bert"}
        assert named["anna"].adapter.pool is None
        assert await catalogue.find("anna") is None
        half = shelf.put("e", "cora", kind="blocks", placement="1+1")
        shelf.registry.note_way(half, "plugged-in", str(Way(0.5)))
        named = await catalogue.names()
        assert await answered(engine, named["cora"]) == alone(half, 0.5)
        assert alone(half, 0.5) != alone(half)
        shelf.registry.note_way(half, "plugged-in", str(Way()))
        assert await answered(engine, (await catalogue.names())["cora"]) == alone(half)
        shelf.registry.note_way(half, "plugged-in", str(Way(0.5)))  # as once before
        assert await answered(engine, (await catalogue.names())["cora"]) == alone(half, 0.5)
        shelf.registry.advance(half, "plugged-in")
        shelf.registry.withdraw(half)
        assert set(await catalogue.names()) == {"base", "bert"}

    asyncio.run(run())
    assert [line.partition(" is served")[2] for line in lines] == [
        " as 'anna'",
        " as 'bert'",
        " no longer",
        " as 'cora'",
        "",  # put on anew, twice
        "",
        " no longer",
    ]


def test_a_name_stays_with_the_client_that_had_it_first(shelf, lines, full_llama, letters_tokenizer):
    model = copy.deepcopy(full_llama)

    async def run():
        catalogue = Catalogue(
            Engine(model, letters_tokenizer),
            {"base": Served("base")},
            Bundles(shelf.registry, model, model_digest(model)),
        )
        spec = {"kind": "lora", "rank": 2, "placement": "1+1"}
        first = shelf.put("b", "anna", **spec)
        second = shelf.put("c", "anna", **spec)  # another client of that name
        like_base = shelf.put("d", "base", **spec)
        named = await catalogue.names()
        assert set(named) == {"base", "anna", f"anna@{second}", f"base@{like_base}"}
        assert named["base"].adapter is None
        before = named["anna"].adapter
        newer = shelf.put("b", "anna", **spec)
        named = await catalogue.names()
        assert set(named) == {"base", "anna", f"anna@{first}", f"anna@{second}", f"base@{like_base}"}
        assert named[f"anna@{first}"].adapter is before
        shelf.registry.refuse(newer)
        assert (await catalogue.names())["anna"].adapter is before
        shelf.registry.refuse(first)  # nothing of hers is left: nobody else is called so for that
        assert set(await catalogue.names()) == {"base", f"anna@{second}", f"base@{like_base}"}

    asyncio.run(run())


def test_a_bundle_that_cannot_be_served_is_said_once_and_disturbs_nothing(shelf, lines, full_llama, letters_tokenizer):
    model = copy.deepcopy(full_llama)

    async def run():
        catalogue = Catalogue(
            Engine(model, letters_tokenizer),
            {"base": Served("base")},
            Bundles(shelf.registry, model, model_digest(model)),
        )
        spec = {"kind": "lora", "rank": 2, "placement": "1+1"}
        damaged, good = shelf.put("b", "anna", **spec), shelf.put("c", "bert", **spec)
        (shelf.registry.bundle_folder(damaged) / "adapter.safetensors").write_bytes(b"x")
        for _ in range(3):
            assert set(await catalogue.names()) == {"base", "bert"}
        assert [line.partition(":")[0] for line in lines] == [
            f"bundle {damaged} is not served",
            f"bundle {good} is served as 'bert'",
        ]

    asyncio.run(run())


def test_a_withdrawn_adapter_stays_until_its_last_answer_is_written(shelf, lines, full_llama, letters_tokenizer):
    model = copy.deepcopy(full_llama)

    async def run():
        engine = Engine(model, letters_tokenizer)
        catalogue = Catalogue(engine, {}, Bundles(shelf.registry, model, model_digest(model)))
        anna = shelf.put("b", "anna", kind="lora", rank=2, placement="1+1")
        served = (await catalogue.names())["anna"]
        whole = await answered(engine, served)
        ask = CompletionAsk(model="anna", prompt=[9, 8, 7], max_tokens=8, temperature=0)
        async with engine.admitted(ask, served.adapter) as job, aclosing(engine.answer(job, here)) as pieces:
            said = (await anext(pieces))[1].text
            shelf.registry.refuse(anna)
            assert await catalogue.names() == {}
            assert served.adapter.pool is not None
            said += "".join([piece.text async for _, piece in pieces])
        assert said == whole
        await engine.retire(served.adapter)
        assert served.adapter.pool is None

    asyncio.run(run())


def test_a_package_that_moved_is_named(shelf, lines, full_llama, dropped_package, tmp_path):
    first, now = tmp_path / "first", tmp_path / "now"
    shutil.copytree(dropped_package.path, first)
    shutil.copy(owner_record_path(dropped_package.path), owner_record_path(first))
    shelf.package = open_package(first)
    bundle_id = shelf.put("b", "anna", kind="lora", rank=2, placement="1+1")
    first.rename(now)
    owner_record_path(first).rename(owner_record_path(now))
    with pytest.raises(ConfigError, match="not where it was"):
        Bundles(shelf.registry, full_llama, model_digest(full_llama)).read(bundle_id)
    fitted, _ = Bundles(shelf.registry, full_llama, model_digest(full_llama), [now]).read(bundle_id)
    assert fitted.spec.rank == 2
    with pytest.raises(ArtefactError, match="no owner's record"):
        Bundles(shelf.registry, full_llama, model_digest(full_llama), [tmp_path / "elsewhere"])
