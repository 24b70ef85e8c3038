"""What a member of a round does: shares of its secrets for all, its mask, shares for the server."""

from collections.abc import Mapping, Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedpeft.secagg import shamir
from fedpeft.secagg.keys import (
    KEY,
    TAG,
    agreed,
    common_secret,
    derived,
    private_key,
    seal,
    unseal,
)
from fedpeft.secagg.masks import Words, add_streams
from fedpeft.secagg.roster import Roster

BOX: Final = 2 * shamir.SHARE + TAG
"""Bytes of a box: a share of each of a member's two secrets."""


def box_keys(roster: Roster, me: int, box_secret: bytes) -> tuple[list[bytes], list[bytes]]:
    """Return the keys of the boxes that the member sends, and of those that it is sent, by index.

    ``me``: its index, in whose place there are zeros. ``box_secret``: its private key for boxes.
    WireError for a member's key that nothing can be agreed on with.
    """
    private = private_key(box_secret)
    to_others, from_others = [bytes(KEY)] * len(roster.members), [bytes(KEY)] * len(roster.members)
    for other, public in enumerate(roster.box_keys):
        if other != me:
            # One agreement for both directions, a key for each: no two boxes may be sealed with
            # the same one.
            secret = common_secret(private, public)
            to_others[other] = _box_key(secret, sender=me, recipient=other)
            from_others[other] = _box_key(secret, sender=other, recipient=me)
    return to_others, from_others


def _box_key(secret: bytes, sender: int, recipient: int) -> bytes:
    """Return the key of the one box from ``sender`` to ``recipient``."""
    return derived(secret, f"fedpeft secagg box {sender} {recipient}".encode())


def share_secrets(
    roster: Roster,
    me: int,
    enough: int,
    keys: Sequence[bytes],
    secrets: tuple[bytes, bytes],
) -> tuple[list[bytes], bytes]:
    """Return a box with shares for every other member, and the member's own shares.

    ``me``: its index. ``keys``: of the boxes that it sends, as ``box_keys`` returns them.
    ``secrets``: its private mask key and the seed of its own mask, ``enough`` shares of which give
    them back. In the place of its own box there are zeros.
    """
    shares: list[bytes] = [b""] * len(roster.members)
    for secret in secrets:
        parts = shamir.split(int.from_bytes(secret), enough, len(shares))
        for index, part in enumerate(parts):
            shares[index] += part.to_bytes(shamir.SHARE)
    boxes: list[bytes] = []
    for index, content in enumerate(shares):
        boxes.append(bytes(BOX) if index == me else seal(keys[index], content, roster.digest))
    return boxes, shares[me]


def open_boxes(
    roster: Roster, keys: Sequence[bytes], boxes: Mapping[int, bytes]
) -> dict[int, tuple[bytes, bytes]]:
    """Return the shares of (mask key, seed) in the ``boxes`` that others sent, by their index.

    ``keys``: of the boxes that are sent to the member, as ``box_keys`` returns them. WireError
    where one of the boxes is not theirs.
    """
    opened: dict[int, tuple[bytes, bytes]] = {}
    for sender, box in boxes.items():
        content = unseal(keys[sender], box, roster.digest)
        opened[sender] = content[: shamir.SHARE], content[shamir.SHARE :]
    return opened


def hide(
    numbers: Words, roster: Roster, me: int, secrets: tuple[bytes, bytes], alive: Sequence[bool]
) -> Words:
    """Return ``numbers`` under the member's masks, modulo 2^64.

    ``secrets``: as in ``share_secrets``. ``alive``: who has shared secrets, by index. With each of
    them there is a common mask, which one of both adds and the other subtracts.
    """
    mask_secret, seed = secrets
    keys = [(self_mask_key(seed), False)]
    private = private_key(mask_secret)
    for index, is_alive in enumerate(alive):
        if is_alive and index != me:
            keys.append((pair_mask_key(private, roster.mask_keys[index]), me > index))
    masked = numbers.copy()
    add_streams(masked, keys)
    return masked


def self_mask_key(seed: bytes) -> bytes:
    """Return the key of a member's own mask."""
    return derived(seed, b"fedpeft secagg self mask")


def pair_mask_key(private: X25519PrivateKey, public: bytes) -> bytes:
    """Return the key of the mask that two members have in common."""
    return agreed(private, public, b"fedpeft secagg pair mask")


def shares_to_open(
    shares: Mapping[int, tuple[bytes, bytes]], sent: Sequence[bool]
) -> dict[int, bytes]:
    """Return which share of each member the server may have.

    Of a member that has ``sent`` its masked numbers it is that of the seed, of another that of the
    mask key. With both, the server could open that member's numbers alone.
    """
    told: dict[int, bytes] = {}
    for index, (of_mask_key, of_seed) in shares.items():
        told[index] = of_seed if sent[index] else of_mask_key
    return told
