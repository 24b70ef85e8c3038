"""How many clients had best train side by side here: found out once per run, by trying."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch

from fedpeft.errors import NotStackable
from fedpeft.federation.client import ClientData, Worker
from fedpeft.ledger import measured
from fedpeft.methods.lora import LoRA
from fedpeft.tasks import Encoded, Example
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
    """Return how many of the ``count`` clients of a round train side by side.

    That is the largest number that gains by it within the memory there is. It is measured on one
    step of LoRA for each client, the yardstick of model and machine. A method that cannot carry so
    many is found out by the engine, when it tries.
    """
    by_size = sorted(clients, key=lambda client: client.examples, reverse=True)
    largest = by_size[:count]  # their batches are full
    if len(largest) == 1:
        return 1
    trial, request = _trial(worker, base)
    with measured(worker.hardware.torch_device) as before:  # the memory that is taken already
        pass

    def timed(size: int) -> tuple[float, int]:
        """Return the seconds and the peak bytes of one step of ``size`` clients side by side."""
        ids = [client.id for client in largest[:size]]
        start = time.perf_counter()
        answers = trial.handle(ids, [request] * size, [b""] * size)
        seconds = time.perf_counter() - start
        return seconds, Response.decode(answers[0][0]).measured.peak_memory

    def gains(size: int) -> bool:
        """Return whether one of two trials takes less time per client than a client alone."""
        for _ in range(2):  # the first makes the kernels for this size, and may be slow for it
            seconds, _peak = timed(size)
            if seconds / size < GAIN * alone:
                return True
        return False

    # 1. What a client alone takes; of two trials the faster one, which other work disturbed less.
    timed(1)  # makes the kernels for these shapes
    alone, peak = min(timed(1), timed(1))
    # Some systems know only the peak since the process began, which then need not have grown.
    bytes_each = (peak - before.peak_memory) or peak
    room = SHARE * _memory(worker.hardware.torch_device) - before.peak_memory

    # 2. Sizes that are worth a trial: as if a stack took as much as its clients one by one.
    candidates: list[int] = []
    for size in sizes(len(largest))[1:]:
        if size * alone <= PATIENCE and size * bytes_each <= room:
            candidates.append(size)

    # 3. The trials themselves.
    return _largest_that_gains(candidates, gains)


def _largest_that_gains(candidates: Sequence[int], gains: Callable[[int], bool]) -> int:
    """Return the largest of ``candidates``, in increasing order, that gains; 1 where none does."""
    for size in reversed(candidates):
        try:
            if gains(size):
                return size
        except NotStackable:  # of the model: it holds for every size
            break
        except Exception:  # out of memory above all; fewer may do
            continue
    return 1


def apart(worker: Worker, base: Base) -> bool:
    """Return whether every dense layer keeps the rows of a batch apart, as stacks need.

    A model may turn (rows, length) round inside, or feed a layer with rows of its own. That shows
    in the number of rows that the layers see, for a batch that has not as many rows as its texts
    have tokens. False also where the model cannot be tried, for whatever reason.
    """
    trial, request = _trial(worker, base)
    text = _probe(worker)
    if text is None:
        return False
    # Two clients train on ``rows`` texts each; with as many tokens as rows in all, (rows, length)
    # turned round would look the same.
    rows = 3 if len(text) != 2 * 3 else 4
    batch = Encoded([text] * rows)
    client = next(iter(worker.client_data))
    trial = replace(
        trial,
        client_data={client: ClientData(batch, batch)},
        training=replace(trial.training, batch_size=rows),
        # Padded, a text might be as long as there are rows.
        hardware=replace(worker.hardware, pad_to_multiple_of=1),
    )
    try:
        trial.handle([client] * 2, [request] * 2, [b""] * 2)
    except Exception:
        # NotStackable as a rule; a model that fails alone, too, fails again in training.
        return False
    return True


def _probe(worker: Worker) -> Example | None:
    """Return a short text that has some tokens; None where there is no text.

    Where no text has enough tokens the longest is taken. The text is not shortened, as T5 and BART
    refuse a text whose end was cut off.
    """
    texts: list[Example] = []
    for data in worker.client_data.values():
        texts += data.train
    long_enough = [text for text in texts if len(text) >= TOKENS]
    if long_enough:
        return min(long_enough, key=len)
    return max(texts, key=len, default=None)


def _trial(worker: Worker, base: Base) -> tuple[Worker, bytes]:
    """Return a worker that takes one step with LoRA on every dense layer, and its request."""
    smallest = min(min(weight.shape) for weight in base.layers.values())  # (out, in) each
    yardstick = LoRA(targets="all-linear", rank=min(8, smallest))  # no rank exceeds its layer's
    state = yardstick.init(base, worker.seed)
    request = Request(Kind.TRAIN, 0, worker.config, state.shared)
    trial = replace(
        worker,
        method=yardstick,
        training=replace(worker.training, steps=1),
        # A cache that keeps nothing: with the run's, later trials would look faster.
        cache=ActivationCache(),
        step_alone=None,
    )
    return trial, request.encode()


def sizes(count: int) -> list[int]:
    """Return the sizes of a stack that deal ``count`` clients evenly, in increasing order.

    1, about 2, 4, 8 and so on, and all of them.

    >>> sizes(8), sizes(20)
    ([1, 2, 4, 8], [1, 2, 4, 10, 20])
    """
    stack_sizes: set[int] = set()
    for power in range(count.bit_length()):
        stacks = max(1, count >> power)  # how many stacks a round is dealt into
        stack_sizes.add(-(-count // stacks))  # rounded up
    return sorted(stack_sizes)


def _memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of this machine; 8 GiB where no one tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    known = set(getattr(os, "sysconf_names", ()))  # Windows has none
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= known:
        return 8 << 30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
