"""Fixtures of the end-to-end tests."""

from pathlib import Path

import pytest

from .builders import Ground, write_ground


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """The tiny model, the data and the configuration; tests read them and change nothing."""
    return write_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A place for run folders that does not exist yet."""
    return tmp_path / "runs"
