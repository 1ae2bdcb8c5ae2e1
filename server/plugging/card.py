"""The README of an adapted folder: a model card that says to others what the folder is, of which model, how good.

Names and digests only: no path of the machine that made it, nothing of the text that was tuned on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import yaml

from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.errors import ConfigError
from offsite.evaluation.results import Results
from offsite.vision.models import VISION_TYPES
from server.plugging.fullmodel import FullModel
from server.plugging.ways import Way

CARD_NAME = "README.md"

Form = Literal["peft", "own", "merged"]

_ROWS = {"zero_shot": "zero-shot: the base model", "emulator_tuned": "emulator-tuned", "plugged_in": "plugged in"}
_WHAT: dict[Form, str] = {
    "peft": "an adapter as a PEFT folder",
    "own": "the changed tensors, under the base model's names",
    "merged": "a whole checkpoint with the adapter merged in",
}


@dataclass(frozen=True)
class Card:
    """What is said of one adapted folder.

    Attributes:
        name: the folder's.
        licence: as the package stated it; empty where it stated none.
        effect: how far the adapter moves the base model's logits, as a share of their root mean square.
        deviation: of the logits of what was read back, likewise.
        results: of an evaluation of this adapter.
        is_seq2seq: the base model is an encoder-decoder.
    """

    name: str
    form: Form
    base: FullModel
    base_digest: str
    adapter: AdapterSpec
    licence: str = ""
    way: Way = field(default_factory=Way)
    corrected: bool = False
    effect: float | None = None
    deviation: float | None = None
    results: Results | None = None
    is_seq2seq: bool = False

    def text(self) -> str:
        """Return the card as Markdown with its YAML header."""
        header = yaml.safe_dump(self._header(), sort_keys=False, allow_unicode=True)
        parts = [f"---\n{header}---", f"# {self.name}", self._told(), self._table(), self._figures(), self._use()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _header(self) -> dict[str, object]:
        known = re.fullmatch(r"[A-Za-z0-9.-]+", self.licence)
        found: dict[str, object] = {"license": self.licence.lower() if known else "other"}
        if self.licence and not known:
            found["license_name"] = self.licence
        if self.base.is_hub_id:
            found["base_model"] = self.base.name
        found["library_name"] = "peft" if self.form == "peft" else "transformers"
        writes = "text2text-generation" if self.is_seq2seq else "text-generation"
        of_head = "token-classification" if self.adapter.task == "tag" else "text-classification"
        found["pipeline_tag"] = writes if self.adapter.head is None else of_head
        if self._sees:
            found["pipeline_tag"] = "image-classification"
        return {**found, "tags": ["offsite-tuning", self.adapter.kind]}

    @property
    def _sees(self) -> bool:
        return self.adapter.head is not None and self.adapter.head.encoder in VISION_TYPES

    def _told(self) -> str:
        data = "images" if self._sees else "text"
        return (
            f"This folder is {_WHAT[self.form]}. The adapter was trained by offsite-tuning: on {data} that stayed with "
            "its owner, against a smaller stand-in for the base model, and was then put into the base model itself."
        )

    def _table(self) -> str:
        adapter = self.adapter
        kind = adapter.kind if adapter.kind in ("blocks", "bitfit") else f"{adapter.kind}, rank {adapter.rank}"
        where = f"the last {adapter.last} blocks" if adapter.last else f"blocks of the ends: {adapter.placement}"
        rows = [
            ("base model", f"`{self.base.name}`, digest of its tensors `{self.base_digest}`"),
            ("adapter", f"{kind}; {where}; {adapter.targets}"),
            ("licence", self.licence or "none stated"),
        ]
        if self.adapter.head is not None:
            rows.append(("head", _head(self.adapter.head)))
        if self.way.word:
            rows.append(("plugged in", self.way.told))
        elif self.way.scale != 1:
            rows.append(("share of the update", f"{self.way.scale:g}"))
        if self.corrected:
            rows.append(("corrected", "for what the stand-in differed by, along the adapter's directions"))
        if self.effect is not None:
            rows.append(("moves the logits by", f"{self.effect:.2g} of their size"))
        if self.deviation is not None:
            rows.append(("read back, the logits differ by", f"{self.deviation:.2g}"))
        return _markdown(["", ""], rows)

    def _figures(self) -> str:
        if self.results is None or self.adapter.task == "regress":  # of an encoder it has no perplexity
            return ""
        rows = [
            (words, f"{self.results.rows[name].perplexity.mean:.2f}")  # type: ignore[index]
            for name, words in _ROWS.items()
            if name in self.results.rows
        ]
        told = f"Perplexity on {self.results.data.num_tokens:,} tokens that neither side trained on (lower is better):"
        return f"## Figures\n\n{told}\n\n" + _markdown(["model", "perplexity"], rows)

    def _use(self) -> str:
        base, name = self.base.name, self.name
        if self.form == "own":
            return f"## Use\n\n    offsite serve {name} --base {base}"
        head, tags = self.adapter.head, self.adapter.task == "tag"
        if self._sees and head is not None:
            return self._use_on_images(head)
        writes = "AutoModelForSeq2SeqLM" if self.is_seq2seq else "AutoModelForCausalLM"
        classifier = "AutoModelForTokenClassification" if tags else "AutoModelForSequenceClassification"
        make = writes if head is None else classifier
        with_labels = "" if head is None else f", num_labels={head.num_labels}, pad_token_id=tokenizer.pad_token_id"
        with_labels += ', problem_type="regression"' if self.adapter.task == "regress" else ""
        lines = [
            f"from transformers import {make}, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
        if self.form == "peft":
            lines = ["from peft import PeftModel", *lines, f'base = {make}.from_pretrained("{base}"{with_labels})']
            lines.append(f'model = PeftModel.from_pretrained(base, "{name}")')
        else:
            lines.append(f'model = {make}.from_pretrained("{name}")')
        code = "\n".join(lines)
        if tags:
            return f"## Use\n\n```python\n{code}\n```"
        if head is not None:
            return f"## Use\n\n```python\n{code}\n```\n\n```sh\noffsite serve {name}\n```"
        served = f"vllm serve {base} --enable-lora --lora-modules {name}={name}" if self.form == "peft" else ""
        served = "" if self.adapter.kind == "dora" else served
        served = f"vllm serve {name}" if self.form == "merged" else served
        served = f"offsite serve {name}" if self.is_seq2seq else served
        return f"## Use\n\n```python\n{code}\n```" + (f"\n\n```sh\n{served}\n```" if served else "")

    def _use_on_images(self, head: Head) -> str:
        make, name = "AutoModelForImageClassification", self.name
        lines = [
            f"from transformers import AutoImageProcessor, {make}",
            "",
            f'processor = AutoImageProcessor.from_pretrained("{name}")',
        ]
        if self.form == "peft":
            opened = f'{make}.from_pretrained("{self.base.name}", num_labels={head.num_labels})'
            lines = ["from peft import PeftModel", *lines, f"base = {opened}"]
            lines.append(f'model = PeftModel.from_pretrained(base, "{name}")')
        else:
            lines.append(f'model = {make}.from_pretrained("{name}")')
        return "## Use\n\n```python\n" + "\n".join(lines) + f"\n```\n\n```sh\noffsite serve {name}\n```"


def require_results(
    results: Results,
    *,
    base_digest: str,
    bundle_digest: str,
    way: Way,
    spare_text: str = "",
    corrected: bool = False,
) -> Results:
    """Return the results only if they are of this adapter in this model, plugged in this way, corrected or not.

    Args:
        spare_text: digest of the public text where directions are spared.

    Raises:
        ConfigError: naming what is another's.
    """
    if results.base_digest != base_digest:
        raise ConfigError("--results: they are of another full model")
    if [crossing.digest for crossing in results.bundles.values()] != [bundle_digest]:
        raise ConfigError("--results: they are not of this bundle alone", hint="offsite evaluate it by its id")
    found = Way.stated(results.scale, results.way)
    if found != way:
        raise ConfigError(f"--results: they are of {found.told}, here it is {way.told}")
    if results.spare_text != spare_text:
        raise ConfigError("--results: other public text was spared", hint="give --spare the same text")
    if results.corrected != corrected:
        raise ConfigError("--results: they are of an update that was corrected where this is not, or the reverse")
    return results


def _head(head: Head) -> str:
    """Return what a head answers, in words."""
    if not head.labels:
        return "a reward, one number of a text" if head.task == "reward" else "a value, one number of a text"
    if head.task == "tag":
        return f"a label of every token, in this order: {', '.join(head.labels)}"
    return f"labels, in this order: {', '.join(head.labels)}"


def _markdown(head: list[str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ["---", "---"], *([one, two.replace("|", "\\|")] for one, two in rows)]
    return "\n".join(f"| {one} | {two} |" for one, two in lines)
