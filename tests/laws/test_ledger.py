"""A ledger says what was written, whatever happened to the process; the meter says what one block cost."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import BadInput
from fedpeft.ledger import (
    FILE,
    MEASURED,
    ClientRow,
    EvaluationRow,
    Ledger,
    Measured,
    Row,
    RunRow,
    measured,
    meter,
    read,
    to_json,
)

RUN = RunRow(
    name="a",
    method="lora",
    seed=3,
    model="minilm",
    data="pydocs",
    data_digest="d1",
    model_digest="w1",
    partition_digest="p1",
    clients=20,
    clients_per_round=4,
    rounds=10,
    majority=0.25,
    reference=False,
    settings={"partition": {"alpha": 0.1}},
    resolved={},
    versions={},
)
FIGURES = Measured(examples=5, steps=2, trained=9, loss=0.1 + 0.2, seconds=1.5, seconds_alone=2.5)
TRAINED = ClientRow(round=0, client=7, down=10, up=20, measured=FIGURES)
LOST = ClientRow(round=0, client=8, down=10, up=0, lost="timed out\nafter 3 s · “x”")
SCORED = EvaluationRow(
    round=1,
    split="test",
    examples=4,
    metrics={"accuracy": 0.5, "macro_f1": 1 / 3, "loss": 1e-320},
)
ROWS: list[Row] = [RUN, TRAINED, LOST, SCORED]


def written(path: Path, rows: list[Row]) -> bytes:
    with Ledger(path) as ledger:
        for row in rows:
            ledger.append(row)
    return path.read_bytes()


def refuse(constant: str) -> object:
    raise AssertionError(f"{constant} is not JSON")


@settings(deadline=None, max_examples=50)
@given(loss=st.floats(), nested=st.floats(), text=st.text())
def test_every_row_comes_back_to_the_bit_and_every_line_is_legal_json(
    tmp_path_factory: pytest.TempPathFactory, loss: float, nested: float, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / FILE
    path.unlink(missing_ok=True)
    nest = {text: [nested, {"deep": nested, "nan": "nan"}], "$float": "nan", "none": None}
    rows: list[Row] = [
        replace(RUN, name=text, settings=nest),
        ClientRow(round=0, client=0, down=1, up=1, measured=Measured(loss=loss), lost=text),
        EvaluationRow(round=1, split="test", examples=1, metrics={"accuracy": 0.0, "loss": -loss}),
    ]
    for line in written(path, rows).splitlines():
        json.loads(line, parse_constant=refuse)
    assert repr(read(path)) == repr(
        rows
    )  # unlike ==, repr takes NaN for NaN and tells -0.0 from 0.0


def test_a_file_cut_anywhere_by_a_crash_gives_the_rows_whose_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / FILE
    whole = written(path, [LOST, SCORED])
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert read(path) == [LOST, SCORED][: whole[:length].count(b"\n")]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "7",
        '{"kind":"nothing"}',
        '{"round":1}',
        '{"kind":"client","round":1}',
        "",
        '{"kind":"client","round":0,"client":1,"down":"x","up":0}',
        '{"kind":"client","round":0,"client":1,"down":1,"up":0,"lost":5}',
        '{"kind":"client","round":0,"client":1,"down":1,"up":0,"seconds":[]}',
        '{"kind":"evaluation","round":1,"split":"test","examples":4,"metrics":{"accuracy":"x"}}',
        '{"kind":"evaluation","round":1,"split":"test","examples":4,"metrics":[]}',
        "[" * 100_000,
        '"\\ud800',
        "\xff",
    ],
    ids=lambda line: line[:20],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / FILE
    whole = written(path, ROWS)
    path.write_bytes(whole + line.encode("latin-1") + b"\n" + whole)
    with pytest.raises(BadInput, match=f"{FILE}, line 5: not a row"):
        read(path)


def test_no_ledger_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"ledger\.jsonl: no ledger to read here \(No such file"):
        read(tmp_path / "nowhere" / FILE)


def test_what_was_synced_is_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with Ledger(path) as ledger:
        assert ledger.sync() == 0
        ledger.append(RUN)
        assert ledger.sync() == path.stat().st_size
        assert read(path) == [RUN]


def test_cut_and_go_on_equals_never_stopped(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", ROWS)
    path = tmp_path / FILE
    with Ledger(path) as ledger:
        ledger.append(RUN)
        kept = ledger.sync()
        ledger.append(LOST)  # the killed run's rows after its last checkpoint
        ledger.sync()
    with path.open("ab") as file:
        file.write(b'{"kind":"cli')  # and half of one more
    with Ledger(path) as ledger:
        ledger.cut(kept)
        assert ledger.sync() == kept
        ledger.append(TRAINED)
        ledger.append(LOST)
        ledger.append(SCORED)
        assert ledger.sync() == len(whole)
    assert path.read_bytes() == whole


def test_cut_also_drops_rows_that_are_still_buffered(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with Ledger(path) as ledger:
        ledger.append(RUN)
        ledger.cut(0)
        ledger.append(SCORED)
    assert read(path) == [SCORED]


def test_a_ledger_shorter_than_its_checkpoint_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    size = len(written(path, ROWS))
    with (
        Ledger(path) as ledger,
        pytest.raises(BadInput, match=f"has {size} bytes, .* had {size + 1}"),
    ):
        ledger.cut(size + 1)
    assert read(path) == ROWS


def test_seconds_are_those_of_the_block_also_when_it_fails() -> None:
    def failing() -> None:
        time.sleep(0.05)
        raise RuntimeError

    with pytest.raises(RuntimeError), measured() as cost:
        failing()
    assert 0.05 <= cost.seconds < 5
    assert cost.peak_memory > 0


def can_reset() -> bool:
    try:
        meter._CLEAR.write_bytes(b"5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_reset(), reason="the high-water mark of this process cannot be reset")
def test_peak_memory_is_the_blocks_own_and_not_an_earlier_ones() -> None:
    size = 128 * 2**20
    with measured() as before:
        pass
    with measured() as large:
        block = bytearray(b"\x01") * size
        del block
    with measured() as after:
        pass
    assert large.peak_memory - before.peak_memory == pytest.approx(size, rel=0.1)
    assert after.peak_memory - before.peak_memory < size / 10


def test_without_proc_the_peak_is_the_whole_processs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(meter, "_CLEAR", tmp_path / "missing" / "clear_refs")
    monkeypatch.setattr(meter, "_STATUS", tmp_path / "status")
    for status in (None, b"Name:\tpython\n"):
        if status is not None:
            (tmp_path / "status").write_bytes(status)
        with measured() as cost:
            pass
        unit = 1 if sys.platform == "darwin" else 1024
        assert cost.peak_memory == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_on_cuda_the_mark_is_reset_before_and_read_after_with_the_clock_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def said(name: str) -> Callable[[torch.device], int]:
        def call(device: torch.device) -> int:
            calls.append(name)
            return 77

        return call

    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, said(name))
    with measured(torch.device("cuda", 0)) as cost:
        calls.append("block")
    assert calls == [
        "synchronize",
        "reset_peak_memory_stats",
        "block",
        "synchronize",
        "max_memory_allocated",
    ]
    assert cost.peak_memory == 77


def test_measuring_is_cheap() -> None:
    with measured() as cost:
        for _ in range(100):
            with measured():
                pass
    assert cost.seconds / 100 < 0.005


OLD = (
    '{"kind":"client","round":3,"client":7,"down":10,"up":20,"examples":5,"steps":2,"trained":9,'
    '"loss":0.25,"seconds":1.5,"peak_memory":800,"shared_by":2,"lost":null}\n'
)
"""A row as ledgers had it before there was ``seconds_alone``."""


def test_a_row_of_an_older_ledger_is_read_and_its_client_counts_as_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text(OLD)
    figures = Measured(
        examples=5,
        steps=2,
        trained=9,
        loss=0.25,
        seconds=1.5,
        seconds_alone=1.5,
        peak_memory=800,
        shared_by=2,
    )
    assert read(path) == [ClientRow(round=3, client=7, down=10, up=20, measured=figures)]


def test_an_older_ledger_was_of_a_classification(tmp_path: Path) -> None:
    """Runs were scored by accuracy, in columns of their own, before metrics had names."""
    path = tmp_path / FILE
    run, scored = to_json(RUN), to_json(SCORED)
    for name in ("metric", "higher_is_better", "metric_is_share"):
        del run[name]
    metrics = scored.pop("metrics")
    assert isinstance(metrics, dict)
    path.write_text(json.dumps(run) + "\n" + json.dumps({**scored, **metrics}) + "\n")
    assert read(path) == [RUN, SCORED]


def test_what_a_client_measured_lies_flat_in_the_file_and_no_loss_is_null() -> None:
    figures = {part.name: getattr(FIGURES, part.name) for part in fields(Measured)}
    flat = to_json(TRAINED)
    assert flat == {
        "kind": "client",
        "round": 0,
        "client": 7,
        "down": 10,
        "up": 20,
        "lost": None,
        "phase": 0,
        "device": "",
        "modelled": None,
        **figures,
    }
    assert to_json(LOST)["loss"] is None
    assert flat.keys() >= MEASURED


def test_sound_figures_are_kept_and_the_others_are_as_if_not_measured() -> None:
    said = replace(FIGURES, examples=2**62, loss=None, seconds=float("nan"))
    assert said.faults().keys() == {"examples", "loss", "seconds"}
    assert said.sound() == replace(FIGURES, examples=0, loss=None, seconds=0.0)
    assert FIGURES.faults() == {}
    assert FIGURES.sound() == FIGURES
    assert FIGURES.faults(held=4) == {"examples": "examples = 5: the client holds 4"}
    assert FIGURES.sound(held=4) == replace(FIGURES, examples=0)
