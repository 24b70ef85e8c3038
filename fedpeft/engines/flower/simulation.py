"""Flower's simulation: server and clients on this machine, the clients in processes of Ray."""

import contextlib
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Final, TypeVar

from flwr.app import ConfigRecordValues, Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedpeft.engines.flower.app import client_app
from fedpeft.engines.flower.engine import connect
from fedpeft.engines.pool import ClientPool
from fedpeft.types import Engine

T = TypeVar("T")
# Ray reports its use over the network; and it would hide the accelerators from actors without any.
QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextlib.contextmanager
def _surroundings(ended: threading.Event) -> Iterator[str]:
    """Keep Flower and Ray offline, quiet and in a folder of their own; yield that folder.

    At the end, put everything back and set ``ended``.
    """
    # What Ray leaves open is no fault of the user's.
    rays_warnings = (  # Ray 2.55, 2026-11
        r"unclosed file <_io\.\w+ name='/dev/null'",
        r"subprocess \d+ is still running",
    )
    with (
        # A short prefix: Ray puts sockets in there, and a socket's path has about 100 characters.
        tempfile.TemporaryDirectory(prefix="fl", ignore_cleanup_errors=True) as folder,
        warnings.catch_warnings(),
    ):
        for message in rays_warnings:
            warnings.filterwarnings("ignore", message, ResourceWarning)
        before, log = dict(os.environ), logging.getLogger("flwr")
        level = log.level
        os.environ |= {"FLWR_HOME": folder, "FLWR_LOG_LEVEL": "CRITICAL", **QUIET}
        log.setLevel(logging.CRITICAL)  # what fails is a Lost with its reason, or is raised
        try:
            yield folder
        finally:
            ended.set()
            log.setLevel(level)
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ |= before  # Flower makes PYTHONPATH longer


def launch(pool: ClientPool, body: Callable[[Engine], T], actors: int = 1) -> T:
    """Simulate the clients of ``pool``, call ``body`` with the engine, and return its result.

    ``body`` runs in the server app, a thread of this process. ``actors``: processes that do the
    clients' work.
    """
    # 1. The server app. The result of `body` and any error leave its thread through a future.
    outcome, ended, server = Future[T](), threading.Event(), ServerApp()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            engine = connect(grid, ended, pool.clients, pool.settings)
            outcome.set_result(body(engine))
        except BaseException as error:
            outcome.set_exception(error)

    # 2. The simulation: a Ray of this machine alone, without Ray's console output.
    with _surroundings(ended) as folder:
        ray: dict[str, ConfigRecordValues] = {
            "address": "local",
            "num_cpus": actors,
            "object_store_memory": 1 << 30,  # bytes; Ray's default is a share of all memory
        }
        ray |= {"log_to_driver": False, "logging_level": "ERROR", "_temp_dir": folder}
        # One CPU a client makes `actors` the number of actors; one that dies is started again.
        actor: dict[str, ConfigRecordValues] = {"num_cpus": 1, "num_gpus": 0, "max_restarts": -1}
        app = client_app(pool.rebuild)
        backend = {"client_resources": actor, "init_args": ray}
        run_simulation(server, app, pool.clients, backend_config=backend)
    # 3. Where Flower failed to start, `main` was never called.
    if not outcome.done():
        raise RuntimeError("the Flower simulation ended before the run began")
    return outcome.result()
