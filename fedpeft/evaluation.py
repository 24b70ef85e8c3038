"""Score a state: mount what the server sends without training it, and count what the model says."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedpeft.hardware import Hardware
from fedpeft.tasks import Classification, Encoded, Scores
from fedpeft.types import NEVER, Client, Context, LocalTask, Method, Payload, State

WHOLE = Client(NEVER)
"""A client of full capacity that remembers nothing: what it is sent is the whole model."""


def score(model: nn.Module, task: Classification, examples: Encoded, hardware: Hardware) -> Scores:
    """Count what ``model``, as it is mounted now, says about ``examples``."""
    return task.score(says(model, task, examples, hardware), examples.labels)


def says(model: nn.Module, task: Classification, examples: Encoded, hardware: Hardware, batch_size: int = 64) -> Tensor:
    """Return the (n, C) logits of ``model``, as it is mounted now, for ``examples``; batches are formed by length."""
    order = sorted(range(len(examples)), key=lambda row: len(examples.ids[row]))
    found = torch.zeros(len(examples), len(task.labels))
    model.eval()
    with hardware.computing(model), torch.inference_mode(), hardware.autocast():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found[rows] = task.logits(model, task.collate(examples.take(rows), hardware.torch_device)).cpu()
    return found


@contextmanager
def held(
    method: Method,
    state: State,
    model: nn.Module,
    hardware: Hardware,
    seed: int,
    client: Client = WHOLE,
    memory: Payload | None = None,
) -> Iterator[LocalTask]:
    """Mount ``state`` on ``model`` as ``client``, with its ``memory``, holds it; by default the whole of it."""

    def stack(payload: Payload) -> dict[str, Tensor]:
        return {name: tensor.to(hardware.torch_device).unsqueeze(0) for name, tensor in payload.items()}

    context = Context([client.id], state.round, seed)
    with method.mount(model, stack(method.send(state, client)), stack(memory or {}), context) as local:
        yield local
