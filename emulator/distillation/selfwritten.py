"""``--public self``: the owner's model writes text of the clients' field, to choose channels on and to distil on.

Two forms, neither of which knows more of the field than the words it is given: questions, begun with a stem and
answered, and running text. Without stems half of the rounds are of each, with stems all are questions. Rows are drawn
with top-p at temperature 1, cut where the next question or the text's end begins, and dropped where almost nothing is
left. What the model writes is no better than the model: nobody has checked that it is true.

Every round is drawn from a seed of its own, which stands in its rows, and is kept in ``PACKAGE.self.work`` once it is
whole: a run that was killed goes on after the last one and ends with the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emulator.distillation.config import DistillConfig
from offsite.console import Progress, progress, say
from offsite.digests import model_digest
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.evaluation.sampling import continuations
from offsite.modelling.context import require_context
from offsite.modelling.load import load_model, load_tokenizer
from offsite.staging import remove, staged_file
from offsite.text.calls import decoded, encoded
from offsite.text.prompts import prompt_ids
from offsite.training.devices import choose_device
from offsite.training.precision import uses_bf16

STEMS = (
    *("What is", "What are", "What causes", "How is", "How does", "How many", "Why is", "When is", "Who is"),
    *("Which", "Is", "Can", "What happens when", "How to", "Do you have information about"),
)
TOP_P = 0.95
TEMPERATURE = 1.0
ROUND_ROWS = 48
QUESTION_TOKENS, ANSWER_TOKENS, RUNNING_TOKENS = 24, 120, 144
FEWEST_CHARACTERS = 20
FRUITLESS_ROUNDS = 5
STEMS_LIMIT = 10_000

_BATCH = 16
_ASKED = "asked.json"

Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What the model is to write: the field in words, beginnings of questions, about how many tokens, from what seed.

    ``seed`` and all else that the text follows from; the same gives the same text on one kind of machine.
    """

    model: str
    field: str
    stems: tuple[str, ...]
    num_tokens: int
    seed: int

    def as_json(self) -> str:
        """Return the settings as they are kept beside the rounds."""
        drawn = {"top_p": TOP_P, "temperature": TEMPERATURE, "rows": ROUND_ROWS}
        return json.dumps({"format": "offsite/self-written/1", **vars(self), **drawn}, sort_keys=True)


def own_text(config: DistillConfig) -> Path:
    """Return the file of text that the model has written, ``PACKAGE.self.jsonl``; it stays with the owner.

    Raises:
        ConfigError: when such a file stands that this run did not write, or the stems cannot be read.
        RunFailed: when the model writes nothing that is worth keeping.
    """
    out = config.output.with_name(f"{config.output.name}.self.jsonl")
    work = own_work(config)
    if out.exists() and not work.is_dir():
        raise ConfigError(
            f"{out.name!r} already exists", hint=f"use it as it is with --public {out.name}, or delete it"
        )
    stems = read_stems(config.stems)
    say(f"loading {Path(config.model).name!r} to write text of its own")
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    digest = model_digest(model)
    device = choose_device(config.device)
    if not uses_bf16(config.precision, device):
        model.float()
    model.to(device)  # type: ignore[arg-type]
    asked = Asked(digest, config.field.strip(), stems, config.self_tokens, config.seed)
    write_text(out, work, model, tokenizer, asked)
    return out


def own_work(config: DistillConfig) -> Path:
    """Return the folder that holds the rounds until the package stands."""
    return config.output.with_name(f"{config.output.name}.self.work")


def read_stems(path: Path | None) -> tuple[str, ...]:
    """Return the lines of the file that are not blank; none for no file.

    Raises:
        DataError: when it cannot be read, is not UTF-8, holds none, or is longer than any list of stems.
    """
    if path is None:
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read stems {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    except UnicodeDecodeError:
        raise DataError(f"stems {path.name!r} are not UTF-8 text") from None
    stems = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not stems or len(stems) > STEMS_LIMIT or max(map(len, stems)) > 500:
        raise DataError(
            f"stems {path.name!r}: expected 1 to {STEMS_LIMIT} lines of at most 500 characters",
            hint="a stem is how a question begins, as: What are the symptoms of",
        )
    return stems


def write_text(
    out: Path, work: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Asked
) -> list[Row]:
    """The file holds about ``asked.num_tokens`` tokens of text, one row a document; returns its rows.

    Raises:
        ConfigError: when `work` holds rounds of other settings, or the model's context is too short to write in.
        RunFailed: when several rounds together leave no row.
    """
    longest = max((len(prompt_ids(tokenizer, _head(asked) + stem)) for stem in asked.stems or STEMS), default=0)
    require_context(model, longest + QUESTION_TOKENS + ANSWER_TOKENS + 8, "a question and its answer")
    _bind(work, asked)
    rows: list[Row] = []
    num_tokens = number = fruitless = 0
    with progress(asked.num_tokens, "writing text of its own, tokens") as bar:
        while num_tokens < asked.num_tokens:
            kept = work / f"round-{number:05d}.json"
            found = _read_round(kept)
            if found is None:
                found = _round(model, tokenizer, asked, number, _shown(bar, num_tokens, asked.num_tokens))
                with staged_file(kept, replace=True) as stage:
                    stage.write_text(json.dumps(found), encoding="utf-8")
            rows += found
            num_tokens += sum(len(encoded(tokenizer, row["text"], what="own text")) for row in found)
            fruitless = 0 if found else fruitless + 1
            if fruitless == FRUITLESS_ROUNDS:
                raise RunFailed(
                    f"the model wrote nothing worth keeping in {fruitless} rounds",
                    hint="say more in --field or --stems, or give text in a file",
                )
            number += 1
            bar.update(min(num_tokens, asked.num_tokens))
    for place, row in enumerate(rows):
        row["document"] = f"self-{place}"
    with staged_file(out, replace=True) as stage:
        stage.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    say(f"{out.name}: {len(rows):,} rows, {num_tokens:,} tokens that the model wrote; it stays with you")
    return rows


def _bind(work: Path, asked: Asked) -> None:
    """The folder holds rounds of these settings and no others."""
    note = work / _ASKED
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ConfigError(f"work folder {work.name!r} is not a folder of its own")
    if note.is_file() and note.read_text(encoding="utf-8") != asked.as_json():
        raise ConfigError(
            f"work folder {work.name!r} holds text that was asked for in other words", hint="delete it to begin anew"
        )
    if not note.is_file():
        if work.is_dir() and any(work.iterdir()):
            raise ConfigError(f"work folder {work.name!r} is another run's", hint="choose another name with -o")
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFailed(f"cannot write {work.name!r}: {(error.strerror or 'i/o error').lower()}") from None
        with staged_file(note, replace=True) as stage:
            stage.write_text(asked.as_json(), encoding="utf-8")


def _read_round(path: Path) -> list[Row] | None:
    if not path.is_file():
        return None
    found: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _shown(bar: Progress, before: int, total: int) -> Callable[[float], None]:
    """Return what shows that a share of a round, which may be as many tokens as are missing, is done."""

    def show(share: float) -> None:
        left = total - before
        bar.update(min(before + int(share * min(left, ROUND_ROWS * RUNNING_TOKENS)), total - 1))

    return show


def _head(asked: Asked) -> str:
    return f"{asked.field}\n\n" if asked.field else ""


def _round(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    number: int,
    show: Callable[[float], None],
) -> list[Row]:
    """Return the rows of one round; none of them says anything of the words that the model was given of the field."""
    seed = round_seed(asked.seed, number)

    def write(prompts: Sequence[str], num_tokens: int, salt: int, upto: float) -> list[str]:
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        made = continuations(
            model,
            ids,
            num_tokens=num_tokens,
            batch_size=_BATCH,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            seed=seed + salt,
            progress=lambda done, total: show(upto * done / total),
        )
        return [_text(tokenizer, one) for one in made]

    if not asked.stems and number % 2:
        prompts = [_head(asked)] * ROUND_ROWS
        texts = [text.strip() for text in write(prompts, RUNNING_TOKENS, 0, 1.0)]
        return [{"text": text, "seed": seed} for text in texts if len(text) > FEWEST_CHARACTERS]
    stems = asked.stems or STEMS
    begun = [stems[(number * ROUND_ROWS + place) % len(stems)] for place in range(ROUND_ROWS)]
    prompts = [f"{_head(asked)}Question: {stem}" for stem in begun]
    ended = write(prompts, QUESTION_TOKENS, 0, 0.2)
    questions = [
        f"Question: {stem}{question}?\nAnswer:"
        for stem, rest in zip(begun, ended, strict=True)
        if (question := cut_question(rest)).strip()
    ]
    answers = write([_head(asked) + question for question in questions], ANSWER_TOKENS, 1, 1.0) if questions else []
    return [
        {"text": question + answer, "seed": seed}
        for question, text in zip(questions, answers, strict=True)
        if len((answer := cut_answer(text)).strip()) > FEWEST_CHARACTERS
    ]


def round_seed(seed: int, number: int) -> int:
    """Return the seed of a round, below 2 ** 53: another for every seed and number."""
    return int.from_bytes(hashlib.sha256(f"offsite/v1/self/{seed}/{number}".encode()).digest()[:8], "big") >> 11


def cut_question(text: str) -> str:
    """Return what the model went on a stem with, up to the question mark or the end of the line."""
    return text.partition("?")[0].partition("\n")[0].rstrip()


def cut_answer(text: str) -> str:
    """Return the answer, up to where the next question begins."""
    return text.partition("Question:")[0].rstrip()


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    ends = tokenizer.eos_token_id
    upto = list(ids).index(ends) if ends in ids else len(ids)
    return decoded(tokenizer, list(ids[:upto]), what="own text", skip_special=True)


def forget(config: DistillConfig) -> None:
    """The rounds are gone; the text itself stays beside the package."""
    remove(own_work(config))
