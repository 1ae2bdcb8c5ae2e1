"""What a server has done and is doing, in Prometheus' text form.

Source: the Prometheus text exposition format, version 0.0.4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[tuple[str, str], ...]


@dataclass
class Metrics:
    """Sums since the start, by name and labels."""

    totals: dict[str, dict[Labels, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """The total is larger by so much."""
        if name not in HELP:
            raise KeyError(name)
        self.totals[name][tuple(sorted(labels.items()))] += amount

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return the page.

        Args:
            gauges: what is so now, by name.
        """
        return "".join(self._lines(gauges))

    def _lines(self, gauges: Mapping[str, float]) -> Iterator[str]:
        for name, told in HELP.items():
            series = {(): gauges[name]} if name in gauges else self.totals.get(name, {})
            if series:
                kind = "gauge" if name in gauges else "counter"
                yield f"# HELP {name} {told}\n# TYPE {name} {kind}\n"
                for labels, value in sorted(series.items()):
                    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
                    yield f"{name}{{{shown}}} {value:g}\n" if shown else f"{name} {value:g}\n"


HELP = {
    "offsite_requests_total": "Admitted requests that have ended, also those that broke off, by model and tenant.",
    "offsite_prompt_tokens_total": "Tokens of prompts, by model and tenant.",
    "offsite_answer_tokens_total": "Tokens of answers, by model and tenant.",
    "offsite_request_seconds_total": "Seconds from admission to the last token, by model and tenant.",
    "offsite_first_token_seconds_total": "Seconds from admission to the first token, by model and tenant.",
    "offsite_refused_total": "Requests that were refused, by HTTP status.",
    "offsite_broken_off_total": "Requests whose client left, or that failed under way.",
    "offsite_requests_inside": "Requests that are answered or wait.",
    "offsite_rows_inside": "Answers that are written together now.",
    "offsite_rows_waiting": "Answers that wait for a place.",
    "offsite_cache_bytes": "Memory of all keys and values.",
    "offsite_models": "Names that can be asked for.",
}
"""Every metric, and what it is."""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
