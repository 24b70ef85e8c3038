"""What the server does with shares: take the masks off a sum, and off nothing else."""

from collections.abc import Mapping, Sequence

from fedpeft.errors import WireError
from fedpeft.secagg import shamir
from fedpeft.secagg.client import pair_mask_key, self_mask_key
from fedpeft.secagg.keys import KEY, commitment, private_key, public_bytes, same
from fedpeft.secagg.masks import Words, add_streams
from fedpeft.secagg.roster import Roster


def uncover(
    total: Words, roster: Roster, sent: Sequence[bool], secrets: Mapping[int, bytes]
) -> None:
    """Take all masks off ``total``, the sum of what the members that have ``sent`` hid.

    ``secrets``: the seed of each member that has sent, and the private mask key of each one that
    had shared its secrets and has not.
    """
    keys: list[tuple[bytes, bool]] = []
    for index, secret in secrets.items():
        if sent[index]:
            keys.append((self_mask_key(secret), True))
            continue
        # Masks with a lost member are in the sum once, with the sign of the other one.
        private = private_key(secret)
        for other in range(len(sent)):
            if sent[other]:
                key = pair_mask_key(private, roster.mask_keys[other])
                keys.append((key, other < index))
    add_streams(total, keys)


def recover(
    roster: Roster,
    seals: Sequence[bytes],
    alive: Sequence[bool],
    sent: Sequence[bool],
    told: Mapping[int, Sequence[bytes]],
    enough: int,
) -> dict[int, bytes]:
    """Return the secret that ``uncover`` needs of each member that was alive, by index.

    ``told``: index of a member that answers -> its share of every member's secret. ``seals``: the
    commitments to the seeds. WireError for too few answers, and where shares do not fit what the
    member has published.
    """
    if len(told) < enough:
        raise WireError(f"{len(told)} clients told their shares, {enough} needed")
    tellers = sorted(told)[:enough]
    weights = shamir.weights_at_zero([teller + 1 for teller in tellers])
    secrets: dict[int, bytes] = {}
    for index, is_alive in enumerate(alive):
        if not is_alive:
            continue
        number = 0
        for weight, teller in zip(weights, tellers, strict=True):
            number += weight * int.from_bytes(told[teller][index])
        secret = _as_bytes(number % shamir.PRIME)
        if not _fits(secret, sent[index], roster.mask_keys[index], seals[index]):
            raise WireError(f"the shares of client {roster.members[index]} do not fit together")
        secrets[index] = secret
    return secrets


def _as_bytes(number: int) -> bytes:
    """Return a secret as bytes; the few numbers of the field that are too large for one as zeros.

    Zeros then fit nothing that was published.
    """
    return number.to_bytes(KEY) if number < 1 << 8 * KEY else bytes(KEY)


def _fits(secret: bytes, is_seed: bool, mask_key: bytes, seal: bytes) -> bool:
    """Return whether ``secret`` is the seed or the private key that was published."""
    if is_seed:
        return same(commitment(secret), seal)
    return same(public_bytes(private_key(secret)), mask_key)
