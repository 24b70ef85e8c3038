"""The local engine with cohorts of one and Flower's simulation end in the same state, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpeft.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What ``flower_runs.py`` printed; Ray leaves warnings and processes behind, so it runs outside."""
    folder = tmp_path_factory.mktemp("ground")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.parity.flower_runs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("name", [*METHODS, "lora, optimizer kept", "federa, optimizer kept"])
def test_flower_ends_where_the_local_engine_does(name: str, told: dict[str, dict[str, Any]]) -> None:
    assert told[name]["differences"] == []
    assert told[name]["rows"] == 8
    assert told[name]["lost"] == [None] * 8
