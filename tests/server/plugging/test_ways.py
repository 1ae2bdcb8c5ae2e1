"""Ways to plug in: one grammar, read and written, and what it refuses."""

from __future__ import annotations

import pytest

from offsite.errors import ConfigError
from server.plugging.ways import Way, ways

WORDS = {
    "1": Way(),
    "0.5": Way(0.5),
    "0.123456789": Way(0.123456789),
    "attention=0.5,mlp=0.75": Way(by_module=(("attention", 0.5), ("mlp", 0.75))),
    "mlp=0.5,top=0.5": Way(by_module=(("top", 0.5), ("mlp", 0.5))),
    "spare=0.1": Way(spare=0.1),
    "0.5,spare=10,mix=0.7": Way(0.5, spare=10.0, mix=0.7),
    "middle=0.25,spare=1e-05": Way(by_module=(("middle", 0.25),), spare=1e-5),
    "mix=0.7": Way(mix=0.7),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_way_is_written_as_it_is_read(word):
    assert Way.parse(word) == WORDS[word]
    assert str(WORDS[word]) == word


@pytest.mark.parametrize(
    ("word", "same"),
    [
        ("1.0", "1"), ("5e-1", "0.5"), ("mlp=0.5,attention=1", "mlp=0.5"), ("top=0.5,mlp=0.5", "mlp=0.5,top=0.5"),
        ("1,mlp=0.5", "mlp=0.5"), ("mix=1", "1"), ("1,mix=0.5", "mix=0.5"), ("attention=1,mlp=1", "1"),
    ],
)  # fmt: skip
def test_what_says_the_same_is_one_way(word, same):
    assert str(Way.parse(word)) == same
    assert Way.parse(word) == Way.parse(same)
    assert hash(Way.parse(word)) == hash(Way.parse(same))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("", "expected a number"), ("0", "scale: expected more than 0"), ("1.5", "at most 1"), ("nan", "a number"),
        ("inf", "a number"), ("-1", "a number"), ("+1", "a number"), (".5", "a number"), ("0.5 ", "a number"),
        ("\u0665", "a number"), ("1_0", "a number"), ("half", "a number"), ("0.5,0.5", "NAME=SHARE"),
        ("mlp", "a number"), ("mlp=", "a number"), ("mpl=0.5", "did you mean 'mlp'"),
        ("mlp=0.5,mlp=0.6", "mlp is given twice"), ("mlp=0", "mlp: expected more than 0"), ("0.5,mlp=0.5", "not both"),
        ("mlp=0.5,", "NAME=SHARE"), ("spare=0", "spare: expected"), ("spare=1e9", "spare: expected"),
        ("mix=0", "mix: expected"), ("mix=1.1", "mix: expected"), ("spare=1,spare=2", "spare is given twice"),
        ("1e999", "at most 1"), ("MLP=0.5", "NAME=SHARE"), ("mlp=0.5=0.5", "a number"), ("x" * 500, "found 'xxx"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(word, told):
    with pytest.raises(ConfigError) as caught:
        Way.parse(word)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 220


def test_a_weights_share_is_the_product_of_those_that_name_it():
    way = Way.parse("attention=0.5,mlp=0.75,top=0.5")
    found = {
        (place, is_mlp): way.share_of(f"{place}.0.x.lora_B", is_mlp=is_mlp)
        for place in ("bottom", "top")
        for is_mlp in (False, True)
    }
    assert found == {("bottom", False): 0.5, ("bottom", True): 0.75, ("top", False): 0.25, ("top", True): 0.375}
    assert Way(0.5).share_of("middle.3.x.weight", is_mlp=True) == 0.5


def test_a_rehearsal_is_given_every_way_once():
    found = [str(way) for way in ways(shares=("1", "1.0", "mlp=0.5"), spares=(None, 0.1), mixes=(1.0, 0.7))]
    assert found == [
        "1", "mix=0.7", "spare=0.1", "spare=0.1,mix=0.7",
        "mlp=0.5", "mlp=0.5,mix=0.7", "mlp=0.5,spare=0.1", "mlp=0.5,spare=0.1,mix=0.7",
    ]  # fmt: skip
    assert [str(way) for way in ways()] == ["1", "0.75", "0.5"]


def test_a_folder_holds_all_but_the_mixing():
    assert Way.parse("0.5,spare=1,mix=0.7").written == Way(0.5, spare=1.0)
    assert Way(mix=0.5).written.is_plain
    assert not Way(spare=1.0).is_plain


@pytest.mark.parametrize("way", [Way(), Way(0.5), Way(spare=2.0), Way.parse("mlp=0.5,top=0.25"), Way(0.5, mix=0.7)])
def test_a_file_states_a_share_and_a_word_only_where_it_needs_one(way):
    assert Way.stated(way.scale, way.word) == way
    assert (way.word == "") == (way in (Way(), Way(0.5)))


@pytest.mark.parametrize(
    ("scale", "word"),
    [(0.5, "1,spare=1"), (1.0, "0.5,spare=1"), (1.0, "1"), (0.5, "0.5"), (1.0, "mlp=0.50"), (1.0, "top=0.5,mlp=0.5"),
     (1.0, "anything"), (0.0, "")],
)  # fmt: skip
def test_a_word_in_another_form_or_of_another_share_is_refused(scale, word):
    with pytest.raises(ConfigError):
        Way.stated(scale, word)


def test_how_people_read_it():
    told = {str(way): way.told for way in (Way(), Way(0.5), Way.parse("attention=0.5,mlp=0.75,spare=0.1,mix=0.7"))}
    assert told == {
        "1": "all of the update",
        "0.5": "0.5 of the update",
        "attention=0.5,mlp=0.75,spare=0.1,mix=0.7": "0.5 of attention, 0.75 of mlp, "
        "spared where public text uses more than 0.1 of the mean, 0.7 of the probabilities",
    }
