"""Versions of what a client remembers: a server names the one that it assumes, by round.

A client may keep a memory from round to round. What the server sends may depend on it, so it must
know which memory the client holds. So every memory has a version, a whole number: the stamp of the
moment in which it was written. A stamp holds the round in its lower 24 bits and the phase of that
round above them, which is 0 for most methods: then it is the round.

A memory has two parts, though: the method's and, under names that begin with ``@``, the training
loop's (see ``Training.keep_optimizer``). Where only the loop has something new, the method's part
is carried along unchanged, and the two parts are of different rounds. Then the version holds both:
the stamp of the memory in its lower 32 bits, and above them the round of the method's part. Methods
only ever see the version of their own part, so it makes no difference to them whether the loop
keeps anything.

Names that begin with ``!`` are for the next exchange alone, such as the keys of secure aggregation:
they are written with either part, count as news of neither, and leave a memory as soon as a newer
version of it is written. So nobody can have them used twice by assuming an older version.
"""

from dataclasses import replace
from typing import Final

from torch import Tensor

from fedpeft.types import NO_MEMORY, Client, Payload

RESERVED: Final = "@"
"""The first character of the names that the training loop uses in a memory."""
ONCE: Final = "!"
"""The first character of the names in a memory that are for the next exchange alone."""
_SHIFT: Final = 32
"""Lower bits of a version, which hold a stamp; those above hold the round of the method's part."""
_ROUND: Final = 24
"""Lower bits of a stamp, which hold a round; those above hold a phase."""


def stamp(round_number: int, phase: int) -> int:
    """Return the version of a memory that was written in this phase of a round.

    >>> stamp(7, phase=0), written(stamp(7, phase=2))
    (7, 7)
    """
    return (phase << _ROUND) + round_number


def carried(now: int, before: int) -> int:
    """Return the version of a memory with stamp ``now`` and the method's part of ``before``.

    >>> version = carried(7, before=3)
    >>> written(version), written_by_method(version)
    (7, 3)
    >>> written_by_method(carried(7, before=NO_MEMORY)) == NO_MEMORY
    True
    """
    older = written_by_method(before) - NO_MEMORY + 1  # at least 1, so that it shows
    return (older << _SHIFT) + now


def written(version: int) -> int:
    """Return the round in which a memory of ``version`` was written, ``NO_MEMORY`` for none."""
    if version == NO_MEMORY:
        return version
    return version % (1 << _ROUND)


def written_by_method(version: int) -> int:
    """Return the round in which the method's part was written, ``NO_MEMORY`` for none."""
    if version < 1 << _SHIFT:  # no older part, or NO_MEMORY
        return written(version)
    return (version >> _SHIFT) - 1 + NO_MEMORY  # the inverse of ``carried``


def as_told(client: Client) -> Client:
    """Return ``client`` as its method knows it: its memory is the method's part alone.

    >>> as_told(Client(5, memory=carried(7, before=3))).memory
    3
    """
    return replace(client, memory=written_by_method(client.memory))


def parted(memory: Payload) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the method's part of a memory, and the loop's.

    >>> methods_part, loops_part = parted({"anchor": Tensor(), "@steps": Tensor()})
    >>> list(methods_part), list(loops_part)
    (['anchor'], ['@steps'])
    """
    methods_part: dict[str, Tensor] = {}
    loops_part: dict[str, Tensor] = {}
    for name, tensor in memory.items():
        part = loops_part if name.startswith(RESERVED) else methods_part
        part[name] = tensor
    return methods_part, loops_part


def joined(stays: Payload, methods_part: Payload, loops_part: Payload) -> Payload:
    """Return the memory to write after a round; empty where the old one is kept.

    ``stays``: what the method keeps of this round, empty for nothing new. ``methods_part``: what it
    has kept so far, which is carried along where there is a ``loops_part`` to write, or something
    for the next exchange.
    """
    news, for_once = lasting(stays), once(stays)
    if not loops_part and not for_once:
        return news
    # Writing replaces the whole memory, so the method's older part must be written again.
    return {**(news or lasting(methods_part)), **for_once, **loops_part}


def once(memory: Payload) -> dict[str, Tensor]:
    """Return what of a memory is for the next exchange alone."""
    return {name: tensor for name, tensor in memory.items() if name.startswith(ONCE)}


def lasting(memory: Payload) -> dict[str, Tensor]:
    """Return a memory without what is for the next exchange alone.

    >>> list(lasting({"anchor": Tensor(), "!key": Tensor()}))
    ['anchor']
    """
    return {name: tensor for name, tensor in memory.items() if not name.startswith(ONCE)}
