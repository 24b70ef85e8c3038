"""Vectors of what texts say, by a pre-trained model as it comes: the mean of its last states."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.data import Rows
from fedpeft.models.choice import ModelSection
from fedpeft.models.padding import settle_padding
from fedpeft.models.source import find
from fedpeft.tasks import Encoded, Task
from fedpeft.tasks.padding import inputs

TOKENS: Final = 4096
"""Tokens that go through the model together, padding included."""


def embed(choice: ModelSection, task: Task, splits: Sequence[Rows]) -> list[NDArray[np.float32]]:
    """Return a vector for every row of each split, (rows, width).

    It is the mean of the model's last states over the tokens that ``task`` makes of the row,
    windows of a long row taken together; a row of which it makes none has the vector 0. The model
    is the checkpoint without a head. It computes on the CPU in float32 whatever else there is, so
    that clusters do not depend on the machine. A model that cannot be loaded raises BadInput.
    """
    source = find(choice, "AutoModel")
    config = source.configuration()
    model, _ = source.weights(config, "eager", seed=0)  # nothing of it is read that is drawn
    tokenizer = source.tokenizer(config)
    settle_padding(tokenizer, model, choice)
    tokenizing_task = task.with_tokenizer(tokenizer)
    # Of an encoder with a decoder, only the encoder reads the text.
    reader: Any = model.get_encoder() if config.is_encoder_decoder else model
    reader.eval()
    embedded: list[NDArray[np.float32]] = []
    for rows in splits:
        examples = tokenizing_task.encode(rows)
        embedded.append(_means(reader, examples, len(rows), tokenizer.pad_token_id))
    return embedded


def _means(reader: Any, examples: Encoded, rows: int, padding: int) -> NDArray[np.float32]:
    """Return the mean state of every row, (rows, width); ``padding``: the id of that token."""
    sums = torch.zeros(rows, reader.config.get_text_config().hidden_size)
    lengths = torch.zeros(rows, 1)
    for batch in _batches(examples):
        read = inputs(batch, max(batch.lengths), padding)
        mask = read["attention_mask"].unsqueeze(2)  # (n, L, 1)
        with torch.inference_mode():
            states = reader(**read).last_hidden_state  # (n, L, width)
        of_rows = torch.tensor([example.row for example in batch])
        sums.index_add_(0, of_rows, (states * mask).sum(dim=1))
        lengths.index_add_(0, of_rows, mask.sum(dim=1).float())
    means: NDArray[np.float32] = (sums / lengths.clamp(min=1)).numpy()
    return means


def _batches(examples: Encoded) -> list[Encoded]:
    """Return the examples in batches of like length, of ``TOKENS`` tokens each at most."""
    lengths = examples.lengths
    batches: list[Encoded] = []
    taken: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Sorted by length, the newest is the longest, to which all are padded.
        if taken and (len(taken) + 1) * lengths[index] > TOKENS:
            batches.append(examples.take(taken))
            taken = []
        taken.append(index)
    return [*batches, examples.take(taken)] if taken else batches
