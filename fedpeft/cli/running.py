"""The commands that train: run, resume, compare, tune, sweep."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.table import Table
from rich.text import Text

from fedpeft.cli.interrupts import resume_all, resume_one, stoppable
from fedpeft.cli.options import (
    Bandwidth,
    Config,
    Folder,
    Jobs,
    Methods,
    Overwrite,
    Resume,
    Runs,
    Set,
    Target,
    Trials,
)
from fedpeft.cli.output import out, say, wide, write_report
from fedpeft.cli.progress import progress_bars
from fedpeft.cli.sites import serve_jobs
from fedpeft.errors import BadInput

DEMOS: Final = {"encoder": "demo.toml", "llm": "demo_llm.toml"}
"""The built-in comparisons: name -> file in the package."""


def run(
    config: Config, settings: Set = [], runs: Runs = Path("runs"), overwrite: Overwrite = False
) -> None:
    """Train one federation with one method."""
    from fedpeft.cli import parsing
    from fedpeft.experiment.build import build
    from fedpeft.experiment.config import from_tree
    from fedpeft.experiment.run import check_learnt, run_from_start
    from fedpeft.experiment.run_folder import beginning

    chosen = from_tree(parsing.settings(config, settings, say))
    folder = runs / chosen.name
    with stoppable(lambda: resume_one(folder)):
        # Claimed before the model is loaded: a folder that cannot be used is refused at once.
        with beginning(folder, overwrite=overwrite), progress_bars(out) as watch:
            federation = build(chosen)
            for note in federation.notes:
                say(note)
            run_from_start(federation, folder, watch(chosen.name))
        write_report([folder], folder / "report")
    check_learnt(folder)  # last, as the report is of use in any case


def resume(run: Folder) -> None:
    """Go on with a run after a crash, from its last whole checkpoint."""
    from fedpeft.experiment import run as runs

    if runs.read_settings(run)[0].engine.kind == "sites":
        from fedpeft.engines.flower import private

        private.check(private.SERVER)
        from fedpeft.deployment.serve import resumed

        serve_jobs([resumed(run, say)], run / "report")
        return
    with stoppable(lambda: resume_one(run)):
        with progress_bars(out) as watch:
            runs.resume(run, on_progress=watch(run.name), on_warning=say)
        write_report([run], run / "report")
    runs.check_learnt(run)


def compare(
    config: Annotated[
        Path | None,
        typer.Argument(help="A TOML file; default: the built-in demo.", show_default=False),
    ] = None,
    demo: Annotated[
        Literal["encoder", "llm"] | None,
        typer.Option(help="Which demo: MiniLM on docstrings (default), or SmolLM2 on functions."),
    ] = None,
    methods: Methods = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated, instead of compare.seeds.")] = "",
    rates: Annotated[
        Path | None, typer.Option(help="What tune has picked, instead of compare.rates.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Pick the rates first, as tune does.")
    ] = False,
    trials: Trials = None,
    settings: Set = [],
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
    resume: Resume = False,
    jobs: Jobs = 0,
    target: Target = None,
    bandwidth: Bandwidth = 1e6,
) -> None:
    """Train the same federation with several methods and seeds, and report on them side by side."""
    from fedpeft.cli import parsing
    from fedpeft.experiment.compare import metric_of, plan
    from fedpeft.experiment.config import merge
    from fedpeft.experiment.run_folder import refuse_existing, runs_in
    from fedpeft.experiment.tuning import rates_file, tuning_folder, without_own_rates
    from fedpeft.report import Metric, check

    compared = parsing.compared(methods, seeds)
    if config and demo:
        raise BadInput(f"--demo {demo}: is run instead of a file; leave out {config}, or --demo")
    chosen = config or Path(str(files("fedpeft") / DEMOS[demo or "encoder"]))
    _check_tuning(tune, trials, rates)
    tree: Mapping[str, Any] = parsing.settings(chosen, [*compared, *settings], say)
    if rates:
        tree = merge(tree, {"compare": {"rates": str(rates)}})
    if tune:
        tree = without_own_rates(tree, rates_file(tuning_folder(tree, runs)))
    planned = plan(tree)
    metric = metric_of(planned[0].config)
    # Before hours of training, not after.
    check(target, bandwidth, Metric(metric.name, metric.higher_is_better, metric.share))
    root = runs / f"{planned[0].config.name}-compare"
    if tune:
        if not resume:  # otherwise these would be refused after the trials
            for one in planned:
                refuse_existing(one.folder(root), overwrite)
        picked = _tune(tree, trials, runs, overwrite, resume, jobs)
        planned = plan(merge(tree, {"compare": {"rates": str(picked)}}))
    folders = _run_all(planned, root, overwrite, resume, jobs)
    write_report(folders, root / "report", target, bandwidth)
    # Earlier commands may have put runs of other methods or seeds beside these.
    if others := len(runs_in(root)) - len(folders):
        say(f"{root} holds {others} more runs; for a report on all of them: fedpeft report {root}")


def _check_tuning(tune: bool, trials: int | None, rates: Path | None) -> None:
    """Raise BadInput for options of tuning that do not go together."""
    if tune and rates:
        raise BadInput(f"--rates {rates}: --tune picks rates of its own; leave out one of them")
    if trials is not None and not tune:
        raise BadInput(f"--trials {trials}: needs --tune")


def tune_rates(
    config: Config,
    methods: Methods = "",
    trials: Trials = None,
    settings: Set = [],
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
    resume: Resume = False,
    jobs: Jobs = 0,
) -> None:
    """Pick the learning rate of every method, with equally many trials, on the validation split."""
    from fedpeft.cli import parsing

    tree = parsing.settings(config, [*parsing.compared(methods), *settings], say)
    picked = _tune(tree, trials, runs, overwrite, resume, jobs)
    say(f"compare at these rates with: fedpeft compare {config} --rates {picked}")


def _tune(
    tree: Mapping[str, Any],
    trials: int | None,
    runs: Path,
    overwrite: bool,
    resume: bool,
    jobs: int,
) -> Path:
    """Pick rates, with a bar for each run, show them, and return their file."""
    from fedpeft.experiment.tuning import TRIALS, rates_file, tune, tuning_folder

    root = tuning_folder(tree, runs)
    with stoppable(resume_all), progress_bars(out) as watch:
        rates = tune(
            tree,
            root,
            TRIALS if trials is None else trials,
            overwrite=overwrite,
            resume=resume,
            on_progress=lambda one: watch(f"{one.label}, until round {one.until}"),
            on_warning=say,
            jobs=jobs,
        )
    table = Table("method", "picked", f"{rates.metric}", "trials", box=None)
    for label, picked in rates.rates.items():
        fields = [f"training.{name} = {value}" for name, value in picked.training.items()]
        fields += [f"method.{name} = {value}" for name, value in picked.method.items()]
        cells = (label, ", ".join(fields), f"{picked.score:.4g}", str(picked.trials))
        table.add_row(*(Text(cell) for cell in cells))
    wide().print(table)
    return rates_file(root)


def sweep(
    config: Config,
    values: Annotated[
        list[str], typer.Argument(help="training.lr=1e-3,3e-3 ... (every combination is run)")
    ],
    methods: Annotated[
        str, typer.Option(help="Comma-separated: sweep each of these methods of the comparison.")
    ] = "",
    settings: Set = [],
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
    resume: Resume = False,
    jobs: Jobs = 0,
) -> None:
    """Try values of fields, scored on the validation split."""
    from fedpeft.cli import parsing
    from fedpeft.experiment.compare import grid

    tree = parsing.settings(config, [*parsing.compared(methods), *settings], say)
    planned = grid(tree, parsing.tried(values, say), methods=bool(methods))
    root = runs / f"{planned[0].config.name}-sweep"
    folders = _run_all(planned, root, overwrite, resume, jobs)
    write_report(folders, root / "report")


def _run_all(
    planned: Sequence[Any], root: Path, overwrite: bool, resume: bool, jobs: int
) -> list[Path]:
    """Train many planned runs, with a bar for each, and return their folders."""
    from fedpeft.experiment.batch import run_all

    with stoppable(resume_all), progress_bars(out) as watch:
        return run_all(
            planned,
            root,
            overwrite=overwrite,
            resume=resume,
            on_progress=lambda one: watch(f"{one.label}, seed {one.config.seed}"),
            on_warning=say,
            jobs=jobs,
        )
