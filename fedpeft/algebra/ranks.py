"""Clients of unequal ranks: how many ranks a client has, and the part of an adapter it is sent."""

from torch import Tensor

from fedpeft.errors import BadInput
from fedpeft.types import Client, Payload


def share_of(client: Client, count: int, field: str = "method.rank") -> int:
    """Return how many of ``count`` ranks ``client`` trains: its capacity's share, rounded down.

    A share below one raises BadInput. ``field``: what the setting of ``count`` is called.

    >>> share_of(Client(0, capacity=0.5), 8), share_of(Client(0), 8)
    (4, 8)
    """
    share = int(client.capacity * count + 1e-9)  # 0.7 * 10 is a little less than 7
    if share < 1:
        raise BadInput(
            f"client {client.id} has capacity {client.capacity}, which is less than one of "
            f"{field} = {count}; choose a capacity of at least {1 / count:.4g}"
        )
    return min(share, count)


def cut(tensors: Payload, rank: int) -> Payload:
    """Return the first ``rank`` ranks of every factor, and all else as it is.

    Factors that have no more are not copied, and where none has, it is ``tensors`` itself.

    >>> import torch
    >>> adapter = {"q:A": torch.ones(4, 3), "q:B": torch.ones(2, 4), "bias": torch.ones(5)}
    >>> [tuple(tensor.shape) for tensor in cut(adapter, 2).values()]
    [(2, 3), (2, 2), (5,)]
    """
    shorter: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(":A") and len(tensor) > rank:
            shorter[name] = tensor[:rank]
        elif name.endswith(":B") and tensor.shape[1] > rank:
            shorter[name] = tensor[:, :rank].contiguous()
    return {**tensors, **shorter} if shorter else tensors


def ranks_in(tensors: Payload) -> int:
    """Return the largest rank of a factor A, (r, in), in ``tensors``; 0 where there is none."""
    ranks = [len(tensor) for name, tensor in tensors.items() if name.endswith(":A")]
    return max(ranks, default=0)
