"""Seconds and peak memory of a block of code, cheap enough for every client in every round."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

_CPU = torch.device("cpu")
# Writing 5 to the first resets the peak that the second shows as VmHWM (proc(5)).
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Measurement:
    """What a block cost; both fields are 0 until it has ended.

    ``seconds``: wall clock. ``peak_memory``: bytes.
    """

    seconds: float = 0.0
    peak_memory: int = 0


@contextmanager
def measured(device: torch.device = _CPU) -> Iterator[Measurement]:
    """Measure the block of a ``with``.

    The result is filled in when the block ends, also by an exception.

    On a CUDA ``device``, the memory is the most that torch had allocated there during the block,
    and the clock waits for the device. Elsewhere, it is the largest resident size of this whole
    process, base model included. Linux can reset that mark (proc(5), ``clear_refs``), so there it
    is the largest size during the block; on other systems, it is the largest since the process
    began. Blocks must not be nested: the inner one resets the outer one's mark.
    """
    result = Measurement()
    on_cuda = device.type == "cuda"
    if on_cuda:
        # Kernels run asynchronously: those queued before the block must not count as its own.
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # no Linux, or no right to write there
            _CLEAR.write_bytes(b"5")
    start = perf_counter()
    try:
        yield result
    finally:
        if on_cuda:
            torch.cuda.synchronize(device)
        result.seconds = perf_counter() - start
        if on_cuda:
            result.peak_memory = torch.cuda.max_memory_allocated(device)
        else:
            result.peak_memory = _resident_peak()


def _resident_peak() -> int:
    """Return the process's largest resident size in bytes since its mark was last reset.

    0 where the system does not tell.
    """
    with suppress(OSError):
        for line in _STATUS.read_bytes().splitlines():
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024  # "VmHWM:  12345 kB", a kB being 1024 bytes
    with suppress(ImportError):  # Windows has no resource
        import resource  # noqa: PLC0415

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # getrusage counts in bytes on macOS and in units of 1024 bytes elsewhere.
        return peak if sys.platform == "darwin" else peak * 1024
    return 0
