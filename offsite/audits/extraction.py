"""What can be read back out of a causal language model: secrets from their prefixes, rows from their beginnings.

Nothing of what is found is returned, shown or kept: only how often, and how far secrets stand out.

Source: exposure, arXiv:1802.08232; verbatim continuation, arXiv:2202.07646.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offsite.audits.canaries import CanarySet, Secret, candidates_of
from offsite.audits.scores import Floats, score_rows
from offsite.audits.statistics import exposure, rank_of
from offsite.errors import ConfigError, DataError
from offsite.evaluation.sampling import Precision, continuations
from offsite.modelling.context import context_of
from offsite.text.batches import IGNORED, Example, encode, pad_id
from offsite.text.calls import decoded
from offsite.text.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOP_K = 40
_LONGEST_SECRET_TOKENS = 1024
_SLACK_TOKENS = 2  # another spelling of the same words may take more

Told = Callable[[int, int], None]


class Extracted(NamedTuple):
    """Of so many secrets, how many came back greedily and in any of `num_samples` draws among the likeliest tokens."""

    num_secrets: int
    num_greedy: int
    num_top_k: int
    num_samples: int


def extracted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    secrets: Sequence[Secret],
    *,
    num_samples: int,
    top_k: int = TOP_K,
    seed: int = 0,
    batch_size: int = 32,
    precision: Precision = "fp32",
    progress: Told | None = None,
) -> Extracted:
    """Return how many of the secrets the model says when it is given their prefixes.

    A secret is found when the words that follow its prefix are the secret's, whatever comes after them.

    Args:
        num_samples: draws for each secret at temperature 1; 0 for none.
        seed: of the draws, which need not be secret.
        progress: called with prompts done and prompts in all.

    Raises:
        ConfigError: when a number is out of range.
        DataError: when a secret is longer than the model's context.
        RunFailed: when the model's output is not finite.
    """
    if not secrets:
        return Extracted(0, 0, 0, num_samples)
    examples = secret_examples(tokenizer, [(secret.prefix, secret.secret) for secret in secrets])
    prompts = [_prompt(example) for example in examples]
    num_tokens = max(example.num_loss_tokens for example in examples) + _SLACK_TOKENS
    require_context(model, max(len(prompt) for prompt in prompts) + num_tokens, "a secret")
    total = len(prompts) * (1 + num_samples)

    def found(draws: int, **settings: float | int) -> int:
        asked = [(row, prompt) for row, prompt in enumerate(prompts) for _ in range(draws)]
        before = 0 if not settings else len(prompts)
        answers = continuations(
            model,
            [prompt for _, prompt in asked],
            num_tokens=num_tokens,
            batch_size=batch_size,
            precision=precision,
            progress=None if progress is None else lambda done, _: progress(before + done, total),
            **settings,  # type: ignore[arg-type]
        )
        pairs = zip(asked, answers, strict=True)
        return len({row for (row, _), ids in pairs if _says(tokenizer, ids, secrets[row].secret)})

    num_greedy = found(1)
    num_drawn = found(num_samples, temperature=1.0, top_k=top_k, seed=seed) if num_samples else 0
    return Extracted(len(secrets), num_greedy, num_drawn, num_samples)


def verbatim(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    prefix_tokens: int,
    continuation_tokens: int,
    batch_size: int = 32,
    precision: Precision = "fp32",
    progress: Told | None = None,
) -> NDArray[np.bool_]:
    """Return, of each row long enough, whether greedy continuation of its beginning is the row, token for token.

    Args:
        prefix_tokens: that the model is given, from the row's first.
        continuation_tokens: that must come back.

    Returns:
        (rows of at least `prefix_tokens + continuation_tokens`,) bool, in the rows' order. Which rows these are does
        not depend on the model.

    Raises:
        ConfigError: when a number is not positive.
        RunFailed: when the model's output is not finite.
    """
    if prefix_tokens < 1 or continuation_tokens < 1:
        raise ConfigError(
            f"beginnings of {prefix_tokens} tokens, continuations of {continuation_tokens}, expected at least 1 of both"
        )
    whole = prefix_tokens + continuation_tokens
    rows = [example.input_ids[:whole] for example in examples if len(example.input_ids) >= whole]
    answers = continuations(
        model,
        [row[:prefix_tokens] for row in rows],
        num_tokens=continuation_tokens,
        batch_size=batch_size,
        precision=precision,
        progress=progress,
    )
    return np.array([row[prefix_tokens:] == ids for row, ids in zip(rows, answers, strict=True)], dtype=np.bool_)


def exposures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    canaries: CanarySet,
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    progress: Told | None = None,
) -> Floats:
    """Return the bits of exposure of every secret that was trained on: (secrets,) float64, in their order.

    Secrets are ranked among their candidates by the loss of all their tokens, given the prefix. A secret that was not
    learned has log2(e) bits on average, 1.44.

    Args:
        progress: called with candidates done and candidates in all.

    Raises:
        DataError: when a secret is longer than the model's context.
        RunFailed: when a loss is not finite.
    """
    planted = canaries.planted
    bits = np.zeros(len(planted))
    for number, secret in enumerate(planted):
        spellings = [secret.secret, *candidates_of(canaries, secret)]
        examples = secret_examples(tokenizer, [(secret.prefix, spelling) for spelling in spellings])
        require_context(model, max(len(example.input_ids) for example in examples), "a secret")
        found = score_rows(
            model,
            examples,
            batch_size=batch_size,
            pad_id=pad_id(tokenizer),
            limit_tokens=_LONGEST_SECRET_TOKENS,
            precision=precision,
        )
        scores = -found.loss * found.num_tokens
        bits[number] = exposure(rank_of(scores[0], scores[1:]), len(spellings))
        if progress is not None:
            progress((number + 1) * len(spellings), len(planted) * len(spellings))
    return bits


def secret_examples(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """Return (prefix, secret) as rows in which the secret's tokens count and no end of sequence follows.

    Raises:
        DataError: when a secret's tokens cannot be told from its prefix's.
    """
    records = [
        Record(((prefix, False), (f" {secret}", True)), "", number, place=f"secret {number}")
        for number, (prefix, secret) in enumerate(pairs, 1)
    ]
    examples = encode(records, tokenizer, context=_LONGEST_SECRET_TOKENS, on_long="error").examples
    made = [_open_ended(one) for one in examples]
    if len(made) != len(pairs) or any(not one.num_loss_tokens or not _prompt(one) for one in made):
        raise DataError("a secret has no token of its own behind its prefix")
    return made


def require_context(model: PreTrainedModel, num_tokens: int, what: str) -> None:
    """Return only if the model can read so many tokens.

    Raises:
        DataError: when its context is shorter.
    """
    context = context_of(model)
    if context is not None and num_tokens > context:
        raise DataError(f"{what} takes {num_tokens} tokens, the model's context is {context}")


def _prompt(example: Example) -> list[int]:
    first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    return example.input_ids[:first]


def _open_ended(example: Example) -> Example:
    """Return the row without its end of sequence, and without what the tokenizer closed it with before that."""
    end = len(example.labels) - 1
    while end and example.labels[end - 1] == IGNORED:
        end -= 1
    return Example(example.input_ids[:end], example.labels[:end])


def _says(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], secret: str) -> bool:
    text = decoded(tokenizer, ids, what="a text that its model made up", skip_special=False).lstrip()
    return text.startswith(secret) and not text[len(secret) : len(secret) + 1].isalpha()
