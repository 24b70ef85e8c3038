"""The federation that rivals are measured on: the same clients, texts, batches and rates for all of them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.config import from_tree
from fedpeft.methods import METHODS
from fedpeft.models import locate
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import plan

LAYERS = 6
"""Of MiniLM."""


@dataclass(frozen=True)
class Setting:
    """``clients`` all take part in each of ``rounds``, with ``steps`` of ``batch`` texts of at most ``length`` tokens.

    ``layers``: MiniLM's lowest. ``out``: where the final adapters go, as safetensors.
    """

    clients: int = 8
    rounds: int = 6
    steps: int = 4
    batch: int = 16
    length: int = 64
    rank: int = 8
    layers: int = LAYERS
    lr: float = 1e-2
    dropout: float = 0.0
    precision: str = "auto"
    attention: str = "auto"
    stack: int | str = "auto"
    method: str = "lora"
    targets: str = "query|value"
    out: str = ""

    def tree(self) -> dict[str, Any]:
        """Return the settings as fedpeft takes them."""
        own = {field.name for field in fields(METHODS[self.method])}  # type: ignore[arg-type]
        given = {"targets": self.targets, "rank": self.rank}
        return {
            "model": {"name": self.model(), "max_length": self.length, "dropout": self.dropout},
            "machine": {"precision": self.precision, "attention": self.attention},
            "partition": {"kind": "dirichlet", "alpha": 1.0, "clients": self.clients},
            "federation": {"rounds": self.rounds, "clients_per_round": self.clients},
            "training": {"lr": self.lr, "steps": self.steps, "batch_size": self.batch},
            "method": {
                "name": self.method,
                **{name: value for name, value in given.items() if name in own},
            },
            "engine": {"stack": self.stack},
            "evaluation": {"limit": 500},
        }

    def model(self) -> str:
        """Return MiniLM, or a folder with its lowest layers, made where it is missing."""
        if self.layers == LAYERS:
            return "minilm"
        folder = Path("benchmarks/results") / f"minilm-{self.layers}"
        if not (folder / "config.json").exists():
            AutoTokenizer.from_pretrained(locate("minilm")).save_pretrained(folder)
            AutoModel.from_pretrained(
                locate("minilm"), num_hidden_layers=self.layers
            ).save_pretrained(folder)
        return str(folder)

    def assembly(self, hardware: Hardware | None = None) -> Federation:
        """Return the federation, ready to run."""
        return build(from_tree(self.tree()), hardware)

    def prepare(self, folder: Path) -> None:
        """Write what a rival needs to play the same federation: texts, batches, first adapters, test texts."""
        whole = replace(self, precision="fp32", stack=1).assembly()
        train, labels = whole.dataset.train, whole.dataset.labels
        clients = [
            {
                "texts": [train.texts[row] for row in rows.tolist()],
                "labels": [labels.index(train.labels[row]) for row in rows.tolist()],
                "rounds": [batches(whole, client, number) for number in range(self.rounds)],
            }
            for client, rows in enumerate(whole.partition.train)
        ]
        test = {
            "ids": [example.ids.tolist() for example in whole.scored],
            "labels": [int(example.labels) for example in whole.scored],
        }
        content = {
            "labels": list(labels),
            "clients": clients,
            "test": test,
            "setting": asdict(self),
        }
        (folder / "federation.json").write_text(json.dumps(content))
        first = {name: tensor.contiguous() for name, tensor in whole.first_state().shared.items()}
        save_file(first, folder / "first.safetensors")


def batches(whole: Federation, client: int, number: int = 0) -> list[list[int]]:
    """Return the rows of every step of one client in one round."""
    return plan(
        len(whole.worker.client_data[client].train),
        whole.config.training,
        whole.config.seed,
        client,
        number,
    )


def figures(found: Mapping[str, Any], setting: Setting) -> dict[str, float]:
    """Return seconds per steady round and client step, seconds from the start to the end of round 1, and the accuracy."""
    ends = found["ends"]
    steady = median(b - a for a, b in pairwise(ends))
    steps = setting.clients * setting.steps
    return {
        "round": steady,
        "step": steady / steps,
        "start": ends[0] - found["began"],
        "accuracy": found["accuracy"],
    }


def quick(setting: Setting) -> Setting:
    """Return the setting for a look that takes a minute."""
    return replace(setting, clients=4, rounds=2, steps=2)
