"""Settings -> everything a run needs, built in one place for all commands and every engine."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import final

import torch

from fedpeft import data, engines
from fedpeft.errors import BadInput
from fedpeft.experiment.agreement import agreement
from fedpeft.experiment.config import Config
from fedpeft.experiment.reading import divide, read_data
from fedpeft.experiment.stacking import apart, widest
from fedpeft.federation.client import ClientData, Worker
from fedpeft.ledger import RunRow
from fedpeft.models import Loaded, is_large_model, kernels, load
from fedpeft.seeds import generator
from fedpeft.tasks import TASKS, Encoded, Task, TokenCache, make_task
from fedpeft.training.activation_cache import ActivationCache, fitting
from fedpeft.training.hardware import Hardware, resolve, use
from fedpeft.types import Client, Method, State

WORTH = 2.0
"""Mean visits of a text over a run from which it pays to keep its hidden states.

With fewer, what is computed for the cache is hardly ever read from it.
"""


@final
@dataclass(frozen=True)
class Federation:
    """A federation ready to run: who holds what, the model, the method and the clients' worker.

    ``train`` and ``test`` are the whole splits, as tokens and label numbers.
    """

    config: Config
    dataset: data.Dataset
    partition: data.Partition
    hardware: Hardware
    loaded: Loaded
    task: Task
    train: Encoded
    test: Encoded
    method: Method
    worker: Worker

    @cached_property
    def scored(self) -> Encoded:
        """Return the texts that the server scores.

        They are the whole split, or a fixed draw of ``evaluation.limit`` texts from it.
        """
        choice = self.config.evaluation
        # Few commands score on validation, so that split is encoded only when it is needed.
        is_test = choice.split == "test"
        rows = self.dataset.test if is_test else self.dataset.validation
        split = self.test if is_test else _encoded(self.config, self.task, self.loaded, rows)
        # Seed 0, not the run's: runs with different seeds are scored on the same texts.
        order = torch.randperm(len(rows), generator=generator(0, "evaluation", choice.split))
        return split.of_rows(sorted(order[: choice.limit].tolist()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know before the run starts, a line each."""
        notes = list(self.partition.notes)
        for note in self.loaded.notes:
            notes.append(f"model.name = {self.config.model.name!r}: {note}")
        return (*notes, *self.train.notes, *self.test.notes)

    @property
    def clients(self) -> list[Client]:
        """Return the clients as the server knows them: by number of training examples."""
        clients: list[Client] = []
        for client_id, rows in enumerate(self.partition.train):
            clients.append(Client(client_id, examples=len(rows)))
        return clients

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
            # The score of a constant answer, against which reports hold every method.
            majority=self.task.trivial(self.dataset, self.scored),
            metric=self.task.metric.name,
            higher_is_better=self.task.metric.higher_is_better,
            metric_is_share=self.task.metric.share,
            # A resumed run compares the digests, so that it trains on what it was started on.
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

    ``hardware``: as resolved by an earlier start of the same run, or None to look now. ``reuse``: a
    federation whose data, tokens and model are taken over where the settings agree, as mounting
    leaves no trace on a model. Raises BadInput for settings that do not work together.
    """
    # 1. What can be refused in a moment comes first; loading a model takes seconds.
    engines.find(config.engine.kind)  # raises BadInput where the engine's extra is not installed
    dataset = _dataset(config, reuse)
    names = TASKS[config.task.kind].names(dataset)
    partition = _partition(config, dataset, reuse)
    _check_partition(config, partition)

    # 2. The machine, and the model in the number format and with the kernels chosen for it.
    task = make_task(config.task, names, config.model.max_length)
    chosen = hardware or _hardware(config, task, reuse)
    use(chosen)
    model = _model(config, dataset, task, chosen, reuse)

    # 3. What the clients train with.
    method = config.build_method()
    client_data = _client_data(partition, model)
    worker = Worker(
        method=method,
        model=model.loaded.model,
        task=model.task,
        client_data=client_data,
        training=config.training,
        hardware=chosen,
        head=model.loaded.base.head,
        seed=config.seed,
        config=agreement(config, method, names, model.loaded.digest),
        cache=_activation_cache(config, client_data, model.loaded, chosen),
    )
    federation = Federation(
        config=config,
        dataset=dataset,
        partition=partition,
        hardware=chosen,
        loaded=model.loaded,
        task=model.task,
        train=model.train,
        test=model.test,
        method=method,
        worker=worker,
    )

    # 4. The stack size is measured on the ready worker, unless ``chosen`` brings it already.
    if hardware is not None or _same_stack(config, reuse):
        return federation
    return _with_stack(federation)


@final
@dataclass(frozen=True)
class _Model:
    """A loaded model, its task with the tokenizer, and the texts in its tokens."""

    loaded: Loaded
    task: Task
    train: Encoded
    test: Encoded


def _dataset(config: Config, reuse: Federation | None) -> data.Dataset:
    """Read the data, or take them over."""
    if reuse is not None and (reuse.config.data, reuse.config.task) == (config.data, config.task):
        return reuse.dataset
    return read_data(config)


def _hardware(config: Config, task: Task, reuse: Federation | None) -> Hardware:
    """Look at the machine, or take over what was found."""

    # All settings that ``resolve`` and ``kernels`` depend on.
    def choices(config: Config) -> tuple[object, ...]:
        return config.machine, config.model.max_length, config.model.name, config.task

    if reuse is not None and choices(reuse.config) == choices(config):
        return reuse.hardware
    return resolve(
        config.machine,
        config.model.max_length,
        kernels(config.model, task),
        is_large_model(config.model, task),
    )


def _model(
    config: Config,
    dataset: data.Dataset,
    task: Task,
    hardware: Hardware,
    reuse: Federation | None,
) -> _Model:
    """Load the model and encode the texts, or take both over."""

    # The seed is among them, as it draws the weights of the new output module.
    def choices(config: Config, hardware: Hardware) -> tuple[object, ...]:
        return config.model, config.task, config.seed, hardware.device, hardware.attention

    if (
        reuse is not None
        and reuse.dataset is dataset
        and choices(reuse.config, reuse.hardware) == choices(config, hardware)
    ):
        return _Model(reuse.loaded, reuse.task, reuse.train, reuse.test)
    loaded = load(config.model, task, hardware, config.seed)
    tokenizing_task = task.with_tokenizer(loaded.tokenizer)
    train = _encoded(config, tokenizing_task, loaded, dataset.train)
    test = _encoded(config, tokenizing_task, loaded, dataset.test)
    return _Model(loaded, tokenizing_task, train, test)


def _encoded(config: Config, task: Task, loaded: Loaded, rows: data.Rows) -> Encoded:
    """Return rows as numbers, from the user's cache where an earlier run has kept them."""
    cache = TokenCache(
        tokenizer=loaded.tokenizer,
        choice=config.task,
        names=tuple(task.labels),
        max_length=config.model.max_length,
        limit=10**6 * config.machine.token_cache,  # megabytes -> bytes
        restore=TASKS[config.task.kind].restore,
    )
    return cache.encode(task, rows)


def _client_data(partition: data.Partition, model: _Model) -> dict[int, ClientData]:
    """Return what each client holds, by its id."""
    client_data: dict[int, ClientData] = {}
    for client_id, train_rows in enumerate(partition.train):
        train = model.train.of_rows(train_rows.tolist())
        if len(train_rows) and not len(train):  # the task has passed over all of them
            raise BadInput(
                f"client {partition.names[client_id]!r}: none of its rows can be used; "
                "choose fewer and larger clients with partition.clients"
            )
        test = model.test.of_rows(partition.test[client_id].tolist())
        client_data[client_id] = ClientData(train, test)
    return client_data


def _check_partition(config: Config, partition: data.Partition) -> None:
    """Raise BadInput where the settings ask more of the clients than there is."""
    count, clients = config.federation.clients_per_round, len(partition.train)
    if count > clients:
        raise BadInput(
            f"federation.clients_per_round = {count}: there are {clients} clients; "
            f"choose at most {clients}"
        )
    test_texts = sum(len(rows) for rows in partition.test)
    if config.evaluation.per_client and not test_texts:
        raise BadInput(
            "evaluation.per_client = true: no client holds test texts, "
            "as a partition of kind 'file' deals none"
        )


def _same_stack(config: Config, reuse: Federation | None) -> bool:
    """Return whether ``reuse`` has found out already how many clients train side by side."""

    # Whatever changes the time or the memory of one step.
    def choices(config: Config) -> tuple[object, ...]:
        count, batch = config.federation.clients_per_round, config.training.batch_size
        return config.machine, config.engine, config.model, config.task, count, batch

    return reuse is not None and choices(reuse.config) == choices(config)


def _with_stack(federation: Federation) -> Federation:
    """Return ``federation`` with the number of clients that train side by side."""
    size = _stack_size(federation)
    hardware = replace(federation.hardware, stack=size)
    worker = replace(federation.worker, hardware=hardware)
    return replace(federation, hardware=hardware, worker=worker)


def _stack_size(federation: Federation) -> int:
    """Return how many clients train side by side, as far as the settings leave it open.

    That is 1 where the base has dropout, as every client has a random stream of its own, and where
    the base mixes the rows of a batch.
    """
    config, base, worker = federation.config, federation.loaded.base, federation.worker
    count = config.federation.clients_per_round
    asked = count if config.engine.stack == "auto" else config.engine.stack
    # In Flower's simulation every client is a node of its own.
    if config.engine.kind != "local" or config.model.dropout > 0 or asked == 1:
        return 1
    if not apart(worker, base):
        return 1
    if config.engine.stack == "auto":
        return widest(worker, base, federation.clients, count)
    return asked


def _activation_cache(
    config: Config, client_data: Mapping[int, ClientData], loaded: Loaded, hardware: Hardware
) -> ActivationCache:
    """Return the cache of the hidden states of frozen blocks.

    It holds the states of no client where that would not pay, or would not be exact.
    """
    texts: dict[int, Encoded] = {}
    for client_id, examples in client_data.items():
        texts[client_id] = examples.train
    width = getattr(loaded.model.config, "hidden_size", None)
    # With dropout in the base, hidden states differ from pass to pass.
    if config.model.dropout > 0 or _visits_per_text(config, texts) < WORTH or width is None:
        return ActivationCache()
    bytes_per_number = 2 if hardware.precision == "bf16" else 4
    limit = 10**6 * config.machine.cache  # megabytes -> bytes
    return ActivationCache(fitting(texts, width * bytes_per_number, limit))


def _visits_per_text(config: Config, texts: Mapping[int, Encoded]) -> float:
    """Return how often a training text is used over the whole run, on average."""
    federation, training = config.federation, config.training
    total = sum(len(examples) for examples in texts.values())
    if training.steps:
        texts_per_client = float(training.steps * training.batch_size)
    else:
        texts_per_client = training.epochs * total / len(texts)
    return federation.rounds * federation.clients_per_round * texts_per_client / total


def _partition(config: Config, dataset: data.Dataset, reuse: Federation | None) -> data.Partition:
    """Divide the data, or take over who holds what; clusters of texts take seconds to find."""

    def choices(config: Config) -> tuple[object, ...]:
        return config.partition, config.seed, config.model, config.task

    if reuse is not None and reuse.dataset is dataset and choices(reuse.config) == choices(config):
        return reuse.partition
    return divide(config, dataset)
