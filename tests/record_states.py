"""What every method ends in, as digests: a change that is to keep all bits is run before and after, on one machine.

    python -m tests.record_states before.json      # in the older checkout
    python -m tests.record_states after.json       # in the newer one
    diff before.json after.json

Each method runs three rounds in fp32 on one thread, on a tiny encoder: one client at a time, and in stacks of four.
Digests depend on the processor's kernels, so they are compared on the spot and not kept.
"""

import json
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from fedpeft.experiment.build import build
from fedpeft.experiment.config import from_tree
from fedpeft.experiment.run import start
from fedpeft.methods import METHODS
from tests.e2e.builders import Ground, write_ground
from tests.tiny import FIELDS

ROUNDS = 3
STACKS = (1, 4)
WIRE_DIGEST = 16
"""Bytes before the tensors of a state file."""


def settings(ground: Ground, method: str, stack: int) -> dict[str, Any]:
    """Return the settings of one recorded run."""
    chosen: dict[str, Any] = {**FIELDS[method], "name": method}
    if "rounds" in chosen:
        chosen["rounds"] = ROUNDS
    return {
        **ground.tree(),
        "federation": {"rounds": ROUNDS, "clients_per_round": 4},
        "engine": {"stack": stack},
        "method": chosen,
    }


def digest(state: dict[str, Tensor]) -> str:
    """Return 16 hex digits of the SHA-256 of names, dtypes, shapes and values."""
    whole = sha256()
    for name, tensor in sorted(state.items()):
        whole.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def last_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the last state and of every client's memory, under names that keep them apart."""
    found: dict[str, Tensor] = {}
    for path in [max(folder.glob("*.state")), *folder.glob("*.memory")]:
        for name, tensor in load(path.read_bytes()[WIRE_DIGEST:]).items():
            found[f"{path.name}/{name}"] = tensor
    return found


def recorded(folder: Path) -> dict[str, str]:
    """Return the digest of the last state of every method, one client at a time and in stacks."""
    ground = write_ground(folder)
    found: dict[str, str] = {}
    for method in METHODS:
        for stack in STACKS:
            run = folder / f"{method}-{stack}"
            start(build(from_tree(settings(ground, method, stack))), run)
            found[f"{method}, stack of {stack}"] = digest(last_checkpoint(run / "checkpoints"))
    return found


def main(out: Path) -> None:
    """Write the digests as JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out.write_text(json.dumps(recorded(Path(folder)), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
