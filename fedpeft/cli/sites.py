"""The commands of a federation on real machines: serve, join, trainer, flower-app."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.cli.interrupts import ended_as_interrupted, resume_all, resume_one, stoppable
from fedpeft.cli.options import Config, LogForm, NewFolder, Overwrite, Resume, Runs, Set, Site
from fedpeft.cli.output import out, say, write_report
from fedpeft.cli.progress import progress_bars


def serve(
    config: Config,
    methods: Annotated[
        str, typer.Option(help="Comma-separated: serve a run of each, one after another.")
    ] = "",
    settings: Set = [],
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
    resume: Resume = False,
    log: LogForm = "lines",
) -> None:
    """Be the server of a federation of sites, each of which runs `fedpeft join`."""
    from fedpeft.cli import parsing
    from fedpeft.engines.flower import private

    private.check(private.SERVER)
    from fedpeft.deployment.serve import job_of
    from fedpeft.experiment.compare import plan
    from fedpeft.experiment.config import from_tree, merge

    defaults = {"server": {"state": str((config.parent / "server-state").absolute())}}
    settled = {"engine": {"kind": "sites"}}
    tree = merge(defaults, parsing.settings(config, settings, say), settled)
    if not methods:
        chosen = from_tree(tree)
        jobs = [job_of(chosen, runs / chosen.name, resume=resume)]
        serve_jobs(jobs, runs / chosen.name / "report", overwrite, log)
        return
    named = {"compare": {"methods": parsing.names(methods)}}
    planned = plan(merge(tree, named))
    root = runs / f"{planned[0].config.name}-sites"
    jobs = [job_of(one.config, one.folder(root), resume=resume) for one in planned]
    serve_jobs(jobs, root / "report", overwrite, log)


def serve_jobs(
    jobs: Sequence[Any], report: Path, overwrite: bool = False, form: str = "lines"
) -> None:
    """Serve runs, with a bar or a line for each round, and report on them."""
    from fedpeft.cli.logs import log_of, round_lines
    from fedpeft.deployment.serve import serve

    def go_on() -> str:
        return resume_one(jobs[0].folder) if len(jobs) == 1 else resume_all()

    log = log_of(form, "serve", say)
    with stoppable(go_on), ended_as_interrupted():
        with progress_bars(out) as bars:
            # A log, and what is no terminal, get a line after each round instead of a bar.
            watch = bars if out.is_terminal and form == "lines" else round_lines(log.tell)
            folders = serve(
                jobs,
                overwrite=overwrite,
                say=log.say,
                on_progress=lambda job: watch(job.config.label or job.config.name),
                tell=log.tell,
            )
        write_report(folders, report, shown=form == "lines")


def join(site: Site, log: LogForm = "lines") -> None:
    """Be a site of a federation: train on data that stay here."""
    from fedpeft.engines.flower import private

    private.check(private.SITE)
    from fedpeft.cli.logs import log_of
    from fedpeft.deployment.join import join

    told = log_of(log, "join", say)
    join(site, told.say, told.tell)


def trainer(site: Site) -> None:
    """Be a site's trainer alone, for Flower's own `flower-supernode`."""
    from fedpeft.deployment.trainer import run_as_process

    run_as_process([str(site)])


def flower_app(folder: NewFolder) -> None:
    """Write the app for Flower's own `flwr run`: a kilobyte without code."""
    from fedpeft.engines.flower.app_folder import write_app

    write_app(folder)
    say(str(folder))
