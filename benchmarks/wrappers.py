"""What wrappers cost: a round of training and its bytes, over the same round of the method inside.

    python -m benchmarks.wrappers            # about 6 minutes on 2 cores
    python -m benchmarks.wrappers --quick    # 2 of 6 layers
    python -m benchmarks.wrappers dpsgd dpsgd-rows    # some

LoRA of rank 8 on query and value of MiniLM; all clients in this process, one after another, so that
the time of a round is that of its client steps and of the server's merge: the processor's time, of
all threads together, which other jobs disturb less. Bytes are those of a reply. `dpsgd-rows` is `dpsgd`
with a pass for each row, as where copies are not possible. Secure aggregation has a benchmark of
its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Annotated
from unittest.mock import patch

import typer

from benchmarks.common import interleaved, ratio, report
from benchmarks.secagg import rounds
from benchmarks.setting import Setting
from fedpeft.training import private
from fedpeft.wrappers import (
    DPSGD,
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedProx,
    FedYogi,
    Krum,
    Median,
    NormClip,
    Quantise,
    Scaffold,
    TopK,
    TrimmedMean,
)
from fedpeft.wrappers.wrapper import Wrapper

WRAPPERS: Mapping[str, Wrapper] = {
    "fedprox": FedProx(),
    "fedavgm": FedAvgM(),
    "fedadam": FedAdam(),
    "fedyogi": FedYogi(),
    "fedadagrad": FedAdagrad(),
    "scaffold": Scaffold(),
    "bf16": Quantise(up="bf16"),
    "int8": Quantise(),
    "int4": Quantise(up="int4"),
    "int8-both": Quantise(down="int8"),
    "top_k": TopK(),
    "norm_clip": NormClip(),
    "median": Median(),
    "trimmed_mean": TrimmedMean(),
    "krum": Krum(malicious=0),
    "bulyan": Bulyan(malicious=0),
    "dpsgd": DPSGD(),
    "dpsgd-rows": DPSGD(),
}
MOST = {"int8": 1.10, "int8-both": 1.10, "dpsgd-rows": 1.5}
"""Most that a wrapper may cost, as a share of the round without it; 1.05 for all others."""


def row_by_row(measure: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """Return ``measure`` without room for the gradients of more than one row in a pass."""

    def measured() -> dict[str, float]:
        with patch.object(private, "NUMBERS", 0):
            return measure()

    return measured


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Some of the wrappers.")] = None,
    look: Annotated[
        bool, typer.Option("--quick", help="Two layers, few steps, three rounds.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
) -> None:
    """Print seconds of a client step and kilobytes of a reply under every wrapper."""
    setting = Setting(clients=4, precision="fp32", stack=1)
    if look:
        setting, repeats = replace(setting, clients=3, steps=2, layers=2), 3
    whole = setting.assembly()
    contenders: dict[str, Callable[[], dict[str, float]]] = {"plain": rounds(whole, whole.method)}
    for name in names or WRAPPERS:
        contenders[name] = rounds(whole, WRAPPERS[name].around(whole.method, f"0.{name}"))
    if "dpsgd-rows" in contenders:
        contenders["dpsgd-rows"] = row_by_row(contenders["dpsgd-rows"])
    found = interleaved(repeats, **contenders)
    plain = found.pop("plain")
    steps = setting.clients * setting.steps
    lines: list[tuple[object, ...]] = [
        ("plain", f"{plain['cpu'].median / steps:.3f}", "", "", plain["up"], "")
    ]
    for name, figures in found.items():
        over = ratio(figures["cpu"], plain["cpu"])
        lines.append(
            (
                name,
                f"{figures['cpu'].median / steps:.3f}",
                over,
                MOST.get(name, 1.05),
                figures["up"],
                ratio(figures["up"], plain["up"]),
            )
        )
    columns = ("wrapper", "s per client step", "over plain", "at most", "kB up", "over plain")
    report("wrappers", columns, lines, setting=asdict(setting), repeats=repeats)


if __name__ == "__main__":
    typer.run(main)
