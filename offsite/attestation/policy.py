"""An auditor's policy for attestations: which key is a TPM's, and what its PCRs must hold.

The auditor writes it from what they know: the attestation key's public half, taken over while somebody could see that
it is a TPM's, and the values of the PCRs of a machine that they trust. Neither comes from the party that is attested.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import Field

from offsite.attestation.evidence import Attestation, TpmQuote
from offsite.attestation.tpm import FEWEST_RSA_BITS, NUM_PCRS, Key, Quote, read_quote, require_signed
from offsite.errors import BadSchema, ConfigError, WrongBinding
from offsite.folders import read_own
from offsite.strictjson import Strict, parse_strict

POLICY_FORMAT: Final = "offsite/attestation-policy/1"
POLICY_LIMIT_BYTES = 64 * 2**10

PcrNumber = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]?)$")]
PcrValue = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Policy(Strict):
    """The content of the policy's file.

    ``ak`` is the attestation key's public half in PEM (``tpm2_readpublic -f pem``), ``pcrs`` the values of the SHA-256
    bank by number: a quote must be of just these.
    """

    format: Literal["offsite/attestation-policy/1"]
    kind: Literal["tpm2-quote"]
    ak: str = Field(max_length=16 * 2**10)
    pcrs: dict[PcrNumber, PcrValue] = Field(min_length=1, max_length=NUM_PCRS)

    @property
    def key(self) -> Key:
        """The attestation key.

        Raises:
            BadSchema: when it is no public key of RSA with 2048 bits or more, P-256 or P-384.
        """
        try:
            key = load_pem_public_key(self.ak.encode())
        except (ValueError, UnsupportedAlgorithm):
            raise BadSchema("policy: ak is no public key in PEM", hint="tpm2_readpublic -c ak.ctx -f pem") from None
        if isinstance(key, rsa.RSAPublicKey) and key.key_size >= FEWEST_RSA_BITS:
            return key
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
            return key
        raise BadSchema(f"policy: ak is neither RSA of {FEWEST_RSA_BITS} bits or more nor of curve P-256 or P-384")

    @property
    def selected(self) -> tuple[int, ...]:
        """The PCRs' numbers, ascending."""
        return tuple(sorted(int(one) for one in self.pcrs))

    @property
    def digest(self) -> bytes:
        """SHA-256 over the values in the order of their numbers, as a TPM works it out."""
        values = (bytes.fromhex(self.pcrs[str(one)]) for one in self.selected)
        return hashlib.sha256(b"".join(values)).digest()


def read_policy(path: Path) -> Policy:
    """Return the policy in the file.

    Raises:
        ConfigError: when there is no such file.
        TooLarge, WrongBinding, BadSchema: when it is no policy of this format.
    """
    if not path.is_file():
        raise ConfigError(f"no policy named {path.name!r}", hint="docs/auditor.md shows one")
    raw = read_own(path, POLICY_LIMIT_BYTES)
    policy = parse_strict(raw, Policy, path.name, {"format": POLICY_FORMAT})
    if policy.selected[-1] >= NUM_PCRS:
        raise BadSchema(f"{path.name}: PCR {policy.selected[-1]}, the last one is {NUM_PCRS - 1}")
    return policy


def require_bound(attestation: Attestation | None, nonce: bytes) -> Quote | None:
    """Return the attestation's quote, known to have its form and to be about this report; None where there is none.

    Whether a TPM made it is not asked here.

    Raises:
        BadSchema: when it has another form.
        WrongBinding: when it holds another nonce.
    """
    if not isinstance(attestation, TpmQuote):
        return None
    quote = read_quote(attestation.parts[0])
    if not hmac.compare_digest(quote.nonce, nonce):
        raise WrongBinding(
            f"the quote was made for {quote.nonce.hex()[:16] or 'nothing'}, this report asks for {nonce.hex()[:16]}",
            hint="a quote fits one report: ask the TPM again, with the nonce that offsite report attest prints",
        )
    return quote


def require_trusted(attestation: Attestation | None, nonce: bytes, policy: Policy) -> Quote:
    """Return the quote, known to be about this report, by the policy's TPM, of a machine in the state it asks for.

    Raises:
        WrongBinding: when there is none, or nonce, PCRs or their values are others.
        BadSchema, BadSignature: when it has another form or is another key's.
    """
    quote = require_bound(attestation, nonce)
    if quote is None or not isinstance(attestation, TpmQuote):
        raise WrongBinding("the policy asks for a TPM's quote, the report states no attestation")
    require_signed(policy.key, *attestation.parts)
    if quote.pcrs != policy.selected:
        found, expected = (",".join(map(str, one)) for one in (quote.pcrs, policy.selected))
        raise WrongBinding(f"the quote is of PCRs {found}, the policy asks for {expected}")
    if not hmac.compare_digest(quote.pcr_digest, policy.digest):
        raise WrongBinding(
            "the PCRs have other values than the policy's: another firmware, boot or state of the machine"
        )
    return quote
