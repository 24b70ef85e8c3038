"""What the server of a run knows, whether its clients are simulated or real."""

from collections.abc import Sequence
from typing import Protocol

from fedpeft.experiment.config import Config
from fedpeft.ledger import RunRow
from fedpeft.models import Loaded
from fedpeft.tasks import Encoded, Task
from fedpeft.training.hardware import Hardware
from fedpeft.types import Client, Method, State


class Prepared(Protocol):
    """What every half of a run has: settings, choices for the machine, model and task."""

    @property
    def config(self) -> Config:
        """The settings that it was built from."""
        ...

    @property
    def hardware(self) -> Hardware:
        """The choices for this machine."""
        ...

    @property
    def loaded(self) -> Loaded:
        """The model."""
        ...

    @property
    def task(self) -> Task:
        """The task, with the model's tokenizer."""
        ...


class ServerSide(Prepared, Protocol):
    """A run as its server sees it: settings, model, method, task; nothing that clients hold."""

    @property
    def method(self) -> Method:
        """The method."""
        ...

    @property
    def agreed(self) -> bytes:
        """The digest of what server and clients must agree on."""
        ...

    @property
    def clients(self) -> Sequence[Client]:
        """The clients that are known by now."""
        ...

    @property
    def scored(self) -> Encoded:
        """The texts that the server scores; none where it has none."""
        ...

    def first_state(self) -> State:
        """Return the state before the first round."""
        ...

    def run_row(self) -> RunRow:
        """Return the first row of the ledger."""
        ...
