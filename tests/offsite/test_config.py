from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from offsite.config import VerbConfig, build, flag_name, is_positional
from offsite.errors import ConfigError


class Loop(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    rate: float = Field(1e-3, gt=0, description="peak rate, per step")
    steps: int = Field(10, ge=1, description="steps")


class Example(VerbConfig):
    verb: ClassVar[str] = "example"

    package: Path = Field(description="a package", json_schema_extra={"positional": True})
    output: Path = Field(Path("out"), description="a folder")
    steps: int = Field(5, ge=0, description="steps")
    rate: float = Field(0.1, gt=0, description="rate, per step")
    resume: bool = Field(False, description="go on")
    kind: Literal["drop", "width"] = Field("drop", description="method")
    limit: int | None = Field(None, description="rows")
    name: str = Field("", description="a name")
    seeds: list[int] = Field([0], description="seeds")
    files: tuple[Path, ...] = Field((), description="files")
    fields: dict[str, str] = Field({}, description="columns")
    more: list[float] | None = Field(None, description="numbers")
    loop: Loop = Field(Loop(), description="training")
    prompts: tuple[str, ...] = Field((), description="texts")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.resume and self.steps == 0:
            raise ValueError("--resume: nothing to resume with --steps 0")
        return self


def from_yaml(folder: Path, text: str, **kwargs) -> Example:
    file = folder / "settings.yaml"
    file.write_text(text)
    return build(Example, file=file, **kwargs)


def test_defaults_file_overrides_flags_in_that_order(tmp_path):
    text = "package: p\nsteps: 1\nrate: 0.5\nname: file"
    assert from_yaml(tmp_path, text).steps == 1
    assert from_yaml(tmp_path, text, overrides=["steps=2"]).steps == 2
    config = from_yaml(tmp_path, text, overrides=["steps=2", "name=word"], flags={"steps": "3"})
    assert (config.steps, config.name, config.rate, config.kind) == (3, "word", 0.5, "drop")


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        ("+2.5e-1", 0.25),
        ("5", 5.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("0.1", 0.1),
        ("1.5e+2", 150.0),
    ],
)
def test_yaml_numbers_are_numbers_however_written(tmp_path, written, number):
    assert from_yaml(tmp_path, f"package: p\nrate: {written}").rate == number


def test_a_whole_number_stays_whole(tmp_path):
    config = from_yaml(tmp_path, "package: p\nsteps: 7\nseeds: [1, 2]\nlimit: 3\nloop: {rate: 1e-4, steps: 2}")
    assert (config.steps, config.seeds, config.limit) == (7, [1, 2], 3)
    assert config.loop == Loop(rate=1e-4, steps=2)


@pytest.mark.parametrize("line", ["steps: '5'", "steps: 5.5", "steps: true", "resume: 1", "rate: fast", "name: 5"])
def test_a_value_of_another_type_is_refused(tmp_path, line):
    with pytest.raises(ConfigError, match=line.split(":")[0]):
        from_yaml(tmp_path, f"package: p\n{line}")


def test_all_problems_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, "stepz: 1\nrate: -1\nkind: shrink", overrides=["loop.stps=3", "steps.x=1"])
    message = str(caught.value)
    assert "unknown setting 'stepz'" in message
    assert "unknown setting 'loop.stps'" in message
    assert "unknown setting 'steps.x'" in message
    assert "--rate: expected more than 0, found -1" in message
    assert "--kind: expected drop or width, found 'shrink'" in message
    assert "PACKAGE is missing" in message
    assert caught.value.hint == "offsite example --help lists every setting"
    assert "\n" not in message


def test_settings_that_contradict_each_other(tmp_path):
    with pytest.raises(ConfigError, match=r"^--resume: nothing to resume with --steps 0$"):
        build(Example, flags={"package": "p", "resume": True, "steps": "0"})


def test_overrides_reach_into_nested_settings_and_mappings():
    words = ["package=p", "loop.rate=1e-2", "fields.text=body", "fields.prompt=question", "resume=true", "limit=4"]
    config = build(Example, overrides=words)
    assert config.loop == Loop(rate=0.01)
    assert config.fields == {"text": "body", "prompt": "question"}
    assert config.resume
    assert config.limit == 4
    assert config.package == Path("p")


def test_overrides_add_to_a_mapping_of_the_file(tmp_path):
    config = from_yaml(tmp_path, "package: p\nfields: {text: body}", overrides=["fields.prompt=question"])
    assert config.fields == {"text": "body", "prompt": "question"}


def test_lists_are_split_at_commas_or_given_one_by_one():
    assert build(Example, flags={"package": "p", "seeds": "1, 2,3"}).seeds == [1, 2, 3]
    assert build(Example, flags={"package": "p", "seeds": ["1", "2"]}).seeds == [1, 2]
    assert build(Example, flags={"package": "p", "files": "a,b"}).files == (Path("a"), Path("b"))
    assert build(Example, flags={"package": "p", "more": "1e-2,3"}).more == [0.01, 3.0]
    assert build(Example, flags={"package": "p", "fields": "text=body,prompt=q=r"}).fields["prompt"] == "q=r"
    assert build(Example, flags={"package": "p", "fields": ["text=body"]}).fields == {"text": "body"}


def test_words_given_one_by_one_keep_their_spaces_and_line_ends():
    assert build(Example, flags={"package": "p", "prompts": ["What is it?\n", " "]}).prompts == ("What is it?\n",)


@pytest.mark.parametrize("text", ["inf", "nan", "-inf"])
def test_numbers_are_finite(text):
    with pytest.raises(ConfigError, match="--rate: "):
        build(Example, flags={"package": "p", "rate": text})


def test_a_mapping_without_an_equals_sign_is_refused():
    with pytest.raises(ConfigError, match=r"--fields.*found 'body'"):
        build(Example, flags={"package": "p", "fields": "body"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"steps: [1", "is not YAML at line"),
        (b"- 1\n- 2", "holds a list, expected a mapping of settings"),
        (b"just words", "holds a str"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
        (b"&a {fields: *a}", "contains itself"),
        (b"? [1]\n: 2", "is not YAML"),
    ],
)
def test_a_broken_file(tmp_path, content, message):
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        build(Example, file=file, flags={"package": "p"})


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read configuration 'no\.yaml': no such file or directory"):
        build(Example, file=tmp_path / "no.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert build(Example, file=tmp_path / "empty.yaml", flags={"package": "p"}).steps == 5


def test_settings_are_frozen():
    config = build(Example, flags={"package": "p"})
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]


def test_spellings():
    assert flag_name("batch_size") == "--batch-size"
    assert is_positional(Example.model_fields["package"])
    assert not is_positional(Example.model_fields["output"])


class Inner(VerbConfig):
    loop: Loop | None = Field(None, description="training, if any")


def test_a_flag_holds_the_settings_inside_one_and_adds_to_words():
    assert build(Inner).loop is None
    assert build(Inner, flags={"loop": "rate=0.5, steps=3"}).loop == Loop(rate=0.5, steps=3)
    assert build(Inner, overrides=["loop.steps=4"], flags={"loop": "rate=0.5"}).loop == Loop(rate=0.5, steps=4)
    for given, message in (("0.5", "--loop: expected NAME=VALUE"), ("rats=1", "unknown setting 'loop.rats'")):
        with pytest.raises(ConfigError, match=message):
            build(Inner, flags={"loop": given})
