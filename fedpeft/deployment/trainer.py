"""The trainer of a site: a process that keeps model, tokens and memory, behind a socket.

It is told what to do by frames (see ``wire/frames.py``): ``about`` asks what the site has for an
offer, ``handle`` brings a request of the server's. Nothing of what it is told is executed.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import final

from fedpeft.deployment.memories import DiskMemories
from fedpeft.deployment.offer import Offer, Refusal, check_sections, read_offer
from fedpeft.deployment.own import OwnRun, own_run
from fedpeft.deployment.site import Site, read_site
from fedpeft.errors import BadInput, WireError
from fedpeft.experiment.config import Config
from fedpeft.experiment.privacy import exchanges
from fedpeft.wire.frames import Closed, Frame, is_own, listening, receive, send
from fedpeft.wire.lifeline import end_with_parent
from fedpeft.wire.messages import Kind, Request, Response, forgotten

OnError = Callable[[BaseException], None]
Turn = tuple[str, int, int]
"""The exchange of a run that was asked for: run, round, phase."""


@final
class Trainer:
    """Answers frames, one after another; a run that was asked for last stays built."""

    def __init__(self, site: Site, on_error: OnError = lambda _: None) -> None:
        self._site = site
        self._on_error = on_error
        self._memories = DiskMemories(site.state, site.client, site.limits.memories)
        self._offer: Offer | None = None
        self._run: OwnRun | None = None
        self._last_begun = -float("inf")  # when a round was begun, of the monotonic clock
        self._turn: Turn | None = None

    def answer(self, frame: Frame) -> Frame:
        """Return the answer to a frame: with a header ``error``, or with what was asked for.

        What goes wrong is told in a few words of our own, or by its type alone: the text of any
        other error may hold a path, or the data. ``on_error`` gets it whole.
        """
        kinds: Mapping[str, Callable[[Frame], Frame]] = {
            "about": self._about,
            "handle": self._handle,
        }
        try:
            kind = kinds.get(str(frame.header.get("kind")))
            if kind is None:
                raise WireError("a frame of an unknown kind")
            return kind(frame)
        except (Refusal, WireError) as error:
            self._on_error(error)
            return Frame({"error": str(error)})
        except BadInput as error:
            self._on_error(error)
            return Frame({"error": "the site's own settings or data do not fit; see its log"})
        except Exception as error:
            self._on_error(error)
            return Frame({"error": f"{_kind(error)}; see the site's log"})

    def _about(self, frame: Frame) -> Frame:
        """Return what the server may know of the site: how much it holds, and of which model.

        ``trains`` is for the connector alone: what the run is.
        """
        run = self._built(_text(frame, "config"))
        return Frame(
            {
                "client": self._site.client,
                "examples": len(run.dataset.train),
                "texts": len(run.train),
                "tests": len(run.test),
                "weights": run.loaded.digest,
                "agreed": run.worker.config.hex(),
                "trains": _trains(run.config),
            }
        )

    def _handle(self, frame: Frame) -> Frame:
        """Return the reply to a request, and keep the client's new memory."""
        # 1. Read who is asked, and for which run.
        client, version = _whole(frame, "client"), _whole(frame, "memory")
        run = self._built(_text(frame, "config"))
        assert self._offer is not None
        if client != self._site.client:
            raise WireError(f"client {client} is not held here")
        request = Request.decode(frame.body, run.worker.config)
        # 2. Fetch the memory that the request assumes.
        memory = self._memories.get(self._offer.run, version)
        if memory is None:
            return Frame({}, forgotten(frame.body, run.worker.config))
        # 3. Do the work: a stack of one client.
        if request.kind is Kind.TRAIN:
            self._take_turn((self._offer.run, request.round, request.phase), run)
        [(reply, new_memory)] = run.worker.handle([client], [frame.body], [memory])
        if new_memory:
            new_version = Response.decode(reply).memory
            self._memories.put(self._offer.run, new_version, new_memory, assumed=version)
        done = {Kind.TRAIN: "trained", Kind.EVALUATE: "scored"}[request.kind]
        return Frame({"done": f"round {request.round}: {done}", "round": request.round}, reply)

    def _built(self, text: str) -> OwnRun:
        """Return what is built for an offer; it is built unless it was the last one."""
        offer = read_offer(text)
        if self._run is None or offer != self._offer:
            run = own_run(offer, self._site, self._run)
            self._run, self._offer = run, offer
        return self._run

    def _take_turn(self, turn: Turn, run: OwnRun) -> None:
        """Take note of an exchange; Refusal where a round was begun too short a time ago.

        An exchange that goes on with the round of the last one need not wait, as long as the
        round has no more of them than the run's method and wrappers need.
        """
        name, round_number, phase = turn
        follows = self._turn == (name, round_number, phase - 1)
        if not (follows and phase < exchanges(run.config)):
            least, now = self._site.limits.interval, time.monotonic()
            if now - self._last_begun < least:
                raise Refusal(f"this site trains at most once in {least:g} s")
            self._last_begun = now
        self._turn = turn


def _kind(error: Exception) -> str:
    """Return of what kind an error is: its type, and of the system's errors which one it was.

    >>> _kind(OSError(28, "secret", "/secret")), _kind(ValueError("secret"))
    ('OSError: No space left on device', 'ValueError')
    """
    name = type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    return name if number is None else f"{name}: {os.strerror(number)}"


def _trains(config: Config) -> str:
    """Return method and wrappers of a run, as ``lora under secagg, dp``."""
    names = ", ".join(str(table["name"]) for table in config.wrap)
    return f"{config.method['name']} under {names}" if names else str(config.method["name"])


def _text(frame: Frame, name: str) -> str:
    value = frame.header.get(name)
    if not isinstance(value, str):
        raise WireError(f"a frame without {name!r}")
    return value


def _whole(frame: Frame, name: str) -> int:
    value = frame.header.get(name)
    if type(value) is not int:  # JSON's true is an int, too
        raise WireError(f"a frame without {name!r}")
    return value


def serve(trainer: Trainer, server: socket.socket, most: int) -> None:
    """Answer whoever connects to ``server``, one after another, for ever.

    ``most``: bytes of a body at most.
    """
    while True:
        connection, _ = server.accept()
        # What is wrong with one connection ends that one alone.
        with connection, contextlib.suppress(Closed):
            if not is_own(connection):
                continue
            while True:
                try:
                    frame = receive(connection, most)
                except WireError as error:
                    send(connection, Frame({"error": str(error)}))
                    break
                send(connection, trainer.answer(frame))


def main(path: Path) -> None:
    """Be the trainer of the site with settings at ``path``, until a signal ends it."""
    site = read_site(path)
    check_sections(site)

    def say(error: BaseException) -> None:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        sys.stderr.write(f"trainer: {line}\n")
        sys.stderr.flush()

    with listening(site.socket) as server:
        serve(Trainer(site, say), server, int(site.limits.message * 1e6))


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def run_as_process(arguments: list[str]) -> None:
    """Run ``main`` as a program: one line for bad input, and a clean end for signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if "child" in arguments[1:]:
        end_with_parent()
    try:
        main(Path(arguments[0]))
    except BadInput as error:
        sys.stderr.write(f"fedpeft: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    run_as_process(sys.argv[1:])
