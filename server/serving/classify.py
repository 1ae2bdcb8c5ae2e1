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
document behind it, as one text, or as the chat template writes both where the query is messages. GET /v1/models and
/health are as of any model that is served. Texts are never logged.

Shapes: N texts, L labels, D width.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from offsite.artefacts.bundle import Head
from offsite.encoders.trunk import is_encoder_config
from offsite.errors import DataError
from offsite.evaluation.embeddings import embeddings_of
from offsite.evaluation.heads import scores_of
from offsite.evaluation.tags import tag_scores, targets_of
from offsite.generation.generate import context_length, embedding_table
from offsite.modelling.head import causal_lm
from offsite.text.batches import Example, answered_ids, encode, pad_id
from offsite.text.calls import encoded
from offsite.text.headrows import Label
from offsite.text.records import Record
from server.serving.app import App
from server.serving.catalogue import Catalogue, Served
from server.serving.engine import Counts, Engine
from server.serving.jobs import Job
from server.serving.protocol import ApiError, ClassifyAsk, EmbeddingAsk, Prompt, RerankAsk, parse
from server.serving.tasks import ServedTasks
from server.tenants.store import Tenant, Tenants

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 8

_NO_LIMIT = 2**31

Given = TypeVar("Given")
Result = TypeVar("Result")


class Scorer:
    """A model that reads whole texts, and the queue before it: one request at a time, in a thread of its own.

    Args:
        model: with a head, or an encoder, in eval mode.
        tokenizer: its own.
        context: most tokens of a text; 0 for what the model was made for.
        limit_waiting: requests that may wait behind the one being answered.
    """

    batch = None

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context: int, limit_waiting: int
    ) -> None:
        self._model, self._tokenizer, self._limit_waiting = model, tokenizer, limit_waiting
        self.context = context_length(model, tokenizer, context)
        self._num_vocabulary = int(embedding_table(model).shape[0])
        self.counts, self.num_inside = Counts(), 0
        self._lock, self._stopping = asyncio.Lock(), False

    def stop(self) -> None:
        """What waits is refused; the request that is computed comes to its end."""
        self._stopping = True

    def tokens(self, texts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Return the tokens of every text, as its tokenizer gives them by itself; of tokens those.

        Raises:
            ApiError: 400; the tokenizer fails on one, it is longer than the context, or a token is unknown.
        """

        def read(text: Prompt) -> Sequence[int]:
            return encoded(self._tokenizer, text, what="it") if isinstance(text, str) else text

        return [self._read("input", number, partial(read, text)) for number, text in enumerate(texts)]

    def answered(self, ask: RerankAsk) -> list[tuple[int, ...]]:
        """Return the tokens of the query with each document behind it, as a reward model's pairs were read.

        Raises:
            ApiError: 400; the tokenizer or its chat template fails on one, or it is longer than the context.
        """
        text = ((ask.query, False),) if isinstance(ask.query, str) else ()
        said = [] if isinstance(ask.query, str) else [one.for_template for one in ask.query]
        messages = tuple((one["role"], one["content"]) for one in said)
        query = Record(text, "", 0, messages=messages, place="the query", num_given=len(messages))
        return [
            self._read("documents", number, partial(answered_ids, query, document, self._tokenizer))
            for number, document in enumerate(ask.documents)
        ]

    def _read(self, name: str, number: int, work: Callable[[], Sequence[int]]) -> tuple[int, ...]:
        where = f"{name}.{number}"
        try:
            ids = tuple(work())
        except DataError as error:
            raise ApiError(400, f"{name} {number}: {error}", param=where) from None
        if not all(0 <= token < self._num_vocabulary for token in ids):
            raise ApiError(400, f"{name} {number}: token ids are 0 to {self._num_vocabulary - 1}", param=where)
        if not 1 <= len(ids) <= self.context:
            message = f"{name} {number} has {len(ids)} tokens, 1 to {self.context} are read"
            raise ApiError(400, message, param=where, code="context_length_exceeded")
        return ids

    async def scores(self, rows: list[tuple[int, ...]]) -> list[list[float]]:
        """Return the head's scores of every text, (N, L).

        Raises:
            ApiError: 429 when too many wait, 503 when the server stops.
            RunFailed: when a score is not finite.
        """
        return await self._in_turn(self._scores, rows)

    def worded(self, texts: Sequence[str]) -> list[Example]:
        """Return the tokens of every text, each word's first with the word's number for a label.

        Raises:
            ApiError: 400; the tokenizer fails on one, it is longer than the context, or no word has a token.
        """
        found = []
        for number, text in enumerate(texts):
            words = tuple(text.split())
            numbers = tuple(Label(place, "") for place in range(len(words)))
            record = Record(((" ".join(words), True),), "", number, place="it", words=words, tags=numbers)
            one: list[Example] = []

            def read(record: Record = record, one: list[Example] = one) -> Sequence[int]:
                one += encode([record], self._tokenizer, context=_NO_LIMIT, ended=False).examples
                return one[0].input_ids

            self._read("input", number, read)
            found += one
        return found

    async def tags(self, rows: list[Example]) -> list[Tensor]:
        """Return the head's scores of the words of every text, (W, L) each.

        Raises:
            ApiError, RunFailed: as `scores`.
        """

        def work(examples: list[Example]) -> list[Tensor]:
            return tag_scores(self._model, examples, batch_size=_ROWS, pad_id=pad_id(self._tokenizer))

        return await self._in_turn(work, rows)

    async def embeddings(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Return the vector of every text, (N, D) float32, of an encoder.

        Raises:
            ApiError, RunFailed: as `scores`.
        """
        return await self._in_turn(self._embeddings, rows)

    async def _in_turn(self, work: Callable[[list[Given]], Result], rows: list[Given]) -> Result:
        if self.num_inside > self._limit_waiting:
            raise ApiError(429, f"{self.num_inside} requests are inside already", kind="rate_limit_error")
        self.num_inside += 1
        try:
            async with self._lock:
                if self._stopping:
                    raise ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
                return await asyncio.to_thread(work, rows)
        finally:
            self.num_inside -= 1

    def _scores(self, rows: list[tuple[int, ...]]) -> list[list[float]]:
        examples = [Example(list(row), list(row)) for row in rows]
        scores_NL = scores_of(self._model, examples, batch_size=_ROWS, pad_id=pad_id(self._tokenizer))
        found: list[list[float]] = scores_NL.tolist()
        return found

    def _embeddings(self, rows: list[tuple[int, ...]]) -> Tensor:
        examples = [Example(list(row), list(row)) for row in rows]
        return embeddings_of(self._model, examples, batch_size=_ROWS, pad_id=pad_id(self._tokenizer))


class HeadApp(App):
    """The routes of a model with a head, or of an encoder.

    Args:
        scorer: the model.
        head: what it answers; None of an encoder without one.
        embeds: whether it is an encoder, whose embeddings can be asked for.
        model_id: the name clients ask for.
        key, tenants, limit_bytes: as `App` takes them.
        stands: as `Catalogue` takes it.
    """

    def __init__(
        self,
        scorer: Scorer,
        head: Head | None,
        *,
        embeds: bool,
        model_id: str,
        key: str | None,
        tenants: Tenants | None,
        limit_bytes: int,
        stands: Callable[[], bool] | None = None,
    ) -> None:
        engine = cast(Engine, scorer)  # of which the routes that are added read counts, and what is inside
        catalogue = Catalogue(engine, {model_id: Served(model_id)}, stands=stands)
        super().__init__(engine, catalogue, key=key, tenants=tenants, limit_bytes=limit_bytes, tasks=ServedTasks())
        self._scorer, self._head, self._embeds = scorer, head, embeds

    def routes(self) -> APIRouter:
        """The addresses that answer under /v1."""
        router = APIRouter(prefix="/v1", dependencies=[Depends(self.authorise)])
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{model_id:path}", self.model, methods=["GET"])
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
        usage = {"prompt_tokens": num, "total_tokens": num, "completion_tokens": 0}
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
        self._scorer.counts.num_prompt_tokens += job.num_prompt_tokens
        return found, job.num_prompt_tokens

    def _told(self, scores: list[float]) -> dict[str, Any]:
        labels = self._head.labels if self._head is not None else ()
        if not labels:
            name = "value" if self._head is not None and self._head.task == "regress" else "score"
            return {name: scores[0]}
        probs = _softmax(scores)
        return {"label": labels[probs.index(max(probs))], "probs": probs, "num_classes": len(labels)}


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
    tokenizer: PreTrainedTokenizerBase,
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
        head: the model's; None of an encoder without one.
        key, limit_waiting, limit_bytes, tenants, stands: as `server.serving.app.build_app` takes them.
    """
    scorer = Scorer(model, tokenizer, context=context, limit_waiting=limit_waiting)
    app = FastAPI(title="offsite", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = scorer
    embeds = is_encoder_config(causal_lm(model).config)
    HeadApp(
        scorer,
        head,
        embeds=embeds,
        model_id=model_id,
        key=key,
        tenants=tenants,
        limit_bytes=limit_bytes,
        stands=stands,
    ).add_routes(app)
    return app
