"""A report says what the ledgers on_warning: every expected number here is worked out by hand from the rows beside it."""

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console, RenderableType

from fedpeft.errors import BadInput
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, Ledger, Measured, Row, RunRow
from fedpeft.report import figures, rates, tables, write
from fedpeft.report.comparison import compare
from fedpeft.report.cost import Cost
from fedpeft.report.summary import Summary, summarise
from fedpeft.report.terms import SLORA_LINK

MB = 1_000_000
REFERENCES = {"centralised", "local-only"}


def opening(method: str, seed: int = 0, rounds: int = 2, digest: str = "d1") -> RunRow:
    settings = {"data": {"partition": {"kind": "dirichlet", "alpha": 0.1}}, "method": {"alpha": 16}}
    return RunRow(
        name=f"{method}-{seed}",
        method=method,
        seed=seed,
        model="minilm",
        data="pydocs",
        data_digest=digest,
        model_digest="weights",
        partition_digest="partition",
        clients=20,
        clients_per_round=2,
        rounds=rounds,
        majority=0.25,
        reference=method in REFERENCES,
        settings=settings,
        resolved={},
        versions={},
    )


def scored(after: int, accuracy: float, split: str = "test") -> EvaluationRow:
    return EvaluationRow(
        round=after,
        split=split,
        examples=100,
        metrics={"accuracy": accuracy, "macro_f1": accuracy / 2, "loss": 1.0},
    )


def asked(number: int, megabytes: int, seconds: float = 1.0) -> ClientRow:
    figures = Measured(steps=1, trained=10, seconds=seconds, seconds_alone=seconds)
    return ClientRow(round=number, client=0, down=megabytes * MB, up=0, measured=figures)


def replied(number: int, client: int, down: int, up: int, **figures: Any) -> ClientRow:
    """Return the row of a client that trained: its traffic in MB and what it measured."""
    own = Measured(**figures)
    return ClientRow(round=number, client=client, down=down * MB, up=up * MB, measured=own)


def run(root: Path, rows: Sequence[Row]) -> Path:
    assert isinstance(rows[0], RunRow)
    folder = root / rows[0].name
    folder.mkdir(parents=True)
    with Ledger(folder / FILE) as ledger:
        for row in rows:
            ledger.append(row)
    return folder


def simple(
    root: Path, method: str, accuracies: Sequence[float], megabytes: int, seed: int = 0
) -> Summary:
    """Return a run of one client a round that moves ``megabytes``, evaluated after every round."""
    rows: list[Row] = [opening(method, seed, len(accuracies))]
    for number, accuracy in enumerate(accuracies):
        rows += [asked(number, megabytes), scored(number + 1, accuracy)]
    return summarise(run(root, rows))


def printed(renderable: RenderableType) -> list[str]:
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return [line.rstrip() for line in capture.get().splitlines()]


def cells(renderable: RenderableType, method: str) -> list[str]:
    return next(line.split() for line in printed(renderable) if line.startswith(f" {method}"))


def sheet(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


RATE = ("lr", "rate_from")
HEADINGS = """
accuracy best_accuracy macro_f1 over_majority start_accuracy client_accuracy
client_worst_tenth_accuracy rounds client_steps trained_first trained_last
down_bytes up_bytes seconds_per_client_round peak_memory_bytes lost network_seconds
network_seconds_slora rounds_to_target bytes_to_target seconds_to_target
modelled_seconds_to_target modelled_seconds_to_target_slora equal_rounds_accuracy
equal_rounds_bytes equal_bytes_accuracy equal_bytes_rounds epsilon_clients epsilon_examples
"""
"""The numbers in the CSV files of a classification, in their order."""


# The run that the first tests work out. Two clients a round; the second round loses one.
ROUNDS: list[Row] = [
    opening("lora"),
    scored(0, 0.1),
    replied(0, 3, 1, 1, steps=4, trained=100, seconds=2.0, seconds_alone=2.5, peak_memory=500),
    replied(
        *(0, 5, 1, 3),
        steps=6,
        trained=120,
        seconds=3.0,
        seconds_alone=4.5,
        peak_memory=700,
        shared_by=2,
    ),
    scored(1, 0.9, "validation"),
    scored(1, 0.5),
    replied(1, 5, 2, 1, steps=4, trained=60, seconds=5.0, seconds_alone=5.0, peak_memory=600),
    ClientRow(round=1, client=9, down=4 * MB, up=0, lost="timeout"),
    scored(2, 0.4),
]


def test_one_run_in_numbers(tmp_path: Path) -> None:
    """Down 1 + 1 + 2 + 4 = 8 MB, up 1 + 3 + 1 = 5 MB; steps 4 + 6 + 4 = 14.

    Seconds of the three replies: 2, 6 / 2 = 3 (two shared them), 5; mean 10 / 3. The largest client of round 0 trained
    120 weights, the only reply of round 1 trained 60.
    """
    summary = summarise(run(tmp_path, ROUNDS))
    assert (summary.down, summary.up, summary.rounds, summary.steps) == (8 * MB, 5 * MB, 2, 14)
    assert summary.seconds == pytest.approx(10 / 3)
    assert (summary.peak_memory, summary.side_by_side) == (700, 2)
    assert (summary.trained_first, summary.trained_last) == (120, 60)
    assert summary.lost == {"timeout": 1}
    assert summary.split == "test"
    assert summary.final == summary.curve[-1]
    assert [(point.round, point.score) for point in summary.curve] == [
        (0, 0.1),
        (1, 0.5),
        (2, 0.4),
    ]


def test_what_had_been_spent_at_each_evaluation(tmp_path: Path) -> None:
    """Round 0: 2 + 4 = 6 MB, the slowest link 4 MB, the slowest training 3 s (6 s shared by two).

    Round 1: 3 + 4 = 7 MB, the slowest link 4 MB (down to the client that was lost), the slowest
    training 5 s. Alone the slowest clients train 4.5 and 5 s, so at 1 MB/s round 0 takes
    4 + 4.5 = 8.5 s, both take 8 + 9.5 = 17.5 s. SLoRA's 5 Mbit/s are 5 * 2^20 / 8 = 655360 bytes/s.
    """
    summary = summarise(run(tmp_path, ROUNDS))
    assert [point.cost for point in summary.curve] == [
        Cost(bytes=0, slowest_bytes=0, slowest_seconds=0.0, slowest_alone=0.0),
        Cost(bytes=6 * MB, slowest_bytes=4 * MB, slowest_seconds=3.0, slowest_alone=4.5),
        Cost(bytes=13 * MB, slowest_bytes=8 * MB, slowest_seconds=8.0, slowest_alone=9.5),
    ]
    assert summary.cost == summary.curve[-1].cost
    assert [point.cost.modelled(1e6) for point in summary.curve] == [0.0, 8.5, 17.5]
    assert summary.cost.network(SLORA_LINK) == pytest.approx(8 * MB / 655360)


def test_sloras_printed_minutes_are_the_model_at_sloras_link() -> None:
    """SLoRA's table has full fine-tuning of ALBERT at 174 Gbit, 597 min: 174 * 1024 / 5 s are 593.9 min, 186 s train.

    174 Gbit are 174 * 2^30 / 8 bytes, those of the one client that stands for a round.
    """
    size = 174 * 2**30 // 8
    transfer = Cost(bytes=20 * size, slowest_bytes=size)
    assert transfer.modelled(SLORA_LINK) == pytest.approx(174 * 1024 / 5)
    whole = replace(transfer, slowest_alone=186.0)
    assert whole.modelled(SLORA_LINK) / 60 == pytest.approx(597, abs=0.1)


def test_reached_after_and_within(tmp_path: Path) -> None:
    """Accuracies 0.1, 0.5, 0.4 after 0, 1, 2 rounds and 0, 6, 13 MB."""
    summary = summarise(run(tmp_path, ROUNDS))
    start, first, second = summary.curve
    assert [summary.reached(target) for target in (0.1, 0.3, 0.5, 0.51)] == [
        start,
        first,
        first,
        None,
    ]
    assert [summary.after(rounds) for rounds in (1, 2, 3, None)] == [first, second, None, None]
    assert [summary.within(size) for size in (0, 6 * MB - 1, 6 * MB, 99 * MB, None)] == [
        start,
        start,
        first,
        second,
        None,
    ]


def test_the_numbers_of_a_run_follow_the_terms(tmp_path: Path) -> None:
    """Target 0.45 is reached after round 1: 6 MB, 3 s of training, 4 MB of the slowest link.

    Alone the slowest client trains 4.5 s; at 2 MB/s 2 + 4.5 = 6.5 s.
    """
    compared = compare(
        [summarise(run(tmp_path, ROUNDS))], target=0.45, bandwidth=2e6, budget=7 * MB
    )
    numbers = compared.lines[0].mean
    assert (numbers.score, numbers.best_score, numbers.others) == (0.4, 0.5, {"macro_f1": 0.2})
    assert numbers.over_majority == pytest.approx(0.15)
    assert numbers.start_score == 0.1
    assert (numbers.rounds_to_target, numbers.bytes_to_target, numbers.seconds_to_target) == (
        1,
        6 * MB,
        3,
    )
    assert numbers.modelled_seconds_to_target == 6.5
    assert numbers.modelled_seconds_to_target_slora == pytest.approx(4 * MB / 655360 + 4.5)
    assert (numbers.network_seconds, numbers.lost) == (4, 1)
    assert (numbers.equal_rounds_score, numbers.equal_rounds_bytes) == (0.4, 13 * MB)
    assert (numbers.equal_bytes_score, numbers.equal_bytes_rounds) == (0.5, 1)


def test_seeds_are_averaged_and_their_spread_is_the_sample_standard_deviation(
    tmp_path: Path,
) -> None:
    """Finals 0.4 and 0.6: mean 0.5, deviation sqrt((0.01 + 0.01) / 1); one seed alone reaches 0.5, after 2 rounds."""
    seeds = [
        simple(tmp_path, "lora", accuracies, 1, seed)
        for seed, accuracies in enumerate([[0.3, 0.4], [0.4, 0.6]])
    ]
    line = compare(seeds, target=0.5).lines[0]
    assert line.mean.score == pytest.approx(0.5)
    assert line.spread.score == pytest.approx(math.sqrt(0.02))
    assert [numbers.rounds_to_target for numbers in line.each] == [None, 2]
    assert line.mean.rounds_to_target is None
    assert compare(seeds, target=0.4).lines[0].mean.rounds_to_target == 1.5
    assert compare(seeds[:1]).lines[0].spread.score is None


def test_the_default_terms(tmp_path: Path) -> None:
    """Finals: a 0.5 (seeds 0.4, 0.6), b 0.8, c 0.3, d 0.6; of the middle ones, 0.5 and 0.6, the lower; 90 % are 0.45.

    Evaluations exist after rounds {1, 2} of all but d, which stops after 1. The least traffic is d's 5 MB. Neither the
    reference, which moves nothing, nor the run without an evaluation has a say.
    """
    runs = [
        simple(tmp_path, "a", [0.1, 0.4], 4),
        simple(tmp_path, "a", [0.1, 0.6], 4, seed=1),
        simple(tmp_path, "b", [0.5, 0.8], 9),
        simple(tmp_path, "c", [0.2, 0.3], 6),
        simple(tmp_path, "d", [0.6], 5),
        simple(tmp_path, "centralised", [0.97, 0.98, 0.99], 0),
        summarise(run(tmp_path, [opening("e"), asked(0, 1)])),
    ]
    compared = compare(runs)
    terms = compared.terms
    assert terms.target == pytest.approx(0.45)
    assert (terms.rounds, terms.budget) == (1, 5 * MB)
    assert [line.label for line in compared.lines] == ["centralised", "b", "d", "a", "c", "e"]
    by_label = {line.label: line for line in compared.lines}
    assert [by_label[label].mean.equal_bytes_score for label in "bdace"] == [
        None,
        0.6,
        0.1,
        None,
        None,
    ]
    assert by_label["centralised"].mean.equal_bytes_score == 0.99
    assert [by_label[label].mean.equal_rounds_score for label in "bdace"] == [
        0.5,
        0.6,
        0.1,
        0.2,
        None,
    ]


def test_references_alone_set_their_own_terms(tmp_path: Path) -> None:
    compared = compare([simple(tmp_path, "centralised", [0.5, 0.6], 0)])
    assert compared.terms.target == pytest.approx(0.54)
    assert (compared.terms.rounds, compared.terms.budget) == (2, 0)


def test_runs_of_one_method_and_seed_stand_alone_under_their_names(tmp_path: Path) -> None:
    first = simple(tmp_path / "1", "lora", [0.3], 1)
    second = simple(tmp_path / "2", "lora", [0.5], 1)
    second = replace(second, run=replace(second.run, name="lora-fast"))
    assert [line.label for line in compare([first, second]).lines] == [
        "lora (lora-fast)",
        "lora (lora-0)",
    ]


def test_seeds_stay_together_where_a_method_was_run_with_two_settings(tmp_path: Path) -> None:
    """As when the reports of two comparisons become one."""
    runs = [
        replace(
            found,
            run=replace(found.run, name=name, seed=seed, settings={"rank": rank, "seed": seed}),
        )
        for name, rank, seed in (("a", 4, 0), ("a", 4, 1), ("a", 8, 0), ("a", 8, 1))
        for found in [simple(tmp_path / f"{rank}{seed}", "lora", [0.3], 1)]
    ]
    assert sorted((line.label, len(line.runs)) for line in compare(runs).lines) == [
        ("lora (a)", 2),
        ("lora (a) 2", 2),
    ]


def test_the_budget_is_one_that_the_cheapest_method_keeps_with_every_seed(tmp_path: Path) -> None:
    cheap = [
        simple(tmp_path / str(seed), "lora", [0.3], megabytes)
        for seed, megabytes in enumerate((3, 4))
    ]
    cheap = [replace(one, run=replace(one.run, seed=seed)) for seed, one in enumerate(cheap)]
    compared = compare([*cheap, simple(tmp_path / "full", "full", [0.5], 9)])
    assert compared.terms.budget == 4 * MB
    assert {line.label: line.mean.equal_bytes_score for line in compared.lines} == {
        "lora": 0.3,
        "full": None,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([opening("b", digest="d2"), scored(1, 0.5)], "a-0 is on data d1, b-0 on d2"),
        ([opening("b"), scored(1, 0.5, "validation")], "different splits \\(test, validation\\)"),
    ],
)
def test_what_does_not_compare_is_refused(tmp_path: Path, rows: list[Row], message: str) -> None:
    folders = [run(tmp_path, [opening("a"), scored(1, 0.5)]), run(tmp_path, rows)]
    with pytest.raises(BadInput, match=message):
        write(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_ledger_that_does_not_open_with_its_run_is_refused(tmp_path: Path) -> None:
    good = run(tmp_path, ROUNDS)
    headless = (good / FILE).read_bytes().partition(b"\n")[2]
    for name, content in (("empty", b""), ("headless", headless)):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_bytes(content)
        with pytest.raises(
            BadInput, match=rf"{name}/ledger\.jsonl: does not open with the row of its run"
        ):
            write([good, tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, out = run(tmp_path, ROUNDS), tmp_path / "out"
    with pytest.raises(BadInput, match="no runs given"):
        write([], out)
    with pytest.raises(BadInput, match="bandwidth = 0: "):
        write([good], out, bandwidth=0.0)
    with pytest.raises(BadInput, match=r"target = 60: .* did you mean 0\.6"):
        write([good], out, target=60)
    with pytest.raises(BadInput, match="is a file"):
        write([good], good / FILE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r"pip install 'fedpeft\[plots\]'"):
        write([good], out)
    assert not out.exists()
    write([good], out, plots=False)
    assert sorted(path.name for path in out.iterdir()) == ["curves.csv", "runs.csv", "summary.csv"]


def test_the_table_fits_120_columns_whole_and_ends_with_the_majority(tmp_path: Path) -> None:
    """Nine methods and references with as many digits as a table has to hold; 0.5 and 0.7 are 60 ± 14.1 %."""
    names = (
        "full",
        "bitfit",
        "lora",
        "ffa_lora",
        "federa",
        "slora",
        "fedara",
        "centralised",
        "local-only",
    )
    spent = replied(
        *(0, 1, 18_160, 18_160),
        steps=1,
        trained=22_700_000,
        loss=1.0,
        seconds=99.4,
        seconds_alone=99.4,
        peak_memory=1234 * MB,
    )
    runs = [
        summarise(run(tmp_path, [opening(name, seed, 1), spent, scored(1, 0.5 + seed / 5)]))
        for name in names
        for seed in (0, 1)
    ]
    table = tables.comparison(compare(runs))
    text = printed(table)
    assert max(map(len, text)) <= 120
    assert "…" not in "".join(text)
    assert cells(table, "full")[:4] == ["full", "60.0", "±", "14.1"]
    assert [line for line in text if line.startswith(" ") and line.strip()][-1].split() == [
        "majority",
        "class",
        "25.0",
    ]
    assert sum(line.count("modelled") for line in text) == 3  # two headings and the small print


def test_the_cells_of_a_table(tmp_path: Path) -> None:
    """The run worked out above, target 0.45: after 1 round, 6 MB.

    4 + 4.5 = 8.5 s = 0.142 min; 4e6 / 655360 + 4.5 = 10.6 s = 0.177 min.
    """
    table = tables.comparison(compare([summarise(run(tmp_path, ROUNDS))], target=0.45))
    modelled = "modelled min to target: per round the slowest client's bytes / bandwidth"
    assert cells(table, "lora") == [
        *("lora", "40.0", "10.0", "+15.0", "120→60.0", "8.00", "5.00"),
        *("1", "6.00", "0.142", "0.177", "3.33", "0.000700", "1"),
    ]
    assert {
        "pydocs · minilm · 20 clients, 2 a round · partition alpha 0.1",
        "data digest d1 · 2 rounds · seeds 0 · scored on test",
        "target: accuracy 45.0 % (as asked)",
        f"{modelled} + its longest training alone",
        "up to 2 clients trained side by side: seconds are shared out by steps, peak MB is that of all at once",
        "lost replies: 1 x timeout",
    } <= set(printed(table))


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    compared = compare([simple(tmp_path, "lora[red]", [0.5], 1)])
    assert cells(tables.comparison(compared), "lora")[0] == "lora[red]"
    assert cells(tables.equal_terms(compared), "lora") == ["lora[red]", "50.0", "1.00", "50.0", "1"]


def test_a_run_without_evaluations_is_reported_with_dashes(tmp_path: Path) -> None:
    folders = [
        run(tmp_path, [opening("lora", rounds=7)]),
        run(tmp_path, [opening("federa"), asked(0, 1)]),
    ]
    report = write(folders, tmp_path / "out")
    assert cells(report, "lora")[1:5] == ["-", "-", "-", "-"]
    assert "unfinished: lora-0 (0 of 7 rounds), federa-0 (1 of 2 rounds)" in printed(report)
    assert "no target: nothing was evaluated" in printed(report)


def test_the_csv_files_have_every_number(tmp_path: Path) -> None:
    """Two seeds of one evaluation each after 3 MB and one second: modelled 3 + 1 s, as SLoRA 3e6 / 655360 + 1 s."""
    folders = []
    for seed, accuracy in enumerate((0.4, 0.6)):
        folders.append(run(tmp_path, [opening("lora", seed), asked(0, 3), scored(1, accuracy)]))
    write(folders, tmp_path / "out", plots=False)

    def table(name: str) -> list[dict[str, str]]:
        return sheet(tmp_path / "out" / name)

    (line,) = table("summary.csv")
    names = HEADINGS.split()
    spreads = [f"{name}_spread" for name in names]
    given = ["target", "bandwidth", "equal_rounds", "equal_bytes", "majority"]
    assert list(line) == ["method", "seeds", *names, *spreads, *given]
    assert list(table("runs.csv")[0]) == ["method", "run", "seed", *names, "lost_reasons", *RATE]
    assert (line["method"], line["seeds"], line["down_bytes"]) == ("lora", "2", "3000000.0")
    assert float(line["accuracy_spread"]) == pytest.approx(math.sqrt(0.02))
    assert [(row["run"], row["seed"], row["accuracy"]) for row in table("runs.csv")] == [
        ("lora-0", "0", "0.4"),
        ("lora-1", "1", "0.6"),
    ]
    point = table("curves.csv")[1]
    assert (point["method"], point["seed"], point["round"], point["megabytes"]) == (
        "lora",
        "1",
        "1",
        "3.0",
    )
    assert (point["modelled_seconds"], point["accuracy"], point["macro_f1"]) == (
        "4.0",
        "0.6",
        "0.3",
    )
    assert float(point["modelled_seconds_slora"]) == pytest.approx(3 * MB / 655360 + 1)


def test_the_curve_of_a_method_is_the_mean_where_all_seeds_were_evaluated(tmp_path: Path) -> None:
    """Seeds 0.2, 0.4 and 0.4, 0.6, 0.9 at 1 and 3 MB a round: after 1 round 30 % at 2 MB, after 2 50 % at 4 MB."""
    seeds = [
        simple(tmp_path, "lora", [0.2, 0.4], 1),
        simple(tmp_path, "lora", [0.4, 0.6, 0.9], 3, seed=1),
    ]
    drawn = figures.curve(compare(seeds).lines[0], lambda point: point.cost.bytes / MB)
    assert list(drawn.x) == [2, 4]
    assert drawn.mean == pytest.approx((30, 50))
    assert drawn.spread == pytest.approx((math.sqrt(200), math.sqrt(200)))


@pytest.mark.parametrize("megabytes", [0, 5])
def test_the_figures_are_pictures_also_of_references_alone(tmp_path: Path, megabytes: int) -> None:
    rows: list[Row] = [
        opening("a"),
        scored(0, 0.1),
        asked(0, megabytes, seconds=0.0),
        scored(1, 0.5),
    ]
    write([run(tmp_path, rows)], tmp_path / "out")
    for name in ("rounds", "megabytes", "time"):
        picture = (tmp_path / "out" / f"accuracy_over_{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(picture[16:20], "big") == 1800  # pixels across


def heights(line: Line2D) -> list[float]:
    return [float(height) for height in np.asarray(line.get_ydata())]


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best first, the majority last; a reference, having moved nothing, is level in the figure over traffic alone."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    runs = [simple(tmp_path, "lora", [0.3, 0.5], 4), simple(tmp_path, "centralised", [0.6, 0.8], 0)]
    figures.save(compare(runs), tmp_path)
    over_rounds, over_megabytes, over_time = (figure.axes[0].get_lines() for figure in drawn)
    labels = ["centralised  80.0", "lora  50.0", "majority class  25.0"]
    assert [line.get_label() for line in over_rounds] == labels
    assert [heights(line) for line in over_rounds] == [[60, 80], [30, 50], [25, 25]]
    assert [heights(line) for line in over_megabytes] == [[80, 80], [30, 50], [25, 25]]
    assert np.asarray(over_megabytes[1].get_xdata()).tolist() == [4, 8]
    assert np.asarray(over_time[1].get_xdata()).tolist() == pytest.approx([5 / 60, 10 / 60])


def test_methods_whose_clients_train_side_by_side_are_modelled_as_if_alone(tmp_path: Path) -> None:
    """A share of 1 s of a stack stands for 4 s alone; the other method's clients take 3 s alone."""
    figures = {
        "lora": Measured(steps=1, seconds=1.0, seconds_alone=4.0, shared_by=4),
        "full": Measured(steps=1, seconds=3.0, seconds_alone=3.0),
    }
    runs = []
    for method, own in figures.items():
        row = ClientRow(round=0, client=0, down=2 * MB, up=0, measured=own)
        runs.append(summarise(run(tmp_path, [opening(method, rounds=1), row, scored(1, 0.5)])))
    by_label = {line.label: line.mean for line in compare(runs, target=0.5).lines}
    assert by_label["lora"].modelled_seconds_to_target == 2 + 4
    assert by_label["full"].modelled_seconds_to_target == 2 + 3
    assert by_label["lora"].seconds_to_target == 1


def test_an_older_ledger_is_modelled_from_its_measured_seconds(tmp_path: Path) -> None:
    folder = run(tmp_path, ROUNDS)
    lines = []
    for line in (folder / FILE).read_text().splitlines():
        content = json.loads(line)
        content.pop("seconds_alone", None)
        lines.append(json.dumps(content) + "\n")
    (folder / FILE).write_text("".join(lines))
    assert [point.cost.slowest_alone for point in summarise(folder).curve] == [0.0, 3.0, 8.0]


def test_a_client_that_diverged_has_no_loss_and_its_time_counts(tmp_path: Path) -> None:
    """Its round waited for it, 6 s, longer than for the other one; its steps were of no use."""
    measured = Measured(examples=3, steps=4, seconds=6.0, seconds_alone=6.0)
    diverged = ClientRow(round=1, client=9, down=1, up=1, measured=measured, lost="diverged: ...")
    rows = [diverged if isinstance(row, ClientRow) and row.lost else row for row in ROUNDS]
    summary = summarise(run(tmp_path, rows))
    assert summary.curve[-1].cost.slowest_alone == 4.5 + 6.0
    assert (summary.steps, summary.lost) == (14, {"diverged: ...": 1})
    assert "lost replies: 1 x diverged: ..." in printed(tables.comparison(compare([summary])))


def language_model(
    root: Path,
    method: str,
    perplexities: Sequence[float],
    megabytes: int = 1,
    majority: float | None = None,
    seed: int = 0,
) -> Path:
    """Return the folder of a run that is scored by perplexity, evaluated after every round."""
    first = replace(
        opening(method, seed, len(perplexities)),
        majority=majority,
        metric="perplexity",
        higher_is_better=False,
        metric_is_share=False,
    )
    rows: list[Row] = [first]
    for index, perplexity in enumerate(perplexities):
        metrics = {"loss": 1.0, "perplexity": perplexity, "bits_per_word": perplexity / 4}
        rows += [
            asked(index, megabytes),
            EvaluationRow(round=index + 1, split="test", examples=9, metrics=metrics),
        ]
    return run(root, rows)


def language_models(root: Path, majority: float | None = None) -> list[Path]:
    """Return four runs, the best last; their final perplexities are 48, 18, 10 and 9."""
    return [
        language_model(root, "ffa_lora", [60, 48], 3, majority),
        language_model(root, "full", [18.5, 18], 9, majority),
        language_model(root, "bitfit", [50, 10], 1, majority),
        language_model(root, "lora", [25, 8, 9], 2, majority),
    ]


def test_runs_scored_by_perplexity_compare_with_the_lowest_first(tmp_path: Path) -> None:
    """Finals 9, 10, 18, 48; of the middle ones, 10 and 18, the worse; 18 / 0.9 = 20 to reach.

    lora is at 8 after 2 rounds and 4 MB, bitfit at 10 after 2 and 2 MB, full at 18.5 after 1 and
    9 MB, ffa_lora never. All are evaluated after round 2; the least traffic is bitfit's, 2 MB, by
    which lora has done a round.
    """
    compared = compare([summarise(folder) for folder in language_models(tmp_path, 40.0)])
    terms = compared.terms
    assert (terms.target, terms.rounds, terms.budget) == (20, 2, 2 * MB)
    assert [line.label for line in compared.lines] == ["lora", "bitfit", "full", "ffa_lora"]
    means = [line.mean for line in compared.lines]
    assert [mean.score for mean in means] == [9, 10, 18, 48]
    assert [mean.best_score for mean in means] == [8, 10, 18, 48]
    assert [mean.over_majority for mean in means] == [31, 30, 22, -8]
    assert [mean.others for mean in means[:2]] == [{"bits_per_word": 2.25}, {"bits_per_word": 2.5}]
    assert [mean.rounds_to_target for mean in means] == [2, 2, 1, None]
    assert [mean.bytes_to_target for mean in means] == [4 * MB, 2 * MB, 9 * MB, None]
    assert [mean.equal_rounds_score for mean in means] == [8, 10, 18, 48]
    assert [mean.equal_bytes_score for mean in means] == [25, 10, None, None]


def test_a_target_is_reached_from_above_where_less_is_better(tmp_path: Path) -> None:
    summary = summarise(language_model(tmp_path, "lora", [25, 8, 9]))
    first, second, _ = summary.curve
    assert [summary.reached(target) for target in (25, 24.9, 8, 7.9)] == [
        first,
        second,
        second,
        None,
    ]


def test_what_is_printed_of_perplexities(tmp_path: Path) -> None:
    """No per cent; a gain is above 0 where a perplexity is below that of the trivial answer."""
    report = write(language_models(tmp_path, 40.0), tmp_path / "out", plots=False)
    text = printed(report)
    assert "Final perplexity and its cost" in text
    assert "target: perplexity at most 20.0 (the median method's final perplexity / 0.9)" in text
    assert "%" not in "".join(text)
    assert cells(report, "method")[:4] == ["method", "perplexity", "word", "trivial"]
    assert cells(report, "lora")[1:4] == ["9.00", "2.25", "+31.0"]
    assert cells(report, "ffa_lora")[1:4] == ["48.0", "12.0", "-8.00"]
    assert cells(report, "trivial") == ["trivial", "answer", "40.0"]
    equal = cells(tables.equal_terms(compare([summarise(tmp_path / "lora-0")])), "lora")
    assert equal == ["lora", "9.00", "6.00", "9.00", "3"]


def test_where_no_answer_is_trivial_there_is_no_row_and_no_line_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    folders = language_models(tmp_path)[2:]
    report = write(folders, tmp_path / "out")
    assert not any("trivial" in line or "majority" in line for line in printed(report))
    assert cells(report, "lora")[1:4] == ["9.00", "2.25", "10.0"]  # the trained weights follow
    for figure in drawn:
        axes = figure.axes[0]
        assert [line.get_label() for line in axes.get_lines()] == ["lora  9.00", "bitfit  10.0"]
        assert [heights(line) for line in axes.get_lines()] == [[25, 8, 9], [50, 10]]
        assert axes.get_ylabel() == "perplexity (lower is better)"
        legend = axes.get_legend()
        assert legend is not None
        assert legend.get_title().get_text() == "final perplexity"
    (line, _) = sheet(tmp_path / "out" / "summary.csv")
    assert (line["majority"], line["over_majority"]) == ("", "")


def test_the_files_of_perplexities_are_named_after_them(tmp_path: Path) -> None:
    write(language_models(tmp_path), tmp_path / "out")
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"perplexity_over_{name}.png" for name in ("megabytes", "rounds", "time")]
    names = HEADINGS.replace("macro_f1", "bits_per_word").replace("accuracy", "perplexity").split()
    runs = sheet(tmp_path / "out" / "runs.csv")
    assert list(runs[0]) == ["method", "run", "seed", *names, "lost_reasons", *RATE]
    assert [row["best_perplexity"] for row in runs] == ["8", "10", "18", "48"]
    point = sheet(tmp_path / "out" / "curves.csv")[0]
    assert list(point)[-2:] == ["perplexity", "bits_per_word"]
    assert (point["perplexity"], point["bits_per_word"]) == ("25", "6.25")


def test_a_share_of_which_less_is_better_is_in_per_cent(tmp_path: Path) -> None:
    """An error rate of 0.18 is 18 %; the default target is 0.18 / 0.9 = 20 %."""
    first = replace(opening("lora", rounds=1), metric="error_rate", higher_is_better=False)
    row = EvaluationRow(round=1, split="test", examples=9, metrics={"error_rate": 0.18})
    report = write([run(tmp_path, [first, asked(0, 1), row])], tmp_path / "out")
    assert cells(report, "lora")[1:3] == ["18.0", "+7.0"]
    source = "the median method's final error rate / 0.9"
    assert f"target: error rate at most 20.0 % ({source})" in printed(report)


def test_a_perplexity_beyond_all_numbers_is_the_worst_and_is_drawn(tmp_path: Path) -> None:
    """Also where only one seed diverged: then the mean is infinite and has no deviation."""
    folders = [
        language_model(tmp_path, "lora", [30, math.inf]),
        language_model(tmp_path, "lora", [30, 20], seed=1),
        language_model(tmp_path, "full", [30, math.nan]),
        language_model(tmp_path, "bitfit", [30, 25]),
    ]
    report = write(folders, tmp_path / "out")
    compared = compare([summarise(folder) for folder in folders])
    assert compared.lines[0].label == "bitfit"
    assert [run.best and run.best.score for run in compared.runs] == [25, 30, 20, 30]
    assert cells(report, "lora")[1] == "inf"
    assert cells(report, "full")[1] == "nan"


def test_different_metrics_are_refused_in_one_line(tmp_path: Path) -> None:
    folders = [language_model(tmp_path, "lora", [9]), run(tmp_path, [opening("full")])]
    message = (
        r"lora-0 is scored by perplexity \(lower is better\), "
        r"full-0 by accuracy \(a share, higher is better\); different metrics do not compare"
    )
    with pytest.raises(BadInput, match=message) as raised:
        write(folders, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_without_the_runs_metric_is_refused(tmp_path: Path) -> None:
    first = replace(opening("lora"), metric="f1")
    message = "after round 1 has no f1, by which the run is scored; it has accuracy, macro_f1, loss"
    with pytest.raises(BadInput, match=message):
        summarise(run(tmp_path, [first, scored(1, 0.5)]))


def test_a_target_has_to_be_one_of_the_runs_metric(tmp_path: Path) -> None:
    folder = language_model(tmp_path, "lora", [70, 50])
    compared = compare([summarise(folder)], target=60)
    assert compared.lines[0].mean.rounds_to_target == 2
    with pytest.raises(BadInput, match=r"target = nan: give a finite perplexity"):
        compare([summarise(folder)], target=math.nan)
    with pytest.raises(BadInput, match="bandwidth = nan: "):
        compare([summarise(folder)], bandwidth=math.nan)


def at_rate(
    root: Path,
    label: str,
    lr: float,
    method: str = "",
    trials: int = 0,
    source: str = "",
    other: Sequence[str] = (),
) -> Summary:
    """Return a run of ``method``, by default called as ``label`` is, at a rate picked as told."""
    row = opening(label)
    settings = {
        **row.settings,
        "method": {"name": method or label},
        "training": {"lr": lr},
        "tuned": {"trials": trials, "source": source, "other": list(other)},
    }
    return summarise(run(root, [replace(row, settings=settings), asked(0, 1), scored(1, 0.5)]))


PICKED: Mapping[str, Any] = {"trials": 4, "source": "a-tune/rates.toml"}
NONE_TUNED = "warning: no rate was tuned"


@pytest.mark.parametrize(
    ("rows", "says"),
    {
        "one method": ([("lora", "lora", {}), ("lora again", "lora", {})], ""),
        "as many trials": ([("lora", "lora", PICKED), ("full", "full", PICKED)], ""),
        "none": ([("lora", "lora", {}), ("full", "full", {})], NONE_TUNED),
        "proposed": ([("lora", "lora", {"source": "x"}), ("full", "full", {})], NONE_TUNED),
        "one of two": (
            [("lora", "lora", PICKED), ("full", "full", {})],
            "warning: rates were not tuned alike (4 trials: lora; none: full)",
        ),
        "fewer trials": (
            [("lora", "lora", PICKED), ("full", "full", {**PICKED, "trials": 1})],
            "warning: rates were not tuned alike (4 trials: lora; 1 trial: full)",
        ),
        "a yardstick": (
            [("lora", "lora", PICKED), ("centralised", "lora", {})],
            "warning: rates were not tuned alike (4 trials: lora; none: lora as a reference)",
        ),
        "other work": (
            [("lora", "lora", {**PICKED, "other": ["model.name"]}), ("full", "full", PICKED)],
            "warning: rates were tuned with other values of model.name; see fedpeft tune",
        ),
    }.values(),
)
def test_a_warning_stands_under_methods_whose_rates_were_not_tuned_alike(
    tmp_path: Path, rows: Sequence[tuple[str, str, Mapping[str, Any]]], says: str
) -> None:
    runs = [at_rate(tmp_path, label, 0.01, method, **tuned) for label, method, tuned in rows]
    lines = printed(tables.comparison(compare(runs)))
    assert sum(line.startswith("warning") for line in lines) == bool(says)
    assert says in " ".join(lines)  # a long one is wrapped


def test_a_sweep_that_shows_as_many_rates_of_each_method_is_tuned_alike(tmp_path: Path) -> None:
    def swept(method: str, rate: float) -> Summary:
        return at_rate(tmp_path, f"{method} training.lr={rate}", rate, method)

    alike = [swept(method, rate) for method in ("lora", "full") for rate in (0.1, 0.2)]
    assert not rates.warning(alike)
    assert "2 trials: lora; none: full" in rates.warning(alike[:3])


def test_the_report_names_every_rate_and_where_it_is_from(tmp_path: Path) -> None:
    runs = [
        at_rate(tmp_path, "lora", 0.01, **PICKED),
        at_rate(tmp_path, "fedara", 0.032, **PICKED),
        at_rate(tmp_path, "federa", 0.003, source="docs/log.md"),
        at_rate(tmp_path, "full", 1e-4),
    ]
    text = " ".join(printed(tables.comparison(compare(runs))))
    assert "lora 0.01, fedara 0.032 (a-tune/rates.toml, 4 trials)" in text
    assert "federa 0.003 (proposed: docs/log.md)" in text
    assert "full 0.0001 (as configured)" in text
    write([tmp_path / f"{one.run.name}" for one in runs], tmp_path / "out", plots=False)
    found = {row["method"]: row for row in sheet(tmp_path / "out" / "runs.csv")}
    assert (found["full"]["lr"], found["full"]["rate_from"]) == ("0.0001", "as configured")
    assert found["lora"]["rate_from"] == "a-tune/rates.toml, 4 trials"


def test_of_runs_whose_settings_have_no_rate_nothing_is_said(tmp_path: Path) -> None:
    runs = [simple(tmp_path, "lora", [0.5], 1), simple(tmp_path, "full", [0.5], 1)]
    assert not rates.named(runs)
    assert not rates.warning(runs)


def test_scores_on_clients_own_texts_have_a_column_of_their_own(tmp_path: Path) -> None:
    """Method lora has a global model, local_only the mean of the clients' own: both also score on own texts."""
    runs = []
    for method, score, own in (("lora", 0.6, 0.7), ("local_only", 0.4, 0.9)):
        last = replace(
            scored(1, score),
            client_mean=own,
            client_worst_tenth=own / 2,
            clients_scored=20,
            personal=method == "local_only",
        )
        folder = run(tmp_path, [opening(method, 0, 1), scored(0, 0.1), asked(0, 3), last])
        runs.append(folder)
    report = write(runs, tmp_path / "out", plots=False)
    assert cells(report, "lora")[1:4] == ["60.0", "70.0", "+35.0"]
    assert cells(report, "local_only")[1:4] == ["40.0", "90.0", "+15.0"]
    assert "no global model, but the mean of the clients' own: local_only" in printed(report)
    lines = {line["method"]: line for line in sheet(tmp_path / "out" / "summary.csv")}
    assert (lines["lora"]["client_accuracy"], lines["lora"]["start_accuracy"]) == ("0.7", "0.1")
    assert lines["local_only"]["client_worst_tenth_accuracy"] == "0.45"


def test_requests_are_counted_by_class_of_devices(tmp_path: Path) -> None:
    """Two seeds: phones are asked 2 + 1 times, of which 1 dropped out and 1 was late; nobody asked the watch."""
    reasons: dict[int, list[str | None]] = {
        0: [None, "dropped out"],
        1: ["no answer within 9 s of modelled time"],
    }
    folders = []
    for seed, of_phones in reasons.items():
        held = {"phone": [0, 1, 2], "desk": [3], "watch": [4]}
        rows: list[Row] = [replace(opening("lora", seed, 1), devices=held)]
        for client, lost in enumerate(of_phones):
            rows.append(ClientRow(round=0, client=client, down=1, up=1, lost=lost, device="phone"))
        rows.append(ClientRow(round=0, client=3, down=1, up=1, lost="rubbish", device="desk"))
        folders.append(run(tmp_path, [*rows, scored(1, 0.5)]))
    report = write(folders, tmp_path / "out", plots=False)
    told = {}
    for text in printed(report):
        words = text.split()
        if len(words) == 8 and words[0] == "lora" and words[1] in ("phone", "desk", "watch"):
            told[words[1]] = [int(word) for word in words[2:]]
    # Clients, asked, used, dropped out, late, lost otherwise.
    assert told == {
        "phone": [3, 3, 1, 1, 1, 0],
        "desk": [1, 2, 0, 0, 0, 2],
        "watch": [1, 0, 0, 0, 0, 0],
    }
    first = sheet(tmp_path / "out" / "devices.csv")[0]
    assert first == {
        "method": "lora",
        "run": "lora-0",
        "seed": "0",
        "device": "phone",
        "clients": "3",
        "asked": "2",
        "used": "1",
        "dropped_out": "1",
        "late": "0",
        "lost_otherwise": "0",
    }


def test_without_a_fleet_nothing_is_said_of_devices(tmp_path: Path) -> None:
    folder = run(tmp_path, [opening("lora"), asked(0, 3), scored(1, 0.5)])
    report = write([folder], tmp_path / "out", plots=False)
    assert not any("device" in line for line in printed(report))
    assert not (tmp_path / "out" / "devices.csv").exists()
