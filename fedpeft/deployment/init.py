"""``fedpeft deploy init``: a folder for the server and one for each site, ready to be carried.

What is written for programs outside, such as systemd or nginx, are templates beside this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final, final

import tomli_w

from fedpeft.deployment.certificates import (
    LOOPBACK,
    authority,
    private_pem,
    server_certificate,
    site_key,
    write_secret,
)
from fedpeft.errors import BadInput
from fedpeft.experiment.config import from_tree, merge, read

LINK_PORT: Final = 9444
"""The SuperLink's port in the example for nginx."""

_TREE: Final[dict[str, Any]] = {
    "name": "sites",
    "model": {"name": "minilm", "max_length": 64},
    "data": {"source": "pydocs"},
    "federation": {"rounds": 10, "clients_per_round": 3, "min_replies": 2},
    "training": {"steps": 4, "batch_size": 16, "lr": 3e-2, "head_lr": 3e-2},
    "method": {"name": "fedara"},
    "evaluation": {"every": 5, "limit": 500},
}
"""The settings where none are given: docstrings, so that all can be tried at once."""


@final
@dataclass(frozen=True)
class Wanted:
    """What to write: how many sites, where they find the server, and what is trained."""

    sites: int
    host: str
    port: int
    config: Path | None = None


def deploy_init(folder: Path, wanted: Wanted) -> list[str]:
    """Write everything for a federation into a new ``folder`` and return what to do next.

    BadInput where the folder exists, and for settings of which no server can be made.
    """
    if folder.exists():
        raise BadInput(f"{folder}: exists; choose another name, nothing is overwritten")
    tree = _server_tree(wanted)
    # 1. Keys and certificates: made here, all at once; none leaves its folder.
    signer = authority(f"fedpeft CA of {wanted.host}")
    hosts = list(dict.fromkeys([wanted.host, *LOOPBACK]))
    certificate, key = server_certificate(signer, hosts)
    try:
        server = folder / "server"
        (server / "sites").mkdir(parents=True)
        folder.chmod(0o700)
        (folder / "ca").mkdir()
        (folder / "ca" / "ca.crt").write_bytes(signer.pem)
        write_secret(folder / "ca" / "ca.key", private_pem(signer.key))
        (server / "server.crt").write_bytes(certificate)
        write_secret(server / "server.key", key)
        (server / "server.toml").write_text(_SERVER + tomli_w.dumps(tree), encoding="utf-8")
        _fill(server / "fedpeft-server.service", "server.service", {})
        _fill(server / "nginx.conf", "nginx.conf", {"host": wanted.host, "port": wanted.port})
        # 2. A folder for each site.
        for number in range(wanted.sites):
            _write_site(folder, number, wanted, signer.pem, tree)
        _fill(folder / "Dockerfile", "Dockerfile", {})
        (folder / "compose.yaml").write_text(_compose(wanted), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror})") from error
    return _next_steps(folder, wanted)


def _server_tree(wanted: Wanted) -> dict[str, Any]:
    """Return the settings in ``server.toml``, checked."""
    chosen = _TREE if wanted.config is None else dict(read(wanted.config))
    sites, plan = wanted.sites, dict(chosen.get("federation", {}))
    plan["clients_per_round"] = min(sites, plan.get("clients_per_round", 4))
    plan["min_replies"] = min(plan["clients_per_round"], plan.get("min_replies", 1))
    server = {
        "host": "0.0.0.0",  # the gate is what sites reach
        "port": wanted.port,
        "certificate": "server.crt",
        "key": "server.key",
        "sites": "sites",
        "min_sites": sites,
    }
    if "server" in chosen:
        raise BadInput(f"{wanted.config}: has a section [server] already; take it out")
    tree = merge(chosen, {"federation": plan, "server": server})
    for section in ("engine", "partition"):  # of simulations
        tree.pop(section, None)
    if wanted.config is not None:
        tree.get("data", {}).pop("train", None)  # the sites have it
    from_tree(merge(tree, {"engine": {"kind": "sites"}}))
    return tree


def _write_site(folder: Path, number: int, wanted: Wanted, ca: bytes, tree: dict[str, Any]) -> None:
    """Write the folder of one site, and its public key into the server's."""
    private, public = site_key()
    site = folder / f"site-{number}"
    site.mkdir()
    site.chmod(0o700)
    (site / "ca.crt").write_bytes(ca)
    write_secret(site / "site.key", private)
    (folder / "server" / "sites" / f"site-{number}.pub").write_bytes(public)
    name = str(tree.get("model", {}).get("name", "minilm"))
    place = Path(name)
    base = place.name if place.is_absolute() else name
    # The names of columns are those of the simulation; what the server alone reads is left out.
    own = {"source", "train", "validation", "test", "labels", "name", "config"}
    columns: dict[str, Any] = {}
    for key, value in tree.get("data", {}).items():
        if key not in own and not key.endswith(("_split", "_fraction")):
            columns[key] = value
    settings = {
        "client": number,
        "server": f"{wanted.host}:{wanted.port}",
        "ca": "ca.crt",
        "key": "site.key",
        "state": "state",
        "data": {"train": "train.jsonl", **columns},
        "models": {base: base},
        "limits": {"methods": _methods(tree)},
    }
    (site / "site.toml").write_text(_SITE + tomli_w.dumps(settings), encoding="utf-8")
    _fill(site / "fedpeft-site.service", "site.service", {"number": number})


def _methods(tree: dict[str, Any]) -> list[str]:
    """Return the methods that a site agrees to at first: those that the settings name."""
    named = [str(tree.get("method", {}).get("name", "lora"))]
    compared: Sequence[str] = tree.get("compare", {}).get("methods", ())
    return list(dict.fromkeys([*named, *compared]))


def _fill(path: Path, template: str, values: dict[str, Any]) -> None:
    """Write a template of ours with ``values`` in the places of its names."""
    text = (files("fedpeft.deployment") / "templates" / template).read_text(encoding="utf-8")
    known = {"link_port": LINK_PORT, **values}
    path.write_text(Template(text).safe_substitute(known), encoding="utf-8")


def _compose(wanted: Wanted) -> str:
    """Return a compose file for a trial of all of it on one machine."""
    lines = [
        "# A trial of everything on one machine: docker compose up --build",
        "# Sites find the server by the name of `deploy init --host`; localhost is each one's own.",
        "services:",
        "  server:",
        "    build: .",
        "    init: true # reaps what ends",
        "    command: serve server.toml --resume",
        "    working_dir: /work",
        "    volumes: [./server:/work]",
        f"    ports: ['{wanted.port}:{wanted.port}']",
        f"    networks: {{default: {{aliases: ['{wanted.host}']}}}}",
    ]
    for number in range(wanted.sites):
        lines += [
            f"  site-{number}:",
            "    build: .",
            "    init: true",
            "    command: join site.toml",
            "    working_dir: /work",
            f"    volumes: [./site-{number}:/work]",
            "    restart: on-failure",
        ]
    return "\n".join(lines) + "\n"


def _next_steps(folder: Path, wanted: Wanted) -> list[str]:
    """Return what to do next, a line each."""
    lines = [
        f"{folder / 'server'}: for the server; start it with: "
        f"fedpeft serve {folder / 'server' / 'server.toml'}",
    ]
    for number in range(wanted.sites):
        site = folder / f"site-{number}"
        lines.append(
            f"{site}: for site {number}; put its texts into train.jsonl, then: "
            f"fedpeft deploy check {site / 'site.toml'}; fedpeft join {site / 'site.toml'}"
        )
    lines.append(
        "Each site's folder holds its private key: carry it there safely and keep no copy. "
        f"With {folder / 'ca' / 'ca.key'} anyone can pass for the server: keep it off line"
    )
    return lines


def deploy_key(path: Path, public: Path) -> list[str]:
    """Write the key of one more site: the private half to ``path``, the public one to ``public``.

    BadInput where one of them exists.
    """
    for one in (path, public):
        if one.exists():
            raise BadInput(f"{one}: exists; nothing is overwritten")
    private, shown = site_key()
    try:
        write_secret(path, private)
        public.write_bytes(shown)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from error
    return [
        f"{path}: the site's private key; it stays with the site",
        f"{public}: its public half; put it into the server's folder of sites, called after the "
        "client's number, such as site-3.pub; a running server takes it in",
    ]


_SERVER: Final = """\
# The server's settings: those of a simulation, and the section [server]. Nothing in it reaches a
# site but the task, the method, the training and the names of model and labels.
# Label names: with files of your own, name all of them in data.labels.
"""
_SITE: Final = """\
# A site's own settings; the server has no say in them. Relative paths start at this file.
# data: the file of the training texts, and `test` for one of test texts, if there is one.
# models: the base models that may be trained: their name at the server -> where they lie here.
# limits.methods: what may be trained; see docs/deploy.md for the other limits, and for [machine].
# To train under secure aggregation alone, put at the end: [limits.require.secagg]
"""
