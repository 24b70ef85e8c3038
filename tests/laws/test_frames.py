"""Frames arrive as they were sent, and what is none is refused before memory is taken for it."""

import contextlib
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import BadInput, WireError
from fedpeft.wire.frames import (
    HEADER,
    Closed,
    Frame,
    check_private,
    connected,
    is_own,
    listening,
    receive,
    send,
)


def all_of(connection: socket.socket) -> None:
    """Read frames until something ends it."""
    while True:
        receive(connection, 1000)


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@given(
    st.dictionaries(st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=20), st.none())),
    st.binary(max_size=2000),
)
def test_a_frame_arrives_as_it_was_sent(header: dict[str, object], body: bytes) -> None:
    with pair() as (one, other):
        send(one, Frame(header, body))
        send(one, Frame({"next": 1}))
        assert receive(other) == Frame(header, body)
        assert receive(other) == Frame({"next": 1})


def test_a_large_body_arrives_piece_by_piece() -> None:
    body = os.urandom(5 * 2**20 + 1)
    with pair() as (one, other):
        sender = threading.Thread(target=send, args=(one, Frame({}, body)))
        sender.start()
        assert receive(other).body == body
        sender.join()


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_end(content: bytes) -> None:
    with pair() as (one, other):
        one.sendall(content)
        one.close()
        with pytest.raises((WireError, Closed)):
            all_of(other)


@pytest.mark.parametrize("lengths", [(HEADER + 1, 0), (2, 1001), (2**32 - 1, 2**64 - 1)])
def test_lengths_beyond_the_bounds_are_refused_before_anything_is_read(
    lengths: tuple[int, int],
) -> None:
    with pair() as (one, other):
        one.sendall(struct.pack("<IQ", *lengths))
        with pytest.raises(WireError, match="at most"):
            receive(other, 1000)


@pytest.mark.parametrize("header", [b"[]", b"1", b"{", b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(header: bytes) -> None:
    with pair() as (one, other):
        sender = threading.Thread(
            target=one.sendall, args=(struct.pack("<IQ", len(header), 0) + header,)
        )
        sender.start()
        with pytest.raises(WireError, match="no JSON"):
            receive(other)
        sender.join()


def test_a_socket_is_its_users_alone_and_goes_in_the_end() -> None:
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    path = folder / "state" / "trainer.sock"
    with listening(path) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with connected(path) as client:
            accepted, _ = server.accept()
            with accepted:
                assert is_own(accepted)
                send(client, Frame({"kind": "about"}))
                assert receive(accepted).header == {"kind": "about"}
    with pytest.raises(Closed):
        connected(path)
    shutil.rmtree(folder)


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 100) / "trainer.sock"
    with pytest.raises(BadInput, match="choose a shorter `state`"), listening(path):
        pass


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        check_private(key, "the key")
    key.chmod(0o600)
    check_private(key, "the key")
    with pytest.raises(BadInput, match="cannot be read"):
        check_private(tmp_path / "none", "the key")
