"""``fedpeft watch``: a run under way in the terminal, or a line a round where there is none."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedpeft.cli.output import say
from fedpeft.experiment.run_folder import check_is_run
from fedpeft.experiment.watching import Stage, Standing, Traffic, Watch

OFTEN: Final = 0.5
"""Seconds between two looks at the folder."""
ROWS: Final = 20
"""Clients that are listed at most."""


def follow(folder: Path, out: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show where the run in ``folder`` stands until it ends, or until Ctrl-C.

    On a terminal that is a table that is kept up to date, elsewhere a line after each round.
    ``sleep`` is called between two looks. BadInput where the folder holds no run, and none that
    waits to begin.
    """
    watch = Watch(folder)
    standing = watch.look()
    if standing.stage is not Stage.WAITING:
        check_is_run(folder)
    try:
        if out.is_terminal:
            _in_place(watch, standing, out, sleep)
        else:
            _line_by_line(watch, standing, out, sleep)
    except KeyboardInterrupt:
        return  # the watcher leaves; the run goes on


def _in_place(
    watch: Watch, standing: Standing, out: Console, sleep: Callable[[float], None]
) -> None:
    with Live(screen_of(standing), console=out, auto_refresh=False) as live:
        while standing.stage in (Stage.WAITING, Stage.RUNNING):
            sleep(OFTEN)
            standing = watch.look()
            live.update(screen_of(standing), refresh=True)


def _line_by_line(
    watch: Watch, standing: Standing, out: Console, sleep: Callable[[float], None]
) -> None:
    told = ""
    while True:
        key = f"{standing.stage} {standing.done}"
        if key != told:
            say(line_of(standing), out)
            told = key
        if standing.stage not in (Stage.WAITING, Stage.RUNNING):
            return
        sleep(OFTEN)
        standing = watch.look()


def line_of(standing: Standing) -> str:
    """Return where a run stands in one line."""
    total = standing.summed.total
    parts = [
        f"{standing.folder.name}: round {standing.done} of {standing.rounds or '?'}",
        _score(standing),
        f"down {_size(total.down)}",
        f"up {_size(total.up)}",
        f"{total.replied} replies, {_lost(total)}",
        _sites(standing),
        _time(standing),
        "" if standing.stage is Stage.RUNNING else standing.stage.value,
    ]
    return ", ".join(part for part in parts if part)


def screen_of(standing: Standing) -> RenderableType:
    """Return where a run stands as it is shown on a terminal."""
    run, total = standing.summed.run, standing.summed.total
    about = f"{run.method} on {run.clients} clients" if run else "not begun yet"
    head = Text(f"{standing.folder}  {about}  {standing.stage.value}")
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(f"round {standing.done} of {standing.rounds or '?'}"),
        ProgressBar(total=standing.rounds, completed=standing.done, width=30),
        Text(_time(standing)),
    )
    parts: list[RenderableType] = [head, bar]
    if score := _score(standing):
        parts.append(Text(score))
    traffic = f"down {_size(total.down)}  up {_size(total.up)}"
    parts.append(Text(f"{traffic}  {total.replied} replies, {_lost(total)}"))
    if sites := _sites(standing):
        parts.append(Text(sites))
    if standing.summed.clients or standing.now:
        parts.append(_clients(standing))
    return Group(*parts)


def _clients(standing: Standing) -> Table:
    """Return a table of clients: those that matter now first, ``ROWS`` of them at most."""
    table = Table("client", "now", "last", "replies", "lost", "down", "up", box=None)
    summed, now = standing.summed, standing.now
    live = now if now and standing.stage is Stage.RUNNING else None
    shown: Iterable[int] = summed.clients
    if live:
        shown = [*live.asked, *live.online, *summed.clients]
    # Those that were in the last exchange, or are in this one, before all others.
    of_now = (live.asked if live else frozenset()) | summed.latest.keys()
    order = sorted(set(shown), key=lambda client: (client not in of_now, client))
    for client in order[:ROWS]:
        total = summed.clients.get(client, Traffic())
        last = summed.latest.get(client)
        what = "" if last is None else f"lost: {last.lost}" if last.lost else "replied"
        state = ""
        if live:
            state = "online" if client in live.online else "away"
            # The ledger has an exchange as a whole, when it is over; here it is as it goes.
            for name, of in (("at work", live.asked), ("replied", live.replied)):
                state = name if client in of else state
            state = "lost" if client in live.lost else state
        table.add_row(
            str(client),
            Text(state),
            Text(what[:60]),
            str(total.replied),
            str(total.lost),
            _size(total.down),
            _size(total.up),
        )
    if len(order) > ROWS:
        table.add_row("...", Text(f"{len(order) - ROWS} more"), "", "", "", "", "")
    return table


def _score(standing: Standing) -> str:
    """Return the last score and the best; empty before there is one."""
    if standing.metric is None or standing.summed.score is None:
        return ""
    name, value = standing.metric
    best = standing.summed.best
    said = f"{name} {value:.3f} after round {standing.summed.score.round}"
    return said if best is None or best == value else f"{said} (best {best:.3f})"


def _lost(total: Traffic) -> str:
    return f"{total.lost} lost" + (f" ({total.late} late)" if total.late else "")


def _sites(standing: Standing) -> str:
    """Return how many sites are online, and what became of those asked; empty elsewhere."""
    now = standing.now
    if now is None or standing.stage is not Stage.RUNNING:
        return ""
    waited_for = len(now.asked - now.replied - now.lost)
    return f"{len(now.online)} sites online, {waited_for} at work"


def _time(standing: Standing) -> str:
    """Return the pace and the time that is left; empty while they are not known."""
    if standing.pace is None or standing.stage is not Stage.RUNNING:
        return ""
    left = "" if standing.left is None else f", {_span(standing.left)} left"
    return f"{standing.pace:.3g} s a round{left}"


def _span(seconds: float) -> str:
    """Return a length of time to read.

    >>> _span(59.6), _span(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _size(count: int) -> str:
    """Return a number of bytes to read.

    >>> _size(999), _size(1_234_567), _size(2_500_000_000)
    ('999 B', '1.2 MB', '2.5 GB')
    """
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    for unit, size in units:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
