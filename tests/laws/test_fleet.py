"""What becomes of a client is drawn by its name and the round, and its bytes and steps are those of what it did."""

import csv
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.engines.local import LocalEngine
from fedpeft.errors import BadInput
from fedpeft.federation.cohort import Trace, read_trace, sample_by_size
from fedpeft.federation.fleet import Device, Fleet, Outing, dealt
from fedpeft.federation.server import federate
from fedpeft.ledger import ClientRow
from fedpeft.seeds import uniform
from fedpeft.training.loop import Training, num_steps, paced, plan
from fedpeft.types import Client, Method, State
from fedpeft.wrappers import DPSGD, SecAgg
from tests.tiny import (
    CONFIG,
    SEED,
    SGD,
    SIZES,
    TinyFederation,
    assert_same,
    assert_same_state,
    federation,
    small,
)

CLASSES = {"desk": Device(0.2), "phone": Device(0.5), "watch": Device(0.3)}
FLAKY = Fleet(
    {"phone": Device(1.0, dropout=0.3, straggling=0.2)}, dict.fromkeys(range(50), "phone")
)


@given(st.integers(0, 2**40), st.permutations(range(20)), st.permutations(sorted(CLASSES)))
def test_every_class_has_its_share_and_who_is_in_it_depends_on_no_order(
    seed: int, clients: list[int], classes: list[str]
) -> None:
    device_of = dealt({name: CLASSES[name] for name in classes}, clients, seed)
    assert Counter(device_of.values()) == {"desk": 4, "phone": 10, "watch": 6}
    assert device_of == dealt(CLASSES, range(20), seed)


def test_shares_that_do_not_divide_are_rounded_by_largest_remainders() -> None:
    """Of 7 clients 1.4, 3.5 and 2.1: 1, 3 and 2, and the one that is left to the largest remainder, 0.5."""
    assert Counter(dealt(CLASSES, range(7), 0).values()) == {"desk": 1, "phone": 4, "watch": 2}


def test_each_client_has_each_class_as_often_as_its_share_over_seeds() -> None:
    seen = Counter(dealt(CLASSES, range(10), seed)[3] for seed in range(1000))
    for name, device in CLASSES.items():
        deviation = math.sqrt(1000 * device.share * (1 - device.share))
        assert abs(seen[name] - 1000 * device.share) < 4 * deviation


def test_a_class_without_clients_is_refused() -> None:
    with pytest.raises(BadInput, match=r"fleet\.rare\.share = 0\.01: .* of 20 .* at least 0\.05"):
        dealt({"rare": Device(0.01), "other": Device(0.99)}, range(20), 0)


@pytest.mark.parametrize(
    ("fate", "probability"), [(FLAKY.drops_out, 0.3), (FLAKY.straggles, 0.2)], ids=["drop", "slow"]
)
def test_clients_fail_as_often_as_their_device_says(
    fate: Callable[[int, int], bool], probability: float
) -> None:
    """Over clients in each round, and over rounds for each client; 4.5 deviations hold for 100 numbers at once."""
    failed = {
        (client, number): fate(client, number) for client in range(50) for number in range(50)
    }
    for index in (0, 1):
        counts = Counter(name[index] for name, failing in failed.items() if failing)
        for number in range(50):
            deviation = math.sqrt(50 * probability * (1 - probability))
            assert abs(counts[number] - 50 * probability) < 4.5 * deviation
    assert abs(sum(failed.values()) - 2500 * probability) < 4 * math.sqrt(2500 * 0.25)


def test_draws_of_different_purpose_seed_and_phase_are_independent() -> None:
    names = [(client, number) for client in range(50) for number in range(40)]
    once = [FLAKY.drops_out(*name) for name in names]
    for other in (
        [FLAKY.drops_out(*name, phase=1) for name in names],
        [replace(FLAKY, seed=1).drops_out(*name) for name in names],
        [FLAKY.straggles(*name) for name in names],
    ):
        both = sum(one and two for one, two in zip(once, other, strict=True))
        due = sum(once) * sum(other) / len(names)
        assert abs(both - due) < 4 * math.sqrt(due)


def test_a_probability_of_0_never_happens_and_one_of_1_always_does() -> None:
    sure = Fleet({"a": Device(0.5), "b": Device(0.5, dropout=1.0)}, {0: "a", 1: "b"})
    assert [sure.drops_out(0, number) for number in range(200)] == [False] * 200
    assert [sure.drops_out(1, number) for number in range(200)] == [True] * 200
    assert all(0 <= uniform(0, "x", number) < 1 for number in range(1000))


WEIGHTS = [
    Client(0, examples=10),
    Client(1, examples=20),
    Client(5, examples=30),
    Client(7, examples=40),
]


def exact_probabilities(count: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every cohort, drawn one by one in proportion to size: by adding up all orders."""
    chances: dict[tuple[int, ...], float] = {}
    for order in permutations(WEIGHTS, count):
        chance, left = 1.0, 100
        for client in order:
            chance *= client.examples / left
            left -= client.examples
        cohort = tuple(sorted(client.id for client in order))
        chances[cohort] = chances.get(cohort, 0.0) + chance
    return chances


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cohorts_by_size_have_the_probabilities_of_successive_draws(count: int) -> None:
    rounds = 4000
    seen = Counter(
        tuple(client.id for client in sample_by_size(WEIGHTS, count, SEED, number))
        for number in range(rounds)
    )
    chances = exact_probabilities(count)
    assert sum(chances.values()) == pytest.approx(1)
    for cohort, chance in chances.items():
        deviation = math.sqrt(rounds * chance * (1 - chance))
        assert abs(seen[cohort] - rounds * chance) < 4 * deviation, cohort


@given(st.integers(0, 2**40), st.integers(1, 4), st.permutations(WEIGHTS))
def test_a_draw_by_size_depends_on_no_order_and_not_on_who_is_passed_over(
    number: int, count: int, clients: list[Client]
) -> None:
    cohort = sample_by_size(clients, count, SEED, number)
    assert len(cohort) == count
    assert cohort == [client for client in clients if client in cohort]
    assert set(cohort) == set(sample_by_size(WEIGHTS, count, SEED, number))
    assert sample_by_size(cohort, count, SEED, number) == cohort


def test_a_client_without_examples_is_drawn_last() -> None:
    clients = [Client(0), Client(1, examples=1), Client(2, examples=1)]
    drawn = [sample_by_size(clients, 2, SEED, number) for number in range(50)]
    assert drawn == [clients[1:]] * 50
    assert sample_by_size(clients, 3, SEED, 0) == clients


def in_a_fleet(
    playing: TinyFederation, fleet: Fleet, rounds: int, cohort: Sequence[Client] | None = None
) -> State:
    """Return the state after so many rounds of ``playing`` with these devices, of all clients or some."""
    state, asked = playing.start, cohort or playing.clients()
    for number in range(rounds):
        outing = Outing(playing.engine, fleet, number)
        [state] = federate(
            playing.method,
            state,
            outing,
            lambda _: asked,
            range(number, number + 1),
            config=CONFIG,
            min_replies=1,
            record=outing.noting(playing.rows.append),
        )
    return state


def alike(device: Device, deadline: float | None = None, seed: int = 3) -> Fleet:
    """Return a fleet of three clients with one device; all of them take 2 steps a round."""
    return Fleet(
        {"one": device}, dict.fromkeys(SIZES, "one"), dict.fromkeys(SIZES, 2), seed, deadline
    )


@pytest.mark.parametrize("name", ["lora", "federa"])
def test_who_drops_out_is_sent_its_request_and_the_others_play_as_if_it_had_not_been_drawn(
    name: str,
) -> None:
    fleet = alike(Device(1.0, dropout=0.4))
    away = {(c, n) for c in SIZES for n in range(4) if fleet.drops_out(c, n)}
    assert 0 < len(away) < 12, "the seed gives both"
    playing, others = federation(small(name)), federation(small(name))
    state = in_a_fleet(playing, fleet, 4)
    there = others.play(4, cohort=lambda n: [c for c in others.clients() if (c.id, n) not in away])
    assert_same_state(state, there)
    # Its request is that of any client with its memory, and it says nothing.
    requests = {(row.client, row.round): row for row in playing.rows}
    assert requests.keys() == {(c, n) for c in SIZES for n in range(4)}
    for name_of, row in requests.items():
        assert row.device == "one"
        assert row.dropped == (name_of in away)
        if row.dropped:
            assert (row.up, row.lost, row.modelled) == (0, "dropped out", None)
            assert row.down > 0
            assert row.measured.steps == 0
    if name == "lora":  # all are sent the same
        assert len({(row.round, row.down) for row in playing.rows}) == 4


def test_the_order_of_asking_changes_nothing() -> None:
    fleet = alike(Device(1.0, dropout=0.4, straggling=0.5), deadline=15.0, seed=8)
    lost: list[dict[int, str | None]] = []
    for order in permutations(SIZES):
        asked = [Client(number, examples=SIZES[number]) for number in order]
        playing = federation(small("lora"))
        in_a_fleet(playing, fleet, 1, cohort=asked)
        assert [row.client for row in playing.rows] == list(order)
        lost.append({row.client: row.lost for row in playing.rows})
    assert lost == [lost[0]] * 6
    assert len(set(lost[0].values())) == 3, "the seed gives one that is used, dropped out and late"


def test_who_is_late_has_moved_its_bytes_and_learnt_in_vain() -> None:
    """Worked by hand: 2 steps of 3 s, and all bytes at 1000 a second; five times as long for who is slow."""
    device = Device(1.0, straggling=0.5, slowdown=5.0, step_seconds=3.0, bandwidth=1000.0)
    loose = alike(device)
    playing = federation(small("lora"))
    in_a_fleet(playing, loose, 3)
    quick = [row for row in playing.rows if not loose.straggles(row.client, row.round)]
    assert 0 < len(quick) < 9, "the seed gives both"
    for row in playing.rows:
        plain = 2 * 3.0 + (row.down + row.up) / 1000
        assert row.modelled == pytest.approx(plain if row in quick else 5 * plain)
        assert row.lost is None
    # A deadline between the 6 s and the 30 s of their steps alone.
    strict, others = federation(small("federa")), federation(small("federa"))
    bound = alike(replace(device, bandwidth=None), deadline=15.0)
    # FeDeRA's clients remember something: who was late is taken to have nothing new.
    quick_names = {(c, n) for c in SIZES for n in range(3) if not loose.straggles(c, n)}
    state = in_a_fleet(strict, bound, 3)
    there = others.play(
        3, cohort=lambda n: [c for c in others.clients() if (c.id, n) in quick_names]
    )
    assert_same_state(state, there)
    for row in strict.rows:
        assert row.late == ((row.client, row.round) not in quick_names)
        assert row.up > 0
        if row.late:
            assert row.lost == "no answer within 15 s of modelled time"
            assert row.modelled == 30.0


def test_a_reply_exactly_at_the_deadline_is_in_time() -> None:
    playing = federation(small("lora"))
    in_a_fleet(playing, alike(Device(1.0, step_seconds=3.0), deadline=6.0), 1)
    assert [row.lost for row in playing.rows] == [None] * 3


def test_a_discreet_client_is_timed_by_the_steps_that_are_planned_for_it() -> None:
    """Under secure aggregation only the first of four exchanges trains: 2 steps of 3 s there, nothing later."""
    method = SecAgg(bits=56, smallest=2).around(small("lora"), "0.secagg")
    playing = federation(method)
    in_a_fleet(playing, alike(Device(1.0, step_seconds=3.0)), 1)
    times = {(row.client, row.phase): row.modelled for row in playing.rows}
    assert len(times) == 12
    assert [row.lost for row in playing.rows] == [None] * 12
    for (_, phase), seconds in times.items():
        assert seconds == (0.0 if phase else 6.0)


def test_a_client_that_hides_its_loss_alone_is_timed_by_the_steps_that_it_tells() -> None:
    """Under DP-SGD, LoRA-A2 trains in both exchanges of a round: 1 step of 3 s to choose, and 2 thereafter."""
    method = DPSGD(noise=1.0).around(small("lora_a2", probe_steps=1), "0.dpsgd")
    playing = federation(method, training=replace(SGD, steps=2))
    in_a_fleet(playing, alike(Device(1.0, step_seconds=3.0)), 1)
    assert [(row.lost, row.phase, row.modelled) for row in playing.rows] == [
        *[(None, 0, 3.0)] * 3,
        *[(None, 1, 6.0)] * 3,
    ]


def test_a_damaged_reply_is_no_affair_of_the_fleet() -> None:
    playing = federation(small("lora"), lambda _, outcome: replace(outcome, blob=b"rubbish"))
    in_a_fleet(playing, alike(Device(1.0), deadline=100.0), 1)
    assert all(row.lost is not None and "damaged" in row.lost for row in playing.rows)


@pytest.mark.parametrize("pace", [0.01, 0.5, 0.75, 1.0])
def test_a_client_takes_its_share_of_the_steps_rounded_up(pace: float) -> None:
    """As one whose training is set to have that many steps; the others take all four of theirs."""
    training = replace(SGD, epochs=2)
    due = max(1, math.ceil(pace * 4))

    def trained(method: Method, training: Training, paces: dict[int, float]) -> TinyFederation:
        playing = federation(method, training=training)
        engine = playing.engine.engine
        assert isinstance(engine, LocalEngine)
        slow = replace(engine, worker=replace(engine.worker, paces=paces))
        playing.engine.engine = slow
        playing.play(1)
        return playing

    slow = trained(small("lora"), training, {1: pace})
    short = trained(small("lora"), replace(SGD, steps=due), {})
    assert [row.measured.steps for row in slow.rows] == [4, due, 4]
    assert_same(slow.answers(0)[1].payload, short.answers(0)[1].payload)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 4), st.none() | st.integers(1, 50))
def test_the_planned_steps_are_those_of_the_plan(
    examples: int, batch: int, epochs: int, steps: int | None
) -> None:
    training = Training(batch_size=batch, epochs=epochs, steps=steps)
    assert num_steps(examples, training) == len(plan(examples, training, 0, 0, 0))


def test_a_share_of_steps_is_not_rounded_up_by_the_last_digit() -> None:
    for tenths in range(1, 11):
        for tens in range(1, 20):
            assert paced(10 * tens, tenths / 10) == tenths * tens


NAMES = ("anna", "ben", "2", "dora")


def trace_file(folder: Path, lines: Sequence[str]) -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_trace_says_who_is_there(tmp_path: Path) -> None:
    """Both ends count; lines of a client add up; a name goes before a number: ``2`` is the third client either way."""
    path = trace_file(
        tmp_path, ["client,from,to", "anna,0,1", "1,2,2", "2,1,3", "anna,3,3", "dora,2,9"]
    )
    trace = read_trace(path, NAMES, rounds=4)
    everybody = [Client(number) for number in range(4)]
    there = [[client.id for client in trace.there(everybody, number)] for number in range(5)]
    assert there == [[0], [0, 2], [1, 2, 3], [0, 2, 3], [3]]
    assert (
        trace.digest
        != read_trace(trace_file(tmp_path, ["client,from,to", "0,0,9"]), NAMES, 4).digest
    )


def test_a_name_that_is_another_ones_number_is_a_name(tmp_path: Path) -> None:
    path = trace_file(tmp_path, ["client,from,to", "1,0,9"])
    assert read_trace(path, ("1", "0"), rounds=1).spans == ((0, 0, 9),)


def test_columns_may_stand_in_any_order_with_blanks_between(tmp_path: Path) -> None:
    path = trace_file(tmp_path, ["to, client, from", '9, "ben", 2', "", "2,anna,0"])
    assert read_trace(path, NAMES, rounds=3) == Trace(
        ((1, 2, 9), (0, 0, 2)), read_trace(path, NAMES, 3).digest
    )


BAD_TRACES = {
    "no client in a round": (["client,from,to", "anna,0,1", "ben,3,3"], "is there in round 2 of"),
    "no lines": (["client,from,to"], "no client is there in round 0"),
    "unknown client": (["client,from,to", "anna,0,9", "annna,0,1"], "line 3: client 'annna'"),
    "number beyond the last": (["client,from,to", "4,0,1"], "line 2: client '4' is not one of 4"),
    "no header": (["anna,0,1"], "line 1 must name the columns client, from, to, not anna, 0, 1"),
    "empty": ([""], "line 1 must name the columns client, from, to, not nothing"),
    "fields missing": (["client,from,to", "anna,0"], "line 2: write three fields"),
    "fields too many": (["client,from,to", "anna,0,1,2"], "line 2: write three fields"),
    "no number": (["client,from,to", "anna,zero,1"], "line 2: from = 'zero': write the number"),
    "negative": (["client,from,to", "anna,0,-1"], "line 2: to = '-1': write the number"),
    "a column twice": (["client,client,from,to", "0,1,0,9"], "line 1 must name the columns"),
    "a number of many digits": (["client,from,to", "0,0," + "9" * 5000], "line 2: to = '999"),
    "a field of many letters": (["client,from,to", "x" * 200_000], "is no CSV file: field larger"),
    "backwards": (["client,from,to", "anna,3,1"], "line 2: to = 1 comes before from = 3"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_bad_trace_is_refused_in_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    lines, says = BAD_TRACES[name]
    path = trace_file(tmp_path, lines)
    csv.field_size_limit(2**17)  # csv's own; other readers in this process may have raised it
    with pytest.raises(BadInput) as refusal:
        read_trace(path, NAMES, rounds=4)
    assert says in str(refusal.value)
    assert "trace.csv" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_trace_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"federation\.trace = .*trace\.csv.*: cannot be read"):
        read_trace(path, NAMES, rounds=4)


def test_random_traces_agree_with_a_table_of_rounds(tmp_path: Path) -> None:
    draw = random.Random(0)
    table = {number: {draw.randrange(4)} for number in range(12)}
    lines = ["client,from,to"]
    for number, present in table.items():
        lines += [f"{client},{number},{number}" for client in present]
    for _ in range(6):
        client, first = draw.randrange(4), draw.randrange(12)
        last = draw.randrange(first, 12)
        lines.append(f"{client},{first},{last}")
        for number in range(first, last + 1):
            table[number].add(client)
    trace = read_trace(trace_file(tmp_path, lines), ("a", "b", "c", "d"), rounds=12)
    everybody = [Client(number) for number in range(4)]
    for number, present in table.items():
        assert {client.id for client in trace.there(everybody, number)} == present


def test_rows_of_old_ledgers_have_no_device() -> None:
    row = ClientRow(round=0, client=1, down=5, up=0)
    assert (row.device, row.modelled, row.dropped) == ("", None, False)
