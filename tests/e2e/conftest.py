"""Fixtures of the end-to-end tests."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from fedpeft.experiment.build import Federation, build

from .builders import Ground, write_ground
from .crashing import ROUNDS, Outcome


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """The tiny model, the data and the configuration; tests read them and change nothing."""
    return write_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="session")
def assembly(ground: Ground) -> Federation:
    """A run of FeDeRA, whose clients remember something, with small states, so that the ledger outgrows them."""
    return build(
        ground.chosen(
            {"method": {"name": "federa", "rank": 1, "targets": "0.attention.self.query"}},
            {"federation": {"rounds": ROUNDS}, "training": {"steps": 1, "batch_size": 4}},
            {"evaluation": {"every": 1, "limit": 8}},
        )
    )


@pytest.fixture(scope="session")
def undisturbed(assembly: Federation, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What ``assembly`` ends in undisturbed."""
    return Outcome.of(assembly, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A place for run folders that does not exist yet."""
    return tmp_path / "runs"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let matplotlib seem not to be installed, which also saves the seconds that its figures take."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "matplotlib" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.fixture(autouse=True)
def no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep settings of the surrounding terminal out of what commands print."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
