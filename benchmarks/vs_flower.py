"""fedpeft against a careful user's Flower app on the same federation: the same clients, texts, batches, rates, dropout.

python -m benchmarks.vs_flower            # 5 interleaved runs of everything, about 25 minutes on 2 cores
python -m benchmarks.vs_flower --quick    # one small run of everything
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from benchmarks.common import Figure, in_process, interleaved, ratio, report
from benchmarks.setting import Setting, quick


def figures(found: Mapping[str, Any], setting: Setting) -> dict[str, float]:
    """Return seconds per steady round and client step, seconds from the start to the end of round 1, and the accuracy."""
    ends = found["ends"]
    steady = median(b - a for a, b in pairwise(ends))
    steps = setting.clients * setting.steps
    return {"round": steady, "step": steady / steps, "start": ends[0] - found["began"], "accuracy": found["accuracy"]}


def flower(setting: Setting, folder: Path, **choice: Any) -> Callable[[], dict[str, float]]:
    """Return what measures the app; ``choice``: threads per worker process, precision, attention kernel, dropout."""
    settings = {"folder": str(folder), "out": str(folder / "flower.safetensors"), **choice}
    return lambda: figures(in_process("benchmarks.flower_app", settings), setting)


def ours(setting: Setting, folder: Path) -> Callable[[], dict[str, float]]:
    """Return what measures fedpeft."""
    settings = asdict(replace(setting, out=str(folder / "fedpeft.safetensors")))
    return lambda: figures(in_process("benchmarks.fedpeft_run", settings), setting)


def main(
    look: Annotated[bool, typer.Option("--quick", help="One small run of everything.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.")] = 5,
) -> None:
    """Compare wall time per steady round, start-up, final adapters and accuracy."""
    repeats, setting = (1, quick(Setting())) if look else (repeats, Setting())
    rows = []
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting.prepare(folder)
        same = interleaved(
            repeats,
            flower=flower(setting, folder, threads=cores, precision="fp32", attention="sdpa", dropout=0.0),
            flower_parallel=flower(setting, folder, threads=1, precision="fp32", attention="sdpa", dropout=0.0),
            fedpeft=ours(replace(setting, precision="fp32", dropout=0.0), folder),
        )
        best = min((same["flower"], same["flower_parallel"]), key=lambda one: one["step"].median)
        rows.append(_row("same number format (fp32), same dropout (0)", best, same["fedpeft"]))
        apart = _apart(folder)
        own = interleaved(
            repeats,
            flower=flower(setting, folder, threads=cores, precision="fp32", attention="sdpa", dropout=0.1),
            fedpeft=ours(setting, folder),
        )
        rows.append(_row("each at its own defaults", own["flower"], own["fedpeft"]))
        start = ratio(own["flower"]["start"], own["fedpeft"]["start"])
    columns = ("", "Flower app, s per client step", "fedpeft", "ratio", "accuracy of both")
    more = [("start of the program to the end of round 1, s", own["flower"]["start"], own["fedpeft"]["start"], start, "")]
    report("vs_flower", columns, [*rows, *more], setting=asdict(setting), repeats=repeats, largest_relative_difference=apart)
    typer.echo(f"final adapters in fp32, largest difference over the largest value: {apart:.1e}")


def _row(label: str, app: Mapping[str, Figure], mine: Mapping[str, Figure]) -> tuple[object, ...]:
    accuracies = f"{app['accuracy'].median:.3f} and {mine['accuracy'].median:.3f}"
    return label, app["step"], mine["step"], ratio(app["step"], mine["step"]), accuracies


def _apart(folder: Path) -> float:
    """Return how far the final adapters of both are apart, relative to the largest value in them."""
    theirs, mine = (load_file(folder / f"{name}.safetensors") for name in ("flower", "fedpeft"))
    assert theirs.keys() == mine.keys()
    largest = max(float(tensor.abs().max()) for tensor in mine.values())
    return max(float((theirs[name] - mine[name]).abs().max()) for name in mine) / largest


if __name__ == "__main__":
    typer.run(main)
