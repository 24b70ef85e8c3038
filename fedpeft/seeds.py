"""Named randomness: every random number comes from the run's seed and the name of its purpose.

No global generator is read or advanced, so the numbers do not depend on what ran before.
"""

from hashlib import blake2b

import torch


def derive(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2**63) that depends on ``seed`` and ``names`` alone, on every machine.

    >>> derive(0, "client", 3) == derive(0, "client", 3)
    True
    >>> derive(0, "client", 3) == derive(1, "client", 3)
    False
    """
    # Joined by a unit separator, rare in any text: ("a", "bc") and ("ab", "c") must differ.
    text = "\x1f".join(str(part) for part in (seed, *names))
    hashed = blake2b(text.encode(), digest_size=8).digest()
    # 63 bits, since a seed travels as an int64.
    return int.from_bytes(hashed, "big") >> 1


def uniform(seed: int, *names: str | int) -> float:
    """Return a number in [0, 1), uniformly distributed over names, from ``derive(seed, *names)``.

    >>> 0 <= uniform(0, "dropout", 3) < 1
    True
    """
    return (derive(seed, *names) >> 10) / 2**53  # as many bits as a float64 holds exactly


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator seeded by ``derive(seed, *names)``.

    >>> one, again = (torch.rand(2, generator=generator(0, "mask")) for _ in range(2))
    >>> torch.equal(one, again)
    True
    """
    return torch.Generator().manual_seed(derive(seed, *names))
