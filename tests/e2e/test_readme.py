"""What the README shows works as it stands there, on a tiny model and easy data in the place of MiniLM and yours."""

import csv
import gzip
import re
import shlex
from pathlib import Path

import pytest

from .builders import Ground, cli_call, examples

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    """Return the README's code blocks of one language."""
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the README names."""
    (tmp_path / "train.jsonl").write_text(ground.data.read_text())
    with gzip.open(tmp_path / "test.csv.gz", "wt", newline="") as file:
        rows = examples()[:40]
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "mine.toml").write_text(blocks("toml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands(place: Path, ground: Ground) -> None:
    smaller = [
        f"model.name={str(ground.model)!r}",
        "model.max_length=16",
        "machine.threads=1",
        "partition.clients=5",
        "partition.alpha=1.0",
        "federation.rounds=2",
        "federation.clients_per_round=2",
        "training.steps=1",
        "compare.rank=4",
    ]
    [shown] = [block for block in blocks("sh") if block.startswith("fedpeft")]
    commands = [shlex.split(line, comments=True) for line in shown.splitlines()]
    (place / "mine.toml").rename(place / "by hand.toml")  # the first command writes one
    assert {command[1] for command in commands} == {
        "init",
        "config",
        "partition",
        "run",
        "resume",
        "compare",
        "sweep",
        "report",
        "export",
        "predict",
        "methods",
        "advise",
        "watch",
    }
    for program, name, *rest in commands:
        assert program == "fedpeft"
        tuned = name != "init" and "mine.toml" in rest
        settings = [f"--set={one}" for one in smaller] if tuned else []
        outcome = cli_call(name, *rest, *settings)
        assert (outcome.code, outcome.err) == (0, ""), (name, outcome)
    for made in (
        "partition.png",
        "runs/mine/ledger.jsonl",
        "report/summary.csv",
        "adapter/adapter_config.json",
    ):
        assert (place / made).exists(), made


def test_the_configuration_that_is_shown_runs(place: Path, ground: Ground) -> None:
    smaller = [f"model.name={str(ground.model)!r}", "partition.clients=5", "partition.alpha=1.0"]
    smaller += ["federation.rounds=2", "training.steps=1", "method.rank=4", "machine.threads=1"]
    settings = [f"--set={one}" for one in smaller]
    outcome = cli_call("run", "mine.toml", "--set=model.max_length=16", *settings)
    assert (outcome.code, outcome.err) == (0, "")


def test_python_example(place: Path, ground: Ground) -> None:
    [code] = blocks("python")
    tiny = f'"model": {{"name": {str(ground.model)!r}, "max_length": 16}}, "machine": {{"threads": 1}}, "data": {{'
    small = (
        code.replace('"data": {', tiny, 1)
        .replace('"clients": 20', '"clients": 5')
        .replace('"rounds": 20', '"rounds": 2')
    )
    assert small.count(str(ground.model)) == 1
    exec(compile(small, "README.md", "exec"), {})  # what a reader would paste
    assert (place / "adapter" / "adapter_model.safetensors").exists()


def test_the_tree_names_every_file_and_no_other() -> None:
    """docs/architecture.md: where to find what."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    [tree] = re.findall(r"```\nfedpeft/\n(.*?)```", text, re.DOTALL)
    named: set[str] = set()
    folders: list[str] = []  # around the line, the outermost first
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        folder = re.match(r" *(\w+/)", line)
        if folder:
            folders[depth:] = [folder[1]]
        else:
            above = "".join(folders[:depth])
            named |= {above + file for file in re.findall(r"(\w+\.(?:py|toml))(?= |$)", line)}
    package = ROOT / "fedpeft"
    there = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.suffix in {".py", ".toml"} and path.name != "__init__.py"
    }
    assert named == there
