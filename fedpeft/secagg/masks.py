"""Masks: a key stretched into as many words of 64 bits as there are numbers to hide."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

Words = NDArray[np.uint64]
"""Numbers modulo 2^64; every smaller power of two divides it."""

_WORD: Final = 8
_BLOCK: Final = 1 << 14
"""Words that are made at once: they stay in the processor's cache while they are added."""
_ZEROS: Final = bytes(_WORD * _BLOCK)
_AT_ONCE: Final = 64
"""Streams that are open at once; a server that lost many clients has hundreds of thousands."""


def add_stream(total: Words, key: bytes, *, negative: bool = False) -> None:
    """Add the stream of ``key`` to ``total``, or subtract it, modulo 2^64.

    The stream is AES-256 in counter mode from 0, eight bytes a word, the lowest first. A key must
    not be used for anything else.
    """
    add_streams(total, [(key, negative)])


def add_streams(total: Words, keys: Sequence[tuple[bytes, bool]]) -> None:
    """Add the streams of several keys, as ``add_stream`` does; ``keys``: (key, negative)."""
    for begin in range(0, len(keys), _AT_ONCE):
        _add_together(total, keys[begin : begin + _AT_ONCE])


def _add_together(total: Words, keys: Sequence[tuple[bytes, bool]]) -> None:
    """Add the streams of so few keys that all of them can be open at once."""
    streams = [(Cipher(AES(key), CTR(bytes(16))).encryptor(), negative) for key, negative in keys]
    # Encrypting zeros gives the stream itself; one buffer is used for all of it.
    buffer = bytearray(len(_ZEROS))
    for begin in range(0, len(total), _BLOCK):
        # All streams of one block, one after another, while the block is in the cache.
        part = total[begin : begin + _BLOCK]
        zeros = memoryview(_ZEROS)[: _WORD * len(part)]
        words = np.frombuffer(buffer, dtype="<u8", count=len(part))
        for stream, negative in streams:
            stream.update_into(zeros, buffer)
            if negative:
                np.subtract(part, words, out=part)
            else:
                np.add(part, words, out=part)
