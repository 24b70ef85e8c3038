"""Settings -> everything a run needs, built in one place for all commands and every engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from torch import Size

from fedpeft import data, engines
from fedpeft.errors import BadInput
from fedpeft.experiment.config import Config
from fedpeft.experiment.pieces import (
    Tokenised,
    encoded,
    hardware_for,
    make_worker,
    row_of,
    to_score,
    tokenised,
    visits_per_text,
)
from fedpeft.experiment.privacy import check_privacy, privacy_notes
from fedpeft.experiment.reading import divide, read_data
from fedpeft.experiment.stacking import apart, widest
from fedpeft.experiment.wrapping import check_replies
from fedpeft.federation.client import ClientData, Worker
from fedpeft.federation.cohort import Trace, read_trace
from fedpeft.federation.fleet import Fleet, dealt
from fedpeft.ledger import RunRow
from fedpeft.models import Loaded, check_bits
from fedpeft.tasks import TASKS, Encoded, Task, make_task
from fedpeft.training.hardware import Hardware, use
from fedpeft.training.loop import num_steps, paced
from fedpeft.types import Base, Client, Method, State


@final
@dataclass(frozen=True)
class Federation:
    """A federation ready to run: who holds what, the model, the method and the clients' worker.

    ``train`` and ``test`` are the whole splits, as tokens and label numbers. ``fleet``: the devices
    of the clients, with what is to be said of them. ``trace``: which of them are there when; None
    where all always are.
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
    fleet: Fleet
    fleet_notes: tuple[str, ...]
    trace: Trace | None

    @property
    def agreed(self) -> bytes:
        """Return the digest of what server and clients must agree on."""
        return self.worker.config

    @cached_property
    def scored(self) -> Encoded:
        """Return the texts that the server scores.

        They are the whole split, or a fixed draw of ``evaluation.limit`` texts from it.
        """
        choice = self.config.evaluation
        # Few commands score on validation, so that split is encoded only when it is needed.
        is_test = choice.split == "test"
        rows = self.dataset.test if is_test else self.dataset.validation
        split = self.test
        if not is_test:
            split = encoded(self.config, self.task, self.loaded, self.dataset, "validation")
        return to_score(choice, split, len(rows))

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know before the run starts, a line each."""
        notes = list(self.partition.notes)
        for note in self.loaded.notes:
            notes.append(f"model.name = {self.config.model.name!r}: {note}")
        notes += self.fleet_notes
        notes += privacy_notes(self.config, self.clients)
        return (*notes, *self.train.notes, *self.test.notes)

    @property
    def clients(self) -> list[Client]:
        """Return the clients as the server knows them: by number of training examples."""
        clients: list[Client] = []
        for client_id, rows in enumerate(self.partition.train):
            capacity = self.fleet.capacity(client_id)
            clients.append(Client(client_id, capacity, examples=len(rows)))
        return clients

    @property
    def trace_digest(self) -> str:
        """Return the digest of the trace of clients; empty where there is none."""
        return "" if self.trace is None else self.trace.digest

    def first_state(self) -> State:
        """Return the state before the first round."""
        return self.method.init(self.loaded.base, self.config.seed)

    def run_row(self) -> RunRow:
        """Return the first row of the ledger."""
        row = row_of(
            self.config,
            self.task,
            self.loaded,
            self.hardware,
            data=self.dataset.name,
            data_digest=self.dataset.digest(),
            clients=len(self.partition.train),
            # The score of a constant answer, against which reports hold every method.
            majority=self.task.trivial(self.dataset, self.scored),
            partition_digest=self.partition.digest(),
        )
        return replace(row, devices=self.fleet.members(), trace_digest=self.trace_digest)


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
    check_bits(config.model)  # likewise
    check_privacy(config)  # likewise
    dataset = _dataset(config, reuse)
    names = TASKS[config.task.kind].names(dataset)
    partition = _partition(config, dataset, reuse)
    _check_partition(config, partition)
    plan, count = config.federation, len(partition.train)
    device_of = dealt(plan.fleet, range(count), config.seed) if plan.fleet else {}
    trace = read_trace(plan.trace, partition.names, plan.rounds) if plan.trace else None

    # 2. The machine, and the model in the number format and with the kernels chosen for it.
    task = make_task(config.task, names, config.model.max_length)
    chosen = hardware or hardware_for(config, task, reuse)
    use(chosen)
    model = tokenised(config, dataset, task, chosen, reuse)

    # 3. What the clients train with.
    method = config.build_method()
    client_data = _client_data(partition, model)
    texts = sum(len(held.train) for held in client_data.values())
    worker = make_worker(
        config=config,
        method=method,
        names=names,
        model=model,
        client_data=client_data,
        hardware=chosen,
        visits=visits_per_text(config, len(client_data), texts),
    )
    fleet = _fleet(config, device_of, client_data)
    worker = replace(worker, paces=fleet.paces())
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
        fleet=fleet,
        fleet_notes=tuple(_capacities(config, fleet, method, model.loaded.base)),
        trace=trace,
    )

    # 4. The stack size is measured on the ready worker, unless ``chosen`` brings it already.
    if hardware is not None or _same_stack(config, reuse):
        return federation
    return _with_stack(federation)


def _dataset(config: Config, reuse: Federation | None) -> data.Dataset:
    """Read the data, or take them over."""
    if reuse is not None and (reuse.config.data, reuse.config.task) == (config.data, config.task):
        return reuse.dataset
    return read_data(config)


def _client_data(partition: data.Partition, model: Tokenised) -> dict[int, ClientData]:
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


def _fleet(
    config: Config, device_of: Mapping[int, str], client_data: Mapping[int, ClientData]
) -> Fleet:
    """Return the devices of the clients; ``device_of``: the class of each."""
    classes, training = config.federation.fleet, config.training
    planned: dict[int, int] = {}
    for client, name in device_of.items():
        steps = num_steps(len(client_data[client].train), training)
        planned[client] = paced(steps, classes[name].steps)
    return Fleet(classes, device_of, planned, config.seed, config.federation.deadline)


def _capacities(config: Config, fleet: Fleet, method: Method, base: Base) -> Iterator[str]:
    """Yield a note for every weak class that ``method`` has train as much as any other.

    BadInput for a class that is too weak for it.
    """
    weak = {name: device for name, device in fleet.devices.items() if device.capacity < 1}
    if not weak:
        return
    state, members = method.init(base, config.seed), fleet.members()

    def sent(client: Client) -> list[tuple[str, Size]]:
        down = method.send(state, client)
        return [(name, tensor.shape) for name, tensor in down.items()]

    for name, device in weak.items():
        client = Client(members[name][0], device.capacity)
        try:
            as_any_other = sent(client) == sent(replace(client, capacity=1.0))
        except BadInput as error:
            raise BadInput(f"federation.fleet.{name}: {error}") from error
        if as_any_other:
            yield (
                f"federation.fleet.{name}.capacity = {device.capacity:g}: method "
                f"{config.method['name']!r} sends the same to every client, however weak"
            )


def _check_partition(config: Config, partition: data.Partition) -> None:
    """Raise BadInput where the settings ask more of the clients than there is."""
    count, clients = config.federation.clients_per_round, len(partition.train)
    if count > clients:
        raise BadInput(
            f"federation.clients_per_round = {count}: there are {clients} clients; "
            f"choose at most {clients}"
        )
    check_replies(config.wrap, count)
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


def _partition(config: Config, dataset: data.Dataset, reuse: Federation | None) -> data.Partition:
    """Divide the data, or take over who holds what; clusters of texts take seconds to find."""

    def choices(config: Config) -> tuple[object, ...]:
        return config.partition, config.seed, config.model, config.task

    if reuse is not None and reuse.dataset is dataset and choices(reuse.config) == choices(config):
        return reuse.partition
    return divide(config, dataset)
