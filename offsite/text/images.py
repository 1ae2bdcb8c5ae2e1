"""Rows of an image, with or without a label, as examples."""

from __future__ import annotations

from collections.abc import Sequence

from offsite.errors import DataError
from offsite.text.batches import Encoded, Example
from offsite.text.records import Record
from offsite.vision.reader import ImageReader


def encode_images(records: Sequence[Record], reader: ImageReader) -> Encoded:
    """Every image as one example, whose ids are zeros, one for each place of the image.

    So batches, splits and audits count images as they count text: a place is a token.

    Raises:
        DataError: naming the first row whose image is none that is taken.
    """
    examples = []
    for record in records:

        def error(problem: str, place: str = record.place) -> DataError:
            return DataError(f"{place}: {problem}", hint="leave the row out, or write its image anew as PNG")

        if record.image is None:
            raise error("holds no image")
        picture, ids = reader.picture(record.image, error), [0] * reader.num_places
        target = None if record.label is None else record.label.number
        examples.append(Example(ids, ids, record.document, target=target, image=picture))
    num_tokens = len(examples) * reader.num_places
    return Encoded(examples, 0, 0, num_tokens, num_tokens - len(examples))
