"""Fixtures and settings shared by all tests: one thread, so that equality to the bit can be asked for."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before anything imports transformers: a test that asks a hub is a fault
)

import pytest
import torch
from torch import nn

from tests.tiny import bert


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums over threads differ in the last bit; the laws here are about our code."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs keep between runs is kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def model() -> nn.Module:
    """A fresh tiny encoder."""
    return bert()
