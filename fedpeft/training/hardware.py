"""What the machine is good at, found out once: device, number format, attention, threads."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Final, Literal

import torch
from annotated_types import Ge
from torch import nn

from fedpeft.errors import BadInput
from fedpeft.mounting import cast_once
from fedpeft.training.bucketing import Buckets

Precision = Literal["auto", "fp32", "bf16"]
Attention = Literal["auto", "eager", "sdpa"]
Kernel = Literal["eager", "sdpa"]
Kernels = tuple[Kernel, ...]

TOKENS = 1280
"""Tokens that go through the model together on CPU: matrix products are large enough with these."""
FEW_TOKENS = 512
"""The same for a large model: its products are large enough with these.

What a token leaves behind for the backward pass grows with the model's blocks, a megabyte for 135 M
parameters.
"""
GRAIN = 4
"""``pad_to_multiple_of`` for bf16 on CPU.

Torch makes its kernels anew there for every shape. That takes a twelfth of a step, unless shapes
come again.
"""
EVERYTHING = 1 << 40
"""More tokens than any step has: on a GPU the whole stack goes through the model at once."""
SHORT = 128
"""Tokens up to which eager attention beats torch's SDPA kernel on CPU."""


@dataclass(frozen=True)
class Machine:
    """What of the hardware is used; `auto` is resolved once, and kept with the run."""

    device: str = "auto"
    """Where the model computes, as torch names it: `cpu`, `cuda`, `cuda:1`; `auto` is a GPU if
    any."""
    precision: Precision = "auto"
    """Number format of the forward pass; `auto` is bf16 where it is much faster. Trained weights
    are fp32 always."""
    attention: Attention = "auto"
    """Kernel of the attention layers; `auto` is the fastest that the model's family has."""
    threads: Annotated[int, Ge(0)] = 0
    """Threads of the process; 0 leaves torch's own choice."""
    cache: Annotated[int, Ge(0)] = 512
    """Megabytes (10^6 bytes) of cached hidden states of frozen blocks, kept between rounds where
    the base has no dropout and texts come again often enough; 0 keeps none."""
    token_cache: Annotated[int, Ge(0)] = 512
    """Megabytes (10^6 bytes) of tokenised texts in the user's cache folder, kept between runs; 0
    keeps none."""


OLD_NAMES: Final[Mapping[str, str]] = {"cohort": "stack", "grain": "pad_to_multiple_of"}
"""Fields of ``hardware.json`` that older versions called by other names: name then -> name now."""


@dataclass(frozen=True)
class Hardware:
    """The resolved choice for one machine, kept in ``hardware.json``."""

    device: str
    """Where the model computes: ``cpu``, ``cuda``, ..."""
    precision: Literal["fp32", "bf16"]
    """Number format of the forward pass."""
    attention: Literal["eager", "sdpa"]
    """Kernel of the attention layers."""
    threads: int
    """Threads of the process."""
    tokens: int = TOKENS
    """Tokens that go through the model together, padding included; a step is cut by length."""
    pad_to_multiple_of: int = 1
    """Lengths and numbers of rows are multiples of it, as far as they can be (see ``Buckets``)."""
    stack: int = 1
    """Clients that train side by side where the method can."""

    @classmethod
    def from_json(cls, text: str) -> "Hardware":
        """Return the choice that this version or an older one wrote as JSON (see ``describe``).

        Raises ValueError or TypeError for anything else, and where a field has both its old name
        and its new one.

        >>> then = '{"device": "cpu", "precision": "fp32", "attention": "eager", "threads": 1'
        >>> Hardware.from_json(then + ', "grain": 4, "cohort": 2}').stack
        2
        """
        fields: dict[str, Any] = {}
        for name, value in dict(json.loads(text)).items():
            name_now = OLD_NAMES.get(name, name)
            if name_now in fields:
                raise ValueError(
                    f"{name_now!r} is there twice, once by the name of an older version"
                )
            fields[name_now] = value
        return cls(**fields)

    @property
    def torch_device(self) -> torch.device:
        """Return the device as torch wants it."""
        return torch.device(self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        if self.precision == "fp32":
            return nullcontext()
        # bf16 has float32's exponents: gradients need no scaling, unlike those of fp16.
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)

    @property
    def buckets(self) -> Buckets:
        """Return how examples are grouped; a GPU never splits a step."""
        # What a pass costs by itself is a rough guess: a twelfth of a full bucket.
        return Buckets(self.tokens, self.tokens // 12, self.pad_to_multiple_of)

    def shared_by(self, processes: int) -> "Hardware":
        """Return the choice for one of several processes at once, with its share of the threads."""
        return replace(self, threads=max(1, self.threads // processes))

    def computing(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return the context in which ``model`` computes batches, its frozen part cast once."""
        return nullcontext() if self.precision == "fp32" else cast_once(model, torch.bfloat16)

    def describe(self) -> dict[str, object]:
        """Return the choice as plain values."""
        return asdict(self)


def resolve(
    machine: Machine,
    max_length: int,
    kernels: Kernels = ("eager", "sdpa"),
    is_large: bool = False,
) -> Hardware:
    """Return the choice for this machine and texts of up to ``max_length`` tokens.

    ``kernels``: those that the model's family has for attention. ``is_large``: whether the model
    is, as ``models.is_large_model`` says. A kernel that the family lacks, a device that does not
    work and too many threads raise BadInput.
    """
    cores = os.cpu_count() or 1
    most = 4 * cores
    if machine.threads > most:
        raise BadInput(
            f"machine.threads = {machine.threads}: this machine has {cores} cores; "
            f"choose at most {most}"
        )
    device = _device(machine.device)
    on_cpu = device.type == "cpu"
    precision = machine.precision
    if precision == "auto":
        precision = "bf16" if _bf16_is_fast(device) else "fp32"
    fastest: Kernel = "eager" if on_cpu and max_length <= SHORT else "sdpa"
    tokens = FEW_TOKENS if is_large else TOKENS
    return Hardware(
        device=str(device),
        precision=precision,
        attention=_kernel(machine.attention, kernels, fastest),
        threads=machine.threads or torch.get_num_threads(),
        tokens=tokens if on_cpu else EVERYTHING,
        pad_to_multiple_of=GRAIN if on_cpu and precision == "bf16" else 1,
    )


def _device(name: str) -> torch.device:
    """Return the device called ``name``; BadInput where it does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()  # a device that is there may still be of no use
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).splitlines()[0]
        raise BadInput(
            f"machine.device = {name!r} is not usable here ({line}); choose 'cpu' or 'auto'"
        ) from error
    return torch.device(name)


def _kernel(asked: Attention, kernels: Kernels, fastest: Kernel) -> Kernel:
    """Return the kernel ``asked`` for; for ``auto`` the ``fastest``, if the model has it."""
    if asked == "auto":
        return fastest if fastest in kernels else kernels[0]
    if asked not in kernels:
        others = " or ".join(repr(name) for name in (*kernels, "auto"))
        why = "the family of this model does not have it"
        raise BadInput(f"machine.attention = {asked!r}: {why}; choose {others}")
    return asked


def use(hardware: Hardware) -> None:
    """Set torch's thread count for this process."""
    torch.set_num_threads(hardware.threads)


def _bf16_is_fast(device: torch.device) -> bool:
    """Return whether a bf16 matrix product takes at most 0.7 of a float32 one's time here."""
    if device.type == "cuda":
        # Compute capability 8.0 is Ampere, the first with bf16 in its tensor cores.
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Measured: how fast a CPU is with bf16 differs from machine to machine.
    return _seconds(torch.bfloat16, device) < 0.7 * _seconds(torch.float32, device)


def _seconds(dtype: torch.dtype, device: torch.device, size: int = 256) -> float:
    """Return the seconds of a product of two (``size``, ``size``) matrices, the least of three."""
    matrix = torch.ones(size, size, dtype=dtype, device=device)

    def once() -> float:
        start = time.perf_counter()
        matrix @ matrix
        return time.perf_counter() - start

    once()  # the first one prepares the kernel
    return min(once() for _ in range(3))
