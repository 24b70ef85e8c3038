"""The command line: thin commands over the same functions that the Python API offers."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.cli.console import say, show_nearest
from fedpeft.cli.interrupts import (
    INTERRUPTED,
    Stopped,
    ended_as_interrupted,
    resume_all,
    resume_one,
    stoppable,
)
from fedpeft.cli.progress import progress_bars
from fedpeft.errors import BadInput

# Commands import what they need in their bodies: torch and transformers take seconds to load, and
# ``fedpeft --help`` is not to wait for them.
app = typer.Typer(
    name="fedpeft",
    help="Federated parameter-efficient fine-tuning of language models. "
    "Option --debug: show tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(emoji=False)
DEMOS = {"encoder": "demo.toml", "llm": "demo_llm.toml"}
"""The built-in comparisons: name -> file in the package."""

Config = Annotated[Path, typer.Argument(help="A TOML file.", show_default=False)]
Folder = Annotated[
    Path, typer.Argument(help="A run's folder, such as runs/mine.", show_default=False)
]
Set = Annotated[
    list[str], typer.Option("--set", help="Override a field: --set training.lr=0.003 (repeatable).")
]
Runs = Annotated[Path, typer.Option("--runs", help="Where run folders are kept.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace run folders that exist.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with run folders that exist.")]
Jobs = Annotated[
    int,
    typer.Option(
        min=0, help="Runs at once, each on its share of the cores; 0: as many as there are cores."
    ),
]
Target = Annotated[
    float | None,
    typer.Option(
        help="Score to reach in the runs' metric, shares as 0 to 1; default: 90 % of the median "
        "method's."
    ),
]
LogForm = Annotated[
    Literal["lines", "json"],
    typer.Option("--log", help="How what happens is written: lines for people, or JSON."),
]
Trials = Annotated[
    int | None, typer.Option(help="Trials of each method; default: 4.", show_default=False)
]
Bandwidth = Annotated[float, typer.Option(help="Modelled bandwidth of a client, bytes per second.")]

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""How torch's threads wait, which it reads when it is loaded.

Threads that spin for long stall each other when cores are shared; threads that never spin are slow
when they are not. 1000 turns are between the two: see ``docs/log.md``.
"""
DEBUG = "--debug"


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


def _say(line: str) -> None:
    say(line, out)


def _print_version(asked: bool) -> None:
    if asked:
        _say(f"fedpeft {version('fedpeft')}")
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


def _settings(config: Path, assignments: Sequence[str]) -> dict[str, Any]:
    """Return the settings in a TOML file with those of ``--set`` over them; old names are told."""
    from fedpeft.cli import parsing as arguments
    from fedpeft.experiment.config import renamed

    return renamed(arguments.tree(config, assignments), _say)


def _values(assignments: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values that a sweep tries for each field; old names are told."""
    from fedpeft.cli import parsing as arguments
    from fedpeft.experiment.config import name_today

    # An old and a new name of one field are one field, with the values of both.
    tried: dict[str, list[Any]] = {}
    for name, values in arguments.values(assignments).items():
        tried.setdefault(name_today(name, _say), []).extend(values)
    return tried


@app.command()
def run(
    config: Config, settings: Set = [], runs: Runs = Path("runs"), overwrite: Overwrite = False
) -> None:
    """Train one federation with one method."""
    from fedpeft.experiment.build import build
    from fedpeft.experiment.config import from_tree
    from fedpeft.experiment.run import check_learnt, run_from_start
    from fedpeft.experiment.run_folder import beginning

    chosen = from_tree(_settings(config, settings))
    folder = runs / chosen.name
    with stoppable(lambda: resume_one(folder)):
        # Claimed before the model is loaded: a folder that cannot be used is refused at once.
        with beginning(folder, overwrite=overwrite), progress_bars(out) as watch:
            federation = build(chosen)
            for note in federation.notes:
                _say(note)
            run_from_start(federation, folder, watch(chosen.name))
        _report([folder], folder / "report")
    check_learnt(folder)  # last, as the report is of use in any case


@app.command()
def resume(run: Folder) -> None:
    """Go on with a run after a crash, from its last whole checkpoint."""
    from fedpeft.experiment import run as runs

    if runs.read_settings(run)[0].engine.kind == "sites":
        from fedpeft.engines.flower import private

        private.check(private.SERVER)
        from fedpeft.deployment.serve import resumed

        _serve([resumed(run, _say)], run / "report")
        return
    with stoppable(lambda: resume_one(run)):
        with progress_bars(out) as watch:
            runs.resume(run, on_progress=watch(run.name), on_warning=_say)
        _report([run], run / "report")
    runs.check_learnt(run)


@app.command()
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
    from fedpeft.cli import parsing as arguments
    from fedpeft.engines.flower import private

    private.check(private.SERVER)
    from fedpeft.deployment.serve import job_of
    from fedpeft.experiment.compare import plan
    from fedpeft.experiment.config import from_tree, merge

    own = {"engine": {"kind": "sites"}}
    beside = {"server": {"state": str((config.parent / "server-state").absolute())}}
    tree = merge(beside, _settings(config, settings), own)
    if not methods:
        chosen = from_tree(tree)
        jobs = [job_of(chosen, runs / chosen.name, resume=resume)]
        _serve(jobs, runs / chosen.name / "report", overwrite, log)
        return
    named = {"compare": {"methods": arguments.names(methods)}}
    planned = plan(merge(tree, named))
    root = runs / f"{planned[0].config.name}-sites"
    jobs = [job_of(one.config, one.folder(root), resume=resume) for one in planned]
    _serve(jobs, root / "report", overwrite, log)


def _serve(jobs: Sequence[Any], report: Path, overwrite: bool = False, form: str = "lines") -> None:
    """Serve runs, with a bar or a line for each round, and report on them."""
    from fedpeft.cli.logs import log_of, round_lines
    from fedpeft.deployment.serve import serve

    def go_on() -> str:
        return resume_one(jobs[0].folder) if len(jobs) == 1 else resume_all()

    log = log_of(form, "serve", _say)
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
        _report(folders, report, shown=form == "lines")


@app.command()
def join(
    site: Annotated[Path, typer.Argument(help="The site's TOML file.", show_default=False)],
    log: LogForm = "lines",
) -> None:
    """Be a site of a federation: train on data that stay here."""
    from fedpeft.engines.flower import private

    private.check(private.SITE)
    from fedpeft.cli.logs import log_of
    from fedpeft.deployment.join import join

    told = log_of(log, "join", _say)
    join(site, told.say, told.tell)


@app.command()
def watch(run: Folder) -> None:
    """Follow a run that another process trains, here or on sites, until it ends."""
    from fedpeft.cli.watch import follow

    with ended_as_interrupted():
        follow(run, out)


@app.command()
def trainer(
    site: Annotated[Path, typer.Argument(help="The site's TOML file.", show_default=False)],
) -> None:
    """Be a site's trainer alone, for Flower's own `flower-supernode`."""
    from fedpeft.deployment.trainer import run_as_process

    run_as_process([str(site)])


@app.command("flower-app")
def flower_app(
    folder: Annotated[Path, typer.Argument(help="A folder to be made.", show_default=False)],
) -> None:
    """Write the app for Flower's own `flwr run`: a kilobyte without code."""
    from fedpeft.engines.flower.app_folder import write_app

    write_app(folder)
    _say(str(folder))


deploy = typer.Typer(help="Prepare a federation of real machines.", no_args_is_help=True)
app.add_typer(deploy, name="deploy")


@deploy.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(help="A folder to be made.", show_default=False)],
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
    from fedpeft.deployment.init import Wanted
    from fedpeft.deployment.init import deploy_init as write_all

    for line in write_all(folder, Wanted(sites, host, port, config)):
        _say(line)


@deploy.command("key")
def deploy_key(
    key: Annotated[Path, typer.Argument(help="Where the private key goes.", show_default=False)],
    public: Annotated[
        Path, typer.Argument(help="Where the public one goes, as site-3.pub.", show_default=False)
    ],
) -> None:
    """Write the key of one more site."""
    from fedpeft.engines.flower import private

    private.check({})
    from fedpeft.deployment.init import deploy_key as write_key

    for line in write_key(key, public):
        _say(line)


@deploy.command("check")
def deploy_check(
    site: Annotated[Path, typer.Argument(help="The site's TOML file.", show_default=False)],
) -> None:
    """Look at all that could go wrong at a site, before anything is trained."""
    from fedpeft.engines.flower import private

    private.check(private.SITE)
    from fedpeft.deployment.preflight import preflight

    if failed := preflight(site, _say):
        raise BadInput(f"{site}: {failed} of the checks failed")


@deploy.command("carve")
def deploy_carve(
    config: Config,
    folder: Annotated[Path, typer.Argument(help="The folder of deploy init.", show_default=False)],
    clients: Annotated[int, typer.Option(min=1, help="How many sites there are.")] = 3,
) -> None:
    """Write what the clients of a simulation would hold as files of sites, for a trial."""
    from fedpeft.deployment.carving import carve
    from fedpeft.experiment.config import from_tree, merge, read

    chosen = from_tree(merge(read(config), {"partition": {"clients": clients}}))
    for site in carve(chosen, folder):
        _say(f"{site / 'train.jsonl'}")


@deploy.command("demo")
def deploy_demo(runs: Runs = Path("runs"), overwrite: Overwrite = False) -> None:
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
            folders = demo(root, _say, watch)
        _report(folders, root / "report")


@app.command()
def compare(
    config: Annotated[
        Path | None,
        typer.Argument(help="A TOML file; default: the built-in demo.", show_default=False),
    ] = None,
    demo: Annotated[
        Literal["encoder", "llm"] | None,
        typer.Option(help="Which demo: MiniLM on docstrings (default), or SmolLM2 on functions."),
    ] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated, instead of compare.methods.")] = "",
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
    from fedpeft.cli import parsing as arguments
    from fedpeft.experiment.compare import metric_of, plan
    from fedpeft.experiment.config import merge
    from fedpeft.experiment.run_folder import refuse_existing, runs_in
    from fedpeft.report import Metric, check

    extra: list[str] = []  # what the options say, as assignments of ``--set``
    if methods:
        extra.append(f"compare.methods={arguments.names(methods)!r}")
    if seeds:
        extra.append(f"compare.seeds={arguments.seeds(seeds)}")
    if config and demo:
        raise BadInput(f"--demo {demo}: is run instead of a file; leave out {config}, or --demo")
    chosen = config or Path(str(files("fedpeft") / DEMOS[demo or "encoder"]))
    _check_tuning(tune, trials, rates)
    tree = _settings(chosen, [*extra, *settings])
    if rates:
        tree = merge(tree, {"compare": {"rates": str(rates)}})
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
    _report(folders, root / "report", target, bandwidth)
    # Earlier commands may have put runs of other methods or seeds beside these.
    if others := len(runs_in(root)) - len(folders):
        _say(f"{root} holds {others} more runs; for a report on all of them: fedpeft report {root}")


def _check_tuning(tune: bool, trials: int | None, rates: Path | None) -> None:
    """Raise BadInput for options of tuning that do not go together."""
    if tune and rates:
        raise BadInput(f"--rates {rates}: --tune picks rates of its own; leave out one of them")
    if trials is not None and not tune:
        raise BadInput(f"--trials {trials}: needs --tune")


@app.command("tune")
def tune_rates(
    config: Config,
    methods: Annotated[str, typer.Option(help="Comma-separated, instead of compare.methods.")] = "",
    trials: Trials = None,
    settings: Set = [],
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
    resume: Resume = False,
    jobs: Jobs = 0,
) -> None:
    """Pick the learning rate of every method, with equally many trials, on the validation split."""
    from fedpeft.cli import parsing as arguments

    extra = [f"compare.methods={arguments.names(methods)!r}"] if methods else []
    picked = _tune(_settings(config, [*extra, *settings]), trials, runs, overwrite, resume, jobs)
    _say(f"compare at these rates with: fedpeft compare {config} --rates {picked}")


def _tune(
    tree: dict[str, Any],
    trials: int | None,
    runs: Path,
    overwrite: bool,
    resume: bool,
    jobs: int,
) -> Path:
    """Pick rates, with a bar for each run, show them, and return their file."""
    from fedpeft.experiment.config import from_tree
    from fedpeft.experiment.rates import FILE
    from fedpeft.experiment.tuning import TRIALS, tune

    root = runs / f"{from_tree(tree).name}-tune"
    with stoppable(resume_all), progress_bars(out) as watch:
        rates = tune(
            tree,
            root,
            TRIALS if trials is None else trials,
            overwrite=overwrite,
            resume=resume,
            on_progress=lambda one: watch(f"{one.label}, until round {one.until}"),
            on_warning=_say,
            jobs=jobs,
        )
    table = Table("method", "picked", f"{rates.metric}", "trials", box=None)
    for label, picked in rates.rates.items():
        fields = [f"training.{name} = {value}" for name, value in picked.training.items()]
        fields += [f"method.{name} = {value}" for name, value in picked.method.items()]
        cells = (label, ", ".join(fields), f"{picked.score:.4g}", str(picked.trials))
        table.add_row(*(Text(cell) for cell in cells))
    _wide().print(table)
    return root / FILE


@app.command()
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
    from fedpeft.cli import parsing as arguments
    from fedpeft.experiment.compare import grid

    extra = [f"compare.methods={arguments.names(methods)!r}"] if methods else []
    planned = grid(_settings(config, [*extra, *settings]), _values(values), methods=bool(methods))
    root = runs / f"{planned[0].config.name}-sweep"
    folders = _run_all(planned, root, overwrite, resume, jobs)
    _report(folders, root / "report")


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
            on_warning=_say,
            jobs=jobs,
        )


@app.command()
def methods() -> None:
    """List the methods."""
    from fedpeft.methods import constructors

    table = Table("name", "what it does", "paper", box=None)
    for name, constructor in constructors().items():
        purpose = (constructor.__doc__ or "").splitlines()[0]  # a dataclass always has one
        table.add_row(Text(name), Text(purpose), Text(constructor.paper))
    _wide().print(table)


@app.command("config")
def explain(
    name: Annotated[
        str,
        typer.Argument(help="A section, such as training, or a method; default: all of them."),
    ] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As a page of Markdown: docs/config.md.")
    ] = False,
) -> None:
    """Explain the fields of a configuration: what they take, their defaults, what they mean."""
    from fedpeft.experiment import reference

    described = [reference.section(name)] if name else reference.sections()
    if markdown:
        typer.echo(reference.page(described), nl=False)
        return
    for one in described:
        table = Table("field", "takes", "default", "meaning", box=None)
        for field in one.fields:
            # As ``Text``, since rich takes brackets in plain strings for markup.
            takes, meaning = Text(field.takes), Text(field.meaning)
            table.add_row(Text(field.name), takes, Text(field.default), meaning)
        _wide().print(Text(f"{one.heading}\n{one.about}"), table, "")


@app.command()
def init(
    config: Annotated[Path, typer.Argument(help="The TOML file to write.", show_default=False)],
    train: Annotated[
        Path, typer.Option(help="The file of the training texts.", show_default=False)
    ],
    test: Annotated[
        Path | None, typer.Option(help="That of the test texts; default: a part of train.")
    ] = None,
    method: Annotated[str, typer.Option(help="The method's name.")] = "lora",
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, tagging, qa or causal_lm; default: told from the columns.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a short configuration for your own data, which runs as it is."""
    from fedpeft.experiment.starter import write_starter

    for line in write_starter(config, train=train, test=test, method=method, task=task):
        _say(line)


@app.command()
def partition(
    config: Config,
    settings: Set = [],
    png: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("partition.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print how unlike clients are, as JSON, and no more.")
    ] = False,
) -> None:
    """Show who holds what and how unlike clients are, as a table and a PNG."""
    from fedpeft.data import view as holdings
    from fedpeft.data.heterogeneity import heterogeneity
    from fedpeft.experiment.config import from_tree
    from fedpeft.experiment.reading import divide, read_data

    chosen = from_tree(_settings(config, settings))
    dataset = read_data(chosen)
    divided = divide(chosen, dataset)
    summary = heterogeneity(dataset, divided)
    if as_json:
        typer.echo(json.dumps(summary.to_json()))
        return
    holdings.picture(dataset, divided, png)
    lines = "\n".join(summary.lines())
    _wide().print(holdings.table(dataset, divided), Text(f"\n{lines}\n\n{png}"))
    for note in divided.notes:
        typer.echo(note)


@app.command()
def advise(
    config: Config,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; default: all that exchange anything.")
    ] = "",
    bandwidth: Annotated[
        str,
        typer.Option(
            help="A client's link, such as 10Mbit/s (plain: bytes per second), or what it may move "
            "in a round, such as 20MB.",
            show_default=False,
        ),
    ] = "",
    memory: Annotated[
        str,
        typer.Option(help="A client's memory, such as 4GB (plain: GB).", show_default=False),
    ] = "",
    deadline: Annotated[
        str,
        typer.Option(help="Time for a round, such as 30s (plain: seconds).", show_default=False),
    ] = "",
    settings: Set = [],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and no more.")] = False,
) -> None:
    """Show which methods fit: bytes, step time and memory here, and what is known of them."""
    from fedpeft.cli import parsing as arguments
    from fedpeft.cli.advice import told_on, view
    from fedpeft.experiment import advise as experiment
    from fedpeft.experiment.limits import limits

    bounds = limits(bandwidth, memory, deadline)
    chosen = arguments.names(methods) if methods else []
    with told_on(Console(stderr=True)) as on_method:
        advice = experiment.advise(_settings(config, settings), chosen, bounds, on_method)
    if as_json:
        typer.echo(json.dumps(advice.to_json()))
        return
    _wide().print(view(advice))


@app.command()
def export(
    run: Folder,
    folder: Annotated[Path, typer.Argument(help="A folder to be made.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole model with the adapters merged in.")
    ] = False,
) -> None:
    """Write what a run has learnt as a peft adapter, or merged as a transformers model."""
    from fedpeft.experiment.trained import open_run
    from fedpeft.models.export import refuse_existing

    refuse_existing(folder)  # before the model is loaded
    open_run(run, _say).export(folder, merge=merge)
    _say(str(folder))


@app.command()
def predict(
    run: Folder,
    texts: Annotated[list[str], typer.Argument(help="Texts.", show_default=False)],
    context: Annotated[
        str | None,
        typer.Option(
            help="The second text of each pair, or the one with the answers.", show_default=False
        ),
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="Also what the model said before it was tuned.")
    ] = False,
) -> None:
    """Answer texts with what a run has learnt: their labels, the names in them, or answers."""
    from fedpeft.experiment.trained import open_run
    from fedpeft.report.names import literal

    trained = open_run(run, _say)
    answers: Sequence[Any] = trained.predict(texts, context)  # named tuples
    columns, rows = [*answers[0]._fields], [[*answer] for answer in answers]
    if before:
        columns += [f"{name} before" for name in columns]
        earlier = trained.untuned().predict(texts, context)
        rows = [[*row, *answer] for row, answer in zip(rows, earlier, strict=True)]
    table = Table(box=None)
    for heading in (*columns, "text"):
        table.add_column(heading, overflow="fold")  # nothing of a long answer is cut off
    for text, row in zip(texts, rows, strict=True):
        cells: list[Text | str] = []
        for value in row:
            cells.append(f"{value:.3f}" if isinstance(value, float) else Text(literal(str(value))))
        table.add_row(*cells, Text(text))
    out.print(table)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders, or a folder of them.", show_default=False)
    ],
    to: Annotated[Path, typer.Option(help="Where CSV and PNG files go.")] = Path("report"),
    target: Target = None,
    bandwidth: Bandwidth = 1e6,
) -> None:
    """Report on runs: tables here; CSV and PNG files in a folder."""
    from fedpeft.experiment.run_folder import runs_in

    runs: list[Path] = []
    for folder in folders:
        runs += runs_in(folder)
    _report(runs, to, target, bandwidth)


def _report(
    folders: Sequence[Path],
    to: Path,
    target: float | None = None,
    bandwidth: float = 1e6,
    *,
    shown: bool = True,
) -> None:
    """Write the files of the report on ``folders``, the figures only with matplotlib.

    ``shown``: whether it is printed, too.
    """
    from importlib.util import find_spec

    from fedpeft.report import write

    plots = find_spec("matplotlib") is not None
    tables = write(folders, to, target=target, bandwidth=bandwidth, plots=plots)
    if shown:
        _wide().print(tables)


def _wide() -> Console:
    """Return a console wide enough for the tables, also where there is no terminal."""
    return Console(width=max(out.width, 120), emoji=False)  # the tables are made for that
