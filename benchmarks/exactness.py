"""How far each merge is from the mean of the clients' models, in the demo's setting.

    python -m benchmarks.exactness            # about 30 minutes on 2 old cores
    python -m benchmarks.exactness --quick

The exact update of a layer is sum p_k (W_k - W), W_k being what client k made of the weights W that all began with. What is
printed is the distance of the merged update from it over its norm, the median over layers.
"""

from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.common import report
from benchmarks.setting import Setting, quick
from fedpeft.algebra.lowrank import by_module
from fedpeft.engines.local import LocalEngine
from fedpeft.experiment.build import Federation
from fedpeft.federation.server import federate
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import Payload, State
from fedpeft.wire.messages import Response
from tests.tiny import Tapped

METHODS = (
    *("lora", "fedrot_lora", "lora_fair", "federa"),
    *("ffa_lora", "rolora", "fedsvd", "fedex_lora", "flora", "florist", "flexlora"),
)
AT = (1, 2, 5, 10)
"""Rounds that the table shows."""


def added(whole: Federation, state: State) -> dict[str, Tensor]:
    """Return what a state adds to each W_0, (out, in) in float64."""
    mounted = mounted_state(
        whole.method, state, whole.loaded.model, whole.hardware, whole.config.seed
    )
    with mounted as local:
        return {name: delta.dense()[0].double() for name, delta in local.deltas().items()}


def product(factors: Mapping[str, Tensor]) -> Tensor:
    """Return B A, (out, in) in float64."""
    return factors["B"].double() @ factors["A"].double()


def errors(whole: Federation, rounds: int) -> list[float]:
    """Return the relative error of every round's merge, the median over layers."""
    engine = Tapped(LocalEngine(whole.worker, stack=whole.hardware.stack))
    before, found = whole.first_state(), []
    states = federate(
        whole.method,
        before,
        engine,
        lambda _: whole.clients,
        range(rounds),
        config=whole.worker.config,
        min_replies=1,
        record=lambda _: None,
    )
    for after in states:
        replies = [Response.decode(reply) for _, reply in engine.talks.pop().values()]
        started, ended = added(whole, before), added(whole, after)
        layers = []
        for module, base in started.items():
            # What a client adds to the start of the round: its B A instead of the B A that was sent.
            sent = _factors(before.shared, module, whole)
            begun = product(sent) if {"A", "B"} <= sent.keys() else torch.zeros_like(base)
            exact = torch.zeros_like(base)
            total = sum(reply.measured.examples for reply in replies)
            for reply in replies:
                own = {**sent, **_factors(reply.payload, module, whole)}
                share = reply.measured.examples / total
                exact += share * _scale(whole) * (product(own) - begun)
            off = (ended[module] - base - exact).norm()
            layers.append(float(off / exact.norm().clamp(min=1e-30)))
        found.append(median(layers))
        before = after
    return found


def _factors(payload: Payload, module: str, whole: Federation) -> dict[str, Tensor]:
    """Return the factors of one layer in a payload; FFA-LoRA's A, which never travels, is drawn."""
    factors = {n: t for n, t in by_module(payload).get(module, {}).items() if n in ("A", "B")}
    if "B" in factors and "A" not in factors and f"{module}:A" not in payload:
        state = State(0, {f"{module}:B": factors["B"]})
        if type(whole.method).__name__ == "FFALoRA":
            with mounted_state(
                whole.method, state, whole.loaded.model, whole.hardware, whole.config.seed
            ) as local:
                pair = local.deltas()[module].factors()
            assert pair is not None
            factors["A"] = pair[1][0]
    return factors


def _scale(whole: Federation) -> float:
    scale: float = whole.method.scale  # type: ignore[attr-defined]
    return scale


def main(
    look: Annotated[bool, typer.Option("--quick", help="One small run of each.")] = False,
) -> None:
    """Print the table of errors."""
    setting = quick(Setting()) if look else replace(Setting(), rounds=max(AT))
    shown = [number for number in AT if number <= setting.rounds]
    rows, figures = [], {}
    for name in METHODS:
        whole = replace(setting, method=name, precision="fp32").assembly()
        figures[name] = errors(whole, setting.rounds)
        rows.append((name, *(f"{figures[name][number - 1]:.1e}" for number in shown)))
        print(rows[-1], flush=True)
    columns = ("method", *(f"round {number}" for number in shown))
    report(
        "exactness", columns, rows, setting={"rounds": setting.rounds}, repeats=1, figures=figures
    )


if __name__ == "__main__":
    typer.run(main)
