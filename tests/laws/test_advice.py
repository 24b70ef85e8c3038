"""What `fedpeft advise` goes by: limits with units, and findings that stand in the docs as they are cited."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.errors import BadInput
from fedpeft.experiment.findings import ALIKE, Study, of_like_skew, studies
from fedpeft.experiment.limits import Limits, limits
from fedpeft.methods import METHODS

ROOT = Path(__file__).parents[2]
STUDIES = {study.name: study for study in studies()}


def section_of(study: Study) -> str:
    """Return the text of the section that a study cites, up to the next heading."""
    page = (ROOT / study.page).read_text(encoding="utf-8")
    _, heading, rest = page.partition(f"\n## {study.section}\n")
    assert heading, f"{study.page} has no section {study.section!r}"
    return rest.partition("\n## ")[0]


def printed(section: str, study: Study) -> dict[str, str]:
    """Return the first figure behind each method in a table of a report, or in the row of a data set."""
    # A report: a method a line, "lora   51.7 ± 4.7   43.8 ..."; the first table is the one of final scores.
    found: dict[str, str] = {}
    for line in section.splitlines():
        if row := re.match(r" +([a-z][\w-]*) +(\d+\.\d+(?: ± \d+\.\d+)?) ", line):
            found.setdefault(row[1].replace("-", "_"), row[2])
    # Markdown: a data set a line, and methods for columns.
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
    for cells in rows:
        if cells[0].split()[:1] == [study.name]:
            for heading, cell in zip(rows[0], cells, strict=True):
                if heading.strip().lower() in METHODS:
                    found[heading.strip().lower()] = cell.removesuffix(" % ").strip()
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_every_score_stands_in_the_section_that_is_cited(name: str) -> None:
    study = STUDIES[name]
    shown = printed(section_of(study), study)
    assert study.scores
    assert study.scores.keys() <= METHODS.keys()
    assert {method: shown.get(method) for method in study.scores} == study.scores
    assert shown.keys() - study.scores.keys() <= {"centralised"}, "a method is left out"


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_that_is_cited_can_be_run_again(name: str) -> None:
    study = STUDIES[name]
    program, *rest = study.command.split()
    if program == "make":
        assert f"`{study.command}`" in section_of(study)
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{rest[0]}:", makefile, re.MULTILINE)
        return
    assert program == "fedpeft"
    if rest[0] == "compare":
        assert f"\n{study.command}" in section_of(study)
    else:
        assert f"{program} run {rest[1].replace(study.name, 'SET')}" in section_of(study)
    settings = tomllib.loads((ROOT / rest[1]).read_text(encoding="utf-8"))
    assert settings["model"]["name"] == study.model
    assert settings.get("task", {}).get("kind", "classification") == study.task
    federation = settings["federation"]
    assert (federation["rounds"], federation["clients_per_round"]) == (
        study.rounds,
        study.clients_per_round,
    )


def test_the_skew_of_every_study_is_the_one_on_the_page() -> None:
    page = (ROOT / "docs" / "advise.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([\d.]+|-) \|$", page, re.MULTILINE))
    assert told == {
        study.name: "-" if study.total_variation is None else f"{study.total_variation:.2f}"
        for study in studies()
    }


def test_studies_of_like_skew_are_of_the_task_and_near_and_come_nearest_first() -> None:
    some = STUDIES["demo"]
    known = [
        replace(some, name="far", total_variation=0.5 + ALIKE + 0.01),
        replace(some, name="near", total_variation=0.5 - ALIKE / 2),
        replace(some, name="nearest", total_variation=0.51),
        replace(some, name="other task", task="qa", total_variation=0.5),
        replace(some, name="no labels", total_variation=None),
    ]
    found = of_like_skew(known, some.task, 0.5)
    assert [study.name for study in found] == ["nearest", "near"]
    assert of_like_skew(known, some.task, None) == ()


def test_the_place_in_a_study_counts_those_that_are_better() -> None:
    upward = replace(STUDIES["demo"], scores={"lora": "9.5", "federa": "10.0 ± 3.0", "full": "9.5"})
    assert [upward.place(name) for name in ("federa", "lora", "full", "slora")] == [1, 2, 2, None]
    downward = replace(upward, higher_is_better=False)
    assert [downward.place(name) for name in ("federa", "lora", "full")] == [3, 1, 1]


@pytest.mark.parametrize(
    ("text", "rate", "traffic"),
    [
        ("10Mbit/s", 1.25e6, None),
        ("8 kbit/s", 1e3, None),
        ("1MB/s", 1e6, None),
        ("2.5e3", 2500.0, None),
        ("20MB", None, 2e7),
        ("0.5 GB", None, 5e8),
    ],
)
def test_bandwidth_is_a_rate_or_bytes_of_a_round(
    text: str, rate: float | None, traffic: float | None
) -> None:
    assert limits(bandwidth=text) == Limits(rate=rate, traffic=traffic)


def test_plain_numbers_are_gigabytes_and_seconds() -> None:
    assert limits(memory="1.5", deadline="90") == limits(memory="1500MB", deadline="1.5min")
    assert limits() == Limits()


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("bandwidth", "10Mb/s", "10Mbit/s or 1MB/s"),
        ("bandwidth", "fast", "bytes per second"),
        ("bandwidth", "-1MB/s", "10Mbit/s"),
        ("bandwidth", "0MB/s", "greater than 0"),
        ("memory", "4GB/s", "4GB or 512MB"),
        ("memory", "1e999", "finite"),
        ("deadline", "3 days", "30s or 2min"),
        ("deadline", "0", "greater than 0"),
    ],
)
def test_other_units_are_refused_in_a_line(option: str, text: str, says: str) -> None:
    with pytest.raises(BadInput) as refusal:
        limits(**{option: text})
    assert str(refusal.value).startswith(f"--{option} {text}: ")
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("limit", "word"),
    [
        (Limits(traffic=999.0), "moves"),
        (Limits(memory=49.0), "process"),
        (Limits(deadline=1.9), "deadline"),
        (Limits(rate=1000.0, deadline=2.9), "deadline"),
        (Limits(traffic=1000.0, memory=50.0, deadline=2.0), None),
        (Limits(rate=1000.0, deadline=3.0), None),
        (Limits(rate=1e-9), None),
    ],
)
def test_a_limit_is_broken_by_more_than_it_allows(limit: Limits, word: str | None) -> None:
    """1,000 bytes, 2 s of training, 50 bytes of memory: transfers take a second at 1,000 bytes per second."""
    broken = limit.broken(moved=1000, training=2.0, memory=50)
    assert broken is None if word is None else word in (broken or "")
