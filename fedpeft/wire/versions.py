"""What a memory is called and made of: versions, and the method's part beside the local loop's.

A memory holds what a method keeps and, under names that begin with ``@``, what the local loop keeps
(see ``Training.keep_optimizer``). A version is one whole number that tells two rounds: when the
memory was written, and when the method's part of it was. They differ where a method kept nothing
new and the loop did; the method's part is then carried along as it was. Methods are only ever told
of their own part, so that it is the same to them whether a loop keeps anything.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor

from fedpeft.types import NO_MEMORY, Client, Payload

RESERVED: Final = "@"
"""How the names begin of what a memory holds beside a method's part."""
_SHIFT: Final = 32
"""A version is the round where both are the same; else it has the older one above this bit, too."""


def carried(number: int, before: int) -> int:
    """Return the version of a memory of round ``number`` with the method's part of ``before``.

    >>> version = carried(7, before=3)
    >>> written(version), written_by_method(version)
    (7, 3)
    >>> written_by_method(carried(7, before=NO_MEMORY)) == NO_MEMORY
    True
    """
    older = written_by_method(before) - NO_MEMORY + 1  # at least 1, so that it shows
    return (older << _SHIFT) + number


def written(version: int) -> int:
    """Return the round in which a memory of ``version`` was written, ``NO_MEMORY`` for none."""
    return version if version < 1 << _SHIFT else version % (1 << _SHIFT)


def written_by_method(version: int) -> int:
    """Return the round in which the method's part was written, ``NO_MEMORY`` where there is none."""
    return version if version < 1 << _SHIFT else (version >> _SHIFT) - 1 + NO_MEMORY


def as_told(client: Client) -> Client:
    """Return ``client`` as its method knows it: its memory is the method's part alone."""
    return replace(client, memory=written_by_method(client.memory))


def parted(memory: Payload) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the method's part of a memory, and the rest."""
    own = {name: tensor for name, tensor in memory.items() if not name.startswith(RESERVED)}
    rest = {name: tensor for name, tensor in memory.items() if name.startswith(RESERVED)}
    return own, rest


def joined(stays: Payload, own: Payload, rest: Mapping[str, Tensor]) -> Payload:
    """Return what is remembered of a round; empty where the memory stays as it was.

    ``stays``: what the method keeps, empty for nothing new. ``own``: its part so far, which is
    carried along where there is a ``rest`` to write.
    """
    if not rest:
        return stays
    return {**(stays or own), **rest}
