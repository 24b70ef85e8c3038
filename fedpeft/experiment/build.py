"""Settings -> everything a run needs, built in one place for the command line, the Python API and every engine."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from typing import final

import torch

from fedpeft import data, engines
from fedpeft.errors import BadInput
from fedpeft.experiment.config import Config
from fedpeft.experiment.sections import CLIENTS, DataSection
from fedpeft.experiment.stacking import apart, widest
from fedpeft.federation.client import ClientData, Worker
from fedpeft.ledger import RunRow
from fedpeft.models import Loaded, kernels, load
from fedpeft.seeds import generator
from fedpeft.tasks import Classification, Encoded
from fedpeft.training.activation_cache import ActivationCache, fitting
from fedpeft.training.hardware import Hardware, resolve, use
from fedpeft.types import Client, Method, State

WORTH = 2.0
"""Visits of a text over a run from which it pays to keep its hidden states."""


@final
@dataclass(frozen=True)
class Federation:
    """A federation ready to run: who holds what, the model, the method and the worker that plays the clients.

    ``train`` and ``test`` are the whole splits as numbers.
    """

    config: Config
    dataset: data.Dataset
    partition: data.Partition
    hardware: Hardware
    loaded: Loaded
    task: Classification
    train: Encoded
    test: Encoded
    method: Method
    worker: Worker

    @cached_property
    def scored(self) -> Encoded:
        """Return the texts that the server scores: the whole split, or a fixed draw of ``evaluation.limit`` of them."""
        choice, rows = self.config.evaluation, self.dataset.validation
        whole = self.test if choice.split == "test" else self.task.encode(rows.texts, rows.labels)
        order = torch.randperm(len(whole), generator=generator(0, "evaluation", choice.split))
        return whole.take(sorted(order[: choice.limit].tolist()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know before the run starts, a line each."""
        name = self.config.model.name
        about_model = tuple(f"model.name = {name!r}: {note}" for note in self.loaded.notes)
        return self.partition.notes + about_model

    @property
    def clients(self) -> list[Client]:
        """Return the clients as the server knows them."""
        return [
            Client(number, examples=len(rows)) for number, rows in enumerate(self.partition.train)
        ]

    def first_state(self) -> State:
        """Return the state before the first round."""
        return self.method.init(self.loaded.base, self.config.seed)

    def run_row(self) -> RunRow:
        """Return the first row of the ledger."""
        config = self.config
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
            reference=config.reference,
            majority=self.dataset.majority(
                [self.task.labels[i] for i in self.scored.labels.tolist()]
            ),
            model_digest=self.loaded.digest,
            partition_digest=self.partition.digest(),
            settings=json.loads(config.to_json()),
            resolved={
                **self.hardware.describe(),
                "processor": platform.processor() or platform.machine(),
            },
            versions={name: version(name) for name in ("fedpeft", "torch", "transformers")},
        )


def build(
    config: Config, hardware: Hardware | None = None, reuse: Federation | None = None
) -> Federation:
    """Build what ``config`` describes.

    ``hardware``: as resolved by an earlier start of the same run, or None to look now. ``reuse``: an assembly whose data,
    tokens and model are taken over where the settings agree, as mounting leaves no trace on a model.
    """
    engines.find(config.engine.kind)
    asks = _hardware_settings(config)
    known = reuse.hardware if reuse and _hardware_settings(reuse.config) == asks else None
    chosen = hardware or known
    if chosen is None:
        chosen = resolve(config.machine, config.model.max_length, kernels(config.model))
    use(chosen)
    dataset = (
        reuse.dataset if reuse and reuse.config.data == config.data else read_data(config.data)
    )
    partition = divide(config, dataset)
    count, clients = config.federation.clients_per_round, len(partition.train)
    if count > clients:
        raise BadInput(
            f"federation.clients_per_round = {count}: there are {clients} clients; choose at most {clients}"
        )
    if config.evaluation.per_client and not any(len(rows) for rows in partition.test):
        raise BadInput(
            "evaluation.per_client = true: no client holds test texts, as a partition of kind 'file' deals none"
        )
    if (
        reuse
        and reuse.dataset is dataset
        and _model_settings(reuse.config, reuse.hardware) == _model_settings(config, chosen)
    ):
        loaded, task, train, test = reuse.loaded, reuse.task, reuse.train, reuse.test
    else:
        loaded = load(config.model, dataset.labels, chosen, config.seed)
        task = Classification(dataset.labels, loaded.tokenizer, config.model.max_length)
        train, test = (
            task.encode(rows.texts, rows.labels) for rows in (dataset.train, dataset.test)
        )
    client_data = {
        number: ClientData(train.take(mine.tolist()), test.take(own.tolist()))
        for number, (mine, own) in enumerate(zip(partition.train, partition.test, strict=True))
    }
    method = config.build_method()
    digest = agreement(config, method, dataset.labels, loaded.digest)
    worker = Worker(
        method=method,
        model=loaded.model,
        task=task,
        client_data=client_data,
        training=config.training,
        hardware=chosen,
        head=loaded.base.head,
        seed=config.seed,
        config=digest,
        cache=_kept(config, client_data, loaded, chosen),
    )
    whole = Federation(
        config, dataset, partition, chosen, loaded, task, train, test, method, worker
    )
    settled = hardware or (reuse and _stack_settings(reuse.config) == _stack_settings(config))
    return whole if settled else _with_stack(whole)


def _hardware_settings(config: Config) -> tuple[object, ...]:
    """Return the settings on which the choice for this machine depends."""
    return config.machine, config.model.max_length, config.model.name


def _model_settings(config: Config, hardware: Hardware) -> tuple[object, ...]:
    """Return the settings on which the loaded model depends, beside the labels."""
    return config.model, config.seed, hardware.device, hardware.attention


def _stack_settings(config: Config) -> tuple[object, ...]:
    """Return the settings on which the choice of the stack depends."""
    return (
        config.machine,
        config.engine,
        config.model,
        config.federation.clients_per_round,
        config.training.batch_size,
    )


def _with_stack(whole: Federation) -> Federation:
    """Return ``whole`` with the number of clients that train side by side.

    One, where the base has dropout, as every client has a random stream of its own, or mixes the rows of a batch.
    """
    config, base, count = whole.config, whole.loaded.base, whole.config.federation.clients_per_round
    size = count if config.engine.stack == "auto" else config.engine.stack
    if (
        config.engine.kind != "local"
        or config.model.dropout > 0
        or (size > 1 and not apart(whole.worker, base))
    ):
        size = 1
    elif config.engine.stack == "auto":
        size = widest(whole.worker, base, whole.clients, count)
    hardware = replace(whole.hardware, stack=size)
    return replace(whole, hardware=hardware, worker=replace(whole.worker, hardware=hardware))


def _kept(
    config: Config, client_data: Mapping[int, ClientData], loaded: Loaded, hardware: Hardware
) -> ActivationCache:
    """Return what keeps the hidden states of frozen blocks; of no client where that would not pay or not be exact."""
    federation, training = config.federation, config.training
    texts = {client: holding.train for client, holding in client_data.items()}
    total = sum(len(own) for own in texts.values())
    own_texts = (
        training.steps * training.batch_size
        if training.steps
        else training.epochs * total / len(texts)
    )
    visits = federation.rounds * federation.clients_per_round * own_texts / total
    width = getattr(loaded.model.config, "hidden_size", None)
    if config.model.dropout > 0 or visits < WORTH or width is None:
        return ActivationCache()
    size = width * (2 if hardware.precision == "bf16" else 4)
    return ActivationCache(fitting(texts, size, 10**6 * config.machine.cache))


def read_data(choice: DataSection) -> data.Dataset:
    """Return the texts that the settings name."""
    if choice.train is None:
        return data.pydocs()
    return data.from_files(
        train=choice.train,
        validation=choice.validation,
        test=choice.test,
        text=choice.text,
        label=choice.label,
        key=choice.key,
        delimiter=choice.delimiter,
        validation_fraction=choice.validation_fraction,
        test_fraction=choice.test_fraction,
    )


def divide(config: Config, dataset: data.Dataset) -> data.Partition:
    """Return who holds what."""
    choice, seed = config.partition, config.seed
    clients = choice.clients or CLIENTS
    match choice.kind:
        case "iid":
            return data.iid(dataset, clients, seed)
        case "dirichlet":
            return data.dirichlet(
                dataset, clients, seed, alpha=choice.alpha, min_examples=choice.min_examples
            )
        case "shards":
            return data.shards(dataset, clients, seed, shards_per_client=choice.shards_per_client)
        case "by_key":
            return data.by_key(dataset, choice.clients)
        case "file":
            assert choice.file is not None  # checked with the settings
            return data.from_file(dataset, choice.file)


def agreement(config: Config, method: Method, labels: Sequence[str], weights: str) -> bytes:
    """Return the digest of what server and clients must agree on: what changes a client's work.

    ``method`` as built from ``config``, every field of it; ``labels`` in their order; ``weights``:
    digest of the pre-trained parameters. Paths do not count, so the same model may lie in another
    folder on every machine. Of the federation only the rounds that a method's schedule knows do.
    """
    fields_of_method = asdict(method)  # type: ignore[call-overload]  # every method is a dataclass
    agreed = {
        "method": {"name": config.method["name"], **fields_of_method},
        "dropout": config.model.dropout,
        "max_length": config.model.max_length,
        "training": asdict(config.training),
        "seed": config.seed,
        "labels": list(labels),
        "weights": weights,
    }
    text = json.dumps(agreed, sort_keys=True, default=repr)
    return blake2b(text.encode(), digest_size=16).digest()
