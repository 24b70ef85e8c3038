"""What looks at processes from outside sees what is there; see tests/e2e/test_deployment.py for what it must not see."""

import os
import socket
import subprocess
import sys
from base64 import b64encode
from ipaddress import ip_address
from pathlib import Path

import pytest

from .outside import PROC, found, listeners, shown_by_ps, tree_of

proc = pytest.mark.skipif(not (PROC / "net" / "tcp").exists(), reason="no /proc/net/tcp here")


@pytest.mark.parametrize("before", [b"", b"x", b"xy", b"xyz"])
def test_a_mark_is_found_in_every_spelling(before: bytes) -> None:
    for mark in (b"fish0", b"/tmp/fpabc/d", bytes(range(10))):
        around = before + mark + b"after"
        for content in (around, around.hex().encode(), b64encode(around)):
            assert found([b"other", mark], content) == [mark]
    assert found([b"trees"], b"tree s") == []


@proc
@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")],
)
def test_sockets_that_listen_are_found_by_address_and_port(
    family: socket.AddressFamily, address: str
) -> None:
    with socket.socket(family) as one:
        try:
            one.bind((address, 0))
        except OSError:
            pytest.skip(f"no address {address} here")
        port = one.getsockname()[1]
        assert port not in {held.port for held in listeners([os.getpid()])}
        one.listen()
        assert (ip_address(address), port) in listeners([os.getpid()])
    assert port not in {held.port for held in listeners([os.getpid()])}


@proc
def test_a_tree_holds_what_children_have_started(tmp_path: Path) -> None:
    inner = "import time; print('up', flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = tree_of(process.pid)
        assert inner.encode() in shown_by_ps()
        for one in tree:
            os.kill(one, 9)
    assert tree[0] == process.pid
    assert len(tree) == 2
