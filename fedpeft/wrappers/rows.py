"""One client of a stack, and clients as a stack again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Row = dict[str, Tensor]
"""Tensors of one client, without a client axis."""


def row_of(stacks: Mapping[str, Tensor], row: int) -> Row:
    """Return the tensors of the client in ``row``, (K, ...) -> (...), in plain memory."""
    return {name: stack[row].detach().cpu() for name, stack in stacks.items()}


def stacked(rows: Sequence[Row]) -> Row:
    """Return the tensors of K clients with a client axis, (...) -> (K, ...)."""
    if len(rows) == 1:
        return {name: tensor.unsqueeze(0) for name, tensor in rows[0].items()}  # without a copy
    stacks: Row = {}
    for name in rows[0]:
        stacks[name] = torch.stack([row[name] for row in rows])
    return stacks
