"""Score a state: mount what the server sends without training it, and count what the model says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedpeft.tasks import Classification, Encoded, Scores
from fedpeft.training.hardware import Hardware
from fedpeft.training.threads import thread_map
from fedpeft.types import NO_MEMORY, Client, Context, LocalTask, Method, Payload, State
from fedpeft.wire.versions import as_told, parted

EVALUATED = 1 << 15
"""Tokens that are scored together at most."""
FULL_CLIENT = Client(NO_MEMORY)
"""A client of full capacity that remembers nothing: what it is sent is the whole model."""


def score(model: nn.Module, task: Classification, examples: Encoded, hardware: Hardware) -> Scores:
    """Count what ``model``, as it is mounted now, says about ``examples``."""
    return task.score(predict_logits(model, task, examples, hardware), examples.labels)


def predict_logits(
    model: nn.Module, task: Classification, examples: Encoded, hardware: Hardware
) -> Tensor:
    """Return the (n, C) logits of ``model``, as it is mounted now, for ``examples``; batches are formed by length."""
    lengths = [len(ids) for ids in examples.ids]
    buckets = replace(hardware.buckets, max_tokens=min(hardware.tokens, EVALUATED))
    batches = buckets.cheapest(lengths)

    def play(rows: Sequence[int]) -> Tensor:
        with torch.inference_mode(), hardware.autocast():
            return task.logits(
                model,
                task.collate(
                    examples.take(rows), hardware.torch_device, buckets.pad_to_multiple_of
                ),
            ).cpu()

    found = torch.zeros(len(examples), len(task.labels))
    model.eval()
    with hardware.computing(model), thread_map(min(hardware.threads, len(batches))) as at_once:
        for rows, logits in zip(batches, at_once(play, batches), strict=True):
            found[rows] = logits
    return found


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
    """Mount ``state`` on ``model`` as ``client``, with its ``memory``, holds it; by default the whole of it."""

    def stack(payload: Payload) -> dict[str, Tensor]:
        return {
            name: tensor.to(hardware.torch_device).unsqueeze(0) for name, tensor in payload.items()
        }

    context = Context([client.id], state.round, seed)
    own, _ = parted(memory or {})
    down = method.send(state, as_told(client))
    with method.mount(model, stack(down), stack(own), context) as local:
        yield local
