"""What models that write no text answer over HTTP: classes, values or tags of texts, rewards, documents, embeddings.

POST /v1/classify takes ``{"model": NAME, "input": TEXT or [TEXT, ...]}``. The reply has in ``data`` for each text its
``index``, of a classifier the ``label``, by the name that the job gave it, ``probs`` in the order of the job's labels
and ``num_classes``, of a reward model the ``score``, of a regression the ``value``, and of a head for tags the
``words``, between white space, with the ``tags`` of each, null where the tokenizer passes a word over. A text is read
whole, as the head was tuned to read it; one that is longer than the context is refused. POST /v1/embeddings, of an
encoder with a head or without, is OpenAI's, with ``input`` a text, a list of texts, tokens or lists of tokens; what its
vectors are is told in ``offsite/evaluation/embeddings.py``.

POST /v1/rerank, of a reward model, takes ``{"model", "query", "documents": [TEXT or {"text": TEXT}, ...]}``,
with ``top_n`` and ``return_documents`` where wanted. It gives in ``results`` the documents' places, most rewarded
first, each with its ``relevance_score``: the logistic function of the number that the head gives the query with the
document behind it, as one text, or as the chat template writes both where the query is messages.

Of a classifier of images ``input`` is base64 of a PNG or JPEG, a ``data:`` URL of one, or a list of these; a place of
an image counts as a token. GET /v1/models and /health are as of any model that is served. Texts and images are never
logged.

Shapes: N texts, L labels, D width.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from offsite.artefacts.bundle import Head
from offsite.encoders.trunk import is_encoder_config
from offsite.evaluation.tags import targets_of
from offsite.modelling.head import causal_lm
from offsite.vision.reader import ImageReader, Reader, tokenizer_in
from server.serving.app import App
from server.serving.catalogue import Catalogue, Served
from server.serving.engine import Engine
from server.serving.jobs import Job
from server.serving.protocol import ApiError, ClassifyAsk, EmbeddingAsk, RerankAsk, parse
from server.serving.scoring import ImageScorer, Scorer, Waiting
from server.serving.tasks import ServedTasks
from server.tenants.store import Tenant, Tenants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")


class ScoredApp(App):
    """What the routes of models that write no text have in common.

    Args:
        waiting: the queue before the model.
        head: what it answers; None of an encoder without one.
        model_id: the name clients ask for.
        key, tenants, limit_bytes: as `App` takes them.
        stands: as `Catalogue` takes it.
    """

    def __init__(
        self,
        waiting: Waiting,
        head: Head | None,
        *,
        model_id: str,
        key: str | None,
        tenants: Tenants | None,
        limit_bytes: int,
        stands: Callable[[], bool] | None = None,
    ) -> None:
        engine = cast(Engine, waiting)  # of which the routes that are added read counts, and what is inside
        catalogue = Catalogue(engine, {model_id: Served(model_id)}, stands=stands)
        super().__init__(engine, catalogue, key=key, tenants=tenants, limit_bytes=limit_bytes, tasks=ServedTasks())
        self._counts, self._head = waiting.counts, head

    def routes(self) -> APIRouter:
        """The addresses that answer under /v1, of any such model."""
        router = APIRouter(prefix="/v1", dependencies=[Depends(self.authorise)])
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{model_id:path}", self.model, methods=["GET"])
        return router

    async def _computed(
        self,
        request: Request,
        served: Served,
        rows: list[tuple[int, ...]],
        work: Callable[[list[tuple[int, ...]]], Awaitable[Result]],
    ) -> tuple[Result, int]:
        """Return what `work` makes of the rows, within the tenant's limits, and how many tokens it read."""
        tenant: Tenant | None = request.state.tenant
        job = Job(tuple(rows), (), frozenset(), continues=False)
        with self._at_once(tenant), self._metered(tenant, served, job):
            found = await work(rows)
        self._counts.num_prompt_tokens += job.num_prompt_tokens
        return found, job.num_prompt_tokens

    def _told(self, scores: list[float]) -> dict[str, Any]:
        labels = self._head.labels if self._head is not None else ()
        if not labels:
            name = "value" if self._head is not None and self._head.task == "regress" else "score"
            return {name: scores[0]}
        probs = _softmax(scores)
        return {"label": labels[probs.index(max(probs))], "probs": probs, "num_classes": len(labels)}


class ImageApp(ScoredApp):
    """The routes of a classifier of images; the arguments are those of `ScoredApp`."""

    def __init__(self, scorer: ImageScorer, head: Head, **given: Any) -> None:
        super().__init__(scorer, head, **given)
        self._scorer = scorer

    def routes(self) -> APIRouter:
        """The addresses that answer under /v1."""
        router = super().routes()
        router.add_api_route("/classify", self.classify, methods=["POST"], response_model=None)
        return router

    async def classify(self, request: Request) -> Response:
        """Classify images."""
        ask = parse(await self._body(request), ClassifyAsk)
        served = await self._find(request, ask.model)
        rows = self._scorer.places(len(ask.input))
        scores, num = await self._computed(request, served, rows, lambda _: self._scorer.scores(ask.input))
        return _classified(served, [self._told(one) for one in scores], num)


class HeadApp(ScoredApp):
    """The routes of a model of texts with a head, or of an encoder.

    Args:
        scorer: the model.
        head: what it answers; None of an encoder without one.
        embeds: whether it is an encoder, whose embeddings can be asked for.
        given: as `ScoredApp` takes it.
    """

    def __init__(self, scorer: Scorer, head: Head | None, *, embeds: bool, **given: Any) -> None:
        super().__init__(scorer, head, **given)
        self._scorer, self._embeds = scorer, embeds

    def routes(self) -> APIRouter:
        """The addresses that answer under /v1."""
        router = super().routes()
        if self._head is not None:
            router.add_api_route("/classify", self.classify, methods=["POST"], response_model=None)
            router.add_api_route("/rerank", self.rerank, methods=["POST"], response_model=None)
        if self._embeds:
            router.add_api_route("/embeddings", self.embeddings, methods=["POST"], response_model=None)
        return router

    async def classify(self, request: Request) -> Response:
        """Classify texts or their words, or tell the value of each, or how much it is rewarded."""
        ask = parse(await self._body(request), ClassifyAsk)
        served = await self._find(request, ask.model)
        if self._head is not None and self._head.task == "tag":
            data, num = await self._tagged(request, served, ask.input)
        else:
            scores, num = await self._computed(request, served, self._scorer.tokens(ask.input), self._scorer.scores)
            data = [self._told(one) for one in scores]
        return _classified(served, data, num)

    async def rerank(self, request: Request) -> Response:
        """Order documents by how much each is rewarded behind the query."""
        ask = parse(await self._body(request), RerankAsk)
        served = await self._find(request, ask.model)
        if self._head is None or self._head.task != "reward":
            labels = () if self._head is None else self._head.labels
            what = f"tells {len(labels)} labels apart" if labels else "gives values"
            message = f"{served.name!r} {what} and orders nothing"
            raise ApiError(400, f"{message}; POST /v1/classify answers", code="unsupported_model")
        found, num = await self._computed(request, served, self._scorer.answered(ask), self._scorer.scores)
        scores = [one[0] for one in found]
        order = sorted(range(len(scores)), key=lambda number: -scores[number])[: ask.top_n]
        results: list[dict[str, Any]] = []
        for number in order:
            results.append({"index": number, "relevance_score": _logistic(scores[number])})
            if ask.return_documents:
                results[-1]["document"] = {"text": ask.documents[number]}
        usage = {"prompt_tokens": num, "total_tokens": num, "completion_tokens": 0}
        stated = {"id": f"rerank-{secrets.token_hex(12)}", "model": served.name}
        return JSONResponse({**stated, "results": results, "usage": usage})

    async def embeddings(self, request: Request) -> Response:
        """Embed texts: the mean of an encoder's last states, at length 1."""
        ask = parse(await self._body(request), EmbeddingAsk)
        served = await self._find(request, ask.model)
        rows = self._scorer.tokens(ask.input)
        vectors_ND, num = await self._computed(request, served, rows, self._scorer.embeddings)
        written = _as_base64 if ask.encoding_format == "base64" else Tensor.tolist
        data = [{"object": "embedding", "index": n, "embedding": written(one)} for n, one in enumerate(vectors_ND)]
        usage = {"prompt_tokens": num, "total_tokens": num}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

    async def _tagged(self, request: Request, served: Served, texts: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
        """Return what is told of every text's words, and how many tokens were read."""
        examples = self._scorer.worded(texts)
        rows = [tuple(one.input_ids) for one in examples]
        scores, num = await self._computed(request, served, rows, lambda _: self._scorer.tags(examples))
        labels = () if self._head is None else self._head.labels
        found = []
        for text, one, scores_WL in zip(texts, examples, scores, strict=True):
            words = text.split()
            tags: list[str | None] = [None] * len(words)
            for place, best in zip(targets_of(one), scores_WL.argmax(1).tolist(), strict=True):
                tags[place] = labels[best]
            found.append({"words": words, "tags": tags})
        return found, num


def _classified(served: Served, data: Sequence[dict[str, Any]], num_tokens: int) -> Response:
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
    return JSONResponse(
        {
            "id": f"classify-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": served.name,
            "data": [{"index": number} | one for number, one in enumerate(data)],
            "usage": usage,
        }
    )


def _softmax(scores: list[float]) -> list[float]:
    found: list[float] = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    return found


def _logistic(score: float) -> float:
    return float(torch.tensor(score, dtype=torch.float64).sigmoid())


def _as_base64(vector_D: Tensor) -> str:
    """Return the vector's float32 numbers, little-endian, as OpenAI writes them."""
    return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode("ascii")


def build_head_app(
    model: PreTrainedModel,
    reader: Reader,
    head: Head | None,
    *,
    model_id: str,
    key: str | None,
    context: int = 0,
    limit_waiting: int = 8,
    limit_bytes: int = 1_048_576,
    tenants: Tenants | None = None,
    stands: Callable[[], bool] | None = None,
) -> FastAPI:
    """Return the application that serves a model with a head, or an encoder; its engine is ``app.state.engine``.

    Args:
        model: in eval mode.
        reader: its tokenizer, or what reads images for it, which then has a head.
        head: the model's; None of an encoder without one.
        key, limit_waiting, limit_bytes, tenants, stands: as `server.serving.app.build_app` takes them.
    """
    app = FastAPI(title="offsite", openapi_url=None, docs_url=None, redoc_url=None)
    given = {"model_id": model_id, "key": key, "tenants": tenants, "limit_bytes": limit_bytes, "stands": stands}
    if isinstance(reader, ImageReader) and head is not None:
        shown = ImageScorer(model, reader, limit_waiting=limit_waiting)
        app.state.engine = shown
        ImageApp(shown, head, **given).add_routes(app)
        return app
    scorer = Scorer(model, tokenizer_in(reader), context=context, limit_waiting=limit_waiting)
    app.state.engine = scorer
    embeds = is_encoder_config(causal_lm(model).config)
    HeadApp(scorer, head, embeds=embeds, **given).add_routes(app)
    return app
