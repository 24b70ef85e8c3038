"""How many clients had best train side by side here: found out once per run, by trying, within the memory there is."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fedpeft.errors import NotStackable
from fedpeft.federation.client import ClientData, Worker
from fedpeft.ledger import measured
from fedpeft.methods.lora import LoRA
from fedpeft.tasks import Encoded
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.types import Base, Client
from fedpeft.wire.messages import Kind, Request, Response

GAIN: Final = 0.95
"""A stack must take at most this share of a lone client's time, per client."""
PATIENCE: Final = 4.0
"""Seconds that a trial may be expected to take, as many lone clients would."""
TOKENS: Final = 5
"""Tokens that a text should have by which rows and length are told apart."""
SHARE: Final = 0.5
"""Share of the memory that a stack may be expected to need, as many lone clients would."""


def widest(worker: Worker, base: Base, clients: Sequence[Client], count: int) -> int:
    """Return how many of the ``count`` clients of a round train side by side: the most that gain by it.

    Measured on one step of LoRA each, the yardstick of model and machine; what a method cannot carry, the engine finds out
    when it tries.
    """
    most = sorted(clients, key=lambda client: client.examples, reverse=True)[
        :count
    ]  # full batches first
    if len(most) == 1:
        return 1
    trial, request = _trial(worker, base)
    with measured(worker.hardware.torch_device) as before:
        pass

    def once(size: int) -> tuple[float, int]:
        ids = [client.id for client in most[:size]]
        start = time.perf_counter()
        answers = trial.handle(ids, [request] * size, [b""] * size)
        return time.perf_counter() - start, Response.decode(answers[0][0]).measured.peak_memory

    once(1)  # makes the kernels for these shapes
    alone, peak = min(once(1), once(1))
    each = (
        peak - before.peak_memory
    ) or peak  # some systems tell the peak since the process began alone
    memory = SHARE * _memory(worker.hardware.torch_device) - before.peak_memory
    for size in sorted(sizes(len(most)), reverse=True)[:-1]:
        if size * alone > PATIENCE or size * each > memory:
            continue
        try:
            if any(once(size)[0] / size < GAIN * alone for _ in range(2)):
                return size
        except NotStackable:
            break
        except Exception:  # out of memory above all; fewer may do
            continue
    return 1


def apart(worker: Worker, base: Base) -> bool:
    """Return whether the model keeps the rows of a batch apart in every dense layer, as side by side they must be.

    Told from the number of rows that the layers see, for a batch whose texts have another length than it has rows: a
    model may turn (rows, length) round inside, or feed a layer with rows of its own. A model that cannot be tried so
    is not known to do, whatever the reason.
    """
    trial, request = _trial(worker, base)
    probe = _probe(worker)
    if probe is None:
        return False
    text, label = probe
    rows = 3 if len(text) != 2 * 3 else 4  # of each of two clients
    own = Encoded([text] * rows, [label] * rows)
    first = next(iter(worker.client_data))
    trial = replace(
        trial,
        client_data={first: ClientData(own, own)},
        training=replace(trial.training, batch_size=rows),
        hardware=replace(
            worker.hardware, pad_to_multiple_of=1
        ),  # padded, it might be as long as there are rows
    )
    try:
        trial.handle([first] * 2, [request] * 2, [b""] * 2)
    except (
        Exception
    ):  # NotStackable as a rule; a model that fails alone, too, fails again in training
        return False
    return True


def _probe(worker: Worker) -> tuple[Tensor, Tensor] | None:
    """Return a short text that has some tokens, and its label; None where there is no text.

    Where no text has enough tokens the longest is taken. A whole text: T5 and BART refuse one whose
    end was cut off.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for own in worker.client_data.values():
        pairs += zip(own.train.ids, own.train.labels, strict=True)
    enough = [pair for pair in pairs if len(pair[0]) >= TOKENS]
    if enough:
        return min(enough, key=lambda pair: len(pair[0]))
    return max(pairs, key=lambda pair: len(pair[0]), default=None)


def _trial(worker: Worker, base: Base) -> tuple[Worker, bytes]:
    """Return a worker that takes one step with LoRA on every dense layer, and its request."""
    yardstick = LoRA(
        targets="all-linear", rank=min(8, *(min(weight.shape) for weight in base.layers.values()))
    )
    request = Request(
        Kind.TRAIN, 0, worker.config, yardstick.init(base, worker.seed).shared
    ).encode()
    trial = replace(
        worker,
        method=yardstick,
        training=replace(worker.training, steps=1),
        cache=ActivationCache(),
        step_alone=None,
    )
    return trial, request


def sizes(count: int) -> list[int]:
    """Return what deals ``count`` clients evenly into stacks: 1, about 2, 4, 8 and so on, and all of them."""
    stacks = [max(1, count >> power) for power in range(count.bit_length())]
    return sorted({-(-count // number) for number in stacks})


def _memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of this machine; where the system does not tell, 8 GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    known = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(getattr(os, "sysconf_names", ()))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else 8 << 30
