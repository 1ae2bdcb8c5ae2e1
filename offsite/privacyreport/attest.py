"""``offsite report attest``: a signed report gets evidence of the machine that issues it, bound to that very report.

Without evidence the verb says which nonce the evidence must hold; the platform's own tools make it. With it, the report
is signed anew: all it says stays, and what it says of attestation changes.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from offsite.attestation.evidence import MOST_BYTES, TpmQuote, quoted
from offsite.attestation.policy import require_bound
from offsite.attestation.tpm import is_made_by_tpm
from offsite.console import say
from offsite.digests import sha256_bytes
from offsite.errors import BadSchema, ConfigError, WrongBinding
from offsite.keys.files import read_limited
from offsite.keys.identity import open_identity
from offsite.privacyreport.config import ReportAttestConfig, ReportVerifyConfig
from offsite.privacyreport.issue import show, told, write_report
from offsite.privacyreport.record import nonce_of, with_quote
from offsite.privacyreport.verify import verify
from offsite.staging import refuse_existing, staged_folder


def run(config: ReportAttestConfig) -> dict[str, object]:
    """Carry out ``offsite report attest``.

    Raises:
        ConfigError: when the output exists, or only a part of the evidence is given.
        ArtefactError: when the report does not verify, is another's, or the evidence is not about it.
        BadKey: when the keys do not open.
    """
    if config.output is not None:
        refuse_existing(config.output)
    report, digest = verify(ReportVerifyConfig(report=config.report, keys=config.keys), now=int(time.time()))
    nonce = nonce_of(report)
    if config.output is None or config.quote is None or config.quote_signature is None:
        say(f"a quote about this report holds the nonce {nonce.hex()}")
        say("it tells whoever reads the report the TPM's clock, resets, firmware and a name of its key; for example:")
        say(f"  tpm2_quote -c AK -l sha256:0,2,4,7 -g sha256 -q {nonce.hex()} -m quote.msg -s quote.sig")
        name = shlex.quote(config.report.name)
        say(f"then: offsite report attest {name} --quote quote.msg --quote-signature quote.sig -o NEW-REPORT")
        return {"digest": digest, "nonce": nonce.hex()}
    attested = with_quote(report, _quote(config.quote, config.quote_signature))
    require_bound(attested.attestation, nonce)
    identity = open_identity(config)
    if identity.public.fingerprint != report.issuer:
        raise WrongBinding("these are not the keys that signed the report", hint="its issuer alone can add to it")
    with staged_folder(config.output) as stage:
        raw = write_report(stage, attested, identity)
    show(attested)
    say(f"{config.output.name}: signed, with the quote; nothing of it is verified until a policy is held against it")
    return {**told(attested, sha256_bytes(raw)), "report": config.output.name}


def _quote(attest: Path, signature: Path) -> TpmQuote:
    for path in (attest, signature):
        if not path.is_file():
            raise ConfigError(f"no file named {path.name!r}", hint="tpm2_quote -m and -s write the two")
    quote = read_limited(attest, MOST_BYTES, what="quote")
    signed = read_limited(signature, MOST_BYTES, what="quote's signature")
    if not is_made_by_tpm(quote):
        swapped = "are --quote and --quote-signature swapped?" if is_made_by_tpm(signed) else "tpm2_quote -m writes it"
        raise BadSchema("quote: does not begin as what a TPM made itself", hint=swapped)
    return quoted(quote, signed)
