"""What is kept of frozen blocks changes nothing but the work: against the run without, in every family."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedpeft.activations import Activations, fitting
from fedpeft.client import Worker
from fedpeft.methods import METHODS
from fedpeft.mounting import describe
from fedpeft.training import Training
from fedpeft.types import Client, Method
from fedpeft.wire import Answer, Kind, Request
from tests.families import FAMILIES, played
from tests.tiny import CONFIG, CPU, SEED, close, examples

SIZES = {0: 6, 1: 11, 2: 9}
SGD = Training(optimizer="sgd", lr=0.2, batch_size=4, epochs=2)
CHAINED = sorted(FAMILIES.keys() - {"albert"})
TOP = r"(layer|h|layers)\.1\."
"""The upper of two blocks."""


def upper(family: str) -> Method:
    """Return LoRA on the dense layers of the upper block."""
    return METHODS["lora"](targets=TOP if family != "albert" else "all-linear", rank=2)  # type: ignore[call-arg]


def request(playing: Worker, method: Method, family: str) -> bytes:
    state = method.init(describe(playing.model, FAMILIES[family].head), SEED)
    return Request(Kind.TRAIN, 0, CONFIG, method.send(state, Client(0))).encode()


def trained(playing: Worker, blob: bytes, cohort: tuple[int, ...] = (0, 1, 2)) -> dict[int, Mapping[str, Tensor]]:
    found = playing.handle(cohort, [blob] * len(cohort), [b""] * len(cohort))
    return {client: Answer.decode(answer).payload for client, (answer, _) in zip(cohort, found, strict=True)}


class Calls:
    """Counts the rows that go into a module."""

    def __init__(self, module: nn.Module) -> None:
        self.rows = 0
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.rows += len(args[0] if args else kwargs["hidden_states"])


def lowest_part(model: nn.Module) -> nn.Module:
    """Return a dense layer inside the lowest block."""
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    return next(module for module in blocks[0].modules() if not list(module.children()))


@pytest.mark.parametrize("grain", [1, 8])
@pytest.mark.parametrize("family", CHAINED)
def test_a_run_with_kept_states_equals_the_run_without(family: str, grain: int) -> None:
    method = upper(family)
    plain = replace(played(family, method, SIZES, SGD), hardware=replace(CPU, grain=grain))
    kept = replace(plain, activations=Activations(SIZES, rows=4))
    blob = request(plain, method, family)
    expected = trained(plain, blob)
    for client, payload in trained(kept, blob).items():
        close(payload, expected[client], 1e-6)
    calls = Calls(lowest_part(kept.model))
    for client, payload in trained(kept, blob).items():
        close(payload, expected[client], 1e-6)
    assert calls.rows == 0, "the lower block was computed again"


def test_only_the_clients_named_are_kept_and_one_stranger_makes_its_cohort_begin_at_the_bottom() -> None:
    method = upper("bert")
    plain = played("bert", method, SIZES, SGD)
    kept = replace(plain, activations=Activations([0, 1]))
    blob = request(plain, method, "bert")
    expected = trained(plain, blob)
    trained(kept, blob, (0, 1))
    calls = Calls(lowest_part(kept.model))
    trained(kept, blob, (0, 1))
    assert calls.rows == 0
    for client, payload in trained(kept, blob).items():
        close(payload, expected[client], 1e-6)
    assert calls.rows == 2 * sum(SIZES.values())


def test_states_do_not_depend_on_what_ran_before() -> None:
    """So a resumed run, which has none, ends in the same bits."""
    method = upper("bert")
    one, other = (replace(played("bert", method, SIZES, SGD), activations=Activations(SIZES)) for _ in range(2))
    blob = request(one, method, "bert")
    for client in SIZES:
        trained(one, blob, (client,))
    for client, payload in trained(one, blob).items():
        assert all(torch.equal(payload[name], tensor) for name, tensor in trained(other, blob)[client].items())


def test_what_is_mounted_lower_than_before_is_computed_again() -> None:
    everywhere: Method = METHODS["lora"](targets="all-linear", rank=2)  # type: ignore[call-arg]
    plain = played("bert", everywhere, SIZES, SGD)
    kept = replace(plain, activations=Activations(SIZES))
    top = replace(kept, method=upper("bert"))
    trained(top, request(top, top.method, "bert"))
    blob = request(plain, everywhere, "bert")
    expected = trained(plain, blob)
    for client, payload in trained(kept, blob).items():
        close(payload, expected[client], 1e-6)


def test_blocks_that_are_used_many_times_form_no_chain() -> None:
    method = upper("albert")
    plain = played("albert", method, SIZES, SGD)
    kept = replace(plain, activations=Activations(SIZES))
    blob = request(plain, method, "albert")
    expected = trained(plain, blob)
    for client, payload in trained(kept, blob).items():
        assert all(torch.equal(payload[name], tensor) for name, tensor in expected[client].items())


def test_clients_are_kept_in_order_as_far_as_the_memory_goes() -> None:
    texts = {client: examples(size, client) for client, size in SIZES.items()}
    size = {client: 8 * sum(len(text) for text in own.ids) for client, own in texts.items()}
    assert fitting(texts, 8, sum(size.values())) == [0, 1, 2]
    assert fitting(texts, 8, size[0] + size[2]) == [0, 2]
    assert fitting(texts, 8, 0) == []
