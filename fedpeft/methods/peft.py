"""Any tuner of the peft library, put in by peft itself; what it trains is averaged."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.errors import BadInput, WireError
from fedpeft.mounting import (
    check_alone,
    check_dtypes,
    check_shapes,
    detached,
    only_clients,
    plain_parameters,
    replaced,
    specs,
    standing_in,
    trainable,
    twin_of,
)
from fedpeft.seeds import derive
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update

PREFIX = "peft:"
"""What stands before peft's own names of what it trains."""
LENGTHENING = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
"""Tuners that put tokens before a text, and so move the places of all others in the output."""
TRIED = "lora, ia3, vera, ln_tuning, oft, boft, loha, lokr, hra, fourierft, prefix_tuning"
"""Tuners that the tests train on every task."""


@final
@dataclass(frozen=True)
class Peft:
    """Train, send and average what a tuner of the peft library makes trainable, and the head.

    Everything that peft keeps frozen it draws from the seed, alike on all clients. Clients train
    one by one.
    """

    paper: ClassVar[str] = "the peft library, https://github.com/huggingface/peft"
    tuner: str = "ia3"
    """The tuner by peft's name, such as `ia3`, `vera`, `ln_tuning`, `oft` or `prefix_tuning`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the tuner's own configuration, such as `target_modules`."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Start from what peft puts into a copy of the model.

        A tuner that peft does not have, or that does not fit model, task or its settings raises
        BadInput.
        """
        if base.twin is None:
            raise BadInput("method.name = 'peft' needs the model itself; choose 'lora'")
        tuned = self._tuned(base.twin(), seed)
        return State(0, _trained_by(tuned) | base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send all that is trained."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Let a copy of the model stand in, on the same parameters, with peft's modules in it.

        One client at a time: more raise NotStackable.
        """
        del memory
        check_alone(context, "a tuner of peft")
        check_dtypes(model, down)
        tuned = self._tuned(twin_of(model), context.seed)
        trained = trainable(down)  # (1, ...)
        # The head's parameters are the model's own, which peft has given other names.
        names = {id(parameter): name for name, parameter in tuned.named_parameters()}
        makers: dict[str, Callable[[Tensor], Tensor]] = {}
        parameters = dict(model.named_parameters())
        for name in plain_parameters(trained):
            if name not in parameters:
                raise WireError(f"{name} is no parameter of the model")
            makers[names[id(parameters[name])]] = partial(only_clients, trained[name])
        for name, stack in trained.items():
            if name.startswith(PREFIX):
                makers[name.removeprefix(PREFIX)] = partial(only_clients, stack)
        check_shapes(tuned, makers)
        with replaced(tuned, makers), standing_in(model, tuned), warnings.catch_warnings():
            # Tuners that put something before a text take no segments, and say so in every pass.
            warnings.filterwarnings("ignore", message="Token type ids are not supported")
            yield LocalTask(trained, lambda: (detached(trained), {}))

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect all of it back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average what was trained."""
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)

    def _tuned(self, model: nn.Module, seed: int) -> nn.Module:
        """Return ``model``, which is changed, with peft's modules in it."""
        peft: Any = import_module("peft")  # takes seconds, and only this method needs it
        known = {kind.value.lower(): cls for kind, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        name = self.tuner.lower()
        if name not in known:
            raise BadInput(
                f"method.tuner = {self.tuner!r} is none of peft's; choose from: {', '.join(known)}"
            )
        kind = type(model).__name__
        if name.upper() in LENGTHENING and not kind.endswith("ForSequenceClassification"):
            raise BadInput(
                f"method.tuner = {self.tuner!r} puts tokens before the text, which moves the "
                f"answers of {kind}; tuners that fit every task: {TRIED}"
            )
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(derive(seed, "peft"))
            warnings.simplefilter("ignore")  # advice on settings, for those who call peft directly
            try:
                config = known[name](task_type="FEATURE_EXTRACTION", **self.settings)
                tuned: nn.Module = peft.get_peft_model(model, config)
            except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
                why = str(error).partition("\n")[0]
                others = "look at method.settings"
                if name not in TRIED.split(", "):
                    others += f", or choose one that fits every task: {TRIED}"
                fault = f"method.tuner = {self.tuner!r} does not fit: {why}; {others}"
                raise BadInput(fault) from error
        return tuned


def _trained_by(tuned: nn.Module) -> dict[str, Tensor]:
    """Return what peft makes trainable, under its own names behind ``PREFIX``."""
    trained: dict[str, Tensor] = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            trained[f"{PREFIX}{name}"] = parameter.detach().float()
    return trained
