"""Keys of one round: X25519 key pairs, what two of them agree on, and boxes for one recipient."""

import hmac
import secrets
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpeft.errors import WireError

KEY: Final = 32
"""Bytes of every key, public, private or symmetric, and of a seed."""
TAG: Final = 16
"""Bytes that a box is longer than its content."""

# A key of a box seals one message, so its nonce need not change.
_NONCE: Final = bytes(12)


def new_secret() -> bytes:
    """Return a new private key or seed, from the operating system."""
    return secrets.token_bytes(KEY)


def private_key(secret: bytes) -> X25519PrivateKey:
    """Return the private key that ``secret`` is."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_bytes(private: X25519PrivateKey) -> bytes:
    """Return the public key of ``private``."""
    return private.public_key().public_bytes_raw()


def common_secret(private: X25519PrivateKey, public: bytes) -> bytes:
    """Return the secret that both ends have in common: X25519. Keys are to be ``derived`` from it.

    WireError for a public key that gives the same secret with every private one.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise WireError("a public key is no point that a secret can be agreed on with") from error


def agreed(private: X25519PrivateKey, public: bytes, purpose: bytes) -> bytes:
    """Return the symmetric key that both ends derive for ``purpose``: X25519, then HKDF.

    WireError as in ``common_secret``.
    """
    return derived(common_secret(private, public), purpose)


def derived(secret: bytes, purpose: bytes) -> bytes:
    """Return the key that ``secret`` gives for ``purpose``: HKDF with SHA-256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY, salt=None, info=purpose).derive(secret)


def seal(key: bytes, content: bytes, about: bytes) -> bytes:
    """Return a box that only ``key`` opens, once for each key.

    ``about`` is not in the box; who opens it has to name the same.
    """
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, about)


def unseal(key: bytes, box: bytes, about: bytes) -> bytes:
    """Return what is in ``box``; WireError where it is damaged, or for others."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, about)
    except InvalidTag as error:
        raise WireError("a box with shares is damaged, or was made for another round") from error


def commitment(seed: bytes) -> bytes:
    """Return what tells a ``seed`` from all others without telling anything about it.

    A seed has 256 bits from the operating system, so nobody finds it by trying.
    """
    return sha256(b"fedpeft secagg commitment" + seed).digest()


def same(left: bytes, right: bytes) -> bool:
    """Return whether both are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(left, right)
