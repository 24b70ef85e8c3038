"""Pieces that a simulation, a server and a site build alike: model, tokens, worker, its cache."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, Literal, Protocol, final

import torch

from fedpeft import data
from fedpeft.errors import BadInput
from fedpeft.experiment.agreement import agreement
from fedpeft.experiment.config import Config
from fedpeft.experiment.sections import EvaluationSection
from fedpeft.experiment.server_side import Prepared
from fedpeft.federation.client import ClientData, Worker
from fedpeft.ledger import RunRow
from fedpeft.models import Loaded, is_large_model, kernels, load
from fedpeft.seeds import generator
from fedpeft.tasks import TASKS, Encoded, Task, TokenCache
from fedpeft.training.activation_cache import ActivationCache, fitting
from fedpeft.training.hardware import Hardware, resolve
from fedpeft.types import Method

WORTH: Final = 2.0
"""Mean visits of a text over a run from which it pays to keep its hidden states.

With fewer, what is computed for the cache is hardly ever read from it.
"""


class Built(Prepared, Protocol):
    """What was built before, and may be taken over where the settings agree."""

    @property
    def dataset(self) -> data.Dataset:
        """The rows, as they were read."""
        ...

    @property
    def train(self) -> Encoded:
        """The training rows as tokens."""
        ...

    @property
    def test(self) -> Encoded:
        """The test rows as tokens."""
        ...


@final
@dataclass(frozen=True)
class Tokenised:
    """A loaded model, its task with the tokenizer, and the texts in its tokens."""

    loaded: Loaded
    task: Task
    train: Encoded
    test: Encoded


def hardware_for(config: Config, task: Task, reuse: Built | None) -> Hardware:
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


def tokenised(
    config: Config, dataset: data.Dataset, task: Task, hardware: Hardware, reuse: Built | None
) -> Tokenised:
    """Load the model and encode the texts, or take both over."""

    # The seed is among them, as it draws the weights of the new output module.
    def choices(config: Config, hardware: Hardware) -> tuple[object, ...]:
        return config.model, config.task, config.seed, hardware.device, hardware.attention

    if (
        reuse is not None
        and reuse.dataset is dataset
        and choices(reuse.config, reuse.hardware) == choices(config, hardware)
    ):
        return Tokenised(reuse.loaded, reuse.task, reuse.train, reuse.test)
    loaded = load(config.model, task, hardware, config.seed)
    tokenizing_task = task.with_tokenizer(loaded.tokenizer)
    train = encoded(config, tokenizing_task, loaded, dataset, "train")
    test = encoded(config, tokenizing_task, loaded, dataset, "test")
    return Tokenised(loaded, tokenizing_task, train, test)


def encoded(
    config: Config,
    task: Task,
    loaded: Loaded,
    dataset: data.Dataset,
    split: Literal["train", "validation", "test"],
) -> Encoded:
    """Return a split as numbers, from the user's cache where an earlier run has kept them.

    What the task cannot work with raises BadInput that names data set and split.
    """
    rows: data.Rows = getattr(dataset, split)
    if not len(rows):
        return Encoded([])
    cache = TokenCache(
        tokenizer=loaded.tokenizer,
        choice=config.task,
        names=tuple(task.labels),
        max_length=config.model.max_length,
        limit=10**6 * config.machine.token_cache,  # megabytes -> bytes
        sources=TASKS[config.task.kind].sources,
    )
    try:
        return cache.encode(task, rows)
    except BadInput as error:
        raise BadInput(f"{dataset.name}, {split}: {error}") from error


def make_worker(
    *,
    config: Config,
    method: Method,
    names: Sequence[str],
    model: Tokenised,
    client_data: Mapping[int, ClientData],
    hardware: Hardware,
    visits: float,
) -> Worker:
    """Return the worker of the clients in ``client_data``.

    ``names``: of the possible answers. ``visits``: see ``visits_per_text``.
    """
    return Worker(
        method=method,
        model=model.loaded.model,
        task=model.task,
        client_data=client_data,
        training=config.training,
        hardware=hardware,
        head=model.loaded.base.head,
        seed=config.seed,
        config=agreement(config, method, names, model.loaded.digest),
        cache=_activation_cache(config, client_data, model.loaded, hardware, visits),
    )


def _activation_cache(
    config: Config,
    client_data: Mapping[int, ClientData],
    loaded: Loaded,
    hardware: Hardware,
    visits: float,
) -> ActivationCache:
    """Return the cache of the hidden states of frozen blocks.

    It holds the states of no client where that would not pay, or would not be exact.
    """
    texts: dict[int, Encoded] = {}
    for client_id, examples in client_data.items():
        texts[client_id] = examples.train
    width = getattr(loaded.model.config, "hidden_size", None)
    # With dropout in the base, hidden states differ from pass to pass.
    if config.model.dropout > 0 or visits < WORTH or width is None:
        return ActivationCache()
    bytes_per_number = 2 if hardware.precision == "bf16" else 4
    limit = 10**6 * config.machine.cache  # megabytes -> bytes
    return ActivationCache(fitting(texts, width * bytes_per_number, limit))


def visits_per_text(config: Config, clients: int, texts: int) -> float:
    """Return how often a training text is used over the whole run, on average.

    ``texts``: of all ``clients`` together.
    """
    federation, training = config.federation, config.training
    if training.steps:
        texts_per_client = float(training.steps * training.batch_size)
    else:
        texts_per_client = training.epochs * texts / clients
    return federation.rounds * federation.clients_per_round * texts_per_client / texts


def to_score(choice: EvaluationSection, split: Encoded, rows: int) -> Encoded:
    """Return the texts that a server scores: all ``rows`` of ``split``, or a fixed draw of them."""
    # Seed 0, not the run's: runs with different seeds are scored on the same texts.
    order = torch.randperm(rows, generator=generator(0, "evaluation", choice.split))
    return split.of_rows(sorted(order[: choice.limit].tolist()))


def row_of(
    config: Config,
    task: Task,
    loaded: Loaded,
    hardware: Hardware,
    *,
    data: str,
    data_digest: str,
    clients: int,
    majority: float | None,
    partition_digest: str,
) -> RunRow:
    """Return the first row of a run's ledger.

    ``data``: its name. ``majority``: the score of an answer that ignores the text, None where that
    is not known.
    """
    return RunRow(
        name=config.name,
        method=config.label or str(config.method["name"]),
        seed=config.seed,
        model=config.model.name,
        data=data,
        data_digest=data_digest,
        clients=clients,
        clients_per_round=min(config.federation.clients_per_round, clients),
        rounds=config.federation.rounds,
        reference=config.reference,
        majority=majority,
        metric=task.metric.name,
        higher_is_better=task.metric.higher_is_better,
        metric_is_share=task.metric.share,
        # A resumed run compares the digests, so that it trains on what it was started on.
        model_digest=loaded.digest,
        partition_digest=partition_digest,
        settings=json.loads(config.to_json()),
        resolved={
            **hardware.describe(),
            "processor": platform.processor() or platform.machine(),
        },
        versions={name: version(name) for name in ("fedpeft", "torch", "transformers")},
    )
