"""The page: everything in it escaped, nothing outside it referred to, no claim beyond what was measured."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError
from page_lab import EVIL, Outline, given, hostile

from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.artefacts.manifest import FileEntry
from offsite.errors import ArtefactError, BadSchema, ConfigError, DataError, WrongBinding
from offsite.evaluation.results import Answer, Crossing, Data, Parameters, Results, Row, Summary, write_results
from offsite.report import page as module
from offsite.report.config import ReportConfig
from offsite.report.engine import environment, render
from offsite.report.page import page, run

DIGEST = "sha256:" + "0123456789abcdef" * 4


def figure(*values, deviation=None):
    named = {f"seed{number}": value for number, value in enumerate(values)}
    return Summary(mean=sum(values) / len(values), deviation=deviation, values=named)


def row(*values, **tasks):
    return Row(perplexity=figure(*values, deviation=0.12 if len(values) > 1 else None), tasks=tasks)


def sample(**changes):
    """Results with the prototype's figures."""
    tensor_file = {"adapter.safetensors": FileEntry(bytes=28_320_000, sha256=DIGEST)}
    package_files = {
        "config.json": FileEntry(bytes=812, sha256=DIGEST),
        "model.safetensors": FileEntry(bytes=176_000_000, sha256=DIGEST),
        "tokenizer.json": FileEntry(bytes=3_522_871, sha256=DIGEST),
    }
    bundles = {
        f"seed{n}": Crossing(name=f"bundle{n}", digest=DIGEST, files=tensor_file, num_parameters=14_160_000)
        for n in range(3)
    }
    given = {
        "model": "smollm2-135m",
        "base_digest": DIGEST,
        "method": {"name": "width", "width": 0.33, "steps": 300},
        "adapter": AdapterSpec(),
        "data": Data(
            name="heldout.jsonl.gz",
            sha256=DIGEST,
            num_records=412,
            num_examples=160,
            num_tokens=40_800,
            num_truncated=0,
        ),
        "rows": {
            "zero_shot": row(18.3),
            "emulator_zero_shot": row(61.2),
            "emulator_tuned": row(11.9, 12.0, 12.2),
            "plugged_in": row(9.2, 9.3, 9.4),
            "ceiling": row(8.97),
            "lora_full": row(7.7),
        },
        "metrics": {
            "recovery_vs_lora": figure(0.86, 0.85, 0.84, deviation=0.01),
            "recovery_vs_ceiling": figure(0.98, 0.96, 0.95, deviation=0.02),
            "recovery_vs_full": None,
            "gap": figure(1.29, 1.29, 1.3, deviation=0.005),
            "capability": figure(1.207),
        },
        "parameters": Parameters(full=134_515_008, middle=92_042_496, emulator=46_000_000, adapter=14_160_000),
        "package": Crossing(
            name="package",
            digest=DIGEST,
            files=package_files,
            num_parameters=88_000_000,
            disclosed={"held_out_kl": 0.41},
        ),
        "bundles": bundles,
        "references": {"ceiling": (DIGEST,), "lora_full": (DIGEST,)},
        "runs": {"distill": {"steps": 300, "seconds": 412.0, "tokens_per_second": 745.0, "peak_bytes": 1.9e9}},
        "answers": (
            Answer(
                prompt="Question: What are the symptoms of measles?\nAnswer:",
                before=" The symptoms of measles are a rash. The rash is a rash. The rash is a rash.",
                after=" The first signs are fever, cough, runny nose and red eyes, followed by a rash.",
            ),
        ),
        "config": {"model": "smollm2-135m"},
        "command": "offsite evaluate smollm2-135m --output results --package package --bundle seed0=bundle0",
        "versions": {"offsite": "0.1.0", "torch": "2.13.0"},
        "device": "cpu, 2 threads",
        "seconds": 171.4,
    }
    return Results(**{**given, **changes})


def sample_logs():
    def noise(step):
        return 0.25 * math.sin(12.9898 * step) * math.cos(78.233 * step)

    tune = [
        {"step": n, "loss": 2.3 + 1.4 * math.exp(-n / 60) + noise(n), "tokens": n * 1024, "seconds": n * 1.7}
        for n in range(1, 201)
    ]
    for record in tune[19::20]:
        record["evaluation_loss"] = 2.25 + 1.2 * math.exp(-record["step"] / 70)
    return {"short": [{"step": 1, "loss": 4.0}, {"step": 2, "loss": None}], "tune-seed0": tune}


class Page(HTMLParser):
    """The tags, attributes and text of a page, and whether every element was closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_says_what_the_results_say():
    shown = Page(page(sample(), sample_logs()))
    for words in (
        "smollm2-135m",
        "(135\xa0M parameters)",
        "18.3 → 9.30",
        "± 0.12",
        "recovery_vs_lora",
        "0.850",
        "not run",
        "28.3",
        "heldout.jsonl.gz",
        "40,800 tokens",
        "width 0.33",
        "held_out_kl 0.410",
        "figures stated: none",
        "Not differentially private",
        "capability 1.21 nats per token",
        "Not run: fully tuned",
        "offsite evaluate smollm2-135m \\\n  --output results \\\n  --package package",
        "200 steps, 204,800 tokens, 340 s",
        "1.9\xa0GB at most held",
        "red eyes",
    ):
        assert words in shown.text, words


def test_what_is_withheld_is_told_where_the_results_have_it():
    later = {
        "recovery_nats_vs_lora": figure(0.79),
        "recovery_nats_vs_ceiling": None,
        "recovery_nats_vs_full": None,
        "withheld_after_tuning": figure(-0.42),
        "withheld_zero_shot": figure(1.207),
    }
    shown = Page(page(sample(metrics=sample().metrics | later), {})).text
    for words in (
        "withheld_after_tuning",
        "withheld_zero_shot",
        "recovery_nats_vs_lora",
        "nats per token withheld from the client's copy, tuned",
        "withheld zero shot 1.21 nats per token",
        "\N{MINUS SIGN}0.420 nats per token are withheld then, by this client",
    ):
        assert words in shown
    assert "capability 1.21" not in shown  # one figure, one name
    earlier = Page(page(sample(), {})).text
    assert not any(name in earlier for name in later)
    assert "are withheld then" not in earlier


def test_the_page_refers_to_nothing_outside_and_runs_nothing():
    text = page(sample(), sample_logs())
    shown = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "form", "base", "a"} & set(shown.tags)
    assert not {"src", "href", "xlink:href", "action", "style"} & {name for name, _ in shown.attributes}
    assert not any(name.startswith("on") for name, _ in shown.attributes)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in shown.attributes
    for reference in ("http:", "https:", "url(", "@import", "//"):
        assert reference not in text


def test_nothing_in_the_results_becomes_markup():
    evil = "<script>alert(1)</script>\"' onload=x &amp;"
    answer = Answer(prompt=evil, before=evil, after=evil)
    changes = {
        "model": evil,
        "method": {"name": evil, evil: evil},
        "answers": (answer,),
        "command": evil,
        "versions": {evil: evil},
        "device": evil,
        "runs": {evil: {"seconds": 1.0}},
        "data": sample().data.model_copy(update={"name": evil}),
        "package": sample().package.model_copy(update={"name": evil, "disclosed": {evil: 1.0}}),
    }
    rows = {name: row.model_copy(update={"tasks": {evil: {evil: figure(0.5)}}}) for name, row in sample().rows.items()}
    changes |= {"rows": rows, "task_metrics": {evil: {evil: {"gap": None}}}}
    text = page(sample(**changes), {evil: [{"step": 1, "loss": 1.0}]})
    shown = Page(text)
    assert "script" not in shown.tags
    assert not any(name == "onload" for name, _ in shown.attributes)
    assert "<script" not in text
    assert shown.text.count(evil) > 15


def full():
    """Results with something in every place of the page."""
    several = figure(0.2, 0.3, deviation=0.05)
    rows = {name: row.model_copy(update={"tasks": {"arc": {"acc": several}}}) for name, row in sample().rows.items()}
    runs = {"distill": {"steps": 300, "best_loss": 0.2}}
    return sample(rows=rows, task_metrics={"arc": {"acc": {"gap": several}}}, scale=0.5, runs=runs)


def test_no_string_that_reaches_the_template_becomes_markup(monkeypatch):
    template, values = given(monkeypatch, module, full(), sample_logs())
    plain, read = Outline(render(template, values)), Outline(render(template, hostile(values)))
    assert read.tags == plain.tags
    assert sum(said.count(EVIL) for said in read.said if said) > 150
    assert {"script", "figure", "svg", "blockquote"} - {tag for tag, _ in plain.tags} == {"script"}


def test_a_value_that_is_missing_stops_the_page(monkeypatch):
    template, values = given(monkeypatch, module, full(), sample_logs())
    assert len(values) > 10
    for name in values:
        with pytest.raises(UndefinedError, match=f"'{name}' is undefined"):
            render(template, {key: value for key, value in values.items() if key != name})


def test_the_same_results_the_same_bytes():
    once = page(full(), sample_logs())
    environment.cache_clear()
    assert page(full(), sample_logs()) == once


def test_figures_over_seeds_have_a_deviation():
    text = page(full(), {})
    assert '<td class="number">0.250<span class="deviation"> ± 0.05</span></td>' in text
    assert '<td class="number">18.3</td>' in text
    assert '<td class="number">\N{EN DASH}</td>' in text


def test_it_claims_no_more_than_was_measured():
    text = page(sample(), {}).lower()
    for claim in ("cannot be", "impossible", "guarantee", "secure", "safe ", "protected", "private data never"):
        assert claim not in text, claim


def test_the_least_results_make_a_page():
    one = {"seed0": sample().bundles["seed0"]}
    rows = {name: row(9.0 + n) for n, name in enumerate(("zero_shot", "emulator_zero_shot", "emulator_tuned"))}
    bare = sample(
        rows={**rows, "plugged_in": row(8.0)},
        metrics=dict.fromkeys(sample().metrics),
        bundles=one,
        references={},
        runs={},
        answers=(),
    )
    shown = Page(page(bare, {}))
    assert "One seed: how much of the figures is chance is not known" in shown.text
    assert "Before and after" not in shown.text
    assert "The runs" not in shown.text
    assert "Not run: full-model LoRA, ceiling, fully tuned" in shown.text


def test_the_command_is_shown_fit_to_be_pasted():
    import shlex

    command = shlex.join(["offsite", "evaluate", "a model", "--prompt", "It's\n--what?", "--pack", "--data", "x"])
    shown = Page(page(sample(command=command), {})).text
    start = shown.index("offsite evaluate")
    pasted = shown[start : shown.index("held-out text", start)]
    assert shlex.split(pasted.replace("\\\n", "")) == shlex.split(command)
    assert pasted.count("\\\n") == 3
    assert "it's" in Page(page(sample(command="it's"), {})).text  # no shell's words: shown as it is


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"recovery_vs_full": figure(0.5)}, "of the gain of full tuning"),
        ({"recovery_vs_ceiling": figure(0.5)}, "of the gain of the same adapter on the true middle"),
        ({}, "nats per token from the full model to the emulator"),
    ],
)
def test_the_tiles_show_a_recovery_that_was_run(metrics, shown):
    bare = dict.fromkeys(sample().metrics) | {"capability": figure(1.2)}
    assert shown in Page(page(sample(metrics={**bare, **metrics}), {})).text


def test_the_page_of_a_head_leads_with_its_accuracy():
    names = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in")
    rows = {
        name: Row(perplexity=figure(20.0), tasks={"classify": {"accuracy": figure(right)}})
        for name, right in zip(names, (0.25, 0.25, 0.75, 0.875), strict=True)
    }
    adapter = AdapterSpec(head=Head(task="classify", labels=("a", "b", "c", "d"), hidden=8))
    measures = {"classify": {"accuracy": {"recovery_vs_lora": figure(0.9)}}}
    given = {"adapter": adapter, "rows": rows, "tasks": {"classify": 8}, "task_metrics": measures}
    text = Page(page(sample(**given), {})).text
    for shown in (
        "accuracy of the full model, before and after",
        "0.250 \N{RIGHTWARDS ARROW} 0.875",
        "higher is better",
    ):
        assert shown in text
    assert "perplexity of the full model" not in text
    with pytest.raises(ValueError, match="whose accuracy is missing"):
        sample(**{**given, "task_metrics": {}})


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "results"
    (out / "logs").mkdir(parents=True)
    write_results(out, sample())
    for name, records in sample_logs().items():
        (out / "logs" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return out


def test_the_verb_writes_the_page_whole(folder, tmp_path):
    out = tmp_path / "report.html"
    found = run(ReportConfig(folder=folder, output=out))
    assert found == {"report": "report.html", "num_bytes": len(out.read_bytes())}
    assert out.read_text(encoding="utf-8") == page(sample(), sample_logs())
    with pytest.raises(ConfigError, match="already exists"):
        run(ReportConfig(folder=folder, output=out))


def put(**changes):
    def change(folder):
        path = folder / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


ROWS = sample().model_dump(mode="json")["rows"]
BROKEN = {
    "no folder": (lambda folder: folder.rename(folder.parent / "gone"), ArtefactError),
    "no results": (lambda folder: (folder / "results.json").unlink(), ArtefactError),
    "not JSON": (lambda folder: (folder / "results.json").write_text("{"), BadSchema),
    "another format": (put(format="offsite/results/9"), WrongBinding),
    "a key nobody knows": (put(extra=1), BadSchema),
    "a figure that is text": (put(seconds="long"), BadSchema),
    "a row nobody knows": (put(rows={"best": {}}), BadSchema),
    "a row too few": (put(rows={}), BadSchema),
    "no seed": (put(rows={**ROWS, "full": {"perplexity": {"mean": 1.0, "values": {}}}}), BadSchema),
    "a perplexity of nothing": (
        put(
            rows={**sample().model_dump(mode="json")["rows"], "full": {"perplexity": {"mean": 0.0, "values": {"a": 0}}}}
        ),
        BadSchema,
    ),
    "no bundle": (put(bundles={}), BadSchema),
    "a broken log": (lambda folder: (folder / "logs" / "short.jsonl").write_text("words\n"), DataError),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_evaluate_did_not_write_is_refused(case, folder, tmp_path):
    change, error = BROKEN[case]
    change(folder)
    with pytest.raises(error) as caught:
        run(ReportConfig(folder=folder, output=tmp_path / "report.html"))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()
