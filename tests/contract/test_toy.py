"""Adding a method takes one file and no other change: this one."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from torch import nn

from fedpeft import methods
from fedpeft.algebra.averaging import averaged
from fedpeft.errors import BadInput
from fedpeft.experiment.config import Config
from fedpeft.federation import checkpoint
from fedpeft.methods import METHODS
from fedpeft.mounting import detached, mounted, trainable
from fedpeft.tasks import examples_in
from fedpeft.training.evaluation import mounted_state, score
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update
from fedpeft.wire.messages import decode
from tests.contract.reference import unmeasured
from tests.tiny import CPU, SEED, TASK, assert_same_state, examples, federation, logits


@final
@dataclass(frozen=True)
class HeadOnly:
    """Train the head alone and count, in every client's memory, how often it was asked."""

    paper: ClassVar[str] = "a toy"
    share: float = 1.0

    def init(self, base: Base, seed: int) -> State:
        return State(0, base.heads())

    def send(self, state: State, client: Client) -> Payload:
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        trained = trainable(down)
        times = memory.get("times", torch.zeros(len(context.clients), dtype=torch.int64)) + 1
        with mounted(model, trained):
            yield LocalTask(trained, lambda: (detached(trained), {"times": times}))

    def expects(self, state: State, down: Payload) -> Mapping[str, Any]:
        return METHODS["lora"]().expects(state, down)  # back comes what went down

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        return averaged(state, updates, "uniform")


def test_a_method_of_ones_own_runs_through_federation_checkpoint_and_evaluation(
    tmp_path: Path, model: nn.Module
) -> None:
    playing = federation(HeadOnly())
    half = playing.play(2)
    checkpoint.save(tmp_path, half, deepcopy(playing.memories), 0, "c")
    last = playing.play(2, half)
    found = checkpoint.load(tmp_path, ["c"], pytest.fail)
    assert found is not None
    resumed = federation(HeadOnly(), memories=found.memories)
    assert_same_state(resumed.play(2, found.state), last)
    assert unmeasured(resumed.rows) == unmeasured(playing.rows[6:])
    assert last.memories == {0: 3, 1: 3, 2: 3}
    assert decode(resumed.memories.get(1, 3))["times"] == 4
    said = logits(model)
    with mounted_state(HeadOnly(), last, model, CPU, SEED):
        assert (logits(model) - said).abs().max() > 1e-2
        assert examples_in(score(model, TASK, examples(20), CPU)) == 20


def test_an_installed_package_adds_its_method_by_an_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = EntryPoints([EntryPoint("head_only", f"{__name__}:HeadOnly", methods.GROUP)])
    monkeypatch.setattr(methods, "entry_points", lambda group: points.select(group=group))
    assert next(iter(methods.constructors())) == "head_only"
    built = Config(method={"name": "head_only", "share": 0.5}).build_method()
    assert vars(built) == {"share": 0.5}


@pytest.mark.parametrize(
    ("value", "says"), [("nonesuch:Toy", "No module named"), ("json:JSONEncoder", "'paper'")]
)
def test_an_installed_method_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str, says: str
) -> None:
    point = EntryPoint("toy", value, methods.GROUP)
    monkeypatch.setattr(methods, "entry_points", lambda group: EntryPoints([point]))
    with pytest.raises(BadInput, match=f"'toy' .*{says}"):
        Config().build_method()


def test_a_method_that_forgets_to_go_on_to_the_next_round_is_told() -> None:
    class Stuck:
        def __init__(self) -> None:
            self.inner = HeadOnly()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def receive(self, state: State, updates: Iterable[Update]) -> State:
            list(updates)
            return state

    with pytest.raises(
        ValueError, match="Stuck.receive gave a state of round 0, phase 0, after round 0"
    ):
        federation(Stuck()).play(1)  # type: ignore[arg-type]
