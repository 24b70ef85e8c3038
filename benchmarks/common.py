"""What all benchmarks share: interleaved repetitions, medians with their spread, one table, one JSON file."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from fedpeft.cli.app import WAITING

RESULTS = Path("benchmarks/results")
PACKAGES = ("fedpeft", "torch", "transformers", "peft", "flwr", "ray", "pfl")


@dataclass(frozen=True)
class Figure:
    """A figure measured several times: its median, and the smallest and largest."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median."""
        return median(self.values)

    def __str__(self) -> str:
        digits = 3 if self.median < 10 else 1
        if len(self.values) == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({min(self.values):.{digits}f}-{max(self.values):.{digits}f})"


def ratio(above: Figure, below: Figure) -> Figure:
    """Return the ratio of figures that were measured alternately, repetition by repetition."""
    return Figure(tuple(a / b for a, b in zip(above.values, below.values, strict=True)))


def interleaved(
    repeats: int, **contenders: Callable[[], Mapping[str, float]]
) -> dict[str, dict[str, Figure]]:
    """Measure the contenders in turn, ``repeats`` times over: contender -> name -> figure."""
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in contenders}
    for number in range(repeats):
        for name, measure in contenders.items():
            found[name].append(measure())
            print(
                f"  {number + 1}/{repeats} {name}: {dict(found[name][-1])}",
                file=sys.stderr,
                flush=True,
            )
    return {
        name: {key: Figure(tuple(one[key] for one in measured)) for key in measured[0]}
        for name, measured in found.items()
    }


def in_process(
    module: str, settings: Mapping[str, Any], python: str = sys.executable
) -> dict[str, Any]:
    """Run ``python -m module SETTINGS`` and return the JSON object of its last line, with ``began``: when it was started.

    How OpenMP's threads wait is left to the module, fedpeft's choice or the library's own, which is faster for rivals.
    """
    began = time.time()
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [python, "-m", module, json.dumps(settings)],
        env={**inherited, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "began": began}


def apart_by(folder: Path, rival: str) -> float:
    """Return how far final adapters in ``folder``, a rival's and fedpeft's, are apart, relative to the largest value."""
    theirs, mine = (load_file(folder / f"{name}.safetensors") for name in (rival, "fedpeft"))
    if theirs.keys() != mine.keys():
        raise SystemExit(
            f"{rival} and fedpeft trained different tensors: {theirs.keys() ^ mine.keys()}"
        )
    largest = max(float(tensor.abs().max()) for tensor in mine.values())
    return max(float((theirs[name] - mine[name]).abs().max()) for name in mine) / largest


def machine() -> dict[str, str]:
    """Return processor, cores, GPU and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    found = {
        "processor": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "bf16": "AVX512-BF16" if "avx512_bf16" in flags else "no AVX512-BF16",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def report(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], **details: object
) -> None:
    """Print one table with the machine under it, and write both with ``details`` to ``benchmarks/results/<name>.json``."""
    table = Table(*columns, title=name, box=None, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    about = machine()
    console = Console(width=max(Console().width, 120))
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "columns": columns,
        "rows": [[str(cell) for cell in row] for row in rows],
        "values": [
            [list(cell.values) if isinstance(cell, Figure) else cell for cell in row]
            for row in rows
        ],
        "machine": about,
        **details,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    console.print(path)
