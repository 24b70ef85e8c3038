"""The command line: thin commands over the same functions that the Python API offers."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Annotated, Final

import typer
from rich.console import Console

from fedpeft.cli import deploy, preparing, results, running, sites
from fedpeft.cli.console import show_nearest
from fedpeft.cli.interrupts import INTERRUPTED, Stopped
from fedpeft.cli.output import say
from fedpeft.errors import BadInput

# Commands import what they need in their bodies, and their modules nothing else: torch and
# transformers take seconds to load, and ``fedpeft --help`` is not to wait for them.
COMMANDS: Final[Mapping[str, Callable[..., None]]] = {
    "run": running.run,
    "resume": running.resume,
    "serve": sites.serve,
    "join": sites.join,
    "watch": results.watch,
    "trainer": sites.trainer,
    "flower-app": sites.flower_app,
    "compare": running.compare,
    "tune": running.tune_rates,
    "sweep": running.sweep,
    "methods": preparing.methods,
    "config": preparing.explain,
    "init": preparing.init,
    "partition": preparing.partition,
    "advise": preparing.advise,
    "export": results.export,
    "predict": results.predict,
    "report": results.report,
}
"""The commands, in the order in which ``fedpeft --help`` lists them."""

DEPLOY_COMMANDS: Final[Mapping[str, Callable[..., None]]] = {
    "init": deploy.init,
    "key": deploy.key,
    "check": deploy.check,
    "carve": deploy.carve,
    "demo": deploy.demo,
}
"""Those of ``fedpeft deploy``, in the order of its help."""

WAITING: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""How torch's threads wait, which it reads when it is loaded.

Threads that spin for long stall each other when cores are shared; threads that never spin are slow
when they are not. 1000 turns are between the two: see ``docs/log.md``.
"""
DEBUG: Final = "--debug"

app = typer.Typer(
    name="fedpeft",
    help="Federated parameter-efficient fine-tuning of language models. "
    "Option --debug: show tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)

deploy_app = typer.Typer(help="Prepare a federation of real machines.", no_args_is_help=True)
for name, command in DEPLOY_COMMANDS.items():
    deploy_app.command(name)(command)
app.add_typer(deploy_app, name="deploy")


def main() -> None:
    """Run the command line.

    Bad input ends it with one line and exit code 2, Ctrl-C with one line and exit code 130. With
    ``--debug`` anywhere, the traceback of bad input is shown too.
    """
    # No module above imports torch, so this is early enough; the user's own choice goes first.
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    show_nearest(sys.stdout, sys.stderr)
    # Taken out here, so that it may stand anywhere, also after a command.
    debug = DEBUG in sys.argv
    sys.argv = [word for word in sys.argv if word != DEBUG]
    try:
        app()
    except BadInput as error:
        if debug:
            traceback.print_exception(error)
        say(f"fedpeft: {error}", Console(stderr=True))
        sys.exit(2)
    except Stopped as stopped:
        say(f"fedpeft: {stopped}", Console(stderr=True))
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Ctrl-C where nothing can be gone on with: typer says nothing
            say("fedpeft: stopped", Console(stderr=True))
        raise


def _print_version(asked: bool) -> None:
    if asked:
        say(f"fedpeft {version('fedpeft')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""
