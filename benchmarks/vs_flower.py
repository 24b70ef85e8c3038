"""fedpeft against a careful user's Flower app on the same federation: the same clients, texts, batches, rates, dropout.

python -m benchmarks.vs_flower            # 5 interleaved runs of everything, about 30 minutes on 2 cores
python -m benchmarks.vs_flower --quick    # one small run of everything
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import Figure, apart_by, in_process, interleaved, ratio, report
from benchmarks.setting import Setting, figures, quick


def flower(setting: Setting, folder: Path, **choice: Any) -> Callable[[], dict[str, float]]:
    """Return what measures the app; ``choice``: threads per worker process, precision, attention kernel, dropout."""
    exact = (choice["precision"], choice["dropout"]) == ("fp32", 0.0)
    settings = {
        "folder": str(folder),
        "out": str(folder / "flower.safetensors") if exact else "",
        **choice,
    }
    return lambda: figures(in_process("benchmarks.flower_app", settings), setting)


def ours(setting: Setting, folder: Path) -> Callable[[], dict[str, float]]:
    """Return what measures fedpeft."""
    settings = asdict(
        replace(
            setting, out=str(folder / "fedpeft.safetensors") if setting.precision == "fp32" else ""
        )
    )
    return lambda: figures(in_process("benchmarks.fedpeft_run", settings), setting)


def main(
    look: Annotated[bool, typer.Option("--quick", help="One small run of everything.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.")] = 5,
) -> None:
    """Compare wall time per steady round, start-up, final adapters and accuracy."""
    repeats, setting = (1, quick(Setting())) if look else (repeats, Setting())
    plain = {"threads": torch.get_num_threads(), "precision": "fp32", "attention": "sdpa"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting.prepare(folder)
        found = interleaved(
            repeats,
            no_dropout=flower(setting, folder, **plain, dropout=0.0),
            workers=flower(setting, folder, **{**plain, "threads": 1}, dropout=0.0),
            workers_eager=flower(
                setting, folder, **{**plain, "threads": 1, "attention": "eager"}, dropout=0.0
            ),
            fp32=ours(replace(setting, precision="fp32"), folder),
            workers_bf16=flower(
                setting, folder, threads=1, precision="bf16", attention="eager", dropout=0.0
            ),
            auto=ours(setting, folder),
            defaults=flower(setting, folder, **plain, dropout=0.1),
        )
        apart = apart_by(folder, "flower")
    best = min((found["workers"], found["workers_eager"]), key=lambda one: one["step"].median)
    start = [found[one]["start"] for one in ("defaults", "auto")]
    rows = [
        _row("fp32, no dropout", found["no_dropout"], found["fp32"]),
        _row("the same, the app with one-thread workers, its better kernel", best, found["fp32"]),
        _row(
            "bf16, no dropout, the app with one-thread workers, eager",
            found["workers_bf16"],
            found["auto"],
        ),
        _row("each at its own defaults", found["defaults"], found["auto"]),
        ("start of the program to the end of round 1, s", *start, ratio(*start), ""),
    ]
    columns = ("", "Flower app, s per client step", "fedpeft", "ratio", "accuracy of both")
    report(
        "vs_flower",
        columns,
        rows,
        setting=asdict(setting),
        repeats=repeats,
        largest_relative_difference=apart,
    )
    typer.echo(f"final adapters in fp32, largest difference over the largest value: {apart:.1e}")


def _row(label: str, app: Mapping[str, Figure], mine: Mapping[str, Figure]) -> tuple[object, ...]:
    accuracies = f"{app['accuracy'].median:.3f} and {mine['accuracy'].median:.3f}"
    return label, app["step"], mine["step"], ratio(app["step"], mine["step"]), accuracies


if __name__ == "__main__":
    typer.run(main)
