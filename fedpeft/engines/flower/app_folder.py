"""The app of a run as Flower wants it: a folder with names, and without any code.

Both sides run what they have installed. So ``flwr run`` has nothing to send but this file.
"""

from pathlib import Path
from typing import Final

from fedpeft.errors import BadInput

FILE: Final = "pyproject.toml"
APP: Final = b"""\
[project]
name = "fedpeft"
version = "1.0.0"
description = "No code: server and sites run what they have installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedpeft"

[tool.flwr.app.components]
serverapp = "fedpeft.deployment.stock:server_app"
clientapp = "fedpeft.engines.flower.stock:client_app"

[tool.flwr.app.config]
config = "server.toml" # the settings of the run, a path at the server
runs = "runs" # where its folder goes, at the server
"""


def write_app(folder: Path) -> None:
    """Write the app into a new folder, for ``flwr run``; BadInput where it cannot be made."""
    try:
        folder.mkdir(parents=True)
        (folder / FILE).write_bytes(APP)
    except FileExistsError as error:
        raise BadInput(f"{folder}: exists; choose another name") from error
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made ({error.strerror})") from error
