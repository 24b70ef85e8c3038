"""``fedpeft deploy check``: what would go wrong at a site, before anything is trained."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, final

import httpx

from fedpeft.deployment.join import gate_of
from fedpeft.deployment.offer import accepted, check_sections, read_offer
from fedpeft.deployment.own import own_run
from fedpeft.deployment.site import Site, read_site
from fedpeft.engines.flower.connector import is_online
from fedpeft.engines.flower.reach import Gate, clock_fault, key_is_known, offered, probe, tls_fault
from fedpeft.errors import BadInput
from fedpeft.models.choice import locate

FACTOR: Final = 3.0
"""Bytes of memory that training takes for each byte of the model's weights in float32, at least."""
BESIDE: Final = 600e6
"""Bytes of memory that Python, torch and transformers take."""

Say = Callable[[str], None]


@final
class Report:
    """The outcome of each check, told as it comes."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._failed = 0

    def failures(self) -> int:
        """Return how many checks have failed so far."""
        return self._failed

    def note(self, what: str, outcome: str) -> None:
        """Tell of what is in order, or could not be looked at."""
        self._say(f"{what}: {outcome}")

    @contextmanager
    def check(self, what: str, ok: str = "ok") -> Iterator[None]:
        """Tell whether what is in the ``with`` raises BadInput; it is not raised again."""
        try:
            yield
        except BadInput as error:
            self._failed += 1
            self._say(f"{what}: FAILED: {error}")
        else:
            self._say(f"{what}: {ok}")


def preflight(path: Path, say: Say) -> int:
    """Look at everything that can be looked at from a site, and return how much has failed.

    BadInput where the settings or the key cannot be read: then nothing else can be looked at.
    """
    report = Report(say)
    site = read_site(path)
    check_sections(site)
    gate = gate_of(site)
    report.note("settings and key", "ok")
    with report.check("server and its certificate"):
        _check_server(gate)
    if report.failures():
        return report.failures()
    known = key_is_known(gate)
    if known is not None:
        with report.check("the site's key"):
            _check_key(known)
    if report.failures():
        return report.failures()
    if is_online(gate):
        # Flower has one code for both.
        unless = "" if known else ", unless its key is not registered"
        report.note(
            "this site",
            f"is online already{unless}; a second one with its key would be refused",
        )
    else:
        report.note("this site", "is not online yet")
    if known is None:
        report.note("the run", "not told: another proxy stands in the place of fedpeft's gate")
        return report.failures()
    content = offered(gate)
    if not content:
        report.note("the run", "none is offered yet; check again when the server serves one")
        return report.failures()
    _check_run(site, content, report)
    return report.failures()


def _check_server(gate: Gate) -> None:
    """Raise BadInput where the server cannot be reached, or is not the right one."""
    where = f"server = {gate.address!r}"
    try:
        response = probe(gate)
    except httpx.TransportError as error:
        fault = tls_fault(error) or f"cannot be reached ({error})"
        raise BadInput(f"{where}: {fault}") from error
    if fault := clock_fault(response):
        raise BadInput(f"{where}: {fault}; set it, as messages are signed with their time")


def _check_key(known: bool) -> None:
    """Raise BadInput where the server does not know the site's key."""
    if not known:
        raise BadInput(
            "the server does not know it; give its public half (the .pub file) to whoever runs "
            "the server"
        )


def _check_run(site: Site, content: Any, report: Report) -> None:
    """Check versions, data, model and memory against the run that is offered."""
    with report.check("version of flwr"):
        there, here = str(content.get("flwr")), version("flwr")
        if there.split(".")[:2] != here.split(".")[:2]:
            raise BadInput(f"{there} at the server, {here} here; both need the same minor version")
    offer = None
    with report.check("the run that is offered", "agreed to"):
        offer = read_offer(str(content.get("offer")))
        config = accepted(offer, site)
    if offer is None or report.failures():
        return
    with report.check("memory"):
        _check_memory(config.model.name)
    began = time.monotonic()
    with report.check("data and model", "fit the run"):
        run = own_run(offer, site, None)
        report.note("examples", f"{len(run.dataset.train)} to train on, {len(run.test)} for tests")
        if run.loaded.digest != content.get("weights"):
            raise BadInput(
                f"model: has other weights than the server's: digest {run.loaded.digest!r} here, "
                f"{content.get('weights')!r} there"
            )
        if run.worker.config.hex() != content.get("agreed"):
            raise BadInput(f"fedpeft {version('fedpeft')} here is another than the server's")
    report.note("time", f"{time.monotonic() - began:.1f} s until the site is ready")


def _check_memory(model: str) -> None:
    """Raise BadInput where the weights in the model's files would not fit into memory."""
    place = Path(locate(model))
    if not place.exists():
        return  # on the hub: its size is not known here
    files = [place] if place.is_file() else list(place.glob("*.safetensors"))
    weights = sum(path.stat().st_size for path in files)
    needed, free = FACTOR * weights + BESIDE, free_memory()
    if needed > free:
        raise BadInput(
            f"training takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )


def free_memory() -> float:
    """Return the bytes of memory that are free here; infinite where no one tells."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    known = set(getattr(os, "sysconf_names", ()))
    if {"SC_PAGE_SIZE", "SC_AVPHYS_PAGES"} <= known:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    return float("inf")
