"""``fedpeft join``: a site's connector, in front of the trainer that is its child.

This process loads no torch. It holds the site's key and speaks with the server, and what it passes
on to the trainer are bytes that it does not look into.
"""

import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedpeft.deployment.child import LOG, TrainerProcess, trainer_process
from fedpeft.deployment.replies import LastReply
from fedpeft.deployment.site import Site, read_site
from fedpeft.deployment.telling import Tell, in_lines
from fedpeft.engines.flower.connector import Asked, Session, forever
from fedpeft.engines.flower.reach import Gate
from fedpeft.errors import BadInput, WireError
from fedpeft.wire.frames import Frame, check_private

Say = Callable[[str], None]


def gate_of(site: Site) -> Gate:
    """Return how ``site`` reaches its server; BadInput for a key or a CA that cannot be used."""
    check_private(site.key, "the site's private key")
    try:
        key = load_ssh_private_key(site.key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{site.key}: is no private key in OpenSSH form without a passphrase; "
            "make one with: fedpeft deploy init"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput(f"{site.key}: is no key on an elliptic curve; see fedpeft deploy init")
    try:
        ca = site.ca.read_bytes()
        gate = Gate(*site.address, ca, key)
        gate.tls()
    except OSError as error:
        raise BadInput(f"{site.ca}: the CA's certificate cannot be read ({error})") from error
    except ValueError as error:
        raise BadInput(f"{site.ca}: is no certificate in PEM form") from error
    return gate


@final
class Answering:
    """Answers what the server asks, by the trainer; a request that comes again, from disk.

    ``tell`` gets what is done, with fields; left out, ``say`` gets the lines.
    """

    def __init__(
        self, site: Site, trainer: TrainerProcess, say: Say, tell: Tell | None = None
    ) -> None:
        self._site = site
        self._trainer = trainer
        self._say = say
        self._tell = tell or in_lines(say)
        self._last = LastReply(site.state)

    def __call__(self, asked: Asked) -> "bytes | Mapping[str, Any]":
        """Return the answer; WireError with words that the server may read."""
        if asked.kind == "query":
            return self._about(asked.to)
        key = LastReply.key(dict(asked.to), asked.request)
        if (kept := self._last.get(key)) is not None:
            self._tell("again", "asked again, answered as before", up=len(kept))
            return kept
        began = time.monotonic()
        reply = self._answered(self._trainer.ask(_request(asked)))
        self._keep(key, reply.body)
        self._tell(
            "answered",
            f"{reply.header.get('done', 'answered')}, {len(reply.body)} bytes",
            round=reply.header.get("round"),
            down=len(asked.request),
            up=len(reply.body),
            seconds=round(time.monotonic() - began, 3),
        )
        return reply.body

    def _keep(self, key: str, reply: bytes) -> None:
        """Keep a reply in case it is lost; where the disk is full, it is sent all the same."""
        try:
            self._last.put(key, reply)
        except OSError as error:
            what = f"the last reply cannot be kept in the site's state ({error.strerror})"
            self._say(f"{what}; it is sent, and made again where it gets lost: make room")

    def _about(self, to: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return who this site is, and what it has for the run that is offered."""
        about: dict[str, Any] = {
            "partition-id": self._site.client,
            "version": version("fedpeft"),
        }
        if "config" not in to:
            return about
        said = self._trainer.ask(Frame({"kind": "about", "config": to["config"]}))
        header = dict(self._answered(said).header)
        trains, examples = header.pop("trains", None), header.get("examples")
        line = f"ready for a run of {trains}, with {examples} examples"
        self._tell("ready", line, trains=trains, examples=examples)
        return {**about, **header}

    def _answered(self, frame: Frame) -> Frame:
        """Return ``frame``; WireError where the trainer tells of an error."""
        if "error" in frame.header:
            reason = str(frame.header["error"])
            self._tell("refused", f"refused: {reason} ({LOG} has the rest)", reason=reason)
            raise WireError(reason)
        return frame


def _request(asked: Asked) -> Frame:
    """Return the frame that brings a request to the trainer."""
    return Frame({"kind": "handle", **asked.to}, asked.request)


def _leave(_number: int, _frame: FrameType | None) -> None:
    # It unwinds every `with`: the server is told, and the trainer is ended.
    raise SystemExit(0)


def join(path: Path, say: Say, tell: Tell | None = None) -> None:
    """Be the site with settings at ``path`` until a signal ends this process.

    ``tell`` gets events with their fields; left out, ``say`` gets their lines. BadInput where the
    settings, the key or the server are wrong.
    """
    tell = tell or in_lines(say)
    site = read_site(path)
    gate = gate_of(site)
    site.state.mkdir(parents=True, exist_ok=True)
    site.state.chmod(0o700)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)
    with trainer_process(path, site.socket, say) as trainer:
        forever(
            gate,
            Answering(site, trainer, say, tell),
            int(site.limits.message * 1e6),
            say,
            partial(_online, site, tell),
        )


def _online(site: Site, tell: Tell, _session: Session) -> None:
    line = f"site {site.client} is online at {site.server}"
    tell("online", line, site=site.client, server=site.server)
