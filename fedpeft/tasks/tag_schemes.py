"""Schemes of tags, BIO, IOB1, BIOES, BILOU and plain types, and the names that tags mark."""

from collections.abc import Sequence
from typing import Final, NamedTuple

OUTSIDE: Final = "O"
"""The tag of a word that belongs to no name."""
BEGINS: Final = frozenset("BSU")
"""Prefixes of words that begin a name wherever they stand."""
PREFIXES: Final = frozenset("BIESLU")
"""What may stand before a type: the words of BIO, BIOES and BILOU."""


class Span(NamedTuple):
    """A name: its type, and its words from ``start`` up to but without ``end``."""

    type: str
    start: int
    end: int


def bio(tags: Sequence[str]) -> tuple[str, ...]:
    """Return tags of any of the schemes in BIO; those in BIO stay as they are.

    Also those of BIOES and BILOU, whose ``E`` and ``L`` end a name and ``S`` and ``U`` are one.

    >>> bio(["I-PER", "I-PER", "B-PER", "O"])  # IOB1
    ('B-PER', 'I-PER', 'B-PER', 'O')
    >>> bio(["PER", "PER", "LOC", "O"])
    ('B-PER', 'I-PER', 'B-LOC', 'O')
    """
    converted: list[str] = []
    before = ""  # the type of the word before
    for tag in tags:
        prefix, type_name = parted(tag)
        if type_name:
            begins = prefix in BEGINS or type_name != before
            converted.append(f"{'B' if begins else 'I'}-{type_name}")
        else:
            converted.append(OUTSIDE)
        before = type_name
    return tuple(converted)


def parted(tag: str) -> tuple[str, str]:
    """Return prefix and type of a tag: ``I-PER`` -> ("I", "PER"), ``O`` -> ("", "").

    A tag without a prefix is a type.
    """
    if tag == OUTSIDE:
        return "", ""
    prefix, dash, type_name = tag.partition("-")
    if dash and prefix in PREFIXES:
        return prefix, type_name
    return "", tag


def spans(tags: Sequence[str]) -> list[Span]:
    """Return the names that ``tags``, in BIO, mark.

    >>> spans(["B-PER", "I-PER", "O", "B-LOC"])
    [Span(type='PER', start=0, end=2), Span(type='LOC', start=3, end=4)]
    """
    marked: list[Span] = []
    for position, tag in enumerate(tags):
        prefix, type_name = parted(tag)
        if prefix == "B":
            marked.append(Span(type_name, position, position + 1))
        elif prefix == "I":
            marked[-1] = marked[-1]._replace(end=position + 1)
    return marked


def types_of(tags: Sequence[str]) -> set[str]:
    """Return the types of a sentence's names."""
    return {parted(tag)[1] for tag in tags} - {""}
