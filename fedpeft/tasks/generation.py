"""Greedy generation for a batch of prompts, with a cache of keys and values."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.tasks.padding import padded_left

NOTHING = -1
"""What stands in the place of a token behind the end of a response."""


def continued(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    limits: Tensor,
    ends: Sequence[int],
) -> Tensor:
    """Return the likeliest token, again and again, behind each prompt: (n, T) int64.

    ``ids`` and ``mask``: prompts padded on the right, (n, L) each. ``limits``: how many tokens each
    may get, (n,); T is the largest. ``ends``: the tokens that end a response, which they belong to.
    Behind its end a row holds -1.
    """
    device = ids.device
    end_tokens = torch.tensor(list(ends), device=device)
    # The next token follows all of a row, so the padding goes to the left.
    prompts = padded_left({"input_ids": ids, "attention_mask": mask})
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    takes_positions = _takes(model, "position_ids")
    # Of the first token of each row, not of its padding; padding gets any position.
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    tokens = torch.full((len(ids), int(limits.max())), NOTHING, device=device)
    active = limits > 0
    cache: Any = None
    read, read_positions = ids, positions  # what the next pass reads
    for step in range(tokens.shape[1]):
        more: dict[str, Any] = {"position_ids": read_positions} if takes_positions else {}
        if cache is not None:
            more["past_key_values"] = cache
        out = model(input_ids=read, attention_mask=mask, use_cache=True, **more)
        likeliest = out.logits[:, -1].argmax(dim=-1)  # (n,)
        tokens[:, step] = torch.where(active, likeliest, NOTHING)
        active = active & ~torch.isin(likeliest, end_tokens) & (limits > step + 1)
        if not bool(active.any()):
            break
        # Rows that have ended are carried along: nobody reads what they say.
        ids = torch.cat([ids, likeliest.unsqueeze(1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        cache = getattr(out, "past_key_values", None)
        read, read_positions = ids, positions
        if cache is not None:  # a family without a cache reads everything again
            read, read_positions = ids[:, -1:], positions[:, -1:]
    return tokens


def _takes(model: nn.Module, argument: str) -> bool:
    """Return whether ``model`` takes an argument of that name, or of any."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return argument in parameters or inspect.Parameter.VAR_KEYWORD in kinds
