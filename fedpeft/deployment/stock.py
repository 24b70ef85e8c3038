"""The server's side of the way of Flower's own programs: what ``flwr run`` starts."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from fedpeft.deployment.serve import Job, serve_one
from fedpeft.engines.flower.stock import StockSites, make_server_app
from fedpeft.experiment.config import from_tree, merge, read
from fedpeft.experiment.run_folder import beginning

SITES: Final = {"engine": {"kind": "sites"}}


def serve(sites: StockSites, settings: Mapping[str, object]) -> None:
    """Serve one run to the sites behind a grid; its folder is what ``fedpeft run`` would make."""
    path = Path(str(settings["config"]))
    state = {"server": {"state": str((path.parent / "server-state").absolute())}}
    config = from_tree(merge(state, read(path), SITES))
    assert config.server.state is not None
    config.server.state.mkdir(parents=True, exist_ok=True)
    folder = Path(str(settings["runs"])) / config.name
    with beginning(folder, overwrite=False):
        serve_one(Job(config, folder), lambda: nullcontext(sites), _nothing, None, _say)


def _nothing() -> None:
    """Let no new keys in: with Flower's own programs that is ``flwr supernode register``."""


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


server_app = make_server_app(serve)
