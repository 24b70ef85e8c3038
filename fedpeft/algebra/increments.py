"""A base that moves: what the server adds to every client's weights, round by round.

The server keeps the total for each layer, (out, in), under ``<module>:total``, and the latest
increments as factors, ``<module>:B+3`` and ``:A+3`` for those of round 3. A client keeps the total
in its memory. It is sent what it lacks: the increments since then side by side, ``<module>:B+`` and
``:A+``, or the total itself where that is smaller.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.algebra.lowrank import by_module
from fedpeft.types import Payload, State

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""(B, A) by module, (out, m) and (m, in)."""


def nothing_added(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the server keeps before the first round, for the (out, in) matrices ``layers``.

    >>> sorted(nothing_added({"query": torch.ones(2, 3)}))
    ['query:total', 'since']
    """
    server = {f"{name}:total": torch.zeros(weight.shape) for name, weight in layers.items()}
    # Increments of this round and later ones are all there.
    return {**server, "since": torch.tensor(0)}


def missing(state: State, memory: int) -> dict[str, Tensor]:
    """Return what a client lacks whose total was stored in round ``memory`` (NO_MEMORY: nothing).

    Empty where it has everything.
    """
    # A total that was stored in round v holds the increments of the rounds before v.
    first = max(memory, 0)
    totals: dict[str, Tensor] = {}
    stacks: dict[str, Tensor] = {}
    is_new = False
    for module, entries in by_module(state.server).items():
        totals[f"{module}:total"] = entries["total"]
        rounds = [number for number in _rounds(entries) if number >= first]
        if rounds:
            stacks[f"{module}:B+"] = torch.cat([entries[f"B+{n}"] for n in rounds], dim=1)
            stacks[f"{module}:A+"] = torch.cat([entries[f"A+{n}"] for n in rounds])
    is_new = bool(stacks) or first < int(state.server["since"])
    if not is_new:
        return {}
    has_all = first >= int(state.server["since"])
    return stacks if has_all and _size(stacks) <= _size(totals) else totals


def held(down: Payload, memory: Payload) -> tuple[dict[str, Tensor], bool]:
    """Return the total of every module as ``<module>:total``, (K, out, in), and whether it is new.

    ``down``: what ``missing`` returned, among other tensors. ``memory``: the client's totals.
    """
    totals = {name: tensor for name, tensor in memory.items() if name.endswith(":total")}
    is_new = False
    for module, entries in by_module(down).items():
        name = f"{module}:total"
        if "total" in entries:
            totals[name], is_new = entries["total"], True
        elif "B+" in entries:
            added = entries["B+"] @ entries["A+"]  # (K, out, in)
            totals[name] = totals[name] + added if name in totals else added
            is_new = True
    return totals, is_new


def is_increment(name: str) -> bool:
    """Return whether ``name`` in a message is that of an increment or a total."""
    return name.endswith((":total", ":B+", ":A+"))


def with_factors(state: State, factors: Factors) -> dict[str, Tensor]:
    """Return what the server keeps once ``factors`` are added after the round of ``state``."""
    server = dict(state.server)
    for module, (B, A) in factors.items():
        server[f"{module}:total"] = server[f"{module}:total"] + B @ A
        server |= {f"{module}:B+{state.round}": B, f"{module}:A+{state.round}": A}
    return _trimmed(server)


def with_matrices(state: State, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the server keeps once ``matrices``, (out, in), are added.

    For those who cannot be told in fewer numbers than the total itself.
    """
    server = {"since": torch.tensor(state.round + 1)}
    for module, matrix in matrices.items():
        name = f"{module}:total"
        server[name] = state.server[name] + matrix
    return server


def _trimmed(server: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``server`` without the oldest increments, which nobody would be sent any more.

    With them a message would be larger than the totals.
    """
    limit = _size({name: tensor for name, tensor in server.items() if name.endswith(":total")})
    by_round: dict[int, dict[str, Tensor]] = {}
    for module, entries in by_module(server).items():
        for number in _rounds(entries):
            names = (f"{module}:B+{number}", f"{module}:A+{number}")
            by_round.setdefault(number, {}).update({name: server[name] for name in names})
    size = 0
    kept = dict(server)
    for number in sorted(by_round, reverse=True):
        size += _size(by_round[number])
        if size > limit:
            kept["since"] = torch.maximum(kept["since"], torch.tensor(number + 1))
            for name in by_round[number]:
                del kept[name]
    return kept


def _rounds(entries: Mapping[str, Tensor]) -> list[int]:
    """Return the rounds of which a module has increments, in order."""
    rounds = [int(factor[2:]) for factor in entries if factor.startswith("A+")]
    return sorted(rounds)


def _size(tensors: Payload) -> int:
    """Return how many numbers there are."""
    return sum(tensor.numel() for tensor in tensors.values())
