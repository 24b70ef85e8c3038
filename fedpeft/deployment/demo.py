"""``fedpeft deploy demo``: all of a deployment on this machine, beside the same in one process."""

import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import tomli_w

from fedpeft.deployment.carving import carve
from fedpeft.deployment.certificates import site_key, write_secret
from fedpeft.deployment.init import Wanted, deploy_init
from fedpeft.deployment.serve import Job, serve
from fedpeft.engines.flower.superlink import free_port
from fedpeft.errors import BadInput
from fedpeft.experiment.batch import run_all
from fedpeft.experiment.compare import Planned, plan
from fedpeft.experiment.config import merge, read
from fedpeft.experiment.recorder import CHECKPOINTS, OnProgress
from fedpeft.wire.messages import digest

CONFIG: Final = "demo_deploy.toml"
PROGRAM: Final = "from fedpeft.cli import main; main()"

Say = Callable[[str], None]


def demo(root: Path, say: Say, on_progress: Callable[[str], OnProgress]) -> list[Path]:
    """Serve FedARA and FeDeRA to three sites, run both in this process, compare their last bits.

    Everything goes into ``root``, a new folder. Returns the folders of the served runs. BadInput
    where an end differs.
    """
    config = Path(str(files("fedpeft") / CONFIG))
    # 1. Keys, certificates and settings, and each site's own file.
    deploy_init(root / "deployment", Wanted(3, "localhost", free_port(), config))
    say(f"keys, certificates and settings: {root / 'deployment'}")
    planned = plan(read(config))
    folders = carve(planned[0].config, root / "deployment")
    for folder in folders:
        _own_machine(folder / "site.toml", read(config)["machine"])
    intruder = _intruder(root / "deployment")

    # 2. The server in this process, each site in one of its own.
    server = root / "deployment" / "server" / "server.toml"
    jobs = [Job(one.config, one.folder(root / "sites")) for one in _served(server)]
    with _started(folders) as begin:

        def on_open() -> None:
            _show_refusal(intruder, say)
            begin()

        served = serve(
            jobs,
            say=say,
            on_progress=lambda job: on_progress(f"{job.config.label} on three sites"),
            on_open=on_open,
        )

    # 3. The same in one process, one client after another.
    say("the sites are told to end; now the same federation in one process")
    here = run_all(
        planned,
        root / "here",
        on_progress=lambda one: on_progress(f"{one.label} in one process"),
        on_warning=say,
        jobs=1,
    )
    _compare(planned, served, here, say)
    return served


def _served(server: Path) -> list[Planned]:
    """Return the runs that the server's settings plan."""
    state = {"server": {"state": str(server.parent / "server-state")}}
    return plan(merge(state, read(server), {"engine": {"kind": "sites"}}))


def _own_machine(path: Path, machine: dict[str, Any]) -> None:
    """Lay a section ``machine``, and the file of test texts, into a site's settings."""
    tree = tomllib.loads(path.read_text(encoding="utf-8"))
    tree["machine"] = machine
    if (path.parent / "test.jsonl").exists():
        tree["data"]["test"] = "test.jsonl"
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")


def _intruder(folder: Path) -> Path:
    """Write the settings of a fourth site, whose key nobody has registered; return their path."""
    copy = folder / "intruder"
    copy.mkdir()
    for name in ("ca.crt", "train.jsonl"):
        (copy / name).write_bytes((folder / "site-0" / name).read_bytes())
    tree = tomllib.loads((folder / "site-0" / "site.toml").read_text(encoding="utf-8"))
    tree["client"] = 3
    (copy / "site.toml").write_text(tomli_w.dumps(tree), encoding="utf-8")
    private, _ = site_key()
    write_secret(copy / "site.key", private)
    return copy / "site.toml"


def _show_refusal(settings: Path, say: Say) -> None:
    """Let the fourth site try to join, and tell what it is told; BadInput where it gets in."""
    command = [sys.executable, "-c", PROGRAM, "join", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 0:
        raise BadInput("the fourth site, whose key is not registered, has got in")
    lines = done.stderr.strip().splitlines()
    say(f"a fourth site, with a key that is not registered: {lines[-1] if lines else 'refused'}")


@contextmanager
def _started(folders: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Yield what starts a site for each folder; they end with the ``with``."""
    sites: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        for folder in folders:
            command = [sys.executable, "-c", PROGRAM, "join", str(folder / "site.toml")]
            with (folder / "site.log").open("wb") as log:
                sites.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    )
                )

    try:
        yield start
    finally:
        for site in sites:
            site.terminate()
        for site in sites:
            with suppress(subprocess.TimeoutExpired):
                site.wait(15.0)
            site.kill()


def state_digest(folder: Path) -> str:
    """Return the digest of a run's last state, as its checkpoint holds it."""
    path = max((folder / CHECKPOINTS).glob("*.state"))
    return digest(path.read_bytes()).hex()


def _compare(
    planned: Sequence[Planned], served: Sequence[Path], here: Sequence[Path], say: Say
) -> None:
    """Tell whether each run has ended in the same bits on sites and in one process."""
    for run, there, beside in zip(planned, served, here, strict=True):
        ends = state_digest(there), state_digest(beside)
        if ends[0] != ends[1]:
            raise BadInput(f"{run.label}: ends in {ends[0]} on sites, and in {ends[1]} here")
        say(f"{run.label}: the last state is {ends[0]} on sites and in one process: equal bits")
