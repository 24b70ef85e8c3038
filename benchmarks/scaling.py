"""Time per round over clients per round, rank, model size and stack: it grows with the work, and with nothing else.

python -m benchmarks.scaling            # about 10 minutes on 2 cores
python -m benchmarks.scaling --quick
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.common import in_process, interleaved, report
from benchmarks.setting import Setting, quick

AXES: dict[str, Sequence[Any]] = {
    "clients": (2, 4, 8, 16),
    "rank": (2, 8, 32),
    "layers": (2, 4, 6),
    "stack": (1, 2, 4, 8),
}


def step(setting: Setting) -> Callable[[], dict[str, float]]:
    """Return what measures the seconds of a steady round per client step, and the peak memory of the process."""

    def measure() -> dict[str, float]:
        found = in_process("benchmarks.fedpeft_run", asdict(setting))
        steady = median(b - a for a, b in pairwise(found["ends"]))
        peak = max(row["peak_memory"] for row in found["rows"])
        return {
            "round": steady,
            "step": steady / setting.clients / setting.steps,
            "peak": peak / 1e6,
        }

    return measure


def main(
    look: Annotated[bool, typer.Option("--quick", help="One small run of each.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.")] = 5,
) -> None:
    """Print seconds per round and per client step along every axis."""
    repeats, setting = (
        (1, quick(Setting())) if look else (repeats, replace(Setting(), rounds=3, stack=8))
    )
    points = {
        f"{axis} {value}": replace(setting, **{axis: value})
        for axis, values in AXES.items()
        for value in values
    }
    found = interleaved(repeats, **{name: step(point) for name, point in points.items()})
    rows = [
        (name, one["round"], one["step"], f"{one['peak'].median:.0f}")
        for name, one in found.items()
    ]
    report(
        "scaling",
        ("", "s per round", "s per client step", "peak MB"),
        rows,
        setting=asdict(setting),
        repeats=repeats,
    )


if __name__ == "__main__":
    typer.run(main)
