"""A state-space model was packaged and tuned, and then could neither be audited nor answer a single request.

What people met: only the end of the way told that the middle had no keys and values to cache. Such a model goes the
whole way now; the figures of its audit and the text of its answers are those of forwards without a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import aclosing

import pytest
import torch
from recurrent import tiny, uncached

from client.audit.audit import run as audit
from client.audit.config import AuditBundleConfig
from client.tuning.config import TuneConfig
from client.tuning.verb import run as tune
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run as distill
from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.package import open_package
from offsite.audits.record import read_audit
from server.plugging.adapted import load_adapted
from server.plugging.config import PlugConfig
from server.plugging.plug import run as plug_in
from server.serving.engine import Engine
from server.serving.protocol import CompletionAsk


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
@pytest.mark.parametrize(("kind", "dtype"), [("mamba", "bfloat16"), ("bamba", "float32")])
def test_distilled_tuned_audited_plugged_in_and_served(kind, dtype, save_model, shelve, tmp_path):
    save_model(tiny(kind).to(getattr(torch, dtype)), tmp_path / "base")
    rows = [f"row {n}: {hashlib.sha256(str(n).encode()).hexdigest()}" for n in range(40)]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    package, bundle = tmp_path / "package", tmp_path / "bundle"
    common = {"block_tokens": 96, "precision": "fp32", "device": "cpu", "batch_size": 8}
    ends = {"bottom": 1, "top": 1}
    distill(
        DistillConfig(
            model=str(tmp_path / "base"), public=data, method="keep-all", steps=0, **ends, **common, output=package
        )
    )
    tune(
        TuneConfig(
            package=package, data=data, adapter="blocks", placement="1+1", steps=6, learning_rate=0.01, pack=False,
            audit_share=0.4, **common, output=bundle,
        )
    )  # fmt: skip
    audit(AuditBundleConfig(package=package, bundle=bundle, data=data, device="cpu", output=tmp_path / "audit"))
    assert read_audit(tmp_path / "audit")[0].verbatim.num_rows > 5

    named = shelve(open_bundle(bundle).path, open_package(package).path, tmp_path / "shelf")
    plug_in(PlugConfig(model=str(tmp_path / "base"), output=tmp_path / "adapted", **named))
    model, tokenizer = load_adapted(tmp_path / "adapted", base=str(tmp_path / "base"))
    model.float()
    prompt = tokenizer("row 7")["input_ids"]
    expected = uncached(model, prompt, 12)
    text = tokenizer.decode(expected[: expected.index(2)] if 2 in expected else expected, skip_special_tokens=True)
    assert answer(Engine(model, tokenizer), prompt) == text


def answer(engine, prompt):
    async def here():
        return False

    async def whole():
        asked = CompletionAsk(model="m", prompt=prompt, temperature=0, max_tokens=12)
        async with engine.admitted(asked) as job, aclosing(engine.answer(job, here)) as pieces:
            return "".join([piece.text async for _, piece in pieces])

    return asyncio.run(whole())
