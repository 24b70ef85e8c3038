"""``deploy check`` names each fault before anything is trained; TLS faults are those of a real server in this process."""

import contextlib
import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedpeft.deployment import preflight as checks
from fedpeft.deployment.carving import carve
from fedpeft.deployment.certificates import authority, server_certificate, site_key, write_secret
from fedpeft.deployment.offer import offer_of
from fedpeft.deployment.own import own_run
from fedpeft.deployment.preflight import preflight
from fedpeft.deployment.site import read_site
from fedpeft.errors import BadInput
from tests.e2e.builders import LABELS, Ground, write_ground

RUN = "0123456789abcdef"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return write_ground(tmp_path_factory.mktemp("ground"))


@dataclass
class Answering:
    """What the gate of a test says, and by which clock."""

    registered: bool = True
    offer: str = "{}"
    ahead: float = 0.0
    status: int = 200


@contextlib.contextmanager
def gate(
    folder: Path, answering: Answering, *, tls: bool = True, hosts: tuple[str, ...] = ("localhost",)
) -> Iterator[int]:
    """Let a server answer as the gate does; its CA's certificate goes into ``folder``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answering.offer
            if self.path.endswith("/key"):
                content = json.dumps({"registered": answering.registered})
            self.send_response(answering.status)
            self.end_headers()
            self.wfile.write(content.encode())

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() - answering.ahead, usegmt=True)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    signer = authority("tests")
    (folder / "ca.crt").write_bytes(signer.pem)
    certificate, key = server_certificate(signer, hosts)
    (folder / "server.pem").write_bytes(certificate + key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def folder(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site's folder with data and key; nobody with its key is online."""
    config = ground.chosen({"partition": {"clients": 2}, "data": {"labels": list(LABELS)}})
    made = carve(config, tmp_path)[0]
    private, _ = site_key()
    write_secret(made / "site.key", private)
    monkeypatch.setattr(checks, "is_online", lambda _: False)
    return made


def settings(ground: Ground, folder: Path, port: int, **changes: Any) -> Path:
    tree = {
        "client": 0,
        "server": f"localhost:{port}",
        "ca": "ca.crt",
        "key": "site.key",
        "data": {"train": "train.jsonl"},
        "models": {"bert": str(ground.model)},
        "machine": ground.tree()["machine"],
        **changes,
    }
    (folder / "site.toml").write_text(tomli_w.dumps(tree))
    return folder / "site.toml"


def told(path: Path) -> tuple[int, str]:
    lines: list[str] = []
    return preflight(path, lines.append), "\n".join(lines)


def offered(ground: Ground, folder: Path, port: int, **changes: Any) -> str:
    """Return what a server that agrees with the site would offer."""
    offer = offer_of(ground.chosen(), RUN, version("fedpeft"), LABELS)
    run = own_run(offer, read_site(settings(ground, folder, port)), None)
    content = {
        "offer": offer.to_json(),
        "weights": run.loaded.digest,
        "agreed": run.worker.config.hex(),
        "flwr": version("flwr"),
    }
    return json.dumps({**content, **changes})


def test_a_site_in_order_passes(ground: Ground, folder: Path) -> None:
    says = Answering()
    with gate(folder, says) as port:
        says.offer = offered(ground, folder, port)
        failed, lines = told(settings(ground, folder, port))
    assert failed == 0, lines
    assert "data and model: fit the run" in lines


def test_a_server_of_another_ca_name_or_protocol_is_told_apart(
    ground: Ground, folder: Path
) -> None:
    with gate(folder, Answering()) as port:
        (folder / "ca.crt").write_bytes(authority("another").pem)
        assert "not signed by the CA" in told(settings(ground, folder, port))[1]
    with gate(folder, Answering(), hosts=("other.example.org",)) as port:
        assert "certificate is for another name" in told(settings(ground, folder, port))[1]
    with gate(folder, Answering(), tls=False) as port:
        assert "does not speak TLS there" in told(settings(ground, folder, port))[1]
    assert "cannot be reached" in told(settings(ground, folder, port))[1]
    with pytest.raises(BadInput, match="sites speak TLS alone"):
        told(settings(ground, folder, port, server=f"http://localhost:{port}"))


@pytest.mark.parametrize(
    ("ahead", "line"), [(60.0, "s ahead of its own"), (-400.0, "s behind its own")]
)
def test_a_clock_that_differs_is_told(
    ahead: float, line: str, ground: Ground, folder: Path
) -> None:
    with gate(folder, Answering(ahead=ahead)) as port:
        failed, lines = told(settings(ground, folder, port))
    assert failed == 1
    assert line in lines


def test_a_key_that_is_unknown_or_online_is_told(
    ground: Ground, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate(folder, Answering(registered=False)) as port:
        failed, lines = told(settings(ground, folder, port))
    assert failed == 1
    assert "does not know it" in lines
    monkeypatch.setattr(checks, "is_online", lambda _: True)
    with gate(folder, Answering()) as port:
        failed, lines = told(settings(ground, folder, port))
    assert failed == 0
    assert "is online already" in lines


def test_a_proxy_that_does_not_tell_of_key_and_run_is_said_not_to_tell(
    ground: Ground, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as nginx, which passes Flower's paths alone: nothing is called ok that nobody saw."""
    with gate(folder, Answering(status=403)) as port:
        failed, lines = told(settings(ground, folder, port))
        monkeypatch.setattr(checks, "is_online", lambda _: True)
        online = told(settings(ground, folder, port))[1]
    assert failed == 0
    assert "the site's key" not in lines
    assert "is not online yet" in lines
    assert "another proxy" in lines
    assert "none is offered" not in lines
    assert "unless its key is not registered" in online


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"flwr": "1.40.0"}, "both need the same minor version"),
        ({"weights": "0" * 16}, "has other weights than the server's"),
        ({"agreed": "00"}, "is another than the server's"),
        ({"offer": "{}"}, "install the same version"),
    ],
)
def test_what_differs_from_the_server_is_told(
    changes: dict[str, str], line: str, ground: Ground, folder: Path
) -> None:
    says = Answering()
    with gate(folder, says) as port:
        says.offer = offered(ground, folder, port, **changes)
        failed, lines = told(settings(ground, folder, port))
    assert failed == 1
    assert line in lines


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"words": "a", "label": "birds"}, 'data.text = "text"'),
        ({"text": "a", "label": "stones"}, "data.labels has no label 'stones'"),
        ({"text": 5, "label": "birds"}, "must be a string, not 5"),
    ],
)
def test_what_is_wrong_with_the_data_is_told_with_file_and_line(
    row: dict[str, object], line: str, ground: Ground, folder: Path
) -> None:
    says = Answering()
    with gate(folder, says) as port:
        says.offer = offered(ground, folder, port)
        with (folder / "train.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        failed, lines = told(settings(ground, folder, port))
    assert failed == 1
    assert line in lines
    assert str(folder / "train.jsonl") in lines


def test_too_little_memory_and_a_run_that_is_not_agreed_to_are_told(
    ground: Ground, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = Answering()
    with gate(folder, says) as port:
        says.offer = offered(ground, folder, port)
        careful = settings(ground, folder, port, limits={"methods": ["fedara"]})
        assert "does not train method 'lora'" in told(careful)[1]
        monkeypatch.setattr(checks, "free_memory", lambda: 1e6)
        failed, lines = told(settings(ground, folder, port))
    assert failed == 1
    assert "0.0 GB are free" in lines


def test_a_key_that_others_can_read_ends_the_checks(ground: Ground, folder: Path) -> None:
    (folder / "site.key").chmod(0o644)
    (folder / "ca.crt").write_bytes(authority("tests").pem)
    with pytest.raises(BadInput, match="chmod 600"):
        told(settings(ground, folder, 9443))
