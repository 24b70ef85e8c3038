"""Keys of sites are read when their files have changed, and not at every look."""

from pathlib import Path
from typing import Any

import pytest

from fedpeft.deployment.certificates import site_key
from fedpeft.engines.flower import sites
from fedpeft.engines.flower.sites import Door, Server


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was registered, call by call."""
    calls: list[list[str]] = []
    monkeypatch.setattr(sites, "register", lambda _link, keys: calls.append(sorted(keys.values())))
    return calls


def test_keys_that_come_go_and_change_are_taken_note_of(
    tmp_path: Path, registered: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    real = sites.numbers_of

    def counted(folder: Path) -> dict[bytes, int]:
        reads.append(folder)
        return real(folder)

    monkeypatch.setattr(sites, "numbers_of", counted)
    door: Any = Door("", 0, tmp_path, tmp_path, tmp_path, tmp_path, False, False, 0)
    link: Any = None
    server = Server(door, link, 0, print)

    def looked() -> int:
        """Look twice and return how often keys were registered so far."""
        server.admit_new()
        before = len(reads)
        server.admit_new()
        assert len(reads) == before
        return len(registered)

    (tmp_path / "site-0.pub").write_bytes(site_key()[1])
    assert looked() == 1
    (tmp_path / "site-1.pub").write_bytes(site_key()[1])
    assert looked() == 2
    assert registered[-1] == ["site 0", "site 1"]
    (tmp_path / "site-1.pub").write_bytes(site_key()[1])  # another key in the same file
    assert looked() == 3
    (tmp_path / "site-0.pub").unlink()
    assert looked() == 4
    assert registered[-1] == ["site 1"]
    (tmp_path / "notes.txt").write_text("no key")
    assert looked() == 4
