"""What FedARA's pruning saves in time: a step once modules are dead, over a step of its first round.

    python -m benchmarks.pruning            # about 2 minutes on 2 cores
    python -m benchmarks.pruning --quick

Twice: with the lower half of the modules dead, and with the mask that a run of its own learned (a quarter of the ranks
left); each with and without the hidden states of the frozen blocks kept.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated

import torch
import typer

from benchmarks.common import interleaved, ratio, report
from benchmarks.setting import Setting
from fedpeft.engines.local import LocalEngine
from fedpeft.experiment.build import Federation
from fedpeft.federation.server import federate
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.types import Client, State
from fedpeft.wire.messages import Kind, Request

KEPT = "with states kept"


def seconds(whole: Federation, state: State) -> Callable[[], dict[str, float]]:
    """Return what measures the wall time of a client step from ``state``, messages included; a first call is left out."""
    engine = LocalEngine(whole.worker, stack=whole.hardware.stack)
    request = Request(
        Kind.TRAIN, state.round, whole.worker.config, whole.method.send(state, Client(0))
    ).encode()

    def measure() -> dict[str, float]:
        began = time.perf_counter()
        list(engine.exchange(whole.clients, lambda _: request))
        return {
            "step": (time.perf_counter() - began)
            / len(whole.clients)
            / (whole.config.training.steps or 1)
        }

    measure()
    return measure


def halved(state: State) -> State:
    """Return the state with the lower half of the modules dead."""
    names = sorted(
        state.server, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()]
    )
    dead = {name: torch.zeros_like(state.server[name]) for name in names[: len(names) // 2]}
    return replace(state, server={**state.server, **dead})


def learned(setting: Setting, rounds: int) -> State:
    """Return the state after a run whose clients voted three quarters of the ranks away."""
    whole = replace(setting, rounds=rounds).assembly()
    engine = LocalEngine(whole.worker, stack=whole.hardware.stack)
    state = whole.first_state()
    config = whole.worker.config
    for after in federate(
        whole.method,
        state,
        engine,
        lambda _: whole.clients,
        range(rounds),
        config=config,
        min_replies=1,
        record=lambda _: None,
    ):
        state = after
    return state


def main(
    look: Annotated[bool, typer.Option("--quick", help="One repetition, of a short run.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 5,
) -> None:
    """Print the ratios, and which modules died."""
    repeats, rounds = (1, 5) if look else (repeats, 20)
    setting = replace(Setting(), method="fedara")
    whole = setting.assembly()
    first, pruned = whole.first_state(), learned(setting, rounds)
    kept = replace(
        whole, worker=replace(whole.worker, cache=ActivationCache(range(len(whole.clients))))
    )
    found = interleaved(
        repeats,
        **{
            "first round": seconds(whole, first),
            "lower half dead": seconds(whole, halved(first)),
            f"lower half dead, {KEPT}": seconds(kept, halved(first)),
        },
    )
    found |= interleaved(
        repeats, **{"learned mask": seconds(whole, pruned)}
    )  # apart: what is kept is of one lowest block
    kept = replace(
        whole, worker=replace(whole.worker, cache=ActivationCache(range(len(whole.clients))))
    )
    found |= interleaved(repeats, **{f"learned mask, {KEPT}": seconds(kept, pruned)})
    rows = [
        (name, one["step"], ratio(one["step"], found["first round"]["step"]))
        for name, one in found.items()
    ]
    ranks = {name.removesuffix(":alive"): int(alive.sum()) for name, alive in pruned.server.items()}
    report(
        "pruning",
        ("", "s per client step", "over the first round"),
        rows,
        setting=asdict(setting),
        ranks_left=ranks,
    )
    dead = [name for name, left in ranks.items() if left == 0]
    typer.echo(
        f"ranks left by the learned mask: {sum(ranks.values())}; dead modules: {', '.join(dead) or 'none'}"
    )


if __name__ == "__main__":
    typer.run(main)
