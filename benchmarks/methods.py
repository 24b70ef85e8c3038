"""What every method costs: seconds, peak memory and bytes of a client and round.

python -m benchmarks.methods            # about 10 minutes on 2 cores
python -m benchmarks.methods --quick
"""

from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Annotated

import typer

from benchmarks.common import in_process, interleaved, report
from benchmarks.setting import Setting, quick
from fedpeft.methods import METHODS

COSTS = ("seconds", "peak_memory", "down", "up")


def costs(setting: Setting) -> dict[str, float]:
    """Return the median over clients and rounds after the first of what the ledger says, a cohort's time shared out."""
    found = in_process("benchmarks.fedpeft_run", asdict(setting))
    rows = [row for row in found["rows"] if row["round"] > 0]
    return {
        "seconds": median(row["seconds"] for row in rows),
        **{name: float(median(row[name] for row in rows)) for name in COSTS[1:]},
    }


def main(
    look: Annotated[bool, typer.Option("--quick", help="One small run of each.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.")] = 5,
) -> None:
    """Print the table of costs."""
    repeats, setting = (1, quick(Setting())) if look else (repeats, replace(Setting(), rounds=3))
    found = interleaved(
        repeats, **{name: partial(costs, replace(setting, method=name)) for name in METHODS}
    )
    base = found["full"]["seconds"].median
    rows = [
        (
            name,
            cost["seconds"],
            f"{cost['seconds'].median / base:.2f}",
            f"{cost['peak_memory'].median / 1e6:.0f}",
            f"{cost['down'].median / 1e6:.3f}",
            f"{cost['up'].median / 1e6:.3f}",
        )
        for name, cost in found.items()
    ]
    values = {
        name: {key: list(figure.values) for key, figure in cost.items()}
        for name, cost in found.items()
    }
    columns = (
        "method",
        "s per client round",
        "over full",
        "peak MB of the process",
        "MB down",
        "MB up",
    )
    report("methods", columns, rows, setting=asdict(setting), repeats=repeats, figures=values)


if __name__ == "__main__":
    typer.run(main)
