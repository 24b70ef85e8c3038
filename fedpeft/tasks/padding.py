"""Examples of different lengths as one batch."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fedpeft.tasks.task import Example

IGNORED = -100
"""The label of a token that has none, as everywhere in transformers."""
READ: Final = ("input_ids", "attention_mask", "token_type_ids")
"""What models read of a batch, as ``inputs`` makes it; the rest belongs to the task."""


def width_of(longest: int, pad_to_multiple_of: int, max_length: int) -> int:
    """Return to how many tokens a batch is padded whose longest example has ``longest``.

    Up to a multiple, but not beyond ``max_length``. An example longer than that keeps its length.

    >>> width_of(5, 4, 16), width_of(15, 4, 15), width_of(20, 8, 16)
    (8, 15, 20)
    """
    rounded = -(-longest // pad_to_multiple_of) * pad_to_multiple_of  # -(-a // b) rounds up
    return min(rounded, max(longest, max_length))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return 1-D tensors as one, in 32 bits where its numbers fit.

    >>> joined([torch.tensor([1]), torch.tensor([2, 3])]).dtype
    torch.int32
    """
    whole = torch.cat(list(tensors))
    narrow = whole.int()
    return narrow if bool((narrow == whole).all()) else whole


def padded(tensors: Sequence[Tensor], width: int, value: int) -> Tensor:
    """Return n tensors of up to ``width`` numbers as one, (n, width), filled up with ``value``."""
    together = pad_sequence(list(tensors), batch_first=True, padding_value=value)
    return functional.pad(together, (0, width - together.shape[1]), value=value)


def padded_left(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a number a token, (n, L) each, with their padding moved to the left.

    Among them is ``attention_mask``, which tells what is padding.

    >>> mask, ids = torch.tensor([[1, 1, 0]]), torch.tensor([[7, 8, 0]])
    >>> padded_left({"attention_mask": mask, "input_ids": ids})["input_ids"].tolist()
    [[0, 7, 8]]
    """
    mask = batch["attention_mask"]
    length = mask.shape[1]
    padding = length - mask.sum(dim=1, keepdim=True)  # (n, 1)
    # Position p of a row with q paddings takes what was at p - q, modulo the length: the paddings
    # from the end come to the front. (n, L)
    before = (torch.arange(length, device=mask.device) - padding) % length
    return {name: tensor.gather(1, before) for name, tensor in batch.items()}


def inputs(examples: Sequence[Example], width: int, padding: int) -> dict[str, Tensor]:
    """Return what every model reads, (n, width) each: input_ids, attention_mask.

    And ``token_type_ids`` where the examples have segments. ``padding``: the id of the padding
    token.
    """
    # From the lengths, since the padding token may also occur inside a text.
    lengths = torch.tensor([len(example) for example in examples])
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    batch = {
        "input_ids": padded([example.ids for example in examples], width, padding),
        "attention_mask": mask,
    }
    segments = [example.segments for example in examples if example.segments is not None]
    if segments:
        batch["token_type_ids"] = padded(segments, width, 0)
    return batch


def read_by_model(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the model itself reads of a batch; labels and the like are left out.

    >>> sorted(read_by_model({"labels": torch.ones(1), "input_ids": torch.ones(1, 1)}))
    ['input_ids']
    """
    return {name: batch[name] for name in READ if name in batch}
