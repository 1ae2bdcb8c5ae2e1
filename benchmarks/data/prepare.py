"""Make the bundled texts, and the larger files of the benchmarks, from the published data sets.

    python benchmarks/data/prepare.py SOURCES --bundled offsite/data
    python benchmarks/data/prepare.py SOURCES --full .bench-data
    python benchmarks/data/prepare.py SOURCES --tasks .bench-data

SOURCES is a folder that holds ``wikitext-2/{train,valid}.txt.gz`` and ``wikitext-2/raw/wiki.test.raw.gz``,
``medquad/all.jsonl.gz`` (one question and answer a row, fields source, file, focus, question, answer), and
for ``--full`` ``openwebtext-1k``, ``c4-demo``, ``wiki-demo``, ``pubmedqa``, ``arc_easy``, ``arc_challenge``, ``piqa``,
``openbookqa``, ``webquestions`` and ``banking77``; for ``--tasks`` ``banking77``, ``arc_easy`` and ``mts-dialog``.
Every choice is by hash, every file is written without a time stamp: the same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

Row = dict[str, object]

NUM_PRIVATE_ROWS, NUM_HELDOUT_ROWS, NUM_PUBLIC_ARTICLES = 4200, 650, 200
NUM_QUESTIONS, NUM_MORE_QUESTIONS = 300, 1000
ANSWER_CHARACTERS = (30, 1500)
HELD_OUT = 0.1
CLIENT_SHARE = 0.4
INTENTS = (
    *("activate_my_card", "card_arrival", "change_pin", "lost_or_stolen_card", "cash_withdrawal_charge"),
    *("exchange_rate", "pending_transfer", "terminate_account", "top_up_failed", "transaction_charged_twice"),
)
"""Ten of Banking77's 77 intents: those that a customer would tell apart."""
SECTIONS = {
    **{"GENHX": "history of present illness", "FAM/SOCHX": "family and social history", "CC": "chief complaint"},
    **{"PASTMEDICALHX": "past medical history", "PASTSURGICAL": "past surgical history", "ALLERGY": "allergies"},
    **{"ROS": "review of systems", "MEDICATIONS": "medications", "ASSESSMENT": "assessment", "DIAGNOSIS": "diagnosis"},
}
DIALOGUE_CHARACTERS, SUMMARY_CHARACTERS = 700, (20, 240)


# --- reading and writing


def read_lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from file


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_lines(path)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """The rows are in `path` as gzipped JSON lines; name, rows, bytes and sha256 are on stdout."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    data = gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"| {path.name} | {len(lines)} | {len(data)} | {hashlib.sha256(data).hexdigest()} |")


def draw(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but `text` and `purpose`."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{text}".encode()).digest()[:6], "big") / 2**48


# --- WikiText-2


def articles(lines: Iterable[str]) -> Iterator[list[str]]:
    """The paragraphs and headings of each article. A title is ` = Title = `; a line of that form inside
    an article (the caption of a table) does not follow an empty line, or is followed by text."""
    padded = [" ", *lines, " "]
    article: list[str] = []
    for before, line, after in zip(padded, padded[1:], padded[2:], strict=False):
        is_title = re.fullmatch(r" = [^=].* = ", line.rstrip("\n")) and not before.strip() and not after.strip()
        if is_title and article:
            yield article
            article = []
        if line.strip():
            article.append(line.strip())
    if article:
        yield article


def raw_articles(lines: Iterable[str]) -> Iterator[list[str]]:
    """As `articles`, for the raw split, which has no empty lines: there only real titles have the form."""
    article: list[str] = []
    for line in filter(str.strip, lines):
        if re.fullmatch(r" = [^=;,]* = ", line.rstrip("\n")) and article:
            yield article
            article = []
        article.append(line.strip())
    yield article


def without_unknowns(paragraph: str) -> str:
    """The sentences of a tokenised paragraph in which no word was replaced by <unk>."""
    sentences = re.split(r"(?<= [.!?]) (?=[A-Z\"])", paragraph)
    return " ".join(sentence for sentence in sentences if "<unk>" not in sentence)


def detokenised(text: str) -> str:
    """WikiText's spaces before punctuation and its @-@ marks undone; quotes are paired in order."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$£€#]) ", r"\1", text)
    text = re.sub(r" ('(?:s|t|re|ve|m|ll|d)\b)", r"\1", text)
    text = re.sub(r"\b(O|[Dd]) '(?=[A-Z])", r"\1'", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return re.sub(r"(?<=\w) / (?=\w)", "/", text)


def wiki_rows(found: Iterable[list[str]], name: str) -> Iterator[Row]:
    for number, (title, *paragraphs) in enumerate(found):
        kept = []
        for paragraph in paragraphs:
            if heading := re.fullmatch(r"(?:= )+([^=].*?)(?: =)+", paragraph):
                if kept and kept[-1].startswith("\n"):
                    kept.pop()  # the section before lost all its sentences
                kept.append("\n" + detokenised(heading[1]))
            elif text := detokenised(without_unknowns(paragraph)):
                kept.append(text)
        if kept and kept[-1].startswith("\n"):
            kept.pop()
        if sum(map(len, kept)) > 500:
            heading = detokenised(title.strip("= "))
            yield {"text": "\n".join([heading, *kept]).replace("<unk>", "").strip(), "document": f"{name}-{number:03d}"}


# --- MedQuAD


def medquad_rows(path: Path) -> tuple[list[Row], list[Row]]:
    """Rows to train on and held-out rows, a tenth of all diseases: one disease can have several documents.

    Dropped: answers that are empty, very short or long, and answers that repeat an earlier one word for
    word (stock sentences on inheritance, for the most part), so that no held-out answer was trained on.
    """
    seen: set[str] = set()
    train, held_out = [], []
    for source in read_rows(path):
        answer = " ".join(source["answer"].split())
        if not ANSWER_CHARACTERS[0] <= len(answer) <= ANSWER_CHARACTERS[1] or answer in seen:
            continue
        seen.add(answer)
        question = re.sub(r"[\s?]+$", "?", " ".join(source["question"].split()))
        subject = " ".join(source["focus"].lower().split())
        row = {
            "document": source["file"].removesuffix(".xml"),
            "source": source["source"],
            "prompt": f"Question: {question}\nAnswer:",
            "completion": f" {answer}",
        }
        (held_out if draw(subject, "medquad") < HELD_OUT else train).append(row)
    straddling = {row["document"] for row in train} & {row["document"] for row in held_out}
    if straddling:
        raise SystemExit(f"documents on both sides: {sorted(straddling)[:3]}")
    return train, held_out


def as_text(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows as running text: what a party has that knows the field and form of the client's text, not the text."""
    for row in rows:
        yield {"text": f"{row['prompt']}{row['completion']}", "document": row["document"]}


def whole_documents(rows: list[Row], num_rows: int, purpose: str) -> list[Row]:
    """At least `num_rows` rows: whole documents in the order of their hash, rows in their own order."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[str(row["document"])] = counts.get(str(row["document"]), 0) + 1
    chosen: set[str] = set()
    for document in sorted(counts, key=lambda name: draw(name, purpose)):
        if sum(counts[name] for name in chosen) >= num_rows:
            break
        chosen.add(document)
    return [row for row in rows if row["document"] in chosen]


# --- web text and multiple choice


def web_rows(sources: Path) -> Iterator[Row]:
    for name in ("openwebtext-1k", "c4-demo"):
        for number, row in enumerate(read_rows(sources / name / "train.jsonl.gz")):
            if "\ufffd" not in row["text"]:
                yield {"text": row["text"].strip(), "document": f"{name}-{number:04d}"}
    for number, line in enumerate(read_lines(sources / "wiki-demo/train.txt.gz")):
        if line.strip():
            yield {"text": line.strip(), "document": f"wiki-demo-{number:02d}"}


def abstract_rows(path: Path) -> Iterator[Row]:
    """PubMedQA's abstracts, each after its question, with the conclusion that its authors drew."""
    for number, row in sorted(json.loads("".join(read_lines(path))).items()):
        text = " ".join([row["QUESTION"], *row["CONTEXTS"], row["LONG_ANSWER"]])
        yield {"text": " ".join(text.split()), "document": f"pubmed-{number}"}


def choice_rows(path: Path) -> Iterator[Row]:
    """Question, choices, answer (an index) of ARC, OpenBookQA or PIQA rows."""
    for row in read_rows(path):
        if "goal" in row:
            yield {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], "answer": row["label"]}
        else:
            question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            yield {"question": question, "choices": row["choices"], "answer": row["gold"]}


def answer_rows(path: Path) -> Iterator[Row]:
    """Question and all its right answers, of WebQuestions rows."""
    for row in json.loads("".join(read_lines(path))):
        yield {"question": row["qText"], "answers": row["answers"]}


def intent_rows(path: Path) -> Iterator[Row]:
    """Text and label of Banking77's rows, each text once."""
    seen: set[str] = set()
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].split())
            if text not in seen:
                seen.add(text)
                yield {"text": text, "label": row["category"]}


def pair_rows(rows: Iterable[Row], asked: set[str]) -> Iterator[Row]:
    """Prompt, right and wrong answer of questions with two choices, but for those that are asked elsewhere."""
    for number, row in enumerate(rows):
        if row["question"] not in asked:
            answer: int = row["answer"]  # type: ignore[assignment]
            right, wrong = (row["choices"][place].strip() for place in (answer, 1 - answer))  # type: ignore[index]
            prompt = f"Question: {row['question']}\nAnswer:"
            if right != wrong:
                yield {"prompt": prompt, "chosen": f" {right}", "rejected": f" {wrong}", "document": f"{number:05d}"}


def tuning_rows(rows: Iterable[Row], asked: set[str]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if row["question"] not in asked:
            answer = row["choices"][row["answer"]] if "choices" in row else row["answers"][0]  # type: ignore[index]
            completion = f" {answer.strip()}"
            prompt = f"Question: {row['question']}\nAnswer:"
            yield {"prompt": prompt, "completion": completion, "document": f"{number:05d}"}


# --- the two sets of files


def write_bundled(sources: Path, out: Path) -> None:
    public = list(wiki_rows(articles(read_lines(sources / "wikitext-2/train.txt.gz")), "wikitext-2-train"))
    public.sort(key=lambda row: draw(str(row["document"]), "public"))
    write_rows(out / "public.jsonl.gz", public[:NUM_PUBLIC_ARTICLES])
    train, held_out = medquad_rows(sources / "medquad/all.jsonl.gz")
    write_rows(out / "private.jsonl.gz", whole_documents(train, NUM_PRIVATE_ROWS, "private"))
    write_rows(out / "heldout.jsonl.gz", whole_documents(held_out, NUM_HELDOUT_ROWS, "heldout"))


def write_full(sources: Path, out: Path) -> None:
    for split, name in (("train", "public_wiki"), ("valid", "wikitext_valid")):
        found = articles(read_lines(sources / f"wikitext-2/{split}.txt.gz"))
        write_rows(out / f"{name}.jsonl.gz", wiki_rows(found, f"wikitext-2-{split}"))
    found = raw_articles(read_lines(sources / "wikitext-2/raw/wiki.test.raw.gz"))
    write_rows(out / "wikitext_test.jsonl.gz", wiki_rows(found, "wikitext-2-test"))
    write_rows(out / "public_web.jsonl.gz", web_rows(sources))
    write_rows(out / "public_medical.jsonl.gz", abstract_rows(sources / "pubmedqa/ori_pqal.json.gz"))
    train, held_out = medquad_rows(sources / "medquad/all.jsonl.gz")
    write_rows(out / "medquad_train.jsonl.gz", train)
    private = {row["document"] for row in whole_documents(train, NUM_PRIVATE_ROWS, "private")}
    others = [row for row in train if row["document"] not in private]
    write_rows(out / "public_medquad.jsonl.gz", as_text(others))
    write_rows(out / "medquad_heldout.jsonl.gz", held_out)
    for name, split in (
        ("arc_easy", "test"),
        ("arc_challenge", "test"),
        ("piqa", "validation"),
        ("openbookqa", "test"),
    ):
        questions = list(choice_rows(sources / name / f"{split}.jsonl.gz"))
        write_questions(name, questions, choice_rows(sources / name / "train.jsonl.gz"), out)
    write_pairs(sources, out)
    write_parts(sources / "piqa", out)
    write_intents(sources / "banking77", out)
    questions = list(answer_rows(sources / "webquestions/test.json.gz"))
    parts = (answer_rows(sources / f"webquestions/{split}.json.gz") for split in ("trainmodel", "val", "devtest"))
    write_questions("webquestions", questions, chain.from_iterable(parts), out)


def ten_intents_rows(path: Path) -> Iterator[Row]:
    """What a customer wrote and its intent in plain words, of the ten intents."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in INTENTS:
                yield {"question": " ".join(row["text"].split()), "answer": row["category"].replace("_", " ")}


def dialogue_rows(path: Path) -> Iterator[Row]:
    """A short dialogue, the section of the note that it is for, and what stands there."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            lines = [" ".join(line.split()) for line in row["dialogue"].splitlines()]
            dialogue, summary = "\n".join(line for line in lines if line), " ".join(row["section_text"].split())
            is_short = len(dialogue) <= DIALOGUE_CHARACTERS
            if row["section_header"] in SECTIONS and is_short and within(len(summary), SUMMARY_CHARACTERS):
                yield {"dialogue": dialogue, "section": SECTIONS[row["section_header"]], "answer": summary}


def within(number: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= number <= limits[1]


def question_rows(path: Path) -> Iterator[Row]:
    """Question, choices and the right one as text, where no choice is there twice."""
    for row in choice_rows(path):
        choices = [choice.strip() for choice in row["choices"]]  # type: ignore[attr-defined]
        if len(set(choices)) == len(choices):
            yield {"question": row["question"], "choices": choices, "answer": choices[row["answer"]]}  # type: ignore[index]


def write_tasks(sources: Path, out: Path) -> None:
    """Rows of the tasks under ``examples/tasks``: ``task_NAME_train``, and up to 300 in ``task_NAME_eval``, by hash."""
    intents, dialogues, questions = sources / "banking77", sources / "mts-dialog/MTS-Dialog", sources / "arc_easy"
    found = {
        "intents": (ten_intents_rows(intents / "train.csv.gz"), ten_intents_rows(intents / "test.csv.gz")),
        "science": (question_rows(questions / "train.jsonl.gz"), question_rows(questions / "test.jsonl.gz")),
        "summaries": (
            dialogue_rows(Path(f"{dialogues}-TrainingSet.csv.gz")),
            chain(
                dialogue_rows(Path(f"{dialogues}-TestSet-1-MEDIQA-Chat-2023.csv.gz")),
                dialogue_rows(Path(f"{dialogues}-TestSet-2-MEDIQA-Sum-2023.csv.gz")),
            ),
        ),
    }
    for name, (training, asked) in found.items():
        held = {json.dumps(row): row for row in asked}
        inputs = {json.dumps({**row, "answer": ""}) for row in held.values()}
        kept = {json.dumps(row): row for row in training if json.dumps({**row, "answer": ""}) not in inputs}
        ordered = sorted(held, key=lambda text: draw(text, f"task-{name}"))
        write_rows(out / f"task_{name}_train.jsonl.gz", kept.values())
        write_rows(out / f"task_{name}_eval.jsonl.gz", [held[text] for text in ordered[:NUM_QUESTIONS]])


def write_pairs(sources: Path, out: Path) -> None:
    """PIQA's right and wrong solutions: pairs to tune on, and the questions of ``piqa_more`` as pairs."""
    questions = sorted(
        choice_rows(sources / "piqa/validation.jsonl.gz"), key=lambda row: draw(str(row["question"]), "piqa")
    )
    asked = {str(row["question"]) for row in questions}
    write_rows(out / "piqa_pairs_train.jsonl.gz", pair_rows(choice_rows(sources / "piqa/train.jsonl.gz"), asked))
    write_rows(out / "piqa_pairs_heldout.jsonl.gz", pair_rows(questions[:NUM_MORE_QUESTIONS], set()))


def write_parts(sources: Path, out: Path) -> None:
    """PIQA as an owner and a client meet it: rows of a client, other rows as public text, and held-out answers."""
    questions = sorted(choice_rows(sources / "validation.jsonl.gz"), key=lambda row: draw(str(row["question"]), "piqa"))
    asked = {str(row["question"]) for row in questions}
    rows = list(tuning_rows(choice_rows(sources / "train.jsonl.gz"), asked))
    is_client = [draw(str(row["prompt"]), "piqa-client") < CLIENT_SHARE for row in rows]
    write_rows(out / "piqa_client.jsonl.gz", (row for row, own in zip(rows, is_client, strict=True) if own))
    others = [row for row, own in zip(rows, is_client, strict=True) if not own]
    write_rows(out / "public_piqa.jsonl.gz", as_text(others))
    write_rows(out / "piqa_heldout.jsonl.gz", tuning_rows(questions[:NUM_MORE_QUESTIONS], set()))


def write_intents(sources: Path, out: Path) -> None:
    """Banking77's two splits, in the order of a hash; texts of the test split are not trained on."""
    held_out = sorted(intent_rows(sources / "test.csv.gz"), key=lambda row: draw(str(row["text"]), "banking77"))
    asked = {row["text"] for row in held_out}
    train = sorted(intent_rows(sources / "train.csv.gz"), key=lambda row: draw(str(row["text"]), "banking77"))
    write_rows(out / "banking77_train.jsonl.gz", (row for row in train if row["text"] not in asked))
    write_rows(out / "banking77_heldout.jsonl.gz", held_out)


def write_questions(name: str, questions: list[Row], training: Iterable[Row], out: Path) -> None:
    """Questions chosen by hash are in ``NAME_eval``, more in that order in ``NAME_more``; rows in ``NAME_train``."""
    questions.sort(key=lambda row: draw(str(row["question"]), name))
    write_rows(out / f"{name}_eval.jsonl.gz", questions[:NUM_QUESTIONS])
    write_rows(out / f"{name}_more.jsonl.gz", questions[:NUM_MORE_QUESTIONS])
    write_rows(out / f"{name}_train.jsonl.gz", tuning_rows(training, {str(row["question"]) for row in questions}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder of the published data sets")
    parser.add_argument("--bundled", type=Path, metavar="OUT", help="write public, private and heldout here")
    parser.add_argument("--full", type=Path, metavar="OUT", help="write the benchmarks' files here")
    parser.add_argument("--tasks", type=Path, metavar="OUT", help="write the rows of examples/tasks here")
    arguments = parser.parse_args()
    if not (arguments.bundled or arguments.full or arguments.tasks):
        parser.error("give --bundled OUT, --full OUT, --tasks OUT, or several of them")
    print("| file | rows | bytes | sha256 |\n| --- | --- | --- | --- |")
    if arguments.bundled:
        write_bundled(arguments.sources, arguments.bundled)
    if arguments.full:
        write_full(arguments.sources, arguments.full)
    if arguments.tasks:
        write_tasks(arguments.sources, arguments.tasks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
