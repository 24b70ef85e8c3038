"""What is resolved for this machine, and what an earlier run resolved."""

from typing import Literal

import pytest

from fedpeft.training.hardware import GRAIN, Hardware, Machine, resolve


@pytest.mark.parametrize(("precision", "pad_to_multiple_of"), [("fp32", 1), ("bf16", GRAIN)])
def test_shapes_come_in_grains_where_kernels_are_made_for_each(
    precision: Literal["fp32", "bf16"], pad_to_multiple_of: int
) -> None:
    machine = Machine(device="cpu", precision=precision)
    assert resolve(machine, 64).pad_to_multiple_of == pad_to_multiple_of


def test_what_was_resolved_before_there_were_grains_stays_as_it_was() -> None:
    known = {
        "device": "cpu",
        "precision": "bf16",
        "attention": "eager",
        "threads": 2,
        "tokens": 1280,
        "stack": 4,
    }
    assert Hardware(**known).pad_to_multiple_of == 1  # type: ignore[arg-type]
