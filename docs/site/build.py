"""The documentation as a site: ``python docs/site/build.py OUT``. A link of a page that leads nowhere fails.

The pages stay where they are, and are read there as well as here. What is built from them: an address for each, the
settings of every verb, written from their declarations, and at a page's first use of a word of ``docs/glossary.md`` a
link to it. The site asks no other host for anything.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from offsite.cli import _resolve  # noqa: E402
from offsite.commands.settings import needed, panels  # noqa: E402
from offsite.commands.verbs import PARTIES, VERBS  # noqa: E402

HOME, GLOSSARY = "docs/site/index.md", "docs/glossary.md"
ALONE = {HOME: "index.md", "README.md": "start.md"}
"""Pages that have another place on the site than in the repository."""

WRITTEN = {"docs/decisions": "decisions/index.md", "offsite/commands/verbs.py": "reference/index.md"}
"""What a page on the site is written from; a link to it leads to that page."""

NAV = {
    "Start": ["start.md"],  # under another name than its own, which is the site's
    "Walk-throughs": ["client.md", "owner.md", "auditor.md", "federation.md", "tasks.md"],
    "How to": ["serving.md", "deploy.md", "flower.md", "python.md"],
    "Look up": ["reference/index.md", "kinds.md", "glossary.md", "format.md", "CHANGELOG.md"],
    "Why": ["SECURITY.md", "security.md", "privacy.md", "results.md", "architecture.md", "decisions/index.md"],
}
LIMIT_BYTES = 2_000_000
"""Files that pages link to are copied, up to this size."""

_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_TERM = re.compile(r"^\*\*([^*]+)\*\*:", re.MULTILINE)


class BrokenLinksError(Exception):
    """Links of pages that lead to nothing in the repository."""


def main() -> int:
    """Build the site into a folder that is new, or was built before."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path, help="folder for the site")
    out = options.parse_args().out.resolve()
    if out.exists() and not (out / "sitemap.xml").is_file():
        print(f"build: {out.name} is there and is no site: name a new folder", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        stage = Path(place)
        try:
            titles = write_pages(stage / "pages")
        except BrokenLinksError as error:
            print(error, file=sys.stderr)
            return 1
        (stage / "mkdocs.yml").write_text(json.dumps(settings(titles)), encoding="utf-8")
        # a process of its own, since it ends the one it is in; its word for a broken page is a warning, which is fatal
        done = subprocess.run(
            [sys.executable, "-m", "zensical", "build", "--clean", "--strict"],
            cwd=stage,
            text=True,
            capture_output=True,
        )
        if done.returncode:
            print(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr), file=sys.stderr)
            return 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stage / "site", out)
    print(json.dumps({"site": out.name, "pages": len(titles)}))
    return 0


def settings(titles: dict[str, str]) -> dict[str, object]:
    """Return the site's settings: no fonts, no other host, and one list of pages."""
    named = {**titles, "start.md": "What it is, in two commands"}
    return {
        "site_name": "offsite",
        "docs_dir": "pages",
        "theme": {"font": False, "variant": "classic", "features": ["navigation.sections", "toc.follow"]},
        "nav": [
            {"Home": "index.md"},
            *({group: [{named[one]: one} for one in ones]} for group, ones in NAV.items()),
        ],
        "markdown_extensions": [
            "attr_list",
            "tables",
            "admonition",
            "pymdownx.superfences",
            {"toc": {"permalink": True}},
        ],
        "extra": {"generator": False},
    }


def write_pages(pages: Path) -> dict[str, str]:
    """Every page and every file that one links to stands in the folder. Returns the pages' titles by place.

    Raises:
        BrokenLinksError: with every link that leads nowhere, one a line.
    """
    sources = {ALONE.get(one, one.removeprefix("docs/")): one for one in sorted(_sources())}
    made = {f"docs/{place}": text for place, text in (*reference(), decisions())}
    broken: list[str] = []
    terms = glossary()
    texts = {place: (source, (ROOT / source).read_text(encoding="utf-8")) for place, source in sources.items()}
    texts |= {source.removeprefix("docs/"): (source, text) for source, text in made.items()}
    known = {source for source, _ in texts.values()}
    copied: set[str] = set()
    for place, (source, text) in texts.items():
        text = text.replace("```mermaid", "```text")  # drawing them would take a script from another host
        found = _rewritten(text, source, place, known, copied, broken)
        if source == GLOSSARY:
            found = _as_anchors(found)
        elif source != HOME:
            found = _with_words(found, place, terms)
        (pages / place).parent.mkdir(parents=True, exist_ok=True)
        (pages / place).write_text(found, encoding="utf-8")
    for name in sorted(copied):
        target = pages / name.removeprefix("docs/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    if broken:
        raise BrokenLinksError("\n".join(broken))
    return {place: _title(text) for place, (_, text) in texts.items()}


def _sources() -> Iterator[str]:
    """Yield the pages of the repository that are on the site."""
    yield from ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "AGENTS.md")
    for folder in ("docs", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.md"):
            name = path.relative_to(ROOT).as_posix()
            if not any(part in ("scratch", "node_modules") for part in path.parts):
                yield name


def reference() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of a page for every verb, made of its settings' declarations, and of their list."""
    listed: dict[str, list[str]] = {party: [] for party in PARTIES}
    for name, verb in VERBS.items():
        place = f"{name.replace(' ', '-')}.md"
        listed[verb.party].append(f"- [`{name}`]({place}): {verb.summary}")
        cls = _resolve(verb.settings)
        lines = [f"# offsite {name}", "", f"{verb.summary.capitalize()}.", "", "```text"]
        lines += [" ".join(["offsite", name, *needed(cls), "[OPTION | KEY=VALUE]..."]), "```", ""]
        for panel, rows in panels(cls).items():
            lines += [f"## {panel}", "", "| setting | what it is |", "| --- | --- |"]
            lines += [f"| `{_cell(typed)}` | {_cell(_escaped(told))} |" for typed, told in rows] + [""]
        yield f"reference/{place}", "\n".join(lines)
    told = ["# Every verb", "", "Written from the verbs' own declarations; `offsite VERB --help` says the same.", ""]
    for party, ones in listed.items():
        told += [f"## {party}", "", *ones, ""] if ones else []
    yield "reference/index.md", "\n".join(told)


def decisions() -> tuple[str, str]:
    """Return (place, text) of the list of decisions."""
    lines = ["# Decisions", "", "Choices for which something else was rejected, and why.", ""]
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        lines.append(f"- [{_title(path.read_text(encoding='utf-8'))}]({path.name})")
    return "decisions/index.md", "\n".join(lines) + "\n"


def glossary() -> dict[str, str]:
    """Return the anchors of the words that are explained, longest word first."""
    names = _TERM.findall((ROOT / GLOSSARY).read_text(encoding="utf-8"))
    return {name: _anchor(name) for name in sorted(names, key=len, reverse=True)}


def _rewritten(text: str, source: str, place: str, known: set[str], copied: set[str], broken: list[str]) -> str:
    """Return the text with its links as they lead on the site; what they lead to is noted, or that it is nothing."""

    def follow(match: re.Match[str]) -> str:
        words, address = match.groups()
        if re.match(r"[a-z]+:", address) or address.startswith("#"):
            return match.group()
        path, _, anchor = address.partition("#")
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if f"{name}/README.md" in known:
            name = f"{name}/README.md"
        if name in WRITTEN:
            target = WRITTEN[name]
        elif name in known:
            target = ALONE.get(name, name.removeprefix("docs/"))
        elif (ROOT / name).is_file() and (ROOT / name).stat().st_size <= LIMIT_BYTES:
            copied.add(name)
            target = name.removeprefix("docs/")
        elif (ROOT / name).is_dir():  # of code: there is no page to show
            return f"{words[1:-1]}"
        else:
            broken.append(f"{source}: the link to {address} leads nowhere")
            return match.group()
        relative = posixpath.relpath(target, posixpath.dirname(place) or ".")
        return f"{words}({relative}{'#' + anchor if anchor else ''})"

    return _outside_code(text, lambda prose: _LINK.sub(follow, prose))


def _with_words(text: str, place: str, terms: dict[str, str]) -> str:
    """Return the text with a link to the glossary at the first use of each of its words in running text."""
    address = posixpath.relpath("glossary.md", posixpath.dirname(place) or ".")
    left = dict(terms)
    lines, is_code = [], False
    for line in text.split("\n"):
        is_code ^= line.startswith("```")
        if not is_code and not re.match(r"[#|<`\s]", line):
            line = _linked(line, left, address)
        lines.append(line)
    return "\n".join(lines)


def _linked(line: str, left: dict[str, str], address: str) -> str:
    for word in list(left):
        pieces = re.split(r"(`[^`]*`|!?\[[^\]]*\](?:\([^)]*\))?|<[^>]*>)", line)
        for number in range(0, len(pieces), 2):  # what is no code, link or tag
            found = re.search(rf"\b{re.escape(word)}(?:s|ed)?\b", pieces[number], re.IGNORECASE)
            if found:
                begin, end = found.span()
                linked = f"[{found.group()}]({address}#{left.pop(word)})"
                pieces[number] = pieces[number][:begin] + linked + pieces[number][end:]
                break
        line = "".join(pieces)
    return line


def _as_anchors(text: str) -> str:
    return _TERM.sub(lambda match: f"**{match.group(1)}**{{ #{_anchor(match.group(1))} }}:", text)


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    parts, last = [], 0
    for match in _CODE.finditer(text):
        parts += [change(text[last : match.start()]), match.group()]
        last = match.end()
    return "".join([*parts, change(text[last:])])


def _title(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ").replace("`", "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _escaped(text: str) -> str:
    return re.sub(r"([<*_\[])", r"\\\1", text)


if __name__ == "__main__":
    sys.exit(main())
