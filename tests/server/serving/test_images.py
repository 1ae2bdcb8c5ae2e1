"""A classifier of images that is served: its classes are the model's own, and nothing but an image is read."""

from __future__ import annotations

import asyncio
import base64

import httpx
import pytest
import torch
from vision_lab import LABELS, encoded, picture, saved

from adapters.heads import attach_head
from offsite.artefacts.bundle import Head
from offsite.errors import ConfigError
from offsite.evaluation.heads import head_scores
from offsite.modelling.load import load_model, load_reader
from server.serving.classify import build_head_app
from server.serving.config import ServeConfig
from server.serving.serve import load_served
from server.tenants.store import Tenants

PNG, JPEG = (base64.b64encode(encoded(picture(n, "blue"), form)).decode() for n, form in ((1, "PNG"), (2, "JPEG")))


@pytest.fixture(scope="module")
def eye(tmp_path_factory):
    """A checkpoint, its trunk with a head of random weights, and what reads images for it."""
    folder = saved(tmp_path_factory.mktemp("eye") / "eye", "dinov2")
    model = load_model(str(folder), encoders=True)
    attach_head(model, Head(task="classify", labels=LABELS, hidden=64, encoder="dinov2"))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return folder, model.eval(), load_reader(str(folder))


def served(eye, **given):
    head = Head(task="classify", labels=LABELS, hidden=64, encoder="dinov2")
    return build_head_app(eye[1], eye[2], head, model_id="eye", key="k", **given)


def sent(app, body, path="/v1/classify", key="k"):
    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
            return await http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

    return asyncio.run(send())


def test_classes_are_those_of_the_model(eye):
    """In either form of file, alone, in a list, and as a data URL."""
    _, model, reader = eye
    given = [PNG, f"data:image/jpeg;base64,{JPEG}"]
    found = sent(served(eye), {"model": "eye", "input": given}).json()
    raw = [base64.b64decode(one) for one in (PNG, JPEG)]
    values = torch.stack([reader.picture(one, pytest.fail).values for one in raw])
    with torch.no_grad():
        wanted = head_scores(model, {"pixel_values": values}, pad_id=0).softmax(1)
    torch.testing.assert_close(torch.tensor([one["probs"] for one in found["data"]]), wanted, atol=1e-5, rtol=1e-4)
    assert [one["label"] for one in found["data"]] == [LABELS[number] for number in wanted.argmax(1)]
    assert found["usage"]["prompt_tokens"] == 2 * reader.num_places
    alone = sent(served(eye), {"model": "eye", "input": PNG}).json()
    assert alone["data"][0]["probs"] == pytest.approx(found["data"][0]["probs"], abs=1e-6)


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ([PNG, "a cough"], 400, "input 1: its image is no base64 (a file's name is not opened)"),
        ("https://example.org/a.png", 400, "input 0: its image is no base64"),
        (f"data:text/plain;base64,{PNG}", 400, "input 0: its image is no base64"),
        (PNG[:80], 400, "input 0: its image is no PNG or JPEG, or breaks off"),
        (base64.b64encode(b"GIF89a").decode(), 400, "input 0: its image is no PNG or JPEG"),
        ([PNG] * 65, 400, "holds 65 texts, 1 to 64 are read"),
        ([], 400, "1 to 64 are read"),
        ({"image": PNG}, 400, "must be a text or a list of texts"),
    ],
)
def test_what_is_no_image_is_refused_by_its_place(eye, given, status, words):
    answer = sent(served(eye), {"model": "eye", "input": given})
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_it_does_nothing_else_and_tenants_are_charged(eye, tmp_path):
    with Tenants.open(tmp_path / "tenants.db", create=True) as tenants:
        key = tenants.add("anna", models=("eye",), tokens_per_day=20)
        app = served(eye, tenants=tenants)
        for path in ("/v1/embeddings", "/v1/rerank", "/v1/chat/completions"):
            assert sent(app, {"model": "eye", "input": PNG}, path).status_code == 404
        assert sent(app, {"model": "eye", "input": PNG}, key=key).status_code == 200
        assert sent(app, {"model": "eye", "input": PNG}, key=key).status_code == 429


def test_a_vision_encoder_without_a_head_is_not_served(eye):
    with pytest.raises(ConfigError, match="reads images and has no head to tell them apart by"):
        load_served(ServeConfig(adapted=eye[0], device="cpu"))
