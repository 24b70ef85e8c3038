"""The commands that prepare a federation of real machines: deploy init, key, check, carve, demo."""

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.interrupts import ended_as_interrupted, stoppable
from fedpeft.cli.options import Config, NewFolder, Overwrite, Runs, Site
from fedpeft.cli.output import out, say, write_report
from fedpeft.cli.progress import progress_bars
from fedpeft.errors import BadInput


def init(
    folder: NewFolder,
    sites: Annotated[int, typer.Option(min=1, max=10_000, help="How many sites there are.")] = 3,
    host: Annotated[str, typer.Option(help="The server's name or address.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The gate's port.")] = 9443,
    config: Annotated[
        Path | None,
        typer.Option(help="The TOML file of what was simulated.", show_default=False),
    ] = None,
) -> None:
    """Write keys, certificates and settings for a server and its sites."""
    from fedpeft.engines.flower import private

    private.check({})
    from fedpeft.deployment.init import Wanted, deploy_init

    for line in deploy_init(folder, Wanted(sites, host, port, config)):
        say(line)


def key(
    key: Annotated[Path, typer.Argument(help="Where the private key goes.", show_default=False)],
    public: Annotated[
        Path, typer.Argument(help="Where the public one goes, as site-3.pub.", show_default=False)
    ],
) -> None:
    """Write the key of one more site."""
    from fedpeft.engines.flower import private

    private.check({})
    from fedpeft.deployment.init import deploy_key

    for line in deploy_key(key, public):
        say(line)


def check(site: Site) -> None:
    """Look at all that could go wrong at a site, before anything is trained."""
    from fedpeft.engines.flower import private

    private.check(private.SITE)
    from fedpeft.deployment.preflight import preflight

    if failed := preflight(site, say):
        raise BadInput(f"{site}: {failed} of the checks failed")


def carve(
    config: Config,
    folder: Annotated[Path, typer.Argument(help="The folder of deploy init.", show_default=False)],
    clients: Annotated[int, typer.Option(min=1, help="How many sites there are.")] = 3,
) -> None:
    """Write what the clients of a simulation would hold as files of sites, for a trial."""
    from fedpeft.deployment.carving import carve
    from fedpeft.experiment.config import from_tree, merge, read

    chosen = from_tree(merge(read(config), {"partition": {"clients": clients}}))
    for site in carve(chosen, folder):
        say(f"{site / 'train.jsonl'}")


def demo(runs: Runs = Path("runs"), overwrite: Overwrite = False) -> None:
    """Try all of it on this machine: a server, three sites, and a fourth that is refused."""
    import shutil

    from fedpeft.engines.flower import private

    private.check(private.SERVER)
    from fedpeft.deployment.demo import demo

    root = runs / "deploy-demo"
    if root.exists() and not overwrite:
        raise BadInput(f"{root}: exists; give --overwrite")
    shutil.rmtree(root, ignore_errors=True)
    with stoppable(lambda: "start it again with --overwrite"), ended_as_interrupted():
        with progress_bars(out) as watch:
            folders = demo(root, say, watch)
        write_report(folders, root / "report")
