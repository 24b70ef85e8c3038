"""Who takes part in a round, under which keys, and how many of them are enough."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import final

from fedpeft.errors import WireError
from fedpeft.secagg.keys import KEY, same


@final
@dataclass(frozen=True)
class Rules:
    """How many clients a sum needs.

    ``threshold``: share of the members, over a half. ``smallest``: clients at least.
    """

    threshold: float
    smallest: int

    def enough(self, members: int) -> int:
        """Return how many of so many ``members`` can open a sum, and must be in it.

        >>> [Rules(0.6, 3).enough(members) for members in (3, 5, 20)]
        [3, 3, 12]
        """
        # Rounded first: 0.55 * 20 is a little over 11 in floating point.
        share = math.ceil(round(self.threshold * members, 9))
        # Over a half in any case: no two sets of so many members are apart.
        return max(share, members // 2 + 1, self.smallest)


@final
@dataclass(frozen=True)
class Roster:
    """The members of a round, in increasing order, and two public keys of each.

    Masks come from ``mask_keys``; ``box_keys`` are for messages between members.
    """

    round: int
    members: tuple[int, ...]
    mask_keys: tuple[bytes, ...]
    box_keys: tuple[bytes, ...]

    @cached_property
    def digest(self) -> bytes:
        """Return 32 bytes that differ for every other roster."""
        numbers = (self.round, len(self.members), *self.members)
        content = b"".join(number.to_bytes(8, "little") for number in numbers)
        keys = b"".join((*self.mask_keys, *self.box_keys))  # all of one length
        return sha256(b"fedpeft secagg roster" + content + keys).digest()

    def check(self, rules: Rules, client: int, own: tuple[bytes, bytes]) -> int:
        """Return the index of ``client``; WireError where it must not take part in this round.

        ``own``: its public keys, for masks and for boxes.
        """
        members, keys = self.members, (*self.mask_keys, *self.box_keys)
        if list(members) != sorted(set(members)) or members[:1] < (0,):
            raise WireError("the members of a round are not in order, or one is there twice")
        if len(keys) != 2 * len(members) or any(len(key) != KEY for key in keys):
            raise WireError("a member of the round has no keys")
        if len(set(keys)) != len(keys):
            raise WireError("two keys of a round's members are the same")
        if len(members) < rules.enough(len(members)):
            raise WireError(f"a round of {len(members)} members; at least {rules.smallest} needed")
        if client not in members:
            raise WireError(f"client {client} is no member of the round")
        index = members.index(client)
        mine = (self.mask_keys[index], self.box_keys[index])
        if not (same(mine[0], own[0]) and same(mine[1], own[1])):
            raise WireError(f"the keys of client {client} are not those that it sent")
        return index

    def check_part(self, rules: Rules, part: Sequence[bool], within: Sequence[bool]) -> None:
        """Raise WireError unless ``part`` of the members is enough of them, and ``within`` it."""
        if len(part) != len(self.members):
            raise WireError(f"{len(part)} marks for {len(self.members)} members")
        for index, member in enumerate(self.members):
            if part[index] and not within[index]:
                raise WireError(f"client {member} was lost, and cannot be back in the same round")
        # Counted as booleans: a mark of 10 must not count for ten members.
        count, enough = sum(map(bool, part)), rules.enough(len(self.members))
        if count < enough:
            raise WireError(f"{count} of {len(self.members)} members are left, {enough} needed")
