"""Valid messages with something wrong: the same mutations for the same seed."""

import random
import re
from collections.abc import Callable, Sequence
from typing import Final

NUMBERS: Final = [
    b"0",
    b"1",
    b"-1",
    b"7",
    b"255",
    b"65536",
    b"2147483648",
    b"9223372036854775807",
    b"1e9",
    b"99999999999999999999",
]
"""What a number is replaced by."""
TOKENS: Final = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b" ",
    b"\n",
    b"\r\n",
    b"\0",
    b"\xff",
    b"\\u0000",
    b"null",
    b"true",
    b"NaN",
    b"../",
    b"%2f",
    b"[" * 200,
    b"A" * 600,
]
"""What is put in between."""
MOST: Final = 1 << 16
"""Bytes that a mutation grows to at most."""

Edit = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def _place(draw: random.Random, content: bytes) -> int:
    return draw.randrange(len(content) + 1)


def _slice(draw: random.Random, content: bytes) -> tuple[int, int]:
    begin = _place(draw, content)
    return begin, min(len(content), begin + draw.choice([1, 2, 4, 8, 64, 1024]))


def _flip(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    if not content:
        return b"\0"
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def _set(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    place = _place(draw, content)
    return content[:place] + bytes([draw.choice([0, 1, 127, 128, 255])]) + content[place + 1 :]


def _cut(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    return content[: _place(draw, content)]


def _remove(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    begin, end = _slice(draw, content)
    return content[:begin] + content[end:]


def _repeat(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    begin, end = _slice(draw, content)
    return content[:end] + content[begin:end] * draw.choice([1, 1, 2, 50]) + content[end:]


def _splice(draw: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    other = draw.choice(seeds)
    begin, end = _slice(draw, other)
    place = _place(draw, content)
    return content[:place] + other[begin:end] + content[place + draw.choice([0, end - begin]) :]


def _insert(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    place = _place(draw, content)
    return content[:place] + draw.choice([draw.randbytes(8), draw.choice(TOKENS)]) + content[place:]


def _number(draw: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    found = list(re.finditer(rb"-?\d+", content))
    if not found:
        return _insert(draw, content, seeds)
    one = draw.choice(found)
    return content[: one.start()] + draw.choice(NUMBERS) + content[one.end() :]


EDITS: Final[Sequence[Edit]] = [
    _flip,
    _flip,
    _set,
    _cut,
    _remove,
    _repeat,
    _splice,
    _insert,
    _number,
    _number,
]


def mutated(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of the ``seeds`` after one to four edits."""
    content = draw.choice(seeds)
    for _ in range(draw.choice([1, 1, 1, 2, 2, 3, 4])):
        content = draw.choice(EDITS)(draw, content, seeds)
    return content[:MOST]
