"""What others can see of processes: their sockets, their command lines and environments, and every byte that they send."""

import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
LISTENS = "0A"
"""The state of a TCP socket that waits for connections, as the kernel writes it."""
LEAST = 5
"""Characters of base64 to look for at least: fewer would be found by chance."""

WATCHING = """
import os, ssl, sys

folder = os.path.dirname(os.path.abspath(__file__))
send = ssl.SSLSocket.send


def write(name, content):
    with open(os.path.join(folder, name), "ab") as file:
        file.write(content)


# httpcore and `sendall` call this, so that it sees whole requests, as they are before encryption.
def sent(self, data, flags=0):
    count = send(self, data, flags)
    write(f"{os.getpid()}-{self.getsockname()[1]}.sent", bytes(data[:count]))
    return count


def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        write("addresses", f"{arguments[1]!r}\\n".encode())
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        write("names", f"{arguments[0]!r}\\n".encode())


ssl.SSLSocket.send = sent
sys.addaudithook(note)
write("programs", f"{sys.orig_argv}\\n".encode())
"""
"""Run by Python at its start, as ``sitecustomize``: what this process and its children send, whom they connect to, and
which names they look up, goes to files beside it."""


def watched(folder: Path) -> str:
    """Return a program that is ``fedpeft``, it and its children watched; what they send is written into ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(WATCHING)
    return (
        "import os, runpy; "
        f"os.environ['PYTHONPATH'] = {str(folder)!r} + os.pathsep + os.environ['PYTHONPATH']; "
        f"runpy.run_path({str(folder / 'sitecustomize.py')!r}); "
        "from fedpeft.cli import main; main()"
    )


def sent(folder: Path) -> bytes:
    """Return every byte that was sent over TLS, one connection after another, without signatures and public keys.

    Those are random letters, in which short words would be found by chance.
    """
    streams = b"\n\n".join(path.read_bytes() for path in sorted(folder.glob("*.sent")))
    return re.sub(
        rb"(?im)^(flwr-signature|flwr-public-key): [\w+/=-]+", rb"\1: (left out)", streams
    )


def spellings(mark: bytes) -> Iterator[bytes]:
    """Yield how ``mark`` may stand in other bytes: as it is, in hex, and in base64 at each place of a group of three."""
    yield mark
    yield mark.hex().encode()
    for before in range(3):
        coded = b64encode(bytes(before) + mark + bytes(3))
        # A character is 6 bits; those that hold bits of the mark alone do not depend on what is around it.
        own = coded[-(-8 * before // 6) : 8 * (before + len(mark)) // 6]
        if len(own) >= LEAST:
            yield own


def found(marks: Iterable[bytes], content: bytes) -> list[bytes]:
    """Return those of ``marks`` that stand in ``content``, in any spelling."""
    return [mark for mark in marks if any(one in content for one in spellings(mark))]


class Listener(NamedTuple):
    """A TCP socket that waits for connections."""

    address: IPv4Address | IPv6Address
    port: int


def tree_of(process: int) -> list[int]:
    """Return a process and all that it has started, by their parents in /proc."""
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            # A program's name may hold spaces and brackets: the last bracket ends it.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    tree = [process]
    for one in tree:
        tree += children.get(one, [])
    return tree


def listeners(processes: Iterable[int]) -> set[Listener]:
    """Return the TCP sockets on which any of ``processes`` listens."""
    own: set[str] = set()
    for process in processes:
        for descriptor in (PROC / str(process) / "fd").iterdir():
            try:
                own.add(str(descriptor.readlink()))
            except OSError:  # it was closed meanwhile
                continue
    held: set[Listener] = set()
    for table in (PROC / "net" / "tcp", PROC / "net" / "tcp6"):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for line in lines:
            _, local, _, state, *rest = line.split()
            if state == LISTENS and f"socket:[{rest[5]}]" in own:
                address, _, port = local.partition(":")
                held.add(Listener(_address(address), int(port, 16)))
    return held


def _address(written: str) -> IPv4Address | IPv6Address:
    """Return an address that the kernel wrote in hex, in words of 32 bits in the machine's byte order."""
    words = [int(written[at : at + 8], 16) for at in range(0, len(written), 8)]
    address = ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words))
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def shown_by_ps() -> bytes:
    """Return all command lines of this machine, in full."""
    return subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, check=True).stdout


def environments(processes: Iterable[int]) -> bytes:
    return b"\n".join((PROC / str(one) / "environ").read_bytes() for one in processes)


def key_lines(path: Path) -> list[bytes]:
    """Return the lines of a private key (PEM) that hold the key."""
    return [line for line in path.read_bytes().splitlines() if len(line) > 20 and b"--" not in line]
