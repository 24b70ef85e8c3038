"""Certificates and keys: a CA, the server's certificate, the key of each site.

Everything is made by the package ``cryptography``; files with private keys are their user's alone.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.errors import BadInput

CA_DAYS: Final = 3650
SERVER_DAYS: Final = 730
LOOPBACK: Final = ("localhost", "127.0.0.1")
_BEFORE: Final = datetime.timedelta(minutes=10)  # clocks differ


@final
@dataclass(frozen=True)
class Authority:
    """A certificate authority: its certificate, and the key that signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """Return the certificate as others get it."""
        return self.certificate.public_bytes(Encoding.PEM)


def authority(name: str) -> Authority:
    """Return a new CA; whoever has its key can make certificates that its sites trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(builder.sign(key, hashes.SHA256()), key)


def server_certificate(signer: Authority, hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """Return (certificate, private key) of a server that sites reach by any of ``hosts``, in PEM.

    BadInput for a host that is neither a name nor an address.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    builder = (
        _builder(subject, signer.certificate.subject, key.public_key(), SERVER_DAYS)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()),
            critical=False,
        )
    )
    certificate = builder.sign(signer.key, hashes.SHA256()).public_bytes(Encoding.PEM)
    return certificate, private_pem(key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """Return what all certificates have in common."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise BadInput(f"--host {host}: is neither a name nor an address") from error


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a server's private key in PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def site_key() -> tuple[bytes, bytes]:
    """Return (private, public) key of a site, in OpenSSH's form, which Flower's programs read.

    >>> private, public = site_key()
    >>> public.split()[0]
    b'ecdsa-sha2-nistp384'
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private, public + b"\n"


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that its user alone can read, from its first moment on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def loopback_tls(folder: Path) -> bytes:
    """Write a certificate for this machine alone into ``folder`` and return its CA's, in PEM.

    Nobody keeps the CA's key. Files from an earlier start are replaced.
    """
    signer = authority("fedpeft loopback")
    certificate, key = server_certificate(signer, LOOPBACK)
    (folder / "link-ca.crt").write_bytes(signer.pem)
    (folder / "link.crt").write_bytes(certificate)
    (folder / "link.key").unlink(missing_ok=True)
    write_secret(folder / "link.key", key)
    return signer.pem
