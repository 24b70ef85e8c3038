"""Killed at any instant, a run resumes to the very bits that an undisturbed one ends in."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.recorder import CHECKPOINTS
from fedpeft.experiment.run import resume, start
from fedpeft.federation.checkpoint import manifest

from .builders import Ground
from .crashing import ROUNDS, Outcome, assert_resumes, die_while

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="crashes need fork and /proc"),
    pytest.mark.filterwarnings(
        "ignore:This process .* is multi-threaded:DeprecationWarning"
    ),  # fork, Python 3.12+
]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},
    "slora": {"rank": 3, "pre_classifier_rank": 5, "stage1": 0.5},
    "fedara": {"rank": 4, "kept": 0.25, "warmup": 0.0},
    "federa": {"rank": 3},
}
CASES = [
    ("lora", "fp32"),
    ("slora", "fp32"),
    ("slora", "bf16"),
    ("fedara", "fp32"),
    ("federa", "fp32"),
    pytest.param("lora", "bf16", marks=pytest.mark.slow),
    pytest.param("fedara", "bf16", marks=pytest.mark.slow),
]
"""FeDeRA because its clients remember something."""
KILLS = 10


@dataclass(frozen=True)
class Case:
    """A run, and what it ends in undisturbed."""

    assembly: Federation
    undisturbed: Outcome

    def instants(self, seed: str) -> list[int]:
        """Return ten random instants after the folder became a run, one from each tenth of the run."""
        first, last = self.undisturbed.instants.configured + 1, self.undisturbed.instants.count
        bounds = [first + (last + 1 - first) * part // KILLS for part in range(KILLS + 1)]
        draw = random.Random(seed)
        return [draw.randrange(low, high) for low, high in pairwise(bounds)]

    def starting(self, folder: Path) -> Callable[[], object]:
        return lambda: start(self.assembly, folder)

    def resuming(self, folder: Path) -> Callable[[], object]:
        return lambda: resume(folder, reuse=self.assembly)

    def assert_resumes(self, folder: Path) -> None:
        """Resume the run in ``folder`` and assert that it ends as the undisturbed one does."""
        assert_resumes(folder, self.assembly, self.undisturbed)


@pytest.fixture(scope="module")
def case(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """Gives the case of a method and a precision, made once."""

    @cache
    def of(method: str, precision: str) -> Case:
        assembly = build(
            ground.chosen(
                {
                    "machine": {"precision": precision},
                    "method": {"name": method, **METHODS[method]},
                },
                {"federation": {"rounds": ROUNDS}, "training": {"steps": 1, "batch_size": 4}},
                {"evaluation": {"every": 2, "limit": 8}},
            )
        )
        return Case(
            assembly,
            Outcome.of(assembly, tmp_path_factory.mktemp("undisturbed") / f"{method}-{precision}"),
        )

    return of


Cases = Callable[[str, str], Case]


@pytest.mark.parametrize(("method", "precision"), CASES)
def test_killed_at_ten_random_instants_a_run_resumes_to_the_same_end(
    case: Cases, runs: Path, method: str, precision: str
) -> None:
    this = case(method, precision)
    second_half: list[bool] = []
    for instant in this.instants(f"{method} {precision}"):
        folder = runs / str(instant)
        die_while(this.starting(folder), instant)
        second_half.append(manifest(folder / CHECKPOINTS, ROUNDS // 2).exists())
        this.assert_resumes(folder)
    assert set(second_half) == {False, True}, (
        "both stages of SLoRA, which are halves of the run, must have been hit"
    )


@pytest.mark.parametrize(("method", "precision"), CASES)
def test_killed_again_and_again_a_run_resumes_to_the_same_end(
    case: Cases, runs: Path, method: str, precision: str
) -> None:
    this = case(method, precision)
    draw = random.Random(f"{method} {precision}")
    die_while(this.starting(runs), this.undisturbed.instants.configured + draw.randrange(5, 20))
    for _ in range(3):
        die_while(this.resuming(runs), draw.randrange(8, 17))  # about a round further
    this.assert_resumes(runs)


@pytest.mark.parametrize("method", METHODS)
def test_killed_before_its_first_checkpoint_a_run_begins_anew(
    case: Cases, runs: Path, method: str
) -> None:
    this = case(method, "fp32")
    for number, instant in enumerate(
        (1, 4)
    ):  # in the middle of the first row; before the state's file is renamed
        folder = runs / str(number)
        die_while(this.starting(folder), this.undisturbed.instants.configured + instant)
        assert not [*folder.glob("checkpoints/*.json")]
        this.assert_resumes(folder)


def test_killed_before_it_is_a_run_a_folder_is_refused_and_can_be_overwritten(
    case: Cases, runs: Path
) -> None:
    this = case("lora", "fp32")
    die_while(this.starting(runs), this.undisturbed.instants.configured - 3)
    with pytest.raises(BadInput, match="holds no run"):
        resume(runs)
    this.undisturbed.assert_equal(this.assembly, runs, start(this.assembly, runs, overwrite=True))


@pytest.mark.slow
def test_a_killed_run_resumes_in_another_process_to_the_same_end(case: Cases, runs: Path) -> None:
    """Hash seeds differ between processes: an order that follows them would show in the last bits."""
    folders = {method: runs / method for method in METHODS}
    for method, folder in folders.items():
        die_while(case(method, "fp32").starting(folder), case(method, "fp32").instants("other")[4])
    code = "import sys, pathlib, fedpeft.experiment.run; [fedpeft.experiment.run.resume(pathlib.Path(folder)) for folder in sys.argv[1:]]"
    seeded = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run(
        [sys.executable, "-c", code, *map(str, folders.values())], check=True, env=seeded
    )
    for method, folder in folders.items():
        case(method, "fp32").assert_resumes(folder)
