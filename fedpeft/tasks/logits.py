"""Logits of a language model where they are read, and no others."""

from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpeft.tasks.task import Batch

TOLERANCE: Final[dict[torch.dtype, float]] = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far logits may differ, as a share of the largest; of the formats with few digits 0.05."""

_CHOOSES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model computes logits at chosen positions, as it was found out."""


def logits_at(model: nn.Module, inputs: Batch, positions: Tensor) -> Tensor:
    """Return the logits at ``positions`` of each row, (n, R, V) in float32.

    ``inputs``: what the model reads, (n, L) each. ``positions``: (n, R). The output layer, a fifth
    of a small language model's work, sees the hidden states at these alone, (n, R, H): the family's
    own scaling of logits follows in its own code. Where a model cannot do so, which is found out
    once by comparing both ways, the logits are taken from those at all positions.
    """
    if chooses(model, inputs, positions):
        out: Tensor = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    else:
        out = _taken(model, inputs, positions)
    return out.float()


def chooses(model: nn.Module, inputs: Batch, positions: Tensor) -> bool:
    """Return whether ``model`` computes logits at the ``positions`` of each row, and no others."""
    if model not in _CHOOSES:
        _CHOOSES[model] = _agree(model, inputs, positions)
    return _CHOOSES[model]


@torch.no_grad()
def looks_ahead(model: nn.Module, ids: Tensor) -> bool:
    """Return whether what ``model`` says behind a token depends on the tokens that follow it.

    ``ids``: a text of two tokens or more, (1, L). A masked language model does so: it would read
    the very tokens that it is to say.
    """
    alone, followed = (
        model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False).logits[0, 0]
        for part in (ids[:, :1], ids)
    )
    difference = (followed - alone).abs().max()
    return bool(difference > TOLERANCE.get(alone.dtype, 0.05) * alone.abs().max())


@torch.no_grad()
def _agree(model: nn.Module, inputs: Batch, positions: Tensor) -> bool:
    """Return whether logits at chosen positions are those of the full model there."""
    full = _taken(model, inputs, positions)
    try:
        chosen: Tensor = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    except Exception:  # of a family's code, which may not know the argument, or only one number
        return False
    if chosen.shape != full.shape:
        return False
    difference = (chosen - full).abs().max()
    return bool(difference <= TOLERANCE.get(full.dtype, 0.05) * full.abs().max())


def _taken(model: nn.Module, inputs: Batch, positions: Tensor) -> Tensor:
    """Return the logits at ``positions``, (n, R, V), from those at all of them."""
    everywhere: Any = model(**inputs, use_cache=False).logits  # (n, L, V)
    return torch.take_along_dim(everywhere, positions.unsqueeze(-1), dim=1)
