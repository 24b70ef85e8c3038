"""Score a state: mount what the server sends without training it, and count what the model says."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpeft.hardware import Hardware
from fedpeft.tasks import Classification, Encoded, Scores
from fedpeft.types import NEVER, Client, Context, Method, Payload, State

WHOLE = Client(NEVER)
"""A client of full capacity that remembers nothing: what it is sent is the whole model."""


def score(
    model: nn.Module, task: Classification, examples: Encoded, hardware: Hardware, batch_size: int = 64
) -> Scores:
    """Count what ``model``, as it is mounted now, says about ``examples``; batches are formed by length."""
    order = sorted(range(len(examples)), key=lambda row: len(examples.ids[row]))
    total = Scores(torch.zeros(3, len(task.labels), dtype=torch.int64), 0.0)
    with torch.inference_mode(), hardware.autocast():
        for start in range(0, len(order), batch_size):
            batch = task.collate(examples.take(order[start : start + batch_size]), hardware.torch_device)
            part = task.score(model, batch)
            total = Scores(total.counts + part.counts, total.loss_sum + part.loss_sum)
    return total


def stack(payload: Payload, device: torch.device) -> Mapping[str, Tensor]:
    """Return a payload with a client axis of one, on ``device``."""
    return {name: tensor.to(device).unsqueeze(0) for name, tensor in payload.items()}


def evaluate(
    method: Method,
    state: State,
    model: nn.Module,
    task: Classification,
    examples: Encoded,
    hardware: Hardware,
    seed: int,
) -> Scores:
    """Score ``state`` on ``examples``, as a client of full capacity would hold it."""
    down = stack(method.send(state, WHOLE), hardware.torch_device)
    with method.mount(model, down, {}, Context([WHOLE.id], state.round, seed)):
        return score(model, task, examples, hardware)
