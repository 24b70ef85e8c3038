"""Which ranks of all layers a client chooses, and the vectors of these alone (LoRA-A2).

All functions count the ranks of all modules together, in alphabetical order of the modules. A
rank's vector is its row of A or its column of B.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fedpeft.algebra.importance import unpack
from fedpeft.algebra.lowrank import by_module
from fedpeft.types import Client, Payload, State, Update


def turn(round_number: int) -> tuple[str, str]:
    """Return the factor that is trained in a round, and the one that rests, where they take turns.

    Rounds are counted from 0. B is first: as long as it is 0, A has no gradient.

    >>> turn(0), turn(1)
    (('B', 'A'), ('A', 'B'))
    """
    return ("A", "B") if round_number % 2 else ("B", "A")


def vectors(factor: Tensor, part: str) -> Tensor:
    """Return a factor rank by rank: A, (..., r, in), as it is; B, (..., out, r), turned round.

    It is its own inverse: it makes a factor of vectors, too.
    """
    return factor if part == "A" else factor.mT


@torch.no_grad()
def contributions(before: Payload, after: Payload, part: str) -> Tensor:
    """Return by how much each rank has changed the product B A, (K, n), where ``part`` has moved.

    That is |dB_i| |A_i| or |B_i| |dA_i|, the Frobenius norm of the rank's change (LoRA-A2, equation
    4). ``before``: both factors of every module, (K, ...). ``after``: those that have moved.

    >>> before = {"q:A": torch.tensor([[[3.0, 4.0]]]), "q:B": torch.tensor([[[1.0]]])}
    >>> contributions(before, {"q:B": torch.tensor([[[3.0]]])}, "B")
    tensor([[10.]])
    """
    resting = "A" if part == "B" else "B"
    scores: list[Tensor] = []
    for module, factors in sorted(by_module(before).items()):
        moved = vectors(after[f"{module}:{part}"] - factors[part], part)  # (K, r, length)
        scores.append(moved.norm(dim=2) * vectors(factors[resting], resting).norm(dim=2))
    return torch.cat(scores, dim=1)


def highest(scores: Tensor, count: int) -> Tensor:
    """Return which ``count`` of the scores, (K, n), are each client's highest, (K, n) of bool.

    Of equal ones the first are chosen.

    >>> highest(torch.tensor([[1.0, 3.0, 1.0]]), 2)
    tensor([[ True,  True, False]])
    """
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, value=True)


def in_modules(chosen: Tensor, modules: Iterable[str]) -> dict[str, Tensor]:
    """Return what is chosen of each module, (..., n) -> (..., r) by name.

    >>> in_modules(torch.tensor([True, False, True, True]), ["value", "key"])
    {'key': tensor([ True, False]), 'value': tensor([True, True])}
    """
    names = sorted(modules)
    of_each = chosen.view(*chosen.shape[:-1], len(names), -1)  # (..., modules, r)
    return dict(zip(names, of_each.unbind(-2), strict=True))


@final
@dataclass(frozen=True)
class Split:
    """The adapters of K clients in two: the ranks that each has chosen, and those that rest.

    ``moving``: the factor that is trained, ``frozen``: the other one, of the chosen ranks alone.
    ``resting``: both factors, with zeros in the chosen ranks of the one that is trained. ``real``:
    module -> (K, m), where m is the largest number of ranks that a client has chosen of it; False
    where one has fewer: its factors are 0 there, and stay so when trained.
    """

    part: str
    moving: dict[str, Tensor]
    frozen: dict[str, Tensor]
    resting: dict[str, Tensor]
    real: dict[str, Tensor]

    @staticmethod
    def of(sent: Payload, chosen: Tensor, part: str) -> "Split":
        """Return the adapters in ``sent``, in two by what is ``chosen``, (K, n) of bool."""
        split = Split(part, {}, {}, {}, {})
        modules = by_module(sent)
        for module, of_module in in_modules(chosen, modules).items():
            most = int(of_module.sum(dim=1).max())
            # A stable sort with True before False: the chosen ranks come first, in their order.
            ranks = of_module.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            real = of_module.gather(1, ranks)  # (K, m)
            if most:
                split.real[module] = real
            for name, factor in modules[module].items():
                whole = vectors(factor, name)  # (K, r, length)
                places = ranks.unsqueeze(2).expand(-1, -1, whole.shape[2])
                if most:
                    taken = vectors(whole.gather(1, places) * real.unsqueeze(2), name)
                    of_chosen = split.moving if name == part else split.frozen
                    of_chosen[f"{module}:{name}"] = taken
                left = whole * ~of_module.unsqueeze(2) if name == part else whole
                split.resting[f"{module}:{name}"] = vectors(left, name)
        return split

    def gathered(self, moved: Payload) -> dict[str, Tensor]:
        """Return the vectors of all chosen ranks, (K, count, length), in a stack for each length.

        ``moved``: as ``moving``. Clients have to have chosen as many ranks of each length, be it in
        other modules.
        """
        stacks: dict[str, list[list[Tensor]]] = {}  # name -> client -> module
        for module, real in self.real.items():
            of_clients = vectors(moved[f"{module}:{self.part}"], self.part)  # (K, m, length)
            parts = stacks.setdefault(_stack_name(of_clients.shape[2]), [[] for _ in real])
            for client, of_client in enumerate(of_clients):
                parts[client].append(of_client[real[client]])
        up: dict[str, Tensor] = {}
        for name, parts in stacks.items():
            up[name] = torch.stack([torch.cat(of_client) for of_client in parts])
        return up


def num_ranks(shared: Payload) -> int:
    """Return n, how many ranks all adapters in ``shared`` have together."""
    return sum(len(factors["A"]) for factors in by_module(shared).values())


def noted(state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
    """Return what each client has chosen, (n,) of bool, as the server keeps it.

    It replies with ``chosen``, a bit a rank, 8 to a byte.
    """
    ranks = num_ranks(state.shared)
    return {_entry(one.client): unpack(one.payload["chosen"], ranks) for one in updates}


def forms(state: State, client: Client, part: str) -> dict[str, tuple[int, int]]:
    """Return the form, (count, length), of each stack of the vectors that a client has chosen.

    >>> shared = {"q:A": torch.ones(2, 8), "q:B": torch.ones(5, 2)}
    >>> state = State(0, shared)
    >>> chosen = noted(state, [Update(Client(3), 9, {"chosen": torch.tensor([64]).byte()})])
    >>> forms(State(0, shared, chosen), Client(3), "A")
    {'chosen.8': (1, 8)}
    """
    found: dict[str, tuple[int, int]] = {}
    modules = by_module(state.shared)
    for module, of_module in in_modules(state.server[_entry(client)], modules).items():
        length, count = vectors(modules[module][part], part).shape[1], int(of_module.sum())
        if count:
            name = _stack_name(length)
            found[name] = found.get(name, (0, length))[0] + count, length
    return found


def scattered(state: State, update: Update, part: str) -> dict[str, Tensor]:
    """Return a reply with whole factors, which are 0 in all ranks that the client has not chosen.

    The reply has vectors as they were ``gathered``, and maybe other tensors.
    """
    modules = by_module(state.shared)
    whole = {name: tensor for name, tensor in update.payload.items() if name in state.shared}
    begin: dict[str, int] = {}  # stack -> where the next module's vectors are
    for module, of_module in in_modules(state.server[_entry(update.client)], modules).items():
        moved = torch.zeros_like(vectors(modules[module][part], part))  # (r, length)
        count = int(of_module.sum())
        if count:
            name = _stack_name(moved.shape[1])
            first = begin.get(name, 0)
            moved[of_module] = update.payload[name][first : first + count]
            begin[name] = first + count
        whole[f"{module}:{part}"] = vectors(moved, part)
    return whole


def _entry(client: Client) -> str:
    """Return the name under which the server keeps what a client has chosen."""
    return f"choice of client {client.id}"


def _stack_name(length: int) -> str:
    """Return the name of the stack of all vectors of one length."""
    return f"chosen.{length}"
