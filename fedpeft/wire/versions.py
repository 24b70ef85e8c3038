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

Names that begin with ``~`` are those of wrappers around the method, such as what a compression
still owes the server. They are treated as the loop's part is: the method never sees them, and where
it has nothing new, its own part is carried along.

Names that begin with ``!`` are for the next exchange alone, such as the keys of secure aggregation:
they are written with any part, count as news of none, and leave a memory as soon as a newer
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
AROUND: Final = "~"
"""The first character of the names in a memory that are those of wrappers."""
_SHIFT: Final = 32
"""Lower bits of a version, which hold a stamp; those above hold the round of the method's part."""
_ROUND: Final = 24
"""Lower bits of a stamp, which hold a round; those above hold a phase."""
ROUNDS: Final = 1 << _ROUND
"""Rounds that a stamp can tell apart."""
PHASES: Final = 1 << (_SHIFT - _ROUND)
"""Phases of a round that it can tell apart."""


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
    """Return the part of the method and its wrappers, and the loop's.

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

    ``stays``: what method and wrappers keep of this round, empty for nothing new. ``methods_part``:
    what they have kept so far. Where there is anything to write, as a ``loops_part``, or something
    for the next exchange, the parts of those that have nothing new are carried along.
    """
    if not stays and not loops_part:
        return {}
    # Writing replaces the whole memory, so what is older must be written again.
    news = own(stays) or own(methods_part)
    return {**news, **_of_wrappers(stays, methods_part), **once(stays), **loops_part}


def _of_wrappers(stays: Payload, before: Payload) -> dict[str, Tensor]:
    """Return what wrappers keep: each its part of ``stays``, or of ``before`` where it has none."""
    kept = {name: tensor for name, tensor in stays.items() if name.startswith(AROUND)}
    owners = {name.partition("/")[0] for name in kept}
    for name, tensor in before.items():
        if name.startswith(AROUND) and name.partition("/")[0] not in owners:
            kept[name] = tensor
    return kept


def own(memory: Payload) -> dict[str, Tensor]:
    """Return what the method itself keeps in a memory.

    >>> list(own({"anchor": Tensor(), "~0.top_k/w": Tensor(), "!key": Tensor()}))
    ['anchor']
    """
    special = RESERVED, ONCE, AROUND
    return {name: tensor for name, tensor in memory.items() if not name.startswith(special)}


def slice_of(memory: Payload, owner: str) -> dict[str, Tensor]:
    """Return what the wrapper ``owner`` keeps in a memory, under its own names.

    >>> list(slice_of(with_slice({"anchor": Tensor()}, "0.top_k", {"w": Tensor()}), "0.top_k"))
    ['w']
    """
    prefix = f"{AROUND}{owner}/"
    entries: dict[str, Tensor] = {}
    for name, tensor in memory.items():
        if name.startswith(prefix):
            entries[name.removeprefix(prefix)] = tensor
    return entries


def without(memory: Payload, owner: str) -> dict[str, Tensor]:
    """Return a memory as a method inside the wrapper ``owner`` knows it."""
    prefix = f"{AROUND}{owner}/"
    return {name: tensor for name, tensor in memory.items() if not name.startswith(prefix)}


def with_slice(memory: Payload, owner: str, entries: Payload) -> dict[str, Tensor]:
    """Return a memory with ``entries`` beside what others keep in it, as those of ``owner``."""
    named = {f"{AROUND}{owner}/{name}": tensor for name, tensor in entries.items()}
    return {**memory, **named}


def once(memory: Payload) -> dict[str, Tensor]:
    """Return what of a memory is for the next exchange alone."""
    return {name: tensor for name, tensor in memory.items() if name.startswith(ONCE)}


def lasting(memory: Payload) -> dict[str, Tensor]:
    """Return a memory without what is for the next exchange alone.

    >>> list(lasting({"anchor": Tensor(), "!key": Tensor()}))
    ['anchor']
    """
    return {name: tensor for name, tensor in memory.items() if not name.startswith(ONCE)}
