"""The gate: the one port of a server that sites reach. It passes Flower's Fleet API and no more.

Paths are compared as a whole with a list, bodies are bounded, and of a request's headers only those
go on that the Fleet API reads. What a SuperLink offers besides, to start runs and to register keys,
has no authentication and cannot be reached through here.
"""

import base64
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from ssl import create_default_context
from typing import Any, Final

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    verify_signature,
)
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedpeft.engines.flower.reach import (
    KEY_ROUTE,
    NOT_SENT,
    OFFER_ROUTE,
    UNANSWERED,
    UNREACHED,
)
from fedpeft.wire.lifeline import end_with_parent

CALLS: Final = (
    "register-node",
    "activate-node",
    "deactivate-node",
    "unregister-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
FLEET: Final = frozenset(f"/v1/fleet/{call}" for call in CALLS)
"""All that is passed on."""
BODY: Final = 64 * 2**20
"""Bytes of a body at most: Flower sends arrays in pieces of 5 MiB."""
HEADERS: Final = frozenset(
    {
        "content-type",
        "accept",
        "flwr-public-key",
        "flwr-signature",
        "flwr-timestamp",
        "flwr-package-name",
        "flwr-package-version",
        "flwr-component-name",
    }
)
"""Headers that go on."""
BACK: Final = frozenset({"content-type", "flwr-version-incompatibility-message"})
"""Headers that come back."""
MOMENT: Final = 300.0
"""Seconds for which a signed time is taken for now, as Flower does."""
TAKEN_IN: Final = "taken-in.json"
"""In the server's state: the public keys that the SuperLink has, in base64."""
KEYS: Final = 4096
"""Bytes of a file with a public key at most."""


def gate(link: str, ca: str, sites: Path, offer: Path) -> Starlette:
    """Return the gate in front of the SuperLink at address ``link``.

    ``ca``: file of the CA of its certificate. ``sites``: folder of the public keys of sites.
    ``offer``: file with what is offered to sites, for those that ask before they join; beside it
    lies ``TAKEN_IN``, the keys that the SuperLink has.
    """

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        context = create_default_context(cafile=ca)
        async with httpx.AsyncClient(
            base_url=f"https://{link}",
            verify=context,
            timeout=60.0,
            trust_env=False,
            limits=httpx.Limits(max_connections=256, max_keepalive_connections=64),
        ) as client:
            app.state.client = client
            yield

    async def forward(request: Request) -> Response:
        if request.url.path not in FLEET:
            return PlainTextResponse("forbidden", 403)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > BODY:
                return PlainTextResponse("too large", 413)
        headers = {name: value for name, value in request.headers.items() if name in HEADERS}
        try:
            answer = await request.app.state.client.post(
                request.url.path, content=bytes(body), headers=headers
            )
        except httpx.TransportError as error:  # it is being restarted; sites try again
            return _silent(error)
        back = {name: value for name, value in answer.headers.items() if name in BACK}
        return Response(answer.content, answer.status_code, headers=back)

    async def key(request: Request) -> Response:
        """Tell whoever holds a public key whether it is registered: it tells nobody else."""
        asked = request.headers.get("flwr-public-key", "")
        told = {"registered": asked in known_keys(sites)}
        with suppress(OSError, ValueError):  # not there yet, or no room for it
            told["taken_in"] = asked in json.loads((offer.parent / TAKEN_IN).read_bytes())
        return JSONResponse(told)

    async def offered(request: Request) -> Response:
        """Tell a site what is offered, if it signs with a key that is registered."""
        if not is_signed(request.headers, known_keys(sites)):
            return PlainTextResponse("forbidden", 403)
        content = offer.read_bytes() if offer.exists() else b"{}"
        return Response(content, media_type="application/json")

    return Starlette(
        routes=[
            Route(KEY_ROUTE, key, methods=["GET"]),
            Route(OFFER_ROUTE, offered, methods=["GET"]),
            Route("/{path:path}", forward, methods=["GET", "POST"]),
        ],
        lifespan=life,
        exception_handlers={ClientDisconnect: _left},
    )


def _left(_request: Request, _error: Exception) -> Response:
    """Answer whoever left within the body: nobody reads it, but a traceback would fill the log."""
    return PlainTextResponse("left", 400)


def _silent(error: httpx.TransportError) -> Response:
    """Tell a site that there is no answer, and whether what it asked may have been done."""
    if isinstance(error, NOT_SENT):
        return PlainTextResponse("the SuperLink is out of reach", UNREACHED)
    return PlainTextResponse("the SuperLink's answer is lost", UNANSWERED)


def is_signed(headers: Mapping[str, str], known: set[str]) -> bool:
    """Return whether a request's time is now, and signed by one of the ``known`` keys."""
    asked, said = headers.get("flwr-public-key", ""), headers.get("flwr-timestamp", "")
    if asked not in known:
        return False
    try:
        age = abs((now() - datetime.fromisoformat(said)).total_seconds())
        signature = base64.b64decode(headers.get("flwr-signature", ""), validate=True)
        key = bytes_to_public_key(base64.b64decode(asked, validate=True))
        signed = said.encode("ascii")  # a time may have any letter between date and hour
    except (ValueError, TypeError):
        return False
    return age < MOMENT and verify_signature(key, signed, signature)


def known_keys(sites: Path) -> set[str]:
    """Return the public keys in a folder, as messages hold them, in base64."""
    known: set[str] = set()
    for path in sites.glob("*.pub"):
        try:
            known.add(base64.b64encode(public_key(path)).decode("ascii"))
        except (OSError, ValueError):
            continue
    return known


def public_key(path: Path) -> bytes:
    """Return a site's public key as messages hold it, from its file in OpenSSH form.

    ValueError for anything else, OSError where it cannot be read.
    """
    key = load_ssh_public_key(path.read_bytes()[:KEYS])
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("no key on an elliptic curve")
    return public_key_to_bytes(key)


def main(settings: dict[str, Any]) -> None:
    """Run the gate; ``settings`` come from standard input, not from a command line."""
    uvicorn.run(
        gate(settings["link"], settings["ca"], Path(settings["sites"]), Path(settings["offer"])),
        host=settings["host"],
        port=settings["port"],
        http="httptools",  # h11 tells of broken requests as if they were the gate's own faults
        ssl_certfile=settings["certificate"],
        ssl_keyfile=settings["key"],
        ws="none",  # of HTTP it passes requests alone
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    # One line, read from the descriptor alone: what follows is the lifeline.
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(sys.stdin.fileno(), 1)
    end_with_parent()
    main(json.loads(line))
