"""A folder has one writer: who comes second is told at once, and a lock ends with its process."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedpeft.errors import BadInput
from fedpeft.experiment.claim import COMMAND, LOCKS, PROCESS, claimed, never_begun, on_behalf

HOLDING = """
import sys
from pathlib import Path
from fedpeft.experiment.claim import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def mounted_state(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process claim ``folder`` for the length of a ``with``."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)],
        stdin=pipe,
        stdout=pipe,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()
        process.stdout.close()


def assert_held(folder: Path, by: str) -> None:
    """Assert that ``folder`` cannot be claimed, and that its holder is named."""
    with pytest.raises(BadInput, match=rf"{folder}: {by} is writing"), claimed(folder):
        pytest.fail("both have it")


def test_the_second_is_refused_by_the_name_of_folder_and_process(tmp_path: Path) -> None:
    with mounted_state(tmp_path) as process:
        assert_held(tmp_path, f"process {process.pid}")
    with claimed(tmp_path):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with mounted_state(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / COMMAND).exists()
    with claimed(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_another_machine_is_named_beside_the_process(tmp_path: Path) -> None:
    with claimed(tmp_path):
        (tmp_path / COMMAND).write_text(" 4711 elsewhere")
        assert_held(tmp_path, "process 4711 on elsewhere")
        (tmp_path / COMMAND).write_text("")
        assert_held(tmp_path, "another process")


def test_a_process_at_work_for_a_killed_command_keeps_its_folder(tmp_path: Path) -> None:
    with on_behalf(tmp_path):
        assert_held(tmp_path, f"process {os.getpid()}")
    with claimed(tmp_path), on_behalf(tmp_path):
        pass
    assert not tmp_path.exists()


def test_what_was_made_and_stays_empty_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with claimed(tmp_path / "runs" / "mine"):
        assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} == {COMMAND}
    assert not [*tmp_path.iterdir()]
    with claimed(tmp_path / "runs" / "mine"):
        (tmp_path / "runs" / "mine" / "kept").touch()
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["kept"]


def test_what_a_killed_start_left_counts_as_no_folder_and_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert not never_begun(folder)
    folder.mkdir()
    assert not never_begun(folder)
    for name in LOCKS:
        (folder / name).touch()
        assert never_begun(folder)
    with claimed(folder):
        pass
    assert not folder.exists()
    (tmp_path / PROCESS).touch()
    (tmp_path / "mine.txt").touch()
    assert not never_begun(tmp_path)


def test_however_many_try_at_once_one_has_it(tmp_path: Path) -> None:
    """Files and folders are made and removed all the time: a lock on a removed file would show."""
    inside: list[int] = []
    had = [0] * 4
    refusals: list[str] = []

    def try_often(number: int) -> None:
        for _ in range(200):
            try:
                with claimed(tmp_path / "runs" / "mine"):
                    inside.append(number)
                    assert inside == [number]
                    had[number] += 1
                    inside.remove(number)
            except BadInput as error:
                refusals.append(str(error))

    failed: list[BaseException] = []

    def watched(number: int) -> None:
        try:
            try_often(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=watched, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(had)
    assert all("is writing" in refusal for refusal in refusals)
    assert not (tmp_path / "runs" / "mine").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX")
def test_where_the_file_system_knows_no_locks_work_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with claimed(tmp_path), claimed(tmp_path):
        pass


@pytest.mark.parametrize(("place", "says"), [(".", "make it writable"), ("new", "--runs")])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    says: str,
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", fail)
    monkeypatch.setattr(Path, "mkdir", fail if place == "new" else lambda *_, **__: None)
    named = rf"{tmp_path / place}: .*Permission denied.*{says}"
    with pytest.raises(BadInput, match=named), claimed(tmp_path / place):
        pass
