"""``offsite canaries``: make up rows that anybody may see, throw a coin for each, and commit to them before tuning.

The texts are made up by the package's model, at a temperature at which it says what nobody wrote: no text of the
client's is in them. Coins, words and nonce are read from the operating system; no seed leads to them.

Source: canaries of a model at high temperature, arXiv:2606.10481.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from client.audit.canaryconfig import CanaryConfig
from client.tuning.ready import job_for
from offsite.artefacts.package import open_package
from offsite.audits.canaries import (
    COMMITMENT_FOLDER,
    REVEAL_FOLDER,
    SECRET_WORDS,
    CanarySet,
    CanaryText,
    Secret,
    words_of,
    write_canaries,
)
from offsite.audits.extraction import require_context
from offsite.audits.gates import MIN_CANARIES
from offsite.console import PLAYED, progress, say
from offsite.errors import RunFailed
from offsite.evaluation.sampling import continuations
from offsite.staging import refuse_existing
from offsite.text.calls import decoded, encoded
from offsite.training.devices import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_ROUNDS = 20
_FEWEST_SHARE = 4  # a text has at least a quarter of the tokens asked for
_MADE_UP = "a text that its model made up"
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def run(config: CanaryConfig) -> dict[str, object]:
    """Run the verb: open the package, make up texts and secrets, throw coins, write the folder.

    Raises:
        ConfigError: when the output exists.
        ArtefactError: when the package is unsound, or the job is another package's.
        DataError: when the texts are longer than the model's context.
        RunFailed: when the model does not make up enough different texts, or the disk is full.
    """
    refuse_existing(config.output)
    package = open_package(config.package)
    package.require_text("canaries")
    job_id = None if config.job is None else job_for(config.job, package).job_id
    model = package.load_model(device=str(choose_device(config.device)))
    texts = made_up(
        model,
        package.load_tokenizer(),
        count=config.count,
        tokens=config.tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
    )
    canaries = CanarySet(
        nonce=os.urandom(32).hex(),
        package_digest=package.digest,
        job_id=job_id,
        tokens=config.tokens,
        temperature=config.temperature,
        synthetic=tuple(
            CanaryText(text=text, included=coin) for text, coin in zip(texts, coins(config.count), strict=True)
        ),
        secrets=made_up_secrets(config.secrets),
        repeats=config.repeats,
        num_candidates=config.candidates,
    )
    commitment = write_canaries(config.output, canaries)
    _say_next(config)
    return {
        "canaries": config.output.name,
        "commitment": commitment.digest,
        "num": commitment.num,
        "num_secrets": commitment.num_secrets,
        "repeats": canaries.repeats,
        "tokens": canaries.tokens,
        "temperature": canaries.temperature,
        "package_digest": package.digest,
        "job_id": job_id,
    }


def made_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    tokens: int,
    temperature: float,
    batch_size: int,
) -> list[str]:
    """Return `count` different texts that the model makes up from the beginning of a text; progress is shown.

    Each is `tokens` long at most and a quarter of that at least, holds no special token, and is the same text once it
    was encoded and decoded.

    Raises:
        DataError: when that is longer than the model's context.
        RunFailed: when the model repeats itself, or its output is not finite.
    """
    require_context(model, tokens + 1, "a canary")
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = set(tokenizer.get_vocab().values())  # they need not be the first numbers, nor lie without gaps
    num_known = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index, union-attr, arg-type]
    without = [number for number in range(num_known) if number in special or number not in pieces]
    found: dict[str, None] = {}
    with progress(count, "canaries") as bar:
        for _ in range(_MAX_ROUNDS):
            missing, before = count - len(found), len(found)
            drawn = continuations(
                model,
                [[begin]] * missing,
                num_tokens=tokens,
                batch_size=batch_size,
                temperature=temperature,
                seed=int.from_bytes(os.urandom(8), "big") >> 1,
                without=without,
                progress=lambda done, _: bar.update(min(before + done, count - 1)),  # noqa: B023 - called at once
            )
            texts = (_readable(tokenizer, ids, tokens, special) for ids in drawn)
            found.update(dict.fromkeys(text for text in texts if text is not None))
            if len(found) == count:
                bar.update(count)
                return list(found)
    raise RunFailed(
        f"the model made up {len(found)} of {count} different texts",
        hint="raise --temperature or --tokens, or make fewer with --count",
    )


def made_up_secrets(num: int) -> tuple[Secret, ...]:
    """Return `num` secrets of random words behind different prefixes, each with a coin of its own."""
    holders: dict[str, None] = {}
    while len(holders) < num:
        holders[words_of(os.urandom(2))] = None
    return tuple(
        Secret(prefix=f"The access code of {holder} is", secret=words_of(os.urandom(SECRET_WORDS)), included=coin)
        for holder, coin in zip(holders, coins(num), strict=True)
    )


def coins(num: int) -> list[bool]:
    """Return so many fair coins, thrown by the operating system."""
    return [bool(byte & 1) for byte in os.urandom(num)]


def _readable(tokenizer: PreTrainedTokenizerBase, ids: list[int], tokens: int, special: set[int]) -> str | None:
    """Return the tokens' text, cut so that it has at most `tokens`; None when it does not survive that."""
    for _ in range(3):  # cutting may leave half a character, and another spelling may be longer
        said = decoded(tokenizer, ids[:tokens], what=_MADE_UP, skip_special=True, clean_up=False)
        text = said.replace(_UNREADABLE, "").strip()
        ids = encoded(tokenizer, text, what=_MADE_UP, add_special_tokens=False)
        again = decoded(tokenizer, ids, what=_MADE_UP, skip_special=False, clean_up=False)
        if again.strip() == text and len(ids) <= tokens and not special & set(ids):
            return text if len(ids) >= tokens // _FEWEST_SHARE else None
    return None


def _say_next(config: CanaryConfig) -> None:
    out = config.output
    if PLAYED in os.environ:  # whoever plays this verb as a stage says what comes next
        return
    if config.count < MIN_CANARIES:
        say(f"{config.count} canaries are too few to refute any epsilon; {MIN_CANARIES} are needed, 1000 are better")
    job = f"--job {config.job}" if config.job is not None else "--job JOB"
    say(f"before tuning, send: offsite seal {out / COMMITMENT_FOLDER} {job} --round 0 -o commitment.sealed")
    say(f"then: offsite tune {config.package} --canaries {out} --data ...")
    say(f"once the bundle is sent, not before: offsite seal {out / REVEAL_FOLDER} {job} --round 0 -o reveal.sealed")
