"""Score a state: mount what the server sends and count how good the predictions are."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedpeft.tasks import Counts, Encoded, Prediction, Task
from fedpeft.training.hardware import Hardware
from fedpeft.training.threads import thread_map
from fedpeft.types import NO_MEMORY, Client, Context, LocalTask, Method, Payload, State
from fedpeft.wire.versions import as_told, parted

EVALUATED = 1 << 15
"""Tokens that are scored together at most."""
FULL_CLIENT = Client(NO_MEMORY)
"""A client of full capacity that remembers nothing: what it is sent is the whole model."""


def score(model: nn.Module, task: Task, examples: Encoded, hardware: Hardware) -> Counts:
    """Count how good the predictions of ``model``, as it is mounted now, are for ``examples``."""
    examples = task.to_score(examples)
    return task.score(predictions(model, task, examples, hardware), examples)


def predictions(
    model: nn.Module, task: Task, examples: Encoded, hardware: Hardware
) -> list[Prediction]:
    """Return the predictions of ``model``, as it is mounted now, for ``examples``, in their order.

    Batches are formed by length, and as many are computed at once as there are threads.
    """
    # A GPU takes a whole step of training at once, but an evaluation may have any number of texts.
    buckets = replace(hardware.buckets, max_tokens=min(hardware.tokens, EVALUATED))
    batches = buckets.cheapest(examples.lengths)
    num_parallel = min(hardware.threads, len(batches))

    def forward(rows: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the model's outputs for ``rows``, named tensors, (n, ...)."""
        chosen = examples.take(rows)
        batch = task.collate(chosen, hardware.torch_device, buckets.pad_to_multiple_of)
        # Modes are a thread's own: they are set where the pass runs.
        with torch.inference_mode(), hardware.autocast():
            outputs = task.predict(model, batch)
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    in_order: list[Prediction] = [{}] * len(examples)  # every entry is replaced below
    model.eval()
    with hardware.computing(model), thread_map(num_parallel) as parallel_map:
        for rows, outputs in zip(batches, parallel_map(forward, batches), strict=True):
            for index, row in enumerate(rows):
                in_order[row] = {name: tensor[index] for name, tensor in outputs.items()}
    return in_order


@contextmanager
def mounted_state(
    method: Method,
    state: State,
    model: nn.Module,
    hardware: Hardware,
    seed: int,
    client: Client = FULL_CLIENT,
    memory: Payload | None = None,
) -> Iterator[LocalTask]:
    """Mount ``state`` on ``model`` as ``client``, with its ``memory``, holds it.

    By default that is the whole state.
    """
    context = Context([client.id], state.round, seed)
    # What the loop keeps in the same memory is not the method's to see.
    methods_part, _ = parted(memory or {})
    sent = method.send(state, as_told(client))
    down = _stack_of_one(sent, hardware.torch_device)
    remembered = _stack_of_one(methods_part, hardware.torch_device)
    with method.mount(model, down, remembered, context) as local:
        yield local


def _stack_of_one(payload: Payload, device: torch.device) -> dict[str, Tensor]:
    """Return a payload on ``device`` with a client axis, (1, ...)."""
    return {name: tensor.to(device).unsqueeze(0) for name, tensor in payload.items()}
