"""Every family on every task: side by side as one by one, kept states as none, scores that add up; or why not.

In the normal run each law sees one method on every family and task; ``test_tasks.py`` has every
method on BERT. The others are tried in ``make test-all``.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.algebra.lowrank import by_module
from fedpeft.errors import BadInput, NotStackable
from fedpeft.experiment.stacking import apart
from fedpeft.methods import METHODS
from fedpeft.mounting import select
from fedpeft.mounting.layers import matrix
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.evaluation import predictions
from fedpeft.types import Payload
from tests.contract.test_tasks import SINGLE, Played, assert_scores_add_up
from tests.family_tasks import (
    ALONE,
    FAMILIES,
    KINDS,
    NO_BIASES,
    PAIRS,
    REFUSED,
    UNCACHED,
    ground,
    opened,
)
from tests.tiny import CPU, FIELDS, close

DOCS = Path(__file__).parents[2] / "docs" / "models.md"

SIZES = {0: 3, 1: 5, 2: 2}
"""Client -> rows of training; with batches of 4 one takes two steps, the last of a single row."""


def table(quick: str, *, stacks: bool = False) -> list[Any]:
    """Return (method, family, kind) of all that applies; in the normal run the method ``quick`` alone.

    Pairs, of which the model is that for texts, are then left to the law of stacks. ``stacks``: only
    where several clients train side by side.
    """
    rows: list[Any] = []
    for name, (family, kind) in product(METHODS, PAIRS):
        # peft finds its layers by itself, in the families that it knows.
        applies = name != "peft" and (name != "bitfit" or family not in NO_BIASES)
        if stacks:
            applies = applies and name not in SINGLE and family not in ALONE
        if applies:
            is_quick = name == quick and (stacks or kind != "pairs")
            marks = () if is_quick else pytest.mark.slow
            rows.append(pytest.param(name, family, kind, marks=marks))
    return rows


def played(name: str, family: str, kind: str, targets: Any = "all-linear") -> Played:
    fields = {"targets": targets} if "targets" in FIELDS[name] else {}
    return Played(name, ground(family, kind), SIZES, **fields)


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_clients_of_a_family_train_side_by_side_but_for_those_that_are_named(
    family: str, kind: str
) -> None:
    """As the product finds out; what cannot is refused by the worker, and then trains one by one."""
    trying = played("lora", family, kind)
    assert apart(trying.worker, ground(family, kind).base) == (family not in ALONE)
    if family in ALONE:
        with pytest.raises(NotStackable, match="use a stack of 1"):
            trying.handled([0, 1, 2])
        trying.handled([0])


def unique(name: str, payload: Payload) -> Payload:
    """Return what is unique of a reply: of factors that are those of an SVD, their product."""
    if name != "fed_sb":
        return payload
    rest = {key: tensor for key, tensor in payload.items() if not key.endswith((":A", ":B"))}
    for module, factors in by_module(payload).items():
        if "A" in factors:
            rest[module] = factors["B"].double() @ factors["A"].double()
    return rest


@pytest.mark.parametrize(("name", "family", "kind"), table("fedara", stacks=True))
def test_k_clients_at_once_equal_k_one_by_one(name: str, family: str, kind: str) -> None:
    trying = played(name, family, kind)
    together = trying.handled([0, 1, 2])
    for client in SIZES:
        alone = trying.handled([client])[0]
        close(unique(name, together[client]), unique(name, alone), 2e-5)


@pytest.mark.parametrize(("name", "family", "kind"), table("lora"))
def test_kept_hidden_states_change_nothing(name: str, family: str, kind: str) -> None:
    """The last dense layers of the base are adapted, so that the first block is not run again."""
    model = ground(family, kind).model
    trying = played(name, family, kind, targets=_last_layer(family, kind))
    rows: list[int] = []  # that go through the first block, pass by pass
    handle = _first_layer(model).register_forward_hook(
        lambda _, inputs, __: rows.append(len(inputs[0]))
    )
    cache = ActivationCache(SIZES, rows=4)
    alone = name in SINGLE or family in ALONE
    again_rows = 0  # once states are kept, in all stacks
    for stack in [[0], [1], [2]] if alone else [[0, 1, 2]]:
        plain, kept = trying.handled(stack), trying.handled(stack, cache=cache)
        rows.clear()
        again = trying.handled(stack, cache=cache)
        for one, other, once_more in zip(plain, kept, again, strict=True):
            close(unique(name, one), unique(name, other), 1e-5)
            close(unique(name, one), unique(name, once_more), 1e-5)
        again_rows += sum(rows)
    handle.remove()
    if "targets" in FIELDS[name]:
        # Training sees each row once; a trial of up to 3 rows a stack may look at the model.
        assert (again_rows < sum(SIZES.values())) == (family not in UNCACHED)


@pytest.mark.parametrize(("name", "family", "kind"), table("federa"))
def test_scores_of_a_client_add_up(name: str, family: str, kind: str) -> None:
    assert_scores_add_up(played(name, family, kind))


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_what_a_model_says_depends_on_neither_padding_nor_mode(family: str, kind: str) -> None:
    """Windows that slide, relative positions and heads that read one token see the text alone."""
    here = ground(family, kind)
    examples = here.task.encode(here.rows(6, 3))
    together = predictions(here.model, here.task, examples, CPU)
    for row, example in enumerate(examples):
        [alone] = predictions(here.model, here.task, examples.take([row]), CPU)
        for name, tensor in alone.items():
            padded = together[row][name]
            size = min(len(tensor), len(padded), len(example))
            torch.testing.assert_close(padded[:size], tensor[:size], rtol=1e-4, atol=1e-5)
    batch = here.task.collate(examples, torch.device("cpu"))
    with torch.no_grad():
        expected = here.task.losses(here.model, batch)
        here.model.train()
        training = here.task.losses(here.model, batch)
        here.model.eval()
    torch.testing.assert_close(training, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_choose_the_dense_layers_of_a_family(family: str) -> None:
    base, expected = ground(family, "classification").base, FAMILIES[family]
    attention, linear = select(base, "attention"), select(base, "all-linear")
    assert (len(attention), len(linear)) == (expected.attention, expected.linear)
    assert attention.keys() <= linear.keys()
    assert not {f"{name}.weight" for name in linear} & base.head


@pytest.mark.parametrize(("family", "kind"), REFUSED)
def test_what_a_task_does_not_run_on_is_refused(family: str, kind: str) -> None:
    with pytest.raises(BadInput) as caught:
        opened(family, kind)
    line = str(caught.value)
    assert REFUSED[family, kind] in line
    assert len(line.splitlines()) == 1


def test_an_encoder_that_reads_from_left_to_right_is_a_language_model() -> None:
    """So which one it is has been tried, and no list of names was asked."""
    assert not opened("bert", "causal_lm", is_decoder=True).base.head


@pytest.mark.parametrize("family", NO_BIASES)
def test_bitfit_refuses_what_has_no_biases(family: str) -> None:
    with pytest.raises(BadInput, match="no biases"):
        played("bitfit", family, "classification")


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if (family, "causal_lm") in PAIRS]
)
def test_nothing_of_a_language_models_head_is_trained(family: str) -> None:
    assert not ground(family, "causal_lm").base.head


def test_the_page_says_what_was_found_out() -> None:
    """By the tables that the laws above hold the product to."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    for row in _rows_of_the_page():
        assert row in lines, f"docs/models.md lacks: {row}"


def _rows_of_the_page() -> list[str]:
    """Return a row of docs/models.md for every family."""
    rows: list[str] = []
    for family, about in FAMILIES.items():
        cells = [_cell(family, kind) for kind in KINDS if kind != "pairs"]
        rows.append(f"| {' | '.join([about.title, *cells])} |")
    return rows


def _cell(family: str, kind: str) -> str:
    if (family, kind) in REFUSED:
        return "-"
    stacked = "one by one" if family in ALONE else "side by side"
    return f"{stacked}, not cached" if family in UNCACHED else f"{stacked}, cached"


def _last_layer(family: str, kind: str) -> str:
    """Return a pattern for the base's dense layer that comes last."""
    last = list(select(ground(family, kind).base, "all-linear"))[-1]
    return f"^{last}$"


def _first_layer(model: nn.Module) -> nn.Module:
    """Return the first dense layer in the first of the most blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=len)
    return next(module for module in blocks[0].modules() if matrix(module) is not None)
