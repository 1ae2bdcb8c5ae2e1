"""A self-signed TLS certificate that a client pins, and the TLS settings of what serves."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from offsite.digests import sha256_bytes
from offsite.errors import ConfigError
from offsite.keys.files import read_private, write_private
from offsite.staging import staged_folder

CERTIFICATE_NAME = "certificate.pem"
PRIVATE_KEY_NAME = "certificate-key.pem"
KEY_LIMIT_BYTES = 64 * 2**10


def write_certificate(out: Path, hosts: Sequence[str], *, days: int) -> str:
    """Write a fresh key and a certificate for `hosts` signed by itself; return the certificate's SHA-256.

    The certificate can sign no other, so that pinning it trusts this one server and nobody else.

    Args:
        hosts: names or addresses that clients use.
        days: from now on.

    Raises:
        ConfigError: when `out` exists or a host is neither a name nor an address.
        RunFailed: when the disk is full.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "offsite exchange")])
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    public = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with staged_folder(out) as stage:
        stage.chmod(0o700)
        (stage / CERTIFICATE_NAME).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        write_private(stage / PRIVATE_KEY_NAME, private)
    return sha256_bytes(certificate.public_bytes(serialization.Encoding.DER))


def server_context(certificate: Path, private_key: Path) -> ssl.SSLContext:
    """Return TLS 1.3 settings with the owner's certificate.

    Raises:
        ConfigError: when the two cannot be read or do not fit each other.
        BadKey: when others can read the key.
    """
    read_private(private_key, KEY_LIMIT_BYTES, what="certificate key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, private_key, password=_no_password)
    except (OSError, ssl.SSLError):
        raise ConfigError(
            f"{certificate.name!r} and {private_key.name!r} are not a certificate and its unencrypted key, in PEM",
            hint="offsite exchange certificate makes both",
        ) from None
    return context


@dataclass(frozen=True)
class CertificateFacts:
    """Names and addresses that a certificate is for, its SHA-256 in hex pairs, as browsers show it, and its end."""

    names: tuple[str, ...]
    sha256: str
    ends: datetime.datetime


def certificate_facts(certificate: Path) -> CertificateFacts:
    """Return what a certificate in a file says of itself.

    Raises:
        ConfigError: when it cannot be read.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        alternatives = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        raise ConfigError(
            f"{certificate.name!r} is not a certificate in PEM that says for which names it is",
            hint="offsite exchange certificate makes one",
        ) from None
    names = alternatives.get_values_for_type(x509.DNSName)
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    every = (*names, *(str(one) for one in addresses))
    return CertificateFacts(every, found.fingerprint(hashes.SHA256()).hex(":").upper(), found.not_valid_after_utc)


def _no_password() -> str:
    return ""


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if not all(label and len(label) < 64 and label.replace("-", "").isalnum() and label.isascii() for label in labels):
        raise ConfigError(f"--host {host!r} is neither a name nor an address")
    return x509.DNSName(host)
