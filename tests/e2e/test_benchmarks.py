"""The benchmarks compare like with like: both sides end in the same losses, and what needs a GPU is tried on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import fedpeft_steps, gpu, plain_loop
from benchmarks.on_device import TINY, encoder, encoder_worker
from benchmarks.steps import apart
from benchmarks.works import QA, SMOLLM2, TAGGING, Work, round_of

from .builders import Ground
from .task_grounds import TASK_GROUNDS

CPU = torch.device("cpu")
# peft asks a model of transformers by a name that is going.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def work_of(kind: str, ground: Ground, folder: Path) -> Work:
    """Return the work that is measured for a task, on the tiny model and rows of its tests."""
    measured = {"tagging": TAGGING, "qa": QA, "causal_lm": SMOLLM2}[kind]
    tree = TASK_GROUNDS[kind].tree(folder)
    model = tree.get("model", {"name": str(ground.model)})["name"]
    settings = {
        "task": {"stride": 4} if kind == "qa" else {},
        "data": tree["data"],
        "machine": {"threads": 1},
    }
    return replace(
        measured, model=model, length=16, batch=4, steps=3, clients=2, stack=2, settings=settings
    )


@pytest.mark.parametrize("kind", ["tagging", "qa", "causal_lm"])
def test_plain_loop_and_fedpeft_do_the_same_work(kind: str, ground: Ground, tmp_path: Path) -> None:
    work = work_of(kind, ground, tmp_path)
    work.prepare(tmp_path)
    # Through JSON, as a process of its own is told.
    theirs = plain_loop.run(tmp_path)
    mine = fedpeft_steps.run(Work(**json.loads(json.dumps(work.__dict__))))
    assert apart([theirs["losses"]], [mine["losses"]]) < 1e-5
    assert theirs["seconds"] > 0
    assert mine["seconds"] > 0
    assert len(mine["losses"]) == work.clients


def test_other_batches_are_noticed(ground: Ground, tmp_path: Path) -> None:
    work = work_of("tagging", ground, tmp_path)
    work.prepare(tmp_path)
    prepared = json.loads((tmp_path / "work.json").read_text())
    for steps in prepared["clients"]:
        steps.reverse()
    (tmp_path / "work.json").write_text(json.dumps(prepared))
    theirs, mine = plain_loop.run(tmp_path), fedpeft_steps.run(work)
    assert apart([theirs["losses"]], [mine["losses"]]) > 1e-5


def test_clients_at_once_and_one_by_one_reply_alike() -> None:
    worker, state = encoder_worker(TINY, encoder(TINY, CPU), CPU)
    at_once = round_of(worker, state, TINY.clients, TINY.clients)
    one_by_one = round_of(worker, state, TINY.clients, 1)
    for one, other in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(one.payload, other.payload, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["clients", "llama"])
def test_a_part_of_what_needs_a_gpu_runs_on_the_cpu(part: str) -> None:
    rows = gpu.rows_of([part], CPU, TINY, 1)
    assert len(rows) > 3
    assert not [row for row in rows if "does not run" in str(row)]


@pytest.mark.slow  # every method on every task, twice
def test_parity_is_measured_for_every_method_and_task() -> None:
    rows = gpu.rows_of(["parity"], CPU, TINY, 1)
    assert [row[0] for row in rows[:-1]] == [f"parity, {kind}" for kind in TASK_GROUNDS]
    assert "MISSED" not in str(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_one_line_says_so() -> None:
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu: torch finds no GPU here.*tiny$"):
        gpu.main()
