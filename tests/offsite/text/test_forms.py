"""Rows of images: from JSON lines and Parquet, refused by their number, with nothing of them in the message."""

from __future__ import annotations

import base64
import json

import pyarrow
import pytest
import torch
from pyarrow import parquet
from vision_lab import LABELS, NORMAL, READING, encoded, picture, write_rows

from offsite.errors import DataError
from offsite.text.batches import collate
from offsite.text.forms import encode_images
from offsite.text.records import read_files, read_records
from offsite.text.writing import write_records
from offsite.vision.pixels import read_settings
from offsite.vision.reader import ImageReader

READER = ImageReader(read_settings({**READING["dinov2"], **NORMAL}, "dinov2", "file"), 17)


def test_rows_of_both_kinds_of_file_are_the_same_images(tmp_path):
    lines = write_rows(tmp_path / "rows.jsonl", 0, 6)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    table = pyarrow.Table.from_pylist(
        [{"image": {"bytes": base64.b64decode(row["image"]), "path": None}, "label": row["label"]} for row in rows]
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    found = [read_records(path, labels=LABELS, images=True) for path in (lines, tmp_path / "rows.parquet")]
    assert [one.image for one in found[0]] == [one.image for one in found[1]]
    assert [one.label.name for one in found[1]] == ["red", "green", "blue"] * 2
    assert len({one.document for one in found[0]}) == 6
    write_records(tmp_path / "again.jsonl", found[0])
    assert [one.content for one in read_records(tmp_path / "again.jsonl", labels=LABELS, images=True)] == [
        one.content for one in found[0]
    ]
    made = encode_images(found[0], READER)
    batch = collate(made.examples[:2], 0)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert torch.equal(batch["pixel_values"][1], READER.picture(found[0][1].image, None).values)
    assert batch["attention_mask"].shape == (2, 17)
    assert [one.target for one in made.examples] == [0, 1, 2] * 2


def test_an_image_that_comes_twice_is_one_document_in_any_file(tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", 0, 2) for name in "ab"]
    found = read_files(paths, images=True)
    assert [one.document for one in found[:2]] == [one.document for one in found[2:]]


SOUND = base64.b64encode(encoded(picture(0))).decode()
WRONG = {
    "a file's name": ({"image": "cat.png", "label": "red"}, "its image is no base64"),
    "a path": ({"image": "/home/someone/cat.png", "label": "red"}, "its image is no base64"),
    "no image": ({"text": "a cat", "label": "red"}, "its image is missing, expected base64 of a PNG or JPEG"),
    "no label": ({"image": SOUND}, "field 'label' is missing"),
    "another label": ({"image": SOUND, "label": "cat"}, "its label is none of the 3 given"),
    "truncated": ({"image": SOUND[:200], "label": "red"}, "its image is no PNG or JPEG, or breaks off"),
    "text in place": ({"image": base64.b64encode(b"a cat").decode(), "label": "red"}, "its image is no PNG or JPEG"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_refused_by_its_number(name, tmp_path):
    row, told = WRONG[name]
    lines = write_rows(tmp_path / "rows.jsonl", 0, 3)
    with lines.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        encode_images(read_files([lines], labels=LABELS, images=True), READER)
    assert str(error.value).startswith(f"rows.jsonl: line 4: {told}")
    assert "cat" not in str(error.value)
    assert str(tmp_path) not in f"{error.value} {error.value.hint}"


def test_plain_text_and_rows_of_text_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("a cat")
    with pytest.raises(DataError, match="plain text, expected rows of an image"):
        read_records(tmp_path / "text.txt", images=True)
