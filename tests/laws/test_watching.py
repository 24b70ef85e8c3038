"""What a watcher says of a run is what its ledger says, at every moment of it; and no watcher is in the run's way."""

import io
import json
import os
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from fedpeft.cli.logs import log_of, round_lines
from fedpeft.cli.watch import follow, line_of
from fedpeft.deployment.metrics import metrics_endpoint
from fedpeft.deployment.now import Announced
from fedpeft.deployment.telling import JsonLog
from fedpeft.errors import BadInput
from fedpeft.experiment.claim import claimed, is_written
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG, Progress
from fedpeft.experiment.run_folder import NOW
from fedpeft.experiment.watching import Now, Stage, Standing, Traffic, Watch, read_now
from fedpeft.federation.checkpoint import manifest
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, Follower, Ledger, Measured, Row, read
from fedpeft.ledger.file import row_of
from fedpeft.types import Client, Lost, Reply
from tests.laws.test_ledger import RUN

ROUNDS = 4
FIGURES = Measured(examples=5, steps=2, trained=9, loss=0.25, seconds=1.5, seconds_alone=2.5)


def rows_of(round_number: int) -> list[Row]:
    """Return a round of three clients, of which one is late, one is lost, and who that is turns; then a score."""
    reasons = [None, "no answer within 5 s", "the answer is empty"]
    rows: list[Row] = []
    for client in range(3):
        lost = reasons[(client + round_number) % 3]
        up = 0 if lost else 70 + client
        rows.append(
            ClientRow(
                round=round_number, client=client, down=100, up=up, measured=FIGURES, lost=lost
            )
        )
    rows.append(
        EvaluationRow(
            round=round_number + 1,
            split="test",
            examples=4,
            metrics={"accuracy": 0.5 - 0.1 * abs(2 - round_number), "loss": 1.0},
        )
    )
    return rows


@dataclass
class Growing:
    """A run's folder that grows by a round at a time, as the recorder writes it."""

    folder: Path
    done: int = 0
    lengths: list[int] = field(default_factory=list)

    def begin(self) -> None:
        (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (self.folder / CONFIG).write_text("{}")
        self.done = 0
        with Ledger(self.folder / FILE) as ledger:
            ledger.append(replace(RUN, rounds=ROUNDS))
            self.lengths = [ledger.sync()]
        self._checkpoint()

    def grow(self, *_: float) -> None:
        """Play a round."""
        with Ledger(self.folder / FILE) as ledger:
            for row in rows_of(self.done):
                ledger.append(row)
            self.lengths.append(ledger.sync())
        self.done += 1
        self._checkpoint()

    def resume_at(self, done: int) -> None:
        """Cut the ledger back to the checkpoint after so many rounds, as a run that is resumed does."""
        with Ledger(self.folder / FILE) as ledger:
            ledger.cut(self.lengths[done])
        for later in range(done + 1, self.done + 1):
            manifest(self.folder / CHECKPOINTS, later).unlink()
        del self.lengths[done + 1 :]
        self.done = done

    def _checkpoint(self) -> None:
        path = manifest(self.folder / CHECKPOINTS, self.done)
        path.write_text("{}")
        os.utime(path, (1000.0 + 8 * self.done, 1000.0 + 8 * self.done))  # 8 s a round
        if self.done > 1:
            manifest(self.folder / CHECKPOINTS, self.done - 2).unlink(missing_ok=True)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Growing]:
    """A run under way, whose folder this process has claimed."""
    growing = Growing(tmp_path / "mine")
    with claimed(growing.folder):
        growing.begin()
        yield growing


def reference(folder: Path) -> dict[str, int]:
    """Return the sums of a run's ledger, read as a whole."""
    rows = [row for row in read(folder / FILE) if isinstance(row, ClientRow)]
    late = sum("no answer within" in (row.lost or "") for row in rows)
    return {
        "replied": sum(row.lost is None for row in rows),
        "lost": sum(row.lost is not None for row in rows),
        "late": late,
        "down": sum(row.down for row in rows),
        "up": sum(row.up for row in rows),
    }


def assert_as_the_ledger(standing: Standing) -> None:
    total = vars(standing.summed.total)
    assert total == reference(standing.folder)
    each = [vars(one) for one in standing.summed.clients.values()]
    assert {name: sum(one[name] for one in each) for name in total} in (total, vars(Traffic()))


@settings(deadline=None, max_examples=60)
@given(pieces=st.lists(st.integers(1, 400), max_size=30), cut=st.integers(0, ROUNDS))
def test_a_ledger_that_grows_by_any_pieces_is_read_once_and_whole(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int], cut: int
) -> None:
    whole = Growing(tmp_path_factory.mktemp("whole"))
    whole.begin()
    while whole.done < ROUNDS:
        whole.grow()
    content = (whole.folder / FILE).read_bytes()
    path = whole.folder / "growing.jsonl"
    follower = Follower(path)
    seen: list[Row] = []
    forgotten: list[int] = []

    def forget() -> None:
        forgotten.append(len(seen))
        seen.clear()

    follower.look(seen.append, forget)  # there is no file yet
    at = 0
    for piece in [*pieces, len(content)]:
        with path.open("ab") as file:
            file.write(content[at : at + piece])
        at += piece
        follower.look(seen.append, forget)
        assert seen == read(path)
    assert not forgotten
    # A run that goes on from an earlier checkpoint writes other rows there.
    os.truncate(path, whole.lengths[cut])
    with Ledger(path) as ledger:
        for row in rows_of(7) * (ROUNDS + 1):
            ledger.append(row)
    follower.look(seen.append, forget)
    assert seen == read(path)
    path.unlink()
    follower.look(seen.append, forget)
    assert seen == []


def test_a_ledger_is_not_read_twice(run: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[int] = []

    def counted(path: Path, number: int, line: bytes) -> Row:
        lines.append(number)
        return row_of(path, number, line)

    monkeypatch.setattr("fedpeft.ledger.follow.row_of", counted)
    watch = Watch(run.folder)
    for _ in range(ROUNDS):
        run.grow()
        watch.look()
        watch.look()
    assert lines == list(range(1, len(read(run.folder / FILE)) + 1))


def test_a_damaged_line_is_named_and_half_a_line_is_waited_for(run: Growing) -> None:
    watch = Watch(run.folder)
    with (run.folder / FILE).open("ab") as file:
        file.write(b'{"kind":"client","rou')
    assert watch.look().summed.total.down == 0
    with (run.folder / FILE).open("ab") as file:
        file.write(b'nd":0,"client":1,"down":5,"up":6}\n' + b"[" * 100_000 + b"\n")
    with pytest.raises(BadInput, match="line 3"):
        watch.look()
    assert watch.look().summed.total.down == 5


def test_at_every_moment_the_sums_are_those_of_the_ledger(run: Growing) -> None:
    watch = Watch(run.folder)
    while run.done < ROUNDS:
        standing = watch.look()
        assert (standing.stage, standing.done, standing.rounds) == (Stage.RUNNING, run.done, ROUNDS)
        assert_as_the_ledger(standing)
        if run.done:
            assert standing.pace == standing.round_seconds == 8.0
            assert standing.left == 8.0 * (ROUNDS - run.done)
            assert {row.client for row in standing.summed.latest.values()} == {0, 1, 2}
            assert all(row.round == run.done - 1 for row in standing.summed.latest.values())
        run.grow()
    standing = watch.look()
    assert (standing.stage, standing.left) == (Stage.FINISHED, 0.0)
    assert standing.metric == ("accuracy", 0.4)
    assert standing.summed.best == 0.5
    assert_as_the_ledger(standing)


def test_a_run_that_is_resumed_or_begun_anew_is_followed(run: Growing) -> None:
    watch = Watch(run.folder)
    for _ in range(3):
        run.grow()
        watch.look()
    run.resume_at(2)
    assert_as_the_ledger(watch.look())
    run.grow()
    run.grow()
    standing = watch.look()
    assert standing.stage is Stage.FINISHED
    assert_as_the_ledger(standing)
    (run.folder / FILE).unlink()
    for path in (run.folder / CHECKPOINTS).iterdir():
        path.unlink()
    run.begin()
    run.grow()
    standing = watch.look()
    assert (standing.stage, standing.done) == (Stage.RUNNING, 1)
    assert_as_the_ledger(standing)


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, emoji=False), out


def never(_: float) -> None:
    """Be slept in by nobody: the run is over."""
    pytest.fail("waited for a run that is over")


def test_where_there_is_no_terminal_each_round_is_a_line_and_the_last_one_ends_it(
    run: Growing,
) -> None:
    plain, out = console(terminal=False)
    follow(run.folder, plain, run.grow)
    lines = out.getvalue().splitlines()
    assert len(lines) == ROUNDS + 1
    for done, line in enumerate(lines):
        assert f"mine: round {done} of {ROUNDS}" in line
    assert lines[2].endswith(
        "down 600 B, up 142 B, 2 replies, 4 lost (2 late), 8 s a round, 0:16 left"
    )
    assert "accuracy 0.400 after round 4 (best 0.500)" in lines[-1]
    assert lines[-1].endswith("finished")
    assert "\x1b" not in out.getvalue()
    follow(run.folder, plain, never)  # a run that is over is told at once
    assert out.getvalue().splitlines()[-1] == lines[-1]


def test_on_a_terminal_a_table_is_kept_up_to_date_and_the_cursor_comes_back(run: Growing) -> None:
    terminal, out = console(terminal=True)
    (run.folder / NOW).write_text(
        Now(frozenset({0, 1, 5}), frozenset({0, 1}), frozenset({0})).to_json()
    )
    follow(run.folder, terminal, run.grow)
    text = out.getvalue()
    for needle in (
        "3 sites online, 1 at work",
        "lost: the answer is empty",
        "finished",
        "8 s a round",
    ):
        assert needle in text
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_the_watch_and_nothing_else(run: Growing, terminal: bool) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    shown, out = console(terminal=terminal)
    follow(run.folder, shown, interrupt)
    assert "Traceback" not in out.getvalue()
    run.grow()


def test_a_run_whose_process_has_ended_early_is_told_and_left(tmp_path: Path) -> None:
    growing = Growing(tmp_path / "mine")
    plain, out = console(terminal=False)
    with claimed(growing.folder):
        assert is_written(growing.folder)
        assert Watch(growing.folder).look().stage is Stage.WAITING
        growing.begin()
        growing.grow()
    assert not is_written(growing.folder)
    follow(growing.folder, plain, never)
    assert out.getvalue().strip().endswith("stopped")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no run"):
        follow(tmp_path / "none", console(terminal=False)[0], never)


def test_a_look_is_in_no_writers_way(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for _ in range(3):
        assert not is_written(folder)
        with claimed(folder):
            assert is_written(folder)
            assert Watch(folder).look().stage is Stage.WAITING


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"online": 5}', "[" * 100_000, '{"online": [true, -1, "x"]}']
)
def test_what_is_no_word_of_now_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / NOW).write_text(content)
    assert read_now(tmp_path) in (None, Now())


@given(st.frozensets(st.integers(0, 2**31 - 1)), st.frozensets(st.integers(0, 2**31 - 1)))
def test_a_word_of_now_reads_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, one: frozenset[int], other: frozenset[int]
) -> None:
    now = Now(online=one, asked=other, replied=one, lost=other)
    (tmp_path_factory.getbasetemp() / NOW).write_text(now.to_json())
    assert read_now(tmp_path_factory.getbasetemp()) == now


def test_the_server_says_who_is_there_and_who_has_answered_as_it_happens(tmp_path: Path) -> None:
    clients = [Client(number) for number in range(3)]
    nodes = SimpleNamespace(online=lambda: [0, 1, 2, 9], on_look=None)
    seen: list[Now | None] = []

    def exchange(
        asked: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        for client in asked:
            request(client)
        announced._when = 0.0
        nodes.on_look()
        seen.append(read_now(tmp_path))
        announced._when = 0.0
        yield Reply(clients[1], b"")
        seen.append(read_now(tmp_path))
        yield Lost(clients[0], "away")
        yield Reply(clients[2], b"")

    engine: Any = SimpleNamespace(nodes=nodes, exchange=exchange)
    announced = Announced(engine, tmp_path)
    outcomes = list(announced.exchange(clients, lambda _: b"x"))
    online, asked = frozenset({0, 1, 2, 9}), frozenset({0, 1, 2})
    assert [type(one) for one in outcomes] == [Reply, Lost, Reply]
    assert seen == [Now(online, asked), Now(online, asked, frozenset({1}))]
    assert read_now(tmp_path) == Now(online, asked, frozenset({1, 2}), frozenset({0}))
    # The next exchange begins with nobody asked; a folder that is gone ends no run.
    announced.folder = tmp_path / "gone"
    assert len(list(announced.exchange(clients[:1], lambda _: b"x"))) == 3


@contextmanager
def scraped(folders: Sequence[Path], faults: list[str]) -> Iterator[Callable[[], dict[Any, float]]]:
    """Yield what asks ``/metrics`` and returns value by (name, labels)."""
    with metrics_endpoint(0, folders, faults.append) as port:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def ask() -> dict[Any, float]:
            with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
                assert response.headers["Content-Type"].startswith("text/plain")
                text = response.read().decode()
            values: dict[Any, float] = {}
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = tuple(sorted(sample.labels.items()))
                    values[sample.name, *(value for _, value in labels)] = sample.value
            return values

        yield ask


def test_metrics_are_the_sums_of_the_ledger_at_every_moment(run: Growing, tmp_path: Path) -> None:
    other = Growing(tmp_path / "other")
    faults: list[str] = []
    (run.folder / NOW).write_text(Now(online=frozenset({0, 2})).to_json())
    with scraped([run.folder, other.folder], faults) as ask:
        assert {name for _, name, *_ in ask()} == {"mine"} | {
            "accepted",
            "lost",
            "late",
            "down",
            "up",
        }
        other.begin()
        for _ in range(ROUNDS):
            run.grow()
            values, sums = ask(), reference(run.folder)
            assert values["fedpeft_rounds_total", "mine"] == run.done
            assert values["fedpeft_rounds_planned", "mine"] == ROUNDS
            assert values["fedpeft_replies_total", "accepted", "mine"] == sums["replied"]
            assert values["fedpeft_replies_total", "late", "mine"] == sums["late"]
            assert values["fedpeft_replies_total", "lost", "mine"] == sums["lost"] - sums["late"]
            assert values["fedpeft_bytes_total", "down", "mine"] == sums["down"]
            assert values["fedpeft_bytes_total", "up", "mine"] == sums["up"]
            assert values["fedpeft_round_seconds", "mine"] == 8.0
            assert ("fedpeft_score", "accuracy", "mine") in values
            assert values["fedpeft_sites_online", "mine"] == (2 if run.done < ROUNDS else 0)
            assert values["fedpeft_rounds_total", "other"] == 0
        assert not faults
        with (run.folder / FILE).open("ab") as file:
            file.write(b"damage\n")
        assert ("fedpeft_rounds_total", "mine") not in ask()
        assert len(faults) == 1


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with (
        metrics_endpoint(0, [], pytest.fail) as port,
        pytest.raises(BadInput, match=f"server.metrics = {port}"),
        metrics_endpoint(port, [], pytest.fail),
    ):
        pass


@given(
    st.text(),
    st.dictionaries(st.sampled_from("abc"), st.one_of(st.integers(), st.text(), st.none())),
)
def test_an_event_is_one_line_of_json_with_its_fields(line: str, about: dict[str, Any]) -> None:
    written: list[str] = []
    log = JsonLog("serve", written.append, lambda: datetime(2026, 1, 2, tzinfo=UTC))
    log.tell("event", line, **about)
    [one] = written
    assert one.isascii()
    assert "\n" not in one
    content = json.loads(one)
    assert content.pop("message") == " ".join(line.splitlines())
    assert content == {
        "time": "2026-01-02T00:00:00.000+00:00",
        "program": "serve",
        "event": "event",
        **about,
    }


def test_a_log_in_json_writes_json_alone_and_one_in_lines_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said: list[str] = []
    for form in ("json", "lines"):
        log = log_of(form, "join", said.append)
        log.say("a line")
        round_lines(log.tell)("mine")(Progress(3, 20, 0.5, 1_500_000))
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (first["event"], first["message"]) == ("note", "a line")
    assert (second["run"], second["round"], second["rounds"], second["score"]) == (
        "mine",
        3,
        20,
        0.5,
    )
    assert said == ["a line", "mine: round 3 of 20, accuracy 0.500, 1.5 MB"]


def test_a_line_says_as_much_as_is_known(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with claimed(folder):
        assert line_of(Watch(folder).look()) == (
            "mine: round 0 of ?, down 0 B, up 0 B, 0 replies, 0 lost, waiting to begin"
        )
