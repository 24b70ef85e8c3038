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
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import load_file, save_file

from benchmarks import rival

SETTINGS: dict[str, Any] = json.loads(
    sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].startswith("{") else os.environ["BENCH"]
)
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
    labels, rank = len(federation()["labels"]), federation()["setting"]["rank"]
    return rival.lora(labels, rank, SETTINGS["dropout"], SETTINGS["attention"], torch.float32)


@cache
def tokenised(client: int) -> list[list[int]]:
    """Return the token ids of a client's texts, once per process."""
    return rival.tokenised(
        federation()["clients"][client]["texts"], federation()["setting"]["length"]
    )


def put(arrays: dict[str, np.ndarray]) -> None:
    """Load what came from the server."""
    with torch.no_grad():
        for name, parameter in rival.trained(model()).items():
            parameter.copy_(torch.from_numpy(arrays[name]))


def precision() -> Any:
    """Return the context of forward passes."""
    return (
        torch.autocast("cpu", dtype=torch.bfloat16)
        if SETTINGS["precision"] == "bf16"
        else nullcontext()
    )


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
    parameters = list(rival.trained(net).values())
    optimizer = torch.optim.AdamW(parameters, lr=setting["lr"], weight_decay=0.0, fused=True)
    number = int(str(message.content["config"]["server-round"])) - 1
    for rows in own["rounds"][number]:
        optimizer.zero_grad()
        with precision():
            logits = net(**rival.collate([ids[row] for row in rows])).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    arrays = ArrayRecord(
        {name: parameter.detach() for name, parameter in rival.trained(net).items()}
    )
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
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(dict(first)),
        num_rounds=setting["rounds"],
        evaluate_fn=ended,
    )
    outcome["arrays"] = {name: array.numpy() for name, array in result.arrays.items()}


def main() -> None:
    """Run the simulation with Flower's own engine and print when each round ended and what came out."""
    resources: Any = {"client_resources": {"num_cpus": SETTINGS["threads"], "num_gpus": 0.0}}
    run_simulation(
        server_app, client_app, federation()["setting"]["clients"], backend_config=resources
    )
    put(outcome["arrays"])
    if SETTINGS["out"]:
        save_file(
            {name: torch.from_numpy(array.copy()) for name, array in outcome["arrays"].items()},
            SETTINGS["out"],
        )
    print(
        json.dumps(
            {
                "ends": ends,
                "accuracy": rival.accuracy(
                    model(), federation()["test"], SETTINGS["precision"] == "bf16"
                ),
            }
        )
    )


if __name__ == "__main__":
    importlib.import_module(
        "benchmarks.flower_app"
    ).main()  # so that workers find the app by its importable name
