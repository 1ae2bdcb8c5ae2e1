"""The privacy report's page: made of the report alone, every plot where there is data for it, nothing unescaped."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from page_lab import EVIL, Outline, given, hostile

from offsite.artefacts.layout import Method
from offsite.audits.gates import Release, bundle_gates, unmeasured
from offsite.audits.record import ScanFigures
from offsite.audits.runs import Run
from offsite.digests import sha256_bytes
from offsite.privacyreport import page as module
from offsite.privacyreport.charts import MOST_STEMS, Bar, bars, exposure, recovery, roc, spent
from offsite.privacyreport.data import attacks
from offsite.privacyreport.page import page
from offsite.privacyreport.record import JobFacts, Limits, audit_digest, parse_report, report_raw
from offsite.report.charts import Curve
from offsite.report.engine import environment, render


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


s = _loaded("privacy_samples")


class Page(HTMLParser):
    """Tags, attributes, the words in the order in which they are seen, and whether every element was closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.titles, self.bold, self.open = [], [], [], [], [], []
        self.feed(text)
        assert not self.open

    @property
    def text(self):
        return " ".join(self.words)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-2:] == ["svg", "title"]:
            self.titles.append(data)
        elif not {"style", "head"} & set(self.open) and data.strip():
            self.words.append(data)
            if "b" in self.open:
                self.bold.append(data)


def release(audit):
    gates = bundle_gates(audit) if audit else unmeasured()
    return Release(
        bundle_digest=s.BUNDLE,
        sealed_digest=s.OTHER,
        audit=audit_digest(audit) if audit else None,
        gates=gates,
        accepted_leakage=any(gate.verdict != "passed" for gate in gates),
        round=1,
    )


PRIVATE = s.bundle_audit(s.made_up_claim(), power=0.95)
LEAKY = s.bundle_audit(power=0.4, canaries=s.canaries(power=0.3, secrets=60, exposed=6.0, extracted=3))
OWNERS = {
    "plugged": s.plugged_audit(),
    "package": s.package_audit(),
    "limits": Limits(max_capability=0.7, max_recovery=0.4, max_union=0.5),
}


def test_what_is_withheld_after_tuning_is_told_where_it_was_measured():
    earlier = page(s.report(package=s.package_audit()))
    later = page(s.report(package=s.package_audit(withheld=s.ways()), limits=Limits(min_withheld=0.5)))
    for words in (
        "What the client is left with after tuning",
        "rehearsed client, 40 steps",
        "nats per token withheld after tuning, by a client",
        "no measure of what the client is left with",
        "limit set for the least of them is 0.5",
    ):
        assert words in later
        assert words not in earlier


def test_the_same_report_the_same_bytes_and_from_the_json_alone():
    report = s.report(bundle=PRIVATE, release=release(PRIVATE), **OWNERS)
    text = page(report)
    assert text == page(parse_report(report_raw(report)))
    assert text.count("<h1") == 1


def test_rendering_again_gives_the_same_bytes_here_and_in_another_process():
    report = s.report(bundle=PRIVATE, release=release(PRIVATE), **OWNERS)
    once = page(report)
    environment.cache_clear()
    assert page(report) == once
    lines = [
        "import sys",
        "from offsite.digests import sha256_bytes",
        "from offsite.privacyreport.page import page",
        "from offsite.privacyreport.record import parse_report",
        "print(sha256_bytes(page(parse_report(sys.stdin.buffer.read())).encode()))",
    ]
    for seed in ("1", "2"):  # the order of sets and of whatever is hashed
        command = [sys.executable, "-c", "\n".join(lines)]
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, input=report_raw(report), env=environ, capture_output=True, check=True)
        assert done.stdout.decode().strip() == sha256_bytes(once.encode())


@pytest.mark.parametrize(
    ("audits", "start", "css"),
    [
        ({"bundle": LEAKY}, "NOT DIFFERENTIALLY PRIVATE", "bad"),
        ({"bundle": PRIVATE}, "Differentially private per example, as claimed: epsilon 3.000", None),
        ({"plugged": s.plugged_audit()}, "DIFFERENTIAL PRIVACY NOT SHOWN", "bad"),
        ({"package": s.package_audit()}, "What a package gives away", None),
    ],
)
def test_the_first_line_seen_is_the_headline(audits, start, css):
    report = s.report(**audits)
    shown = Page(page(report))
    assert shown.words[0] == report.headline
    assert report.headline.startswith(start)
    body = page(report).split("<main>")[1]
    assert body.startswith(f'<h1 class="{css}">' if css else "<h1>")
    assert f"<title>{report.headline.replace(chr(39), '&#x27;')}</title>" in page(report)


def test_leakage_that_was_accepted_is_in_bold_and_in_words():
    shown = Page(page(s.report(bundle=LEAKY, release=release(LEAKY))))
    assert shown.bold[0] == "Released although gates failed: --accept-leakage was given."
    shown = Page(page(s.report(bundle=LEAKY, release=release(None))))
    assert shown.bold[0] == "Released although gates could not be measured: --accept-leakage was given."
    assert "When the bundle was sealed: " in shown.bold
    assert "audit not measurable (no audit of this bundle was given)" in shown.text
    few = s.bundle_audit(
        power=0.4, canaries=None, scan=ScanFigures(num_bytes=9, num_ngrams_compared=1, found={"text": 2})
    )
    shown = Page(page(s.report(bundle=few, release=release(few))))
    told = "Released although gates failed and others could not be measured: --accept-leakage was given."
    assert shown.bold[0] == told
    assert (
        "Released after every gate had passed." in Page(page(s.report(bundle=PRIVATE, release=release(PRIVATE)))).text
    )
    assert "No release record is in this report" in Page(page(s.report(bundle=PRIVATE))).text


def test_the_facts_of_a_private_run():
    area = PRIVATE.membership[0].auc
    shown = Page(page(s.report(bundle=PRIVATE))).text
    for words in (
        "one example",
        "one unit added or removed",
        "not public",
        "Poisson-subsampled Gaussian",
        "each unit at rate 0.064 in each step",
        "0.865 times the clipping norm",
        "3.000 at delta 0.00051 (PLD, dp-accounting 0.6.0)",
        "3.741",
        "4.512 at delta 0.00051, of 2 runs that share a record with this one",
        "6.000, for all runs",
        "not what was learned by comparing them",
        "epsilon of at least 0.153",
        "would have shown 2.350",
        f"({area.low:.3f}\N{EN DASH}{area.high:.3f})",
        "too few to tell",
        "0 of 10",
        "In brackets: intervals at 95% confidence",
        "Differential privacy covers the adapter's tensors alone",
        "were set aside from the same text before tuning",
        "with an area of 0.503 (0.479\N{EN DASH}0.527)",
        "New are 0",
    ):
        assert words in shown, words


@pytest.mark.parametrize(("share", "told"), [(0.1, "were held out of the same text"), (0.0, "in files of their own")])
def test_rows_that_were_validated_on_are_said_to_come_from_where_they_did(share, told):
    audit = s.bundle_audit(nonmembers="validation")
    text = audit.run.text.model_copy(update={"validation": share})
    audit = audit.model_copy(update={"run": audit.run.model_copy(update={"text": text})})
    assert told in attacks(audit).source


def test_what_was_not_measured_says_so():
    bare = s.bundle_audit(membership=(), canaries=None, verbatim=None, nonmembers=None, auc_before=None)
    shown = Page(page(s.report(bundle=bare)))
    for words in (
        "Membership of rows: no attack was run",
        "Canaries: none were planted",
        "Reading rows back word for word: not tried",
        "The adapter in the full model: only its owner can attack it there",
        "What the package gives away of the full model: no audit of it is quoted",
        "not measurable",
    ):
        assert words in shown.text, words
    assert shown.titles == []
    package = s.package_audit(recovery=(), union=None, capabilities=s.package_audit().capabilities[1:])
    shown = Page(page(s.report(package=package))).text
    for words in (
        "Recovery of the full model from the package: no attack was run",
        "What several packages of this model hold together: not measured",
        "Capability with an adapter: the emulator was measured as it was sent only",
        "No limit was set for this package",
    ):
        assert words in shown, words
    half = s.bundle_audit(canaries=s.canaries().model_copy(update={"bound": None, "exposure": None, "membership": ()}))
    shown = Page(page(s.report(bundle=half)))
    assert "A lower bound on epsilon: none" in shown.text
    assert "Exposure: no made-up secret was planted" in shown.text
    assert shown.titles == ["hits against false alarms, rows"]


@pytest.mark.parametrize(
    ("audits", "titles"),
    [
        (
            {"bundle": PRIVATE},
            [
                "epsilon spent over steps",
                "hits against false alarms, rows",
                "hits against false alarms, canaries, the emulator",
                "exposure of secrets, the emulator",
            ],
        ),
        (
            OWNERS,
            [
                "hits against false alarms, canaries, the full model",
                "exposure of secrets, the full model",
                "capability",
                "share regained against tokens",
            ],
        ),
        ({"package": s.package_audit(recovery=())}, ["capability"]),
    ],
)
def test_every_plot_is_there_exactly_where_there_is_data(audits, titles):
    assert Page(page(s.report(**audits))).titles == titles


def test_it_refers_to_nothing_outside_and_runs_nothing():
    text = page(s.report(bundle=PRIVATE, release=release(PRIVATE), **OWNERS))
    shown = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "form", "base", "a"} & set(shown.tags)
    assert not {"src", "href", "xlink:href", "action", "style"} & {name for name, _ in shown.attributes}
    assert not any(name.startswith("on") for name, _ in shown.attributes)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in shown.attributes
    for reference in ("http:", "https:", "url(", "@import", "//"):
        assert reference not in text


@pytest.mark.parametrize("audits", [{"bundle": PRIVATE}, {"bundle": LEAKY}, OWNERS])
def test_it_claims_no_more_than_was_measured(audits):
    text = page(s.report(**audits)).lower()
    for claim in ("cannot be", "impossible", "guarantee", "secure", "safe ", "protected", "private data never"):
        assert claim not in text, claim


def test_nothing_in_the_audits_becomes_markup():
    evil = "<script>alert(1)</script>\"' onload=x &amp;"
    claim = s.made_up_claim(accountant=evil, noise=evil, released=evil, engine=evil)
    canaries = s.canaries()
    canaries = canaries.model_copy(update={"bound": canaries.bound.model_copy(update={"rule": evil})})
    package = s.package_audit()
    capability = package.capabilities[1].model_copy(update={"name": evil})
    report = s.report(
        bundle=s.bundle_audit(claim, versions={"torch": evil}, canaries=canaries),
        package=package.model_copy(
            update={
                "method": Method(name="width", settings={"note": evil}),
                "capabilities": (capability,),
                "recovery_text": evil,
            }
        ),
        versions={"offsite": evil},
    )
    text = page(report)
    shown = Page(text)
    assert "script" not in shown.tags
    assert "<script" not in text
    assert not any(name == "onload" for name, _ in shown.attributes)
    assert shown.text.count(evil) >= 10
    assert text == page(parse_report(report_raw(report)))


def full():
    """Reports with something in every place of the page: of a private run, and of one that leaked."""
    job = JobFacts(job_id=s.JOB, digest=s.OTHER, owner=s.ISSUER, client=s.ISSUER)
    similar = s.package_audit().similarity.model_copy(update={"num_within_rounding": 70_000_000})
    owners = {**OWNERS, "package": s.package_audit(similarity=similar)}
    return [
        s.report(bundle=PRIVATE, release=release(PRIVATE), job=job, **owners),
        s.report(bundle=LEAKY, release=release(None), job=job, **owners),
    ]


@pytest.mark.parametrize("report", full(), ids=["private", "leaky"])
def test_no_string_that_reaches_the_template_becomes_markup(report, monkeypatch):
    template, values = given(monkeypatch, module, report)
    plain, read = Outline(render(template, values)), Outline(render(template, hostile(values)))
    assert read.tags == plain.tags
    assert sum(said.count(EVIL) for said in read.said if said) > 400
    assert {"script", "figure", "svg", "bdi"} - {tag for tag, _ in plain.tags} == {"script"}


def test_a_value_that_is_missing_stops_the_page(monkeypatch):
    template, values = given(monkeypatch, module, full()[0])
    assert len(values) > 8
    for name in values:
        with pytest.raises(UndefinedError, match=f"'{name}' is undefined"):
            render(template, {key: value for key, value in values.items() if key != name})


def test_every_digest_is_on_the_page():
    report = s.report(bundle=PRIVATE, release=release(PRIVATE), **OWNERS)
    shown = Page(page(report)).text
    run: Run = PRIVATE.run
    found = [run.bundle_digest, run.package_digest, run.base_digest, s.OTHER, s.ISSUER]
    for digest in [*found, *report.digests.audits.values()]:
        assert digest in shown
    assert "2026-09-21 14:13:20 UTC" in shown
    assert "offsite report verify REPORT" in shown


# --- the charts


def svg(chart, *figures, **settings):
    return environment().get_template("drawing.svg.jinja").module.svg(chart(*figures, **settings))


def numbers(markup, attribute):
    return [float(value) for value in re.findall(rf'{attribute}="(-?[\d.]+)"', markup)]


def polyline(markup, css):
    points = re.search(rf'<polyline points="([^"]*)" class="{css}"/>', markup).group(1)
    return [tuple(map(float, point.split(","))) for point in points.split()]


def test_the_roc_shows_low_false_alarms_chance_and_the_one_percent_mark():
    line = Curve("loss", ((0.0, 0.0), (0.0, 0.01), (0.001, 0.1), (0.01, 0.5), (1.0, 1.0)), "s1")
    drawn = svg(roc, [line], title="t", floor=1e-3, limit=(0.01, 0.03))
    chance, found = polyline(drawn, "chance"), polyline(drawn, "line s1")
    assert chance[0] == found[0]  # both start in the corner
    assert chance[1] == found[-1]
    width = chance[1][0] - chance[0][0]
    assert found[3][0] - found[0][0] == pytest.approx(width / 3, abs=0.2)  # 1% is a third of three decades
    assert found[1][0] == found[0][0]
    assert found[1][1] < found[0][1]
    mark = float(re.search(r'<line x1="([\d.]+)"[^>]*class="reference"', drawn).group(1))
    assert mark == pytest.approx(found[3][0], abs=0.1)
    assert 'class="limit"' in drawn
    assert all(text in drawn for text in ("0.1%", "1%", "10%", "100%", "limit 3%"))
    assert "limit" not in svg(roc, [line], title="t", floor=1e-3, limit=None)


def test_exposure_draws_each_secret_or_curves_of_many():
    few = svg(exposure, [1.0, 5.0, 3.0], [0.5, 0.0, 0.2], most=10.0, title="t")
    assert few.count("<circle") == 6
    after = list(map(float, re.findall(r'cy="([\d.]+)" r="4.5"', few)))
    assert after == sorted(after)  # the most exposed first, and highest
    assert "most there could be: 10.0" in few
    many = svg(exposure, [float(n % 7) for n in range(MOST_STEMS + 1)], [0.0] * 5, most=10.0, title="t")
    assert "<circle" not in many
    assert many.count("<polyline") == 2
    assert svg(exposure, [0.0], [], most=0.0, title="t").count("<circle") == 1


def test_epsilon_ends_where_it_is_claimed_and_levels_that_are_one_are_drawn_once():
    points = [(1.0, 0.5), (2.0, 0.8), (4.0, 1.2)]
    drawn = svg(spent, points, claimed=1.2, budget=2.0, total=1.2, title="t")
    assert drawn.count('class="reference"') == 2
    assert "claimed, all runs 1.20" in drawn
    assert "budget 2.00" in drawn
    ends = polyline(drawn, "line s1")[-1][1]
    assert ends in numbers(drawn, "y1")
    assert len(svg(spent, [(1.0, 0.0)], claimed=0.0, budget=0.0, total=0.0, title="t")) > 100


def test_recovery_puts_no_tokens_at_the_left_and_the_rest_by_their_logarithm():
    line = Curve("heal", ((0.0, -0.1), (100.0, 0.1), (1000.0, 0.2), (10_000.0, 0.5)), "s1")
    drawn = svg(recovery, [line], title="t", limit=0.4)
    x = [point[0] for point in polyline(drawn, "line s1")]
    assert x[2] - x[1] == pytest.approx(x[3] - x[2], abs=0.2)
    assert x[0] < x[1]
    assert "limit 0.40" in drawn
    assert svg(recovery, [Curve("one", ((500.0, 1.2),), "s1")], title="t", limit=None).count("<circle") == 1
    assert svg(recovery, [Curve("none", ((0.0, 0.0),), "s1")], title="t", limit=None).count("<circle") == 1


def test_bars_begin_at_chance_whichever_way_they_go():
    drawn = svg(bars, [("one", [Bar("a", 1.0, "9", "owner"), Bar("b", -0.5, "7", "client")])], title="t", limit=0.7)
    zero = float(re.search(r'<line x1="([\d.]+)"[^>]*class="axis-line"', drawn).group(1))
    starts, widths = numbers(drawn, "rect x"), numbers(drawn, '(?<=[0-9]" )width')
    assert starts[0] == pytest.approx(zero, abs=0.1)
    assert starts[1] + widths[1] == pytest.approx(zero, abs=0.2)
    assert 'class="reference"' in drawn
