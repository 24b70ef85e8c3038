"""Steps of every task: a plain transformers and peft loop over fedpeft, in time and in memory.

    python -m benchmarks.steps                    # all rows
    python -m benchmarks.steps smollm2 tagging    # some
    python -m benchmarks.steps --quick

Both sides train the same clients on the same batches from the same first adapters, each repetition
in a process of its own, in turn; what they load and encode before is not counted. Their losses have
to agree. ``benchmarks/plain_loop.py`` is what a competent user writes. SmolLM2 is tuned on `pycode`, the
packaged data; rows for MiniLM are generated, with lengths like those of WikiANN and of SQuAD, or
read from files with these sets' columns. Memory is the resident size of the process while it
trains at its highest, model and libraries included.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import in_process, interleaved, ratio, report
from benchmarks.works import GENERATED, QA, SMOLLM2, TAGGING, Work

WORKS: Mapping[str, Work] = {
    "smollm2": SMOLLM2,
    "smollm2-stack": replace(SMOLLM2, clients=4, stack=4, steps=2),
    "tagging": TAGGING,
    "qa": QA,
}
"""One client; four clients, in the plain loop one by one; tagging and QA with a stack of four."""
GOALS: Mapping[str, tuple[float, float]] = {
    "smollm2": (1.2, 1.5),
    "smollm2-stack": (1.3, 1.8),
    "tagging": (1.5, 2.5),
    "qa": (1.5, 2.5),
}
"""Floor and stretch of the seconds, plain loop over fedpeft."""
TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "bf16": 3e-2}
"""How far the mean losses of a client may be apart, as a share; both sides take the same steps."""


def measured(
    module: str, settings: Mapping[str, Any], losses: list[list[float]]
) -> dict[str, float]:
    """Return seconds and megabytes of one side; its losses are appended to ``losses``."""
    found = in_process(module, settings)
    losses.append(found["losses"])
    return {
        "seconds": found["seconds"],
        "peak": found["peak"] / 1e6,
    }


def apart(one: list[list[float]], other: list[list[float]]) -> float:
    """Return how far the losses of the two sides are apart at most, as a share."""
    largest = 0.0
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            largest = max(largest, abs(a - b) / abs(a))
    return largest


def compared(name: str, work: Work, repeats: int) -> tuple[object, ...]:
    """Return the row of ``work``; losses that differ end the benchmark."""
    plain: list[list[float]] = []
    ours: list[list[float]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if not work.train and work.kind in GENERATED:
            path = folder / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in GENERATED[work.kind]()))
            work = replace(work, train=str(path))
        work.prepare(folder)
        found = interleaved(
            repeats,
            plain=partial(measured, "benchmarks.plain_loop", {"folder": place}, plain),
            fedpeft=partial(measured, "benchmarks.fedpeft_steps", asdict(work), ours),
        )
    difference = apart(plain, ours)
    if difference > TOLERANCE[work.precision]:
        raise SystemExit(f"{name}: the losses are {difference:.1e} apart: {plain[0]}, {ours[0]}")
    mine, theirs = found["fedpeft"], found["plain"]
    floor, stretch = GOALS[name]
    return (
        name,
        theirs["seconds"],
        mine["seconds"],
        ratio(theirs["seconds"], mine["seconds"]),
        f"{floor} / {stretch}",
        theirs["peak"],
        mine["peak"],
        ratio(theirs["peak"], mine["peak"]),
        f"{difference:.0e}",
    )


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(WORKS)}.")] = None,
    look: Annotated[bool, typer.Option("--quick", help="One repetition of few steps.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 5,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of both sides.")] = "fp32",
    tagging: Annotated[Path | None, typer.Option(help="Rows with tokens and tags.")] = None,
    qa: Annotated[Path | None, typer.Option(help="Rows with question, context, answers.")] = None,
) -> None:
    """Print seconds and megabytes of both sides, and their ratios."""
    files = {"tagging": tagging, "qa": qa}
    rows: list[tuple[object, ...]] = []
    for name in names or WORKS:
        work = replace(WORKS[name], precision=precision)
        own = files.get(name)
        if own is not None:
            work = replace(work, train=str(own.absolute()))
        if look:
            work = replace(work, steps=1)
        rows.append(compared(name, work, 1 if look else repeats))
    columns = (
        "",
        "plain loop, s per client step",
        "fedpeft",
        "ratio",
        "floor / stretch",
        "plain loop, peak MB",
        "fedpeft",
        "ratio",
        "losses apart",
    )
    works = {name: asdict(work) for name, work in WORKS.items()}
    report("steps", columns, rows, works=works, precision=precision, repeats=repeats)


if __name__ == "__main__":
    typer.run(main)
