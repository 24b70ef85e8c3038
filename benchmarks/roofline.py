"""How close a step is to the hardware: FLOPs of real tokens over its time, as a share of the matrix-product peak.

    python -m benchmarks.roofline            # about 2 minutes on 2 cores
    python -m benchmarks.roofline --quick
    python -m benchmarks.roofline --profile  # where a step goes, instead

A step of LoRA goes through every frozen matrix twice, forward and back, at 2 FLOPs per entry and token; gradients of frozen
weights are not computed, attention, adapters and head are not counted. Padding counts for nothing. Only what is done counts:
no gradients go below the first block, and what the head does not read is left out (``models.spare_last_block``). The last
column counts these FLOPs, too, as if the step had the plain model's work to do. The peak is the best matrix product of the
model's own sizes, timed in the same process and number format before every repetition, which is a round with batches of its
own: kernels are made anew for shapes that are.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.common import Figure, report
from benchmarks.setting import LAYERS, Setting, batches
from fedpeft.engines.local import LocalEngine
from fedpeft.experiment.build import Federation
from fedpeft.types import Client, Reply
from fedpeft.wire.messages import Kind, Request

HEAD = re.compile("pooler|classifier")
SPARED = re.compile(rf"layer\.{LAYERS - 1}\.(attention\.output|intermediate|output)\.")
BELOW = re.compile(r"layer\.0\.attention\.self\.")


def peak(dtype: torch.dtype, device: torch.device, rows: int = 1024) -> float:
    """Return the FLOP/s of the best of some matrix products of MiniLM's and larger sizes."""
    best = 0.0
    for inner, outer in ((384, 384), (384, 1536), (1536, 384), (1024, 1024)):
        x, w = (
            torch.randn(rows, inner, dtype=dtype, device=device),
            torch.randn(outer, inner, dtype=dtype, device=device),
        )
        count = max(1, int(2e9 if device.type == "cpu" else 2e12) // (2 * rows * inner * outer))
        for _ in range(5):
            _wait(device)
            began = time.perf_counter()
            for _ in range(count):
                nn.functional.linear(x, w)
            _wait(device)
            best = max(best, count * 2 * rows * inner * outer / (time.perf_counter() - began))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(whole: Federation, count: int, number: int = 0) -> float:
    """Return the wall time of a client step when ``count`` clients are asked at once for a round, messages included."""
    request = Request(Kind.TRAIN, number, whole.worker.config, whole.first_state().shared).encode()
    clients = [Client(client) for client in range(count)]
    engine = LocalEngine(whole.worker, stack=whole.hardware.stack)
    began = time.perf_counter()
    replies = list(engine.exchange(clients, lambda _: request))
    took = time.perf_counter() - began
    if not all(isinstance(reply, Reply) for reply in replies):
        raise SystemExit(f"lost: {replies}")
    return took / count / (whole.config.training.steps or 1)


def flops(whole: Federation, count: int, number: int) -> tuple[float, float]:
    """Return the FLOPs of a client step of a round, the mean over its real tokens: those done, and the plain model's."""
    sizes = {
        name: layer.numel()
        for name, layer in whole.loaded.base.layers.items()
        if not HEAD.search(name)
    }
    lengths = [
        [whole.worker.client_data[client].train.lengths[row] for row in rows]
        for client in range(count)
        for rows in batches(whole, client, number)
    ]
    tokens, texts = mean(map(sum, lengths)), mean(map(len, lengths))
    spared, below = (
        sum(size for name, size in sizes.items() if part.search(name)) for part in (SPARED, BELOW)
    )
    plain = 4 * sum(sizes.values()) * tokens
    return plain - 4 * spared * (tokens - texts) - 2 * below * tokens, plain


def profile(whole: Federation) -> list[tuple[str, str]]:
    """Return the dearest operations of a stack's steps in one lane, with their share of the time spent in operations."""
    chosen = _with(whole, stack=8, threads=1)
    torch.set_num_threads(1)
    for _ in range(3):
        seconds(chosen, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        seconds(chosen, 8)
    found = sorted(seen.key_averages(), key=lambda one: one.self_cpu_time_total, reverse=True)
    total = sum(one.self_cpu_time_total for one in found)
    return [
        (one.key.removeprefix("aten::"), f"{one.self_cpu_time_total / total:.1%}")
        for one in found[:16]
    ]


def _with(whole: Federation, **changes: Any) -> Federation:
    hardware = replace(whole.hardware, **changes)
    return replace(whole, hardware=hardware, worker=replace(whole.worker, hardware=hardware))


def shares(whole: Federation, repeats: int) -> Iterator[tuple[Any, ...]]:
    """Yield a row for one client at a time and for stacks of several sizes."""
    precision, device = whole.hardware.precision, whole.hardware.torch_device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for place, stack in enumerate(sorted({1, 4, 8, whole.hardware.stack})):
        chosen = _with(whole, stack=stack)
        seconds(chosen, 8)
        best, took, done, plain = list[float](), list[float](), list[float](), list[float]()
        for number in range(1 + place * repeats, 1 + (place + 1) * repeats):
            best.append(peak(dtype, device))
            took.append(seconds(chosen, 8, number))
            for amount, share in zip(flops(chosen, 8, number), (done, plain), strict=True):
                share.append(amount / took[-1] / best[-1])
        gigaflops = Figure(tuple(value / 1e9 for value in best))
        yield (
            precision,
            stack,
            gigaflops,
            *(Figure(tuple(values)) for values in (took, done, plain)),
        )


def main(
    look: Annotated[bool, typer.Option("--quick", help="One repetition.")] = False,
    repeats: Annotated[int, typer.Option(help="Repetitions.")] = 5,
    where: Annotated[
        bool,
        typer.Option("--profile", help="Print where a step of a stack of 8 goes, in one lane."),
    ] = False,
) -> None:
    """Print the share of the peak for one client at a time and for whole stacks, in every number format there is."""
    formats = {
        precision: replace(Setting(), precision=precision).assembly()
        for precision in ("fp32", "bf16")
    }
    if where:
        for precision, whole in formats.items():
            report(
                f"profile_{precision}",
                ("operation", "share of the time"),
                profile(whole),
                setting=asdict(Setting()),
            )
        return
    repeats = 1 if look else repeats
    rows = [row for whole in formats.values() for row in shares(whole, repeats)]
    columns = (
        "format",
        "stack",
        "peak, GFLOP/s",
        "s per client step",
        "share of the peak",
        "with the plain model's FLOPs",
    )
    report("roofline", columns, rows, setting=asdict(Setting()), repeats=repeats)


if __name__ == "__main__":
    typer.run(main)
