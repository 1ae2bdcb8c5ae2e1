"""``offsite generate``: answers of a client's emulator with its adapter, or of an owner's full or adapted model.

Which party's code opens a folder follows from what lies in it, by a table of names that are looked up when they are
called, as of verbs. What is written is shown on stderr while it is; the result has the answers to `--prompt`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.console import progress, say, say_piece
from offsite.digests import model_digest, sha256_files
from offsite.errors import ConfigError
from offsite.folders import kind_of
from offsite.generation.asked import Asked, ids_of, in_files, in_words
from offsite.generation.config import GenerateConfig
from offsite.generation.generate import Piece, context_length, end_of_turn_tokens, end_tokens, generate
from offsite.generation.kept import Kept
from offsite.generation.sampling import Settings
from offsite.modelling.load import is_seq2seq_name, load_model, load_tokenizer, refuse_encoder, require_weights
from offsite.modelling.steps import cache_is_right
from offsite.seq2seq.models import is_seq2seq
from offsite.staging import refuse_existing
from offsite.training.devices import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE, _ADAPTED = "client.tuning.tune:load_writer", "server.plugging.adapted:load_writer"
_OTHERS = "other prompts, another model or other settings"
_SETTINGS = ("chat", "max_tokens", "temperature", "top_p", "stop", "seed", "fields")


@dataclass(frozen=True)
class Writer:
    """A model that is asked, its tokenizer, and the digest of what it was opened from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str

    @property
    def is_pair(self) -> bool:
        """Whether it is an encoder-decoder, whose answer is a text of its own."""
        return is_seq2seq(self.model)


@dataclass(frozen=True)
class _Written:
    """An answer: its text, how many tokens it took, and how it ended."""

    text: str
    num_tokens: int
    finish: str

    def told(self) -> dict[str, object]:
        return {"text": self.text, "num_tokens": self.num_tokens, "finish": self.finish}


def run(config: GenerateConfig) -> dict[str, object]:
    """Carry out ``offsite generate``: read what is asked, open the model, answer.

    Killed and called again, answers to a file go on from those that there are.

    Raises:
        ConfigError, DataError: when settings, prompts or the model are not as needed.
        ArtefactError: when a package, bundle or adapted folder is rejected.
        RunFailed: when the model's output is not finite, or the disk is full.
    """
    if config.output is not None:
        refuse_existing(config.output)
    if config.prompt:
        asked = in_words(config.prompt, chat=config.chat)
    else:
        asked = in_files(config.file, config.fields, chat=config.chat)
    writer = _opened(config)
    prompts = [ids_of(one, writer.tokenizer, is_read=writer.is_pair) for one in asked]
    settings = _settings(config, writer, asked, prompts)
    answering = _Answering(writer, any(one.messages for one in asked))
    began = time.monotonic()
    if config.output is None:
        answers = [
            _shown(answering.pieces(*one), of) for one, of in zip(_rows(prompts, settings, asked), asked, strict=True)
        ]
        found: dict[str, Any] = {"answers": [one.told() for one in answers]}
        num_tokens = sum(one.num_tokens for one in answers)
    else:
        found, num_tokens = _kept(config, config.output, writer, answering, asked, prompts, settings)
    seconds = time.monotonic() - began
    return {
        **found,
        "model": Path(config.model).name,
        "num_prompts": len(asked),
        "num_prompt_tokens": sum(map(len, prompts)),
        "num_tokens": num_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(num_tokens / max(seconds, 1e-9), 1),
    }


class _Answering:
    """Answers of one model; whether its cache can be believed is tried once."""

    def __init__(self, writer: Writer, is_chat: bool) -> None:
        self._writer = writer
        self._ends = end_tokens(writer.model, writer.tokenizer)
        self._turns = end_of_turn_tokens(writer.tokenizer) if is_chat else frozenset()
        self._cached = cache_is_right(writer.model)

    def pieces(self, prompt: Sequence[int], settings: Settings, is_chat: bool) -> Iterator[Piece]:
        """Yield an answer as it is written."""
        ends = self._ends | self._turns if is_chat else self._ends
        model, tokenizer = self._writer.model, self._writer.tokenizer
        continues = not is_chat and not self._writer.is_pair
        return generate(model, tokenizer, prompt, settings, end_ids=ends, continues=continues, cached=self._cached)


def _rows(
    prompts: Sequence[Sequence[int]], settings: Sequence[Settings], asked: Sequence[Asked]
) -> Iterator[tuple[Sequence[int], Settings, bool]]:
    for ids, one, of in zip(prompts, settings, asked, strict=True):
        yield ids, one, bool(of.messages)


def _shown(pieces: Iterator[Piece], of: Asked) -> _Written:
    """Return an answer that was shown while it was written."""
    say(f"{of.place}:")
    found = _written(pieces, shown=True)
    say("")
    return found


def _written(pieces: Iterator[Piece], *, shown: bool) -> _Written:
    texts, finish = [], ""
    for piece in pieces:
        texts.append(piece.text)
        finish = piece.finish or finish
        if shown:
            say_piece(piece.text)
    return _Written("".join(texts), len(texts), finish)


def _kept(
    config: GenerateConfig,
    output: Path,
    writer: Writer,
    answering: _Answering,
    asked: Sequence[Asked],
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Settings],
) -> tuple[dict[str, Any], int]:
    """Return what is told of answers that stand at `output`, and how many tokens were written just now."""
    digest = writer.digest or model_digest(writer.model)
    bound = {"model": digest, "data": sha256_files(config.file), "device": choose_device(config.device).type}
    kept = Kept(
        output.with_name(f"{output.name}.work"),
        bound | config.model_dump(mode="json", include={*_SETTINGS}),
        of=_OTHERS,
    )
    first, num_tokens = len(kept.lines), 0
    if first:
        say(f"going on after {first} of {len(asked)} answers")
    with progress(len(asked), "generate", start=first) as bar:
        for number, row in enumerate(_rows(prompts, settings, asked)):
            if number < first:
                continue
            answer = _written(answering.pieces(*row), shown=False)
            kept.add({**asked[number].told(), **answer.told()})
            num_tokens += answer.num_tokens
            bar.update(number + 1)
    kept.finish(output)
    return {"output": output.name, "num_resumed": first}, num_tokens


def _settings(
    config: GenerateConfig, writer: Writer, asked: Sequence[Asked], prompts: Sequence[Sequence[int]]
) -> list[Settings]:
    """Return how each answer is drawn: with a seed of its own, so that it does not depend on those before.

    Raises:
        ConfigError: when a prompt leaves no room for an answer.
    """
    context = context_length(writer.model, writer.tokenizer)
    found = []
    for number, (one, ids) in enumerate(zip(asked, prompts, strict=True)):
        room, told = context - len(ids), f"the model's context is {context}"
        if writer.is_pair:  # either text has a context of its own
            room = context if len(ids) <= context else 0
        if room < 1:
            raise ConfigError(
                f"{one.place}: {len(ids)} tokens, {told}{'' if writer.is_pair else ', an answer included'}"
            )
        found.append(
            Settings(
                limit_tokens=min(config.max_tokens, room),
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed + number,
                stop=config.stop,
            )
        )
    return found


def _opened(config: GenerateConfig) -> Writer:
    """Return the model that these settings name, on its device; the digest of a plain model is left for later.

    Raises:
        ConfigError: when the folder holds something else, or a bundle is given for what is no package.
        UnsupportedModel: when it writes no text.
        ArtefactError: when package, bundle or adapted folder is rejected.
    """
    device, path = choose_device(config.device), Path(config.model)
    kind = kind_of(path) if path.is_dir() else None
    if kind == "a package":
        return Writer(*_named(_PACKAGE)(path, config.bundle, device))
    if config.bundle is not None:
        raise ConfigError(
            f"--bundle: {path.name!r} is no package; an owner's model is asked with the adapter plugged in",
            hint="offsite plug-in, then offsite generate ADAPTED",
        )
    if kind == "an adapted folder":
        return Writer(*_named(_ADAPTED)(path, config.base, device.type))
    if kind not in (None, "a model"):
        raise ConfigError(
            f"{path.name!r} is {kind}; expected a package, a model or an adapted folder",
            hint="offsite generate PACKAGE --bundle BUNDLE asks a package with a bundle's adapter"
            if kind == "a bundle"
            else None,
        )
    if not is_seq2seq_name(config.model):
        refuse_encoder(config.model)
    require_weights(config.model)
    model = load_model(config.model, device=device.type, seq2seq=True)
    return Writer(model, load_tokenizer(config.model), "")


def _named(spec: str) -> Any:
    """Return the function that a party's module has under this name."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)
