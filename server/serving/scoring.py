"""What reads whole texts, or images, for models that write none: one request at a time, in a thread of its own.

Shapes: N texts or images, L labels, D width, W words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from offsite.errors import DataError
from offsite.evaluation.embeddings import embeddings_of
from offsite.evaluation.heads import scores_of
from offsite.evaluation.tags import tag_scores
from offsite.generation.generate import context_length, embedding_table
from offsite.text.batches import Example, answered_ids, encode, pad_id
from offsite.text.calls import encoded
from offsite.text.forms import encode_images
from offsite.text.headrows import Label
from offsite.text.records import Record
from offsite.vision.images import image_bytes
from offsite.vision.reader import ImageReader
from server.serving.engine import Counts
from server.serving.protocol import ApiError, Prompt, RerankAsk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 8

_NO_LIMIT = 2**31

Given = TypeVar("Given")
Result = TypeVar("Result")


class Waiting:
    """The queue before a model: one request is computed at a time, in a thread, and so many may wait.

    Args:
        limit_waiting: requests that may wait behind the one being answered.
    """

    batch = None

    def __init__(self, *, limit_waiting: int) -> None:
        self._limit_waiting = limit_waiting
        self.counts, self.num_inside = Counts(), 0
        self._lock, self._stopping = asyncio.Lock(), False

    def stop(self) -> None:
        """What waits is refused; the request that is computed comes to its end."""
        self._stopping = True

    async def in_turn(self, work: Callable[[Given], Result], given: Given) -> Result:
        """Return what `work` makes of what is given, once it is its turn.

        Raises:
            ApiError: 429 when too many wait, 503 when the server stops.
        """
        if self.num_inside > self._limit_waiting:
            raise ApiError(429, f"{self.num_inside} requests are inside already", kind="rate_limit_error")
        self.num_inside += 1
        try:
            async with self._lock:
                if self._stopping:
                    raise ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
                return await asyncio.to_thread(work, given)
        finally:
            self.num_inside -= 1


class Scorer(Waiting):
    """A model that reads whole texts, and the queue before it.

    Args:
        model: with a head, or an encoder, in eval mode.
        tokenizer: its own.
        context: most tokens of a text; 0 for what the model was made for.
        limit_waiting: requests that may wait behind the one being answered.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context: int, limit_waiting: int
    ) -> None:
        super().__init__(limit_waiting=limit_waiting)
        self._model, self._tokenizer = model, tokenizer
        self.context = context_length(model, tokenizer, context)
        self._num_vocabulary = int(embedding_table(model).shape[0])

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
        return await self.in_turn(self._scores, rows)

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

        return await self.in_turn(work, rows)

    async def embeddings(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Return the vector of every text, (N, D) float32, of an encoder.

        Raises:
            ApiError, RunFailed: as `scores`.
        """
        return await self.in_turn(self._embeddings, rows)

    def _scores(self, rows: list[tuple[int, ...]]) -> list[list[float]]:
        examples = [Example(list(row), list(row)) for row in rows]
        scores_NL = scores_of(self._model, examples, batch_size=_ROWS, pad_id=pad_id(self._tokenizer))
        found: list[list[float]] = scores_NL.tolist()
        return found

    def _embeddings(self, rows: list[tuple[int, ...]]) -> Tensor:
        examples = [Example(list(row), list(row)) for row in rows]
        return embeddings_of(self._model, examples, batch_size=_ROWS, pad_id=pad_id(self._tokenizer))


class ImageScorer(Waiting):
    """A classifier of images, and the queue before it: images are decoded, too, when it is their turn.

    Args:
        model: with a head, in eval mode.
        reader: reads images for it.
        limit_waiting: requests that may wait behind the one being answered.
    """

    def __init__(self, model: PreTrainedModel, reader: ImageReader, *, limit_waiting: int) -> None:
        super().__init__(limit_waiting=limit_waiting)
        self._model, self._reader, self.context = model, reader, reader.num_places

    def places(self, num_images: int) -> list[tuple[int, ...]]:
        """Return, in place of tokens, a zero for each place of so many images."""
        return [(0,) * self._reader.num_places] * num_images

    async def scores(self, images: Sequence[str]) -> list[list[float]]:
        """Return the head's scores of every image, (N, L).

        Args:
            images: base64 of PNGs or JPEGs, or ``data:`` URLs of it.

        Raises:
            ApiError: 400 where one is no image that is taken; as `Waiting.in_turn`.
            RunFailed: when a score is not finite.
        """
        return await self.in_turn(self._scores, images)

    def _scores(self, images: Sequence[str]) -> list[list[float]]:
        examples = [self._example(number, image) for number, image in enumerate(images)]
        scores_NL = scores_of(self._model, examples, batch_size=_ROWS, pad_id=0)
        found: list[list[float]] = scores_NL.tolist()
        return found

    def _example(self, number: int, image: str) -> Example:
        place = f"input {number}"
        try:
            raw = image_bytes(_without_url(image), lambda problem: DataError(f"{place}: {problem}"))
            return encode_images([Record((), "", number, place=place, image=raw)], self._reader).examples[0]
        except DataError as error:
            raise ApiError(400, str(error), param=f"input.{number}") from None


def _without_url(image: str) -> str:
    """Return the base64 of a ``data:`` URL of an image; anything else as it is. No other URL is ever followed."""
    before, found, after = image.partition(";base64,")
    return after if found and before.startswith("data:image/") else image
