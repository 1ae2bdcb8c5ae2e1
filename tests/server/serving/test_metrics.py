"""The page that Prometheus reads."""

from __future__ import annotations

import pytest

from server.serving.metrics import Metrics


def test_sums_and_gauges_are_told_with_their_labels():
    metrics = Metrics()
    for model, amount in (("a", 2), ('b"\\\n', 1), ("a", 3)):
        metrics.add("offsite_answer_tokens_total", amount, model=model, tenant="")
    text = metrics.text({"offsite_rows_inside": 4})
    assert text.splitlines() == [
        "# HELP offsite_answer_tokens_total Tokens of answers, by model and tenant.",
        "# TYPE offsite_answer_tokens_total counter",
        'offsite_answer_tokens_total{model="a",tenant=""} 5',
        'offsite_answer_tokens_total{model="b\\"\\\\\\n",tenant=""} 1',
        "# HELP offsite_rows_inside Answers that are written together now.",
        "# TYPE offsite_rows_inside gauge",
        "offsite_rows_inside 4",
    ]
    assert text.endswith("\n")


def test_a_metric_that_nobody_explains_is_a_bug():
    with pytest.raises(KeyError):
        Metrics().add("offsite_made_up")
