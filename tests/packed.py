"""Tiny models with a base of 4 or 8 bits, loaded as the product loads them, and workers on them."""

import atexit
import contextlib
import io
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import nn

from fedpeft.federation.client import ClientData, Worker
from fedpeft.models import Loaded, ModelSection, load
from fedpeft.mounting import describe, unpack_layers
from fedpeft.tasks import Task
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Training
from fedpeft.types import Base, Method
from tests import causal_lms, tiny_tasks
from tests.tiny import CONFIG, CPU, SEED

BITS = (4, 8)
KINDS = ("bert", "llama")
SIZES = {0: 5, 1: 9, 2: 7}
"""Client -> rows of training; batches of 4 are ragged, and clients have unequal numbers of steps."""
SGD = Training(optimizer="sgd", lr=0.2, momentum=0.9, batch_size=4, clip=0.3)


def task_of(kind: str) -> Task:
    """Return classification for BERT, tuning on prompts and responses for Llama."""
    return causal_lms.task() if kind == "llama" else tiny_tasks.TASK_CASES["classification"].task()


def rows_of(kind: str, count: int, seed: int) -> Any:
    """Return random rows of the task."""
    if kind == "llama":
        return causal_lms.rows(count, seed)
    return tiny_tasks.TASK_CASES["classification"].rows(count, seed)


@cache
def folder(kind: str) -> Path:
    """Return a folder with the checkpoint of a tiny model, and its tokenizer."""
    parent = Path(mkdtemp(prefix="fedpeft-tests-"))
    atexit.register(shutil.rmtree, parent)
    place = parent / kind
    model: Any = (
        causal_lms.causal_lm("llama")
        if kind == "llama"
        else tiny_tasks.TASK_CASES["classification"].make()
    )
    tokenizer = causal_lms.tokenizer() if kind == "llama" else tiny_tasks.tokenizer()
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@cache
def loaded(kind: str, bits: int) -> Loaded:
    """Return the model as the product loads it; tests leave it as it is."""
    choice = ModelSection(name=str(folder(kind)), max_length=20, bits=bits)  # type: ignore[arg-type]
    return load(choice, task_of(kind), CPU, SEED)


@cache
def unpacked(kind: str, bits: int) -> nn.Module:
    """Return the same model with ordinary layers that hold the same matrices."""
    model = deepcopy(loaded(kind, bits).model)
    unpack_layers(model)
    return model


def bases(kind: str, bits: int) -> tuple[Base, Base]:
    """Return the server's view of ``loaded`` and of ``unpacked``."""
    one = loaded(kind, bits)
    output: Any = unpacked(kind, bits)
    without = output.get_output_embeddings() if kind == "llama" else None
    return one.base, describe(output, one.base.head, without)


def worker(
    kind: str, bits: int, method: Method, *, plain: bool = False, hardware: Hardware = CPU
) -> Worker:
    """Return a worker whose clients hold random rows; ``plain``: on the unpacked model."""
    task, one = task_of(kind), loaded(kind, bits)
    model = unpacked(kind, bits) if plain else one.model
    with torch.no_grad():
        assert not task.trial(model, CPU.torch_device)
    held: dict[int, ClientData] = {}
    for client, size in SIZES.items():
        own = task.encode(rows_of(kind, size, client))
        held[client] = ClientData(own, own)
    return Worker(
        method=method,
        model=model,
        task=task,
        client_data=held,
        training=SGD,
        hardware=hardware,
        head=one.base.head,
        seed=SEED,
        config=CONFIG,
        step_alone=None,
    )


def kept(model: nn.Module) -> dict[str, bytes]:
    """Return the bytes of every parameter and buffer."""
    parts = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().numpy().tobytes() for name, tensor in parts}
