"""A site's own settings, ``site.toml``: all that the server has no say in.

Nothing here loads torch, as the connector does not: ``experiment.sections`` is read by the trainer.
"""

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, final

from annotated_types import Ge, Gt

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import checked

SOCKET: Final = "trainer.sock"
"""The trainer's socket in a site's ``state``."""
NUMBERS: Final = range(1 << 31)
"""What a client's number may be."""


@final
@dataclass(frozen=True)
class Limits:
    """What the site agrees to."""

    message: Annotated[float, Gt(0)] = 1024.0
    """Megabytes (10^6 bytes) of a request at most."""
    interval: Annotated[float, Ge(0)] = 0.0
    """Seconds from the start of one round's training to that of the next, at least."""
    steps: Annotated[int, Ge(1)] = 100_000
    """Steps of one training at most, also where a number of epochs is asked for."""
    methods: tuple[str, ...] = ()
    """The methods that may be trained; left out: all that come with fedpeft."""
    require: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The wrappers without which the site does not train: name -> fields, with the least that each
    has to be (`clip`, `delta` and `norm`: the most); a text has to be the same."""
    memories: Annotated[int, Ge(1)] = 8
    """Runs of which the site keeps what it has to remember; the oldest is forgotten first."""


@final
@dataclass(frozen=True)
class Site:
    """The settings of a site; `data` and `machine` are sections as a configuration has them."""

    client: Annotated[int, Ge(0)]
    """The number of this site's client, as the server's file of its public key says it."""
    server: str
    """The server's gate, as `fl.example.org:9443`."""
    ca: Path
    """The certificate of the CA (PEM) that has signed the server's."""
    key: Path
    """The private key of this site (OpenSSH form), readable by its user alone."""
    data: dict[str, Any]
    """Where the site's data lie: `train`, `test` and the names of columns."""
    models: dict[str, str]
    """The base models that may be trained: name, as the server's configuration has it -> where that
    model lies here (a folder, a GGUF file, a short name, an id on the hub)."""
    machine: dict[str, Any] = field(default_factory=dict)
    """What of the hardware is used."""
    limits: Limits = field(default_factory=Limits)
    """What the site agrees to."""
    state: Path = Path("state")
    """The folder in which the site keeps what it has to remember, and its trainer's socket."""
    trust_remote_code: bool = False
    """Run the Python files that a base model brings along."""

    @property
    def socket(self) -> Path:
        """Return the path of the trainer's socket."""
        return self.state / SOCKET

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port of the server's gate."""
        host, _, port = self.server.rpartition(":")
        return host.strip("[]"), int(port)


def read_site(path: Path) -> Site:
    """Return the settings in a site's TOML file; BadInput names file and field of a mistake.

    Relative paths start at the folder of the file.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; make one with: fedpeft deploy init") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path}: not a TOML file: {error}") from error
    try:
        site = checked(Site, tree, "")
        return _absolute(_checked_server(site), path.parent.absolute())
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _checked_server(site: Site) -> Site:
    """Return ``site`` with its server as host and port; BadInput where it names none."""
    said = site.server
    if said.startswith("http://"):
        raise BadInput(f"server = {said!r}: sites speak TLS alone; write it as host:port")
    plain = said.removeprefix("https://").rstrip("/")
    host, colon, port = plain.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 1 << 16):
        raise BadInput(f"server = {said!r}: write it as host:port, such as 'fl.example.org:9443'")
    if not site.models:
        raise BadInput("models: name at least one base model, such as minilm = 'minilm'")
    if "train" not in site.data:
        raise BadInput("data.train is missing: name the file of the training texts")
    return replace(site, server=plain)


def _absolute(site: Site, folder: Path) -> Site:
    """Return ``site`` with full paths."""
    data = dict(site.data)
    for name in ("train", "validation", "test"):
        if isinstance(data.get(name), str):
            data[name] = str(_full(Path(data[name]), folder))
    models: dict[str, str] = {}
    for name, place in site.models.items():
        full = _full(Path(place), folder)
        models[name] = str(full) if full.exists() else place
    return replace(
        site,
        data=data,
        models=models,
        ca=_full(site.ca, folder),
        key=_full(site.key, folder),
        state=_full(site.state, folder),
    )


def _full(path: Path, folder: Path) -> Path:
    try:
        return (folder / path.expanduser()).absolute()
    except RuntimeError as error:
        raise BadInput(f"{path}: no home folder is known for {path.parts[0]!r}") from error
