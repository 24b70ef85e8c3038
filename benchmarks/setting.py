"""The federation that rivals are measured on: the same clients, texts, batches and rates for all of them."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fedpeft.assembly import Assembly, assemble
from fedpeft.config import from_tree
from fedpeft.hardware import Hardware
from fedpeft.training import plan


@dataclass(frozen=True)
class Setting:
    """``clients`` all take part in each of ``rounds``, with ``steps`` of ``batch`` texts of at most ``length`` tokens.

    ``out``: where the final adapters go, as safetensors.
    """

    clients: int = 8
    rounds: int = 4
    steps: int = 4
    batch: int = 16
    length: int = 64
    rank: int = 8
    lr: float = 3e-3
    dropout: float = 0.0
    precision: str = "auto"
    attention: str = "auto"
    threads: int = 0
    cohort: int | str = "auto"
    method: str = "lora"
    targets: str = "query|value"
    out: str = ""

    def tree(self) -> dict[str, Any]:
        """Return the settings as fedpeft takes them."""
        return {
            "model": {"name": "minilm", "max_length": self.length, "dropout": self.dropout},
            "machine": {"precision": self.precision, "attention": self.attention, "threads": self.threads},
            "partition": {"kind": "dirichlet", "alpha": 1.0, "clients": self.clients},
            "federation": {"rounds": self.rounds, "clients_per_round": self.clients},
            "training": {"lr": self.lr, "steps": self.steps, "batch_size": self.batch},
            "method": {"name": self.method, "targets": self.targets, "rank": self.rank},
            "engine": {"cohort": self.cohort},
            "evaluation": {"limit": 500},
        }

    def assembly(self, hardware: Hardware | None = None) -> Assembly:
        """Return the federation, ready to run."""
        return assemble(from_tree(self.tree()), hardware)

    def prepare(self, folder: Path) -> None:
        """Write what a rival needs to play the same federation: texts, batches, first adapters, test texts."""
        whole = replace(self, precision="fp32", cohort=1).assembly()
        train, labels = whole.dataset.train, whole.dataset.labels
        clients = [
            {
                "texts": [train.texts[row] for row in rows.tolist()],
                "labels": [labels.index(train.labels[row]) for row in rows.tolist()],
                "rounds": [plan(len(rows), whole.config.training, 0, client, number) for number in range(self.rounds)],
            }
            for client, rows in enumerate(whole.partition.train)
        ]
        test = {"ids": [ids.tolist() for ids in whole.scored.ids], "labels": whole.scored.labels.tolist()}
        content = {"labels": list(labels), "clients": clients, "test": test, "setting": asdict(self)}
        (folder / "federation.json").write_text(json.dumps(content))
        save_file(
            {name: tensor.contiguous() for name, tensor in whole.first_state().shared.items()}, folder / "first.safetensors"
        )


def quick(setting: Setting) -> Setting:
    """Return the setting for a look that takes a minute."""
    return replace(setting, clients=4, rounds=2, steps=2)
