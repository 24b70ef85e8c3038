"""The tokens that the head of a family reads: no others are computed, and none is padding."""

from typing import Any

import torch
from torch import nn

from fedpeft.tasks.padding import padded_left

READS_FIRST = {
    "bert": ("encoder.layer", "attention.output"),
    "roberta": ("encoder.layer", "attention.output"),
    "distilbert": ("transformer.layer", "sa_layer_norm"),
}
"""Families whose head reads the first token alone.

For each its blocks, and the module of a block through which its attention leaves.
"""
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids")
"""What tasks give to a model that has a number for each token."""
READS_LAST = ("xlnet",)
"""Families whose head reads the last position, as their own tokenizers pad on the left."""


def spare_last_block(model: nn.Module) -> None:
    """Let the last block compute the first token alone where the head reads no other.

    Its attention still reads all tokens; what follows the attention computes the first one.
    """
    config: Any = model.config
    # Chunks of a feed-forward want a multiple of their size, not one token.
    chunked = getattr(config, "chunk_size_feed_forward", 0) > 1
    if config.model_type in READS_FIRST and not chunked:
        blocks, leaving = READS_FIRST[config.model_type]
        last: Any = model.base_model.get_submodule(blocks)[-1]  # type: ignore[union-attr,index]
        last.get_submodule(leaving).register_forward_pre_hook(_first_tokens)


def _first_tokens(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the first token of hidden states, (n, L, width) -> (n, 1, width)."""
    # Contiguous: for a view with gaps a dense layer would make n products of one row each.
    return tuple(hidden[:, :1].contiguous() for hidden in inputs)


def pad_on_the_left(model: nn.Module) -> None:
    """Move the padding of batches to the left where the head reads the last position.

    Tasks pad on the right.
    """
    config: Any = model.config
    if config.model_type in READS_LAST:
        model.register_forward_pre_hook(_turned, with_kwargs=True)


def _turned(
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move the padding of all that has a number for each token, (n, L), from right to left."""
    batch = {name: kwargs[name] for name in PER_TOKEN if name in kwargs}
    return args, {**kwargs, **padded_left(batch)}
