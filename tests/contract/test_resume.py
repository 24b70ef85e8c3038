"""A run that is saved and resumed ends as one that went on, to the bit; the same seed gives the same run."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from fedpeft.federation import checkpoint
from tests.contract.reference import ROUNDS, reference, rows, unmeasured
from tests.tiny import assert_same_state, federation, small


@pytest.mark.parametrize("done", [1, 3])
@pytest.mark.parametrize("name", rows())
def test_resuming_equals_going_on(name: str, done: int, tmp_path: Path) -> None:
    """Everything but the checkpoint is made anew: model, worker, engine. SLoRA is in its first stage, then in its second."""
    whole = reference(name)
    checkpoint.save(tmp_path, whole.states[done], deepcopy(whole.memories[done]), 123, "c")
    found = checkpoint.load(tmp_path, ["c"], pytest.fail)
    assert found is not None
    assert found.ledger == 123
    assert_same_state(found.state, whole.states[done])
    resumed = federation(small(name), memories=found.memories)
    last = resumed.play(ROUNDS - done, found.state)
    assert_same_state(last, whole.states[ROUNDS])
    assert unmeasured(resumed.rows) == unmeasured(whole.rows_of(done))
    for client, version in last.memories.items():
        assert resumed.memories.get(client, version) == whole.memories[ROUNDS].get(client, version)


@pytest.mark.parametrize("name", rows())
def test_the_same_seed_gives_the_same_run_whatever_torch_drew_before(name: str) -> None:
    torch.rand(17)
    again = federation(small(name))
    assert_same_state(again.play(2), reference(name).states[2])
    assert unmeasured(again.rows) == unmeasured(reference(name).rows_of(0, 2))
