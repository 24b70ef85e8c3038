"""Settings -> everything a run needs, built in one place for the command line, the Python API and every engine."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from typing import final

import torch

from fedpeft import data
from fedpeft.client import Holding, Worker
from fedpeft.config import Config
from fedpeft.hardware import Hardware, resolve, use
from fedpeft.ledger import RunRow
from fedpeft.models import Loaded, load
from fedpeft.seeds import generator
from fedpeft.tasks import Classification, Encoded
from fedpeft.types import BadInput, Client, Method, State


@final
@dataclass(frozen=True)
class Assembly:
    """A federation ready to run: who holds what, the model, the method and the worker that plays the clients.

    ``scored``: the texts that the server evaluates on. ``config_digest``: what server and clients must agree on.
    """

    config: Config
    dataset: data.Dataset
    partition: data.Partition
    hardware: Hardware
    loaded: Loaded
    task: Classification
    method: Method
    worker: Worker
    scored: Encoded

    @property
    def clients(self) -> list[Client]:
        """Return the clients as the server knows them."""
        return [Client(number, examples=len(rows)) for number, rows in enumerate(self.partition.train)]

    def first_state(self) -> State:
        """Return the state before the first round."""
        return self.method.init(self.loaded.base, self.config.seed)

    def run_row(self) -> RunRow:
        """Return the first row of the ledger."""
        config = self.config
        split = self.dataset.test if config.evaluation.split == "test" else self.dataset.validation
        return RunRow(
            name=config.name,
            method=config.label or str(config.method["name"]),
            seed=config.seed,
            model=config.model.name,
            data=self.dataset.name,
            data_digest=self.dataset.digest(),
            clients=len(self.partition.train),
            clients_per_round=min(config.federation.clients_per_round, len(self.partition.train)),
            rounds=config.federation.rounds,
            majority=self.dataset.majority(split),
            settings=json.loads(config.to_json()),
            resolved={**self.hardware.describe(), "processor": platform.processor() or platform.machine()},
            versions={name: version(name) for name in ("fedpeft", "torch", "transformers")},
        )


def assemble(config: Config, hardware: Hardware | None = None) -> Assembly:
    """Build what ``config`` describes; ``hardware`` as resolved by an earlier start of the same run, or None to look now."""
    chosen = hardware or resolve(config.machine, config.model.max_length)
    use(chosen)
    dataset = read_data(config)
    partition = divide(config, dataset)
    if config.federation.clients_per_round > len(partition.train):
        raise BadInput(
            f"federation.clients_per_round = {config.federation.clients_per_round}: there are {len(partition.train)} clients; "
            f"choose at most {len(partition.train)}"
        )
    loaded = load(config.model, dataset.labels, chosen, config.seed)
    task = Classification(dataset.labels, loaded.tokenizer, config.model.max_length)
    method = config.build_method()
    train, test = (task.encode(rows.texts, rows.labels) for rows in (dataset.train, dataset.test))
    holdings = {
        number: Holding(train.take(mine.tolist()), test.take(own.tolist()))
        for number, (mine, own) in enumerate(zip(partition.train, partition.test, strict=True))
    }
    worker = Worker(
        method,
        loaded.model,
        task,
        holdings,
        config.training,
        chosen,
        loaded.base.head,
        config.seed,
        agreement(config, dataset, loaded),
    )
    return Assembly(config, dataset, partition, chosen, loaded, task, method, worker, _scored(config, dataset, task, test))


def read_data(config: Config) -> data.Dataset:
    """Return the texts that the settings name."""
    choice = config.data
    if choice.train is None:
        return data.pydocs()
    return data.from_files(
        train=choice.train,
        validation=choice.validation,
        test=choice.test,
        text=choice.text,
        label=choice.label,
        key=choice.key,
        validation_fraction=choice.validation_fraction,
        test_fraction=choice.test_fraction,
    )


def divide(config: Config, dataset: data.Dataset) -> data.Partition:
    """Return who holds what."""
    choice, seed = config.partition, config.seed
    match choice.kind:
        case "iid":
            return data.iid(dataset, choice.clients, seed)
        case "dirichlet":
            return data.dirichlet(dataset, choice.clients, seed, alpha=choice.alpha, min_examples=choice.min_examples)
        case "shards":
            return data.shards(dataset, choice.clients, seed, shards_per_client=choice.shards_per_client)
        case "by_key":
            return data.by_key(dataset, choice.clients)
        case "file":
            assert choice.file is not None  # checked with the settings
            return data.from_file(dataset, choice.file)


def agreement(config: Config, dataset: data.Dataset, loaded: Loaded) -> bytes:
    """Return the digest of what server and clients must agree on: method, model, labels, training, seed and rounds."""
    settings: Mapping[str, object] = json.loads(config.to_json())
    agreed = {name: settings[name] for name in ("method", "model", "training", "federation", "seed")}
    text = json.dumps({**agreed, "labels": dataset.labels, "weights": loaded.digest}, sort_keys=True)
    return blake2b(text.encode(), digest_size=16).digest()


def _scored(config: Config, dataset: data.Dataset, task: Classification, test: Encoded) -> Encoded:
    """Return the texts that the server scores: the whole split, or a fixed draw of ``evaluation.limit`` of them."""
    choice = config.evaluation
    rows = dataset.validation
    whole = test if choice.split == "test" else task.encode(rows.texts, rows.labels)
    if choice.limit is None or choice.limit >= len(whole):
        return whole
    order = torch.randperm(len(whole), generator=generator(0, "evaluation", choice.split))
    return whole.take(sorted(order[: choice.limit].tolist()))
