"""A folder of data: which of its files are read, in which order, and what it may not lead to."""

from __future__ import annotations

import pytest

from offsite.errors import DataError
from offsite.text.rows import files_in


def test_a_folder_is_its_files_of_text_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "data"
    (folder / "below").mkdir(parents=True)
    left = ("run.log.jsonl", "run.run.json", "package.owner.json", "bundle.sealed.release.json", "me.card.json")
    for name in ("b.jsonl", "a.csv.gz", "c.TXT", "notes.pdf", ".hidden.txt", "README", "below/d.txt", *left):
        (folder / name).write_text("x")
    (folder / "z.txt").symlink_to(folder / "c.TXT")
    alone = tmp_path / "alone.pdf"
    found = files_in([alone, folder])
    assert found == (alone, *(folder / name for name in ("a.csv.gz", "b.jsonl", "c.TXT", "z.txt")))


@pytest.mark.parametrize("target", ["outside.txt", "nothing.txt", "below/outside"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, target):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.txt").write_text("x")
    (folder / "a.txt").write_text("x")
    (folder / "link.txt").symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=r"^data/link.txt: a link to what lies outside of the folder$"):
        files_in([folder])
