"""The same federation in pfl-research's simulator as its expert would tune it. Knows nothing of fedpeft.

Run by ``vs_pfl.py`` in an environment of its own, on the federation that it prepared; prints one line of JSON. One resident
model, texts tokenised once, batches padded to their longest text, frozen weights cast to bf16 once, eager attention, no
dropout, a fused optimizer over the trained parameters alone, no evaluation in the rounds that are measured.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import rival

SETTINGS: dict[str, Any] = json.loads(sys.argv[1])
FEDERATION: dict[str, Any] = json.loads((Path(SETTINGS["folder"]) / "federation.json").read_text())
SETTING: dict[str, Any] = FEDERATION["setting"]
AMP = torch.bfloat16 if SETTINGS["precision"] == "bf16" else None


class Classifier(torch.nn.Module):
    """MiniLM with LoRA on query and value and a classifier of its own, in the form that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = rival.lora(
            len(FEDERATION["labels"]),
            SETTING["rank"],
            0.0,
            SETTINGS["attention"],
            AMP or torch.float32,
        )
        for module in self.net.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # autocast casts
        for parameter in rival.trained(self.net).values():
            parameter.data = parameter.data.float()
        first = load_file(Path(SETTINGS["folder"]) / "first.safetensors")
        with torch.no_grad():
            for name, parameter in rival.trained(self.net).items():
                parameter.copy_(first[name])

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        self.train()
        logits: Tensor = self.net(input_ids=input_ids, attention_mask=attention_mask).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def metrics(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Weighted]:
        """Return the accuracy of a batch."""
        self.eval()
        said = self.net(input_ids=input_ids, attention_mask=attention_mask).logits.argmax(1)
        return {"accuracy": Weighted(int((said == labels).sum()), len(labels))}


class Planned(Dataset):  # type: ignore[misc]
    """A client's texts, dealt out in the batches that were prepared for each of its rounds."""

    def __init__(self, client: int) -> None:
        own = FEDERATION["clients"][client]
        self.ids = rival.tokenised(own["texts"], SETTING["length"])
        self.targets = torch.tensor(own["labels"])
        self.rounds = iter(own["rounds"])
        super().__init__((self.targets,), user_id=str(client))

    def iter(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of the client's next round, or one batch to pfl's evaluation, which the first round always has."""
        batches = (
            next(self.rounds)
            if batch_size == SETTING["batch"]
            else [list(range(len(self.ids)))[:batch_size]]
        )
        for rows in batches:
            yield {**rival.collate([self.ids[row] for row in rows]), "labels": self.targets[rows]}


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """Takes the time at the end of every round."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Take the time."""
        del aggregate_metrics, model, central_iteration
        self.ends.append(time.time())
        return False, Metrics()


def main() -> None:
    """Run the simulation and print when each round ended and what came out."""
    torch.set_num_threads(SETTINGS["threads"])
    clients, rounds = SETTING["clients"], SETTING["rounds"]
    users = {client: Planned(client) for client in range(clients)}
    sampler = get_user_sampler("minimize_reuse", list(range(clients)))
    data = FederatedDataset(users.__getitem__, sampler)
    net = Classifier()
    trained = list(rival.trained(net.net).values())
    model = PyTorchModel(
        net,
        lambda _, lr: torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True),
        torch.optim.SGD(trained, lr=1.0),
        amp_dtype=AMP,
    )
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            rounds, evaluation_frequency=10**9, train_cohort_size=clients, val_cohort_size=0
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_batch_size=SETTING["batch"],
            local_num_epochs=1,
            local_learning_rate=SETTING["lr"],
            local_max_grad_norm=1.0,
        ),
        NNEvalHyperParams(local_batch_size=rival.EVALUATED),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if SETTINGS["out"]:
        save_file(
            {name: tensor.detach() for name, tensor in rival.trained(net.net).items()},
            SETTINGS["out"],
        )
    print(
        json.dumps(
            {
                "ends": clock.ends,
                "accuracy": rival.accuracy(net.net, FEDERATION["test"], AMP is not None),
            }
        )
    )


if __name__ == "__main__":
    main()
